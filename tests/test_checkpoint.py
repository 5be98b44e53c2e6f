"""Opening checkpoints: sources, and every kind of damage gets its own line."""

from __future__ import annotations

import json
import re
import shutil
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from moe2edge.errors import InputError, Moe2EdgeError, Unsupported
from moe2edge.storage.checkpoint import open_checkpoint
from moe2edge.storage.companions import read_companions
from moe2edge.storage.safetensors_files import (
    PlannedTensor,
    read_all,
    read_tensor,
    write_checkpoint,
    write_safetensors,
)
from moe2edge.testing import Make

Damage = Callable[[Path], None]


def edit_config(**changes: object) -> Damage:
    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    return damage


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return damage


def truncate(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-100])


def header_bomb(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 60))


def spoil_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def sharded(weight_map: dict[str, str]) -> Damage:
    def damage(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
        index = {"weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return damage


NORM = "model.norm.weight"
CASES: list[tuple[str, Damage, type[Moe2EdgeError], str]] = [
    ("no config", lambda f: (f / "config.json").unlink(), InputError, "is not a checkpoint"),
    ("config is no JSON", spoil_config, InputError, "is damaged"),
    (
        "no weights",
        lambda f: (f / "model.safetensors").unlink(),
        InputError,
        "no model.safetensors",
    ),
    ("pickles", pickled, InputError, "only pickled weights"),
    ("truncated", truncate, InputError, "damaged or cut short"),
    ("huge header", header_bomb, InputError, "damaged or cut short"),
    (
        "missing shard",
        sharded({NORM: "model-00002-of-00002.safetensors"}),
        InputError,
        "shard model-00002-of-00002.safetensors is missing",
    ),
    ("shard elsewhere", sharded({NORM: "../x.safetensors"}), InputError, "not a plain file name"),
    (
        "wrong shape",
        edit_tensors(lambda t: t.update({NORM: torch.ones(63)})),
        InputError,
        r"model.norm.weight has shape \[63\], but config.json asks for \[64\]",
    ),
    ("missing tensor", edit_tensors(lambda t: t.pop(NORM)), InputError, f"has no tensor {NORM}"),
    (
        "unknown tensor",
        edit_tensors(lambda t: t.update(extra=torch.ones(2))),
        InputError,
        "1 tensors that MixtralForCausalLM does not know, such as extra",
    ),
    (
        "integers",
        edit_tensors(lambda t: t.update({NORM: torch.ones(64, dtype=torch.int32)})),
        Unsupported,
        "dtype I32",
    ),
    ("no method", edit_config(quantization_config={"bits": 4}), InputError, "no quant_method"),
    (
        "not quantized",
        edit_config(quantization_config={"quant_method": "fp8"}),
        InputError,
        "take quantization_config out of config.json",
    ),
    ("dense", edit_config(model_type="llama", num_local_experts=None), Unsupported, "dense model"),
    (
        "unknown",
        edit_config(model_type="mixtrale"),
        Unsupported,
        "'mixtrale' is not known",
    ),
    ("no experts", edit_config(num_local_experts=None), InputError, "num_local_experts is None"),
    ("bad size", edit_config(hidden_size=-1), InputError, "hidden_size must be a positive"),
    (
        "top-k",
        edit_config(num_experts_per_tok=9),
        InputError,
        "num_experts_per_tok is 9, but there are 6 experts",
    ),
]


@pytest.mark.parametrize(
    ("damage", "error", "message"), [c[1:] for c in CASES], ids=[c[0] for c in CASES]
)
def test_each_kind_of_damage_has_a_message(
    tiny: Make, tmp_path: Path, damage: Damage, error: type[Moe2EdgeError], message: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny("mixtral"), folder)
    damage(folder)
    with pytest.raises(error, match=message) as caught:
        open_checkpoint(str(folder)).model.verify()
    assert "\n" not in str(caught.value)


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    canary = tmp_path / "ran"
    (tmp_path / "config.json").write_text('{"model_type": "mixtral", "num_local_experts": 2}')
    code = f"cposix\nsystem\n(S'touch {canary}'\ntR."
    (tmp_path / "pytorch_model.bin").write_bytes(code.encode())
    with pytest.raises(InputError, match="pickled"):
        _ = open_checkpoint(str(tmp_path)).model
    assert not canary.exists()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("builtin:tiny-mo", "no built-in model"),
        ("no/such/folder", "there is no folder"),
        ("./nothing", "there is no folder"),
    ],
)
def test_sources_that_do_not_exist(source: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_checkpoint(source)


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def hub_cache(folder: Path, cache: Path) -> None:
    """Lay out a local cache as huggingface_hub does: blobs, and links to them in a snapshot."""
    repo = cache / "models--some-org--some-moe"
    snapshot = repo / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    for path in folder.iterdir():
        shutil.copyfile(path, repo / "blobs" / path.name)
        (snapshot / path.name).symlink_to(repo / "blobs" / path.name)


def test_hub_ids_are_found_in_the_cache_offline(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub_cache(tiny("olmoe"), tmp_path)
    for source in ("some-org/some-moe", "hf://some-org/some-moe", f"some-org/some-moe@{COMMIT}"):
        found = open_checkpoint(source, cache_dir=tmp_path)
        assert found.revision == COMMIT
        assert found.model.parameters == open_checkpoint(str(tiny("olmoe"))).model.parameters
    with pytest.raises(InputError, match="not in the local cache"):
        open_checkpoint("some-org/other", cache_dir=tmp_path)


def test_opening_reads_headers_only(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("numbers were read")

    monkeypatch.setattr("moe2edge.storage.safetensors_files.read_tensor", refuse)
    assert "6 experts" in str(open_checkpoint(str(tiny("qwen3_moe"))).model)


def test_shards_are_written_one_tensor_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moe2edge.storage.safetensors_files.SHARD_BYTES", 100)
    tensors = {f"t{n}": torch.full((4, 5), float(n), dtype=torch.bfloat16) for n in range(5)}
    made: list[str] = []

    def make(name: str) -> Callable[[], torch.Tensor]:
        def numbers() -> torch.Tensor:
            made.append(name)
            return tensors[name]

        return numbers

    write_checkpoint(tmp_path, [PlannedTensor(n, (4, 5), "BF16", make(n)) for n in tensors])
    assert made == list(tensors)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    for name, tensor in read_all(tmp_path):
        assert torch.equal(tensor, tensors.pop(name))
    assert not tensors


def test_a_tensor_that_is_not_as_planned_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="planned"):
        write_checkpoint(tmp_path, [PlannedTensor("t", (2,), "F32", lambda: torch.ones(3))])


def test_each_file_is_opened_once(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []

    def counting(path: Path, framework: str) -> Any:
        opened.append(path)
        return safe_open(path, framework=framework)

    monkeypatch.setattr("moe2edge.storage.safetensors_files.safe_open", counting)
    folder = tiny("olmoe", num_hidden_layers=2)
    for _, _, weight in open_checkpoint(str(folder)).model.tensors():
        weight.load()
    assert opened == [folder / "model.safetensors"]


def test_a_rewritten_file_is_read_again(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        write_checkpoint(
            tmp_path, [PlannedTensor("t", (3,), "F32", partial(torch.full, (3,), value))]
        )
        assert [float(t[0]) for _, t in read_all(tmp_path)] == [value]


def test_a_revision_is_named_once(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="give one"):
        open_checkpoint("org/name@main", revision="other", cache_dir=tmp_path)


@pytest.mark.parametrize("name", ["~nosuchuser/model", "x" * 5000])
def test_impossible_file_names_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="cannot be opened"):
        open_checkpoint(name)


def test_a_matrix_of_one_column_is_written_whatever_its_strides(tmp_path: Path) -> None:
    """Torch counts it as contiguous with any stride along the column of one."""
    odd = torch.arange(4.0).view(1, 4).T
    assert odd.stride() == (1, 4)
    write_safetensors(tmp_path / "x.safetensors", [PlannedTensor("x", (4, 1), "F32", lambda: odd)])
    assert torch.equal(read_tensor(tmp_path / "x.safetensors", "x"), odd)


# ---- the hub's cache where the hub cannot be reached -------------------------------------------


def list_tree(cache: Path, *more: str) -> None:
    """Write down what the commit has on the hub, as huggingface_hub does when it reaches it."""
    from huggingface_hub._tree_cache import TreeCacheEntry, write_tree_cache

    repo = cache / "models--some-org--some-moe"
    names = [path.name for path in (repo / "snapshots" / COMMIT).iterdir()]
    entry = TreeCacheEntry(size=1, blob_id="a" * 40, lfs_sha256=None, lfs_size=None, xet_hash=None)
    write_tree_cache(str(repo), COMMIT, dict.fromkeys([*names, *more], entry))


@pytest.fixture
def cached(tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a cache with a whole model, where the hub cannot be reached."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub_cache(tiny("olmoe"), tmp_path)
    return tmp_path


def test_a_snapshot_without_files_that_are_not_needed_is_used(cached: Path) -> None:
    lacking = ("LICENSE", "README.md", "merges.txt", "tokenizer.model", "vocab.json")
    list_tree(cached, *lacking, "consolidated.safetensors", "pytorch_model.bin", "onnx/x.onnx")
    found = open_checkpoint("some-org/some-moe", cache_dir=cached)
    assert found.lacking == lacking
    assert found.hub_id == "some-org/some-moe"
    notes = read_companions(found).notes
    assert "the local cache lacks LICENSE, README.md, merges.txt, tokenizer.model" in notes[0]


@pytest.mark.parametrize(
    "name",
    [
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", "additional_chat_templates/rag.jinja", "model.safetensors",
    ],
)  # fmt: skip
def test_what_a_snapshot_lacks_is_named(cached: Path, name: str) -> None:
    list_tree(cached, "LICENSE", name)
    snapshot = cached / "models--some-org--some-moe" / "snapshots" / COMMIT
    (snapshot / name).unlink(missing_ok=True)
    expected = f"is in the local cache without {name}, and the hub cannot be reached; complete it"
    with pytest.raises(InputError, match=re.escape(expected)):
        open_checkpoint("some-org/some-moe", cache_dir=cached)


def test_a_vocabulary_is_needed_where_it_is_the_only_one(cached: Path) -> None:
    snapshot = cached / "models--some-org--some-moe" / "snapshots" / COMMIT
    (snapshot / "tokenizer.json").unlink()
    list_tree(cached, "vocab.json", "merges.txt")
    with pytest.raises(InputError, match=r"without merges\.txt, vocab\.json, and"):
        open_checkpoint("some-org/some-moe", cache_dir=cached)


def test_shards_are_not_needed_beside_a_single_file(cached: Path) -> None:
    list_tree(cached, "model-00001-of-00001.safetensors", "model.safetensors.index.json")
    found = open_checkpoint("some-org/some-moe", cache_dir=cached)
    assert "model-00001-of-00001.safetensors" in found.lacking


def test_the_links_of_the_cache_are_followed(cached: Path, tmp_path: Path) -> None:
    found = read_companions(open_checkpoint("some-org/some-moe", cache_dir=cached))
    assert found.get("tokenizer.json") is not None
