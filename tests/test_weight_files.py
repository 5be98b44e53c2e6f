"""Which files and tensors of a checkpoint are read: those that transformers reads."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from helpers import compute_logits, run_module
from moe2edge.calibration.tokens import Tokens
from moe2edge.commands.source_check import check_ids
from moe2edge.errors import InputError, Unsupported, VerificationFailed
from moe2edge.evaluation import verify
from moe2edge.evaluation.reference import Reference, record
from moe2edge.model.hf_config import build_config
from moe2edge.model.model import EMBEDDING, HEAD
from moe2edge.passes.rtn import Rtn
from moe2edge.progress import Reporter
from moe2edge.runtime.torch_runtime import TorchRuntime, open_source
from moe2edge.storage.checkpoint import Checkpoint, open_checkpoint
from moe2edge.storage.tensor_bytes import hash_tensors
from moe2edge.storage.text_files import hash_file
from moe2edge.targets.hf import Hf
from moe2edge.testing import Make

IDS = torch.arange(1, 41)[None]
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
Tensors = dict[str, Tensor]


@pytest.fixture
def folder(tiny: Make, tmp_path: Path) -> Path:
    """Return a copy of a tiny checkpoint."""
    return Path(shutil.copytree(tiny("mixtral"), tmp_path / "model"))


def edit(folder: Path, change: Callable[[Tensors], object], name: str = SINGLE) -> None:
    """Change the tensors of a file."""
    tensors = load_file(folder / name)
    change(tensors)
    save_file({k: t.clone() for k, t in tensors.items()}, folder / name, {"format": "pt"})


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def shard(folder: Path, change: Callable[[Tensors], object] = lambda _: None) -> None:
    """Write two shards and an index beside the single file, of tensors that ``change`` changes."""
    tensors = load_file(folder / SINGLE)
    change(tensors)
    names = sorted(tensors)
    files = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    for n, file in enumerate(files):
        save_file({k: tensors[k].clone() for k in names[n::2]}, folder / file, {"format": "pt"})
    weight_map = {name: files[n % 2] for n, name in enumerate(names)}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def assert_read_as_stock(folder: Path) -> Checkpoint:
    """Assert that a walk over the checkpoint computes what stock transformers does."""
    found = open_checkpoint(folder)
    assert found.sha256
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.testing.assert_close(
        compute_logits(found.model, IDS), run_module(stock, IDS), rtol=0, atol=1e-4
    )
    return found


def double(name: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: tensors[name] * 2})


# ---- tied embeddings -----------------------------------------------------------------------------


def test_a_stored_head_that_differs_is_used_despite_the_flag(folder: Path) -> None:
    edit_config(folder, tie_word_embeddings=True)
    found = assert_read_as_stock(folder)
    assert found.model.rest[HEAD].name == HEAD
    assert build_config(found.model)["tie_word_embeddings"] is False
    assert "the stored head is used" in " ".join(found.notes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_equal_stored_head_stays_tied(folder: Path, dtype: torch.dtype) -> None:
    edit_config(folder, tie_word_embeddings=True)
    edit(folder, lambda t: t.update({HEAD: t[EMBEDDING].to(dtype)}))
    found = assert_read_as_stock(folder)
    assert HEAD not in found.model.rest
    assert build_config(found.model)["tie_word_embeddings"] is True
    assert not found.notes


def test_a_head_alone_is_the_embedding_where_they_are_tied(folder: Path) -> None:
    edit_config(folder, tie_word_embeddings=True)
    edit(folder, lambda t: t.pop(EMBEDDING))
    found = assert_read_as_stock(folder)
    assert [HEAD in found.model.rest, found.model.rest[EMBEDDING].name] == [False, HEAD]


def test_a_head_that_is_not_stored_is_asked_for(folder: Path) -> None:
    edit(folder, lambda t: t.pop(HEAD))
    with pytest.raises(InputError, match="has to say tie_word_embeddings: true"):
        _ = open_checkpoint(folder).model
    edit_config(folder, tie_word_embeddings=True)  # as the message says
    assert_read_as_stock(folder)


# ---- a single file and an index ------------------------------------------------------------------


def test_equal_single_file_and_shards_are_one_checkpoint(folder: Path) -> None:
    shard(folder)
    found = assert_read_as_stock(folder)
    assert set(found.files.values()) == {folder / SINGLE}


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (double("model.norm.weight"), "model.norm.weight"),
        (lambda t: t.pop(HEAD), HEAD),
        (lambda t: t.update(extra=torch.ones(2)), "extra"),
        (lambda t: t.update({HEAD: t[HEAD].half()}), HEAD),
    ],
    ids=["other numbers", "fewer tensors", "more tensors", "another dtype"],
)
def test_two_checkpoints_in_a_folder_are_refused(
    folder: Path, change: Callable[[Tensors], object], name: str
) -> None:
    shard(folder, change)
    with pytest.raises(InputError, match=f"two checkpoints: {SINGLE}, which .* in {name}"):
        _ = open_checkpoint(folder).sha256
    for path in folder.glob("model-*"):
        path.unlink()
    (folder / INDEX).unlink()  # as the message says
    assert_read_as_stock(folder)


@pytest.mark.parametrize("left", ["an index", "a damaged index", "an empty index", "one shard"])
def test_an_index_without_its_shards_is_no_second_checkpoint(folder: Path, left: str) -> None:
    shard(folder, double("model.norm.weight"))
    (folder / "model-00002-of-00002.safetensors").unlink()
    if left != "one shard":
        (folder / "model-00001-of-00002.safetensors").unlink()
    if left == "a damaged index":
        (folder / INDEX).write_text("{")
    if left == "an empty index":
        (folder / INDEX).write_text("{}")
    found = assert_read_as_stock(folder)
    assert f"{INDEX} beside it is no checkpoint" in " ".join(found.notes)


def test_a_damaged_single_file_hides_shards(folder: Path) -> None:
    shard(folder)
    (folder / SINGLE).write_bytes(b"damaged")
    with pytest.raises(InputError, match="if it is moved away, the shards of"):
        _ = open_checkpoint(folder).model
    (folder / SINGLE).unlink()  # as the message says
    assert_read_as_stock(folder)


# ---- shards --------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["names too few", "names too many", "another shard", "leftover"])
def test_what_an_index_says_of_tensors_does_not_matter(folder: Path, change: str) -> None:
    shard(folder)
    shutil.move(folder / SINGLE, folder / "model-00009-of-00009.safetensors")
    index = json.loads((folder / INDEX).read_text())
    names, files = list(index["weight_map"]), list(index["weight_map"].values())
    if change == "names too few":
        del index["weight_map"][names[0]]
    if change == "names too many":
        index["weight_map"]["ghost"] = files[0]
    if change == "another shard":
        index["weight_map"][names[0]] = files[1]
    (folder / INDEX).write_text(json.dumps(index))
    found = assert_read_as_stock(folder)
    assert "not read, as in transformers: model-00009-of" in " ".join(found.notes)


def test_a_tensor_in_two_shards_has_to_be_the_same(folder: Path) -> None:
    shard(folder)
    (folder / SINGLE).unlink()
    name, first, second = EMBEDDING, *sorted(path.name for path in folder.glob("model-*"))
    holder, other = (first, second) if EMBEDDING in load_file(folder / first) else (second, first)
    tensor = load_file(folder / holder)[name]
    edit(folder, lambda t: t.update({name: tensor}), other)
    assert_read_as_stock(folder)
    edit(folder, double(name), other)
    with pytest.raises(InputError, match=f"shards of one checkpoint with two values of {name}"):
        _ = open_checkpoint(folder).sha256


def test_a_tensor_that_only_the_index_has_is_named(folder: Path) -> None:
    edit(folder, lambda t: t.pop(HEAD))
    shard(folder)
    (folder / SINGLE).unlink()
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][HEAD] = "model-00001-of-00002.safetensors"
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(InputError, match=f"names {HEAD}, which no shard has"):
        _ = open_checkpoint(folder).model


# ---- weights under other names -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["consolidated.safetensors", "model.fp16.safetensors"])
def test_weights_of_other_names_are_named_and_not_read(folder: Path, name: str) -> None:
    shutil.copy(folder / SINGLE, folder / name)
    edit(folder, double(EMBEDDING), name)
    assert f"not read, as in transformers: {name}" in " ".join(assert_read_as_stock(folder).notes)
    (folder / SINGLE).unlink()
    with pytest.raises(InputError, match=f"no model.safetensors .*, but {name}; .* rename"):
        _ = open_checkpoint(folder).model


def test_an_adapter_beside_weights_is_refused(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match=r"holds an adapter .*merge_and_unload"):
        _ = open_checkpoint(folder).model
    (folder / SINGLE).rename(folder / "adapter_model.safetensors")
    with pytest.raises(InputError, match="holds an adapter and no model"):
        _ = open_checkpoint(folder).model


def test_a_folder_inside_is_pointed_at(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / SINGLE).rename(folder / "sub" / SINGLE)
    with pytest.raises(InputError, match="the folder sub in it has: name that one"):
        _ = open_checkpoint(folder).model


def test_other_files_that_a_config_names_are_not_read(folder: Path) -> None:
    shutil.copy(folder / SINGLE, folder / "other.safetensors")
    edit_config(folder, transformers_weights="other.safetensors")
    with pytest.raises(Unsupported, match=r"transformers_weights names 'other.safetensors'"):
        _ = open_checkpoint(folder).model


@pytest.mark.parametrize("name", ["config.json", SINGLE, INDEX])
@pytest.mark.parametrize("to_itself", [False, True])
def test_links_that_lead_nowhere_are_named(folder: Path, name: str, to_itself: bool) -> None:
    if name == INDEX:
        (folder / SINGLE).unlink()
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(name if to_itself else "nowhere")
    with pytest.raises(InputError, match=f"{name} is a link that leads nowhere; download the"):
        _ = open_checkpoint(folder).model


@pytest.mark.parametrize("shards", [False, True])
def test_weights_that_are_no_regular_file_are_not_opened(folder: Path, shards: bool) -> None:
    """Whoever opens a pipe waits for its other end."""
    shard(folder)
    name = "model-00002-of-00002.safetensors" if shards else SINGLE
    if shards:
        (folder / SINGLE).unlink()
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(InputError, match=f"{name} is not a regular file; put a file"):
        _ = open_checkpoint(folder).model
    (folder / name).unlink()
    (folder / name).symlink_to("/dev/zero")
    with pytest.raises(InputError, match=f"{name} is not a regular file; put a file"):
        _ = open_checkpoint(folder).model


# ---- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        (dtype, value)
        for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64)
        for value in (float("nan"), float("inf"), float("-inf"))
    ]
    + [(torch.float64, 3.4028235677973366e38)],  # the least that float32 rounds to infinity
)
def test_numbers_that_are_not_finite_are_found_while_hashing(
    tmp_path: Path, dtype: torch.dtype, value: float
) -> None:
    file = tmp_path / "x.safetensors"
    most = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
    largest = torch.full((700_001,), most, dtype=dtype)
    tensors = {"a": -largest, "b": largest, "c": torch.ones(3, dtype=dtype)}
    save_file(tensors, file)
    assert hash_tensors(file) == (hash_file(file), ())
    for at in (0, 350_000, 700_000):
        broken = largest.clone()
        broken[at] = value
        save_file({**tensors, "b": broken}, file)
        assert hash_tensors(file) == (hash_file(file), ("b",))


@pytest.mark.parametrize(
    "name", [HEAD, "model.norm.weight", "model.layers.2.self_attn.o_proj.weight"]
)
def test_a_source_with_numbers_that_are_not_finite_is_refused(folder: Path, name: str) -> None:
    edit(folder, lambda t: t[name].view(-1)[-1:].fill_(float("nan")))
    with pytest.raises(
        InputError, match=f"{name} holds numbers that are not finite in float32; the"
    ):
        _ = open_checkpoint(folder).sha256


def test_rows_of_the_embedding_matter_to_texts_that_reach_them(folder: Path) -> None:
    edit(folder, lambda t: [t[EMBEDDING][row].fill_(float("inf")) for row in (5, 70)])
    found, said = open_checkpoint(folder), list[str]()
    assert found.broken_ids == (5, 70)
    reporter = Reporter(said.append, lambda *_: None)
    harmless, broken = (Tokens(torch.tensor([ids]), "", "") for ids in ([1, 6], [1, 70]))
    check_ids(found, {"calibration": None, "evaluation": harmless}, reporter)
    assert "2 rows of model.embed_tokens.weight hold" in said[0]
    assert "ids 5, 70" in said[0]
    with pytest.raises(InputError, match=r"row 70 of .* and the training text has its id"):
        check_ids(found, {"evaluation": harmless, "training": broken}, reporter)
    check_ids(found, {}, reporter, [Rtn(head=8, group_size=32)])
    with pytest.raises(InputError, match=r"row 5 of .*: leave embedding out of rtn"):
        check_ids(found, {}, reporter, [Rtn(embedding=8, group_size=32)])
    edit_config(folder, tie_word_embeddings=True)
    edit(folder, lambda t: t.pop(HEAD))
    with pytest.raises(InputError, match="holds numbers that are not finite"):  # logits have it
        _ = open_checkpoint(folder).sha256


def test_float16_that_overflows_is_told_as_that(tiny: Make, folder: Path) -> None:
    edit(folder, lambda t: t.update({k: v.half() for k, v in t.items()}))
    edit_config(folder, dtype="float16")
    edit(folder, lambda t: t[EMBEDDING][:, 3].fill_(40000))
    down = [f"model.layers.1.block_sparse_moe.experts.{n}.w2.weight" for n in range(6)]
    edit(folder, lambda t: [t[name][3].fill_(60000) for name in down])
    runtime = open_source(folder, dtype="float16")
    model = open_checkpoint(folder).model
    logits = compute_logits(model, IDS)
    assert logits.isfinite().all()
    reference = Reference(IDS, 39, logits[:, 38:], {}, None)
    with pytest.raises(VerificationFailed, match=r"block 1 overflow in float16.*bfloat16"):
        verify.measure_shipped(reference, runtime, verify.Parity(0.0))
    converted = TorchRuntime(runtime.model.to(torch.bfloat16))  # as the message says
    assert converted.logits(IDS).isfinite().all()


def test_logits_that_are_all_zero_agree(folder: Path) -> None:
    edit(folder, lambda t: t["model.norm.weight"].zero_())
    runtime = open_source(folder)
    reference = Reference(IDS, 39, torch.zeros(len(IDS), IDS.shape[1] - 38, 96), {}, None)
    assert verify.measure_shipped(reference, runtime, verify.Parity(0.0)).shipped == 0
    other = replace(reference, logits=torch.ones_like(reference.logits))
    with pytest.raises(VerificationFailed, match=r"by 100\.0% \(median\)"):
        verify.measure_shipped(other, runtime, verify.Parity(0.0))


def test_a_reference_of_numbers_that_are_not_finite_is_refused(folder: Path) -> None:
    edit(folder, lambda t: t["lm_head.weight"][7].fill_(3e38))
    model = open_checkpoint(folder).model
    hidden = torch.full((1, 4, 64), 3.0)
    hidden[..., 0] = -90.0
    with pytest.raises(InputError, match=r"logits that are not finite, in float32; weights of"):
        record(model, IDS[:, :4], None, hidden)


# ---- dtypes --------------------------------------------------------------------------------------


def test_hf_refuses_to_be_run_in_float64(folder: Path) -> None:
    assert Hf().stored(open_checkpoint(folder).model)
    edit(folder, lambda t: t.update({k: v.double() for k, v in t.items()}))
    edit_config(folder, dtype="float64")
    with pytest.raises(Unsupported, match=r"float64.*convert the source to float32"):
        Hf().accepts(open_checkpoint(folder).model)
    edit_config(folder, dtype=None, torch_dtype="float32")  # what decides is what is run
    Hf().accepts(open_checkpoint(folder).model)
