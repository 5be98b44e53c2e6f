"""What the target ``hf`` accepts and writes; its numbers are tested in ``test_loading.py``."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moe2edge.errors import Unsupported, VerificationFailed
from moe2edge.model.family import FAMILIES
from moe2edge.model.model import Model
from moe2edge.numerics.rounding import round_to_nearest
from moe2edge.numerics.scheme import Scheme
from moe2edge.pipeline.registry import find_target
from moe2edge.storage import safetensors_files
from moe2edge.storage.checkpoint import open_checkpoint
from moe2edge.testing import Make, make_checkpoint

HF = find_target("hf")


def open_model(folder: Path) -> Model:
    return open_checkpoint(str(folder)).model


def keep(model: Model, index: int, *ids: int) -> Model:
    """``model`` with only some experts in one block."""
    block, layer = next((b, m) for b, m in model.moe_blocks if b.index == index)
    return model.replace_block(replace(block, mlp=layer.keep(ids)))


def written(model: Model, folder: Path) -> Path:
    folder.mkdir()
    HF.write(model, folder)
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_stock_transformers_finds_every_tensor(
    family: str, dtype: str, tiny: Make, tmp_path: Path
) -> None:
    model = open_model(tiny(family, dtype=dtype))
    for index in range(3):
        model = keep(model, index, 1, 4, 2)
    folder = written(model.keep_blocks([0, 2]), tmp_path / "out")
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    assert str(loaded.dtype) == f"torch.{dtype}"
    assert loaded.config.num_hidden_layers == 2
    assert loaded.model.layers[1].mlp.gate.weight.shape == (3, 64)
    found = dict(HF.tensors(folder))
    expected = {name: weight.load() for name, _, weight in model.keep_blocks([0, 2]).tensors()}
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert isinstance(tensor, torch.Tensor)
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name]), name
    # What was written is a checkpoint again, of the same model.
    assert str(open_model(folder)).splitlines()[0] == str(model.keep_blocks([0, 2])).splitlines()[0]


def test_experts_are_renumbered_from_zero(tiny: Make, tmp_path: Path) -> None:
    source = open_model(tiny("mixtral"))
    model = source
    for index in range(3):
        model = keep(model, index, 5, 3)
    folder = written(model, tmp_path / "out")
    tensors = load_file(folder / "model.safetensors")
    experts = {name.split(".")[5] for name in tensors if ".experts." in name}
    assert experts == {"0", "1"}
    moved = tensors["model.layers.1.block_sparse_moe.experts.1.w3.weight"]
    layer = source.moe_blocks[1][1]
    assert torch.equal(moved, layer.experts[3].up.load())
    assert json.loads((folder / "config.json").read_text())["num_local_experts"] == 2


def test_quantized_models_are_refused(tiny: Make) -> None:
    model = open_model(tiny("olmoe"))
    weight = model.blocks[0].attention["q_proj.weight"]
    numbers = round_to_nearest(weight.load(), Scheme(group_size=32))
    weight = replace(weight, scheme=numbers.scheme, load_quantized=lambda: numbers)
    block = model.blocks[0].with_weights({"attention.q_proj.weight": weight})
    with pytest.raises(Unsupported, match=r"q_proj\.weight is w4a16.*hf:dequantize=true") as caught:
        HF.accepts(model.replace_block(block))
    assert caught.value.exit_code == 6
    HF.accepts(model)


def test_layers_of_unequal_size_are_refused(tiny: Make) -> None:
    model = keep(open_model(tiny("olmoe")), 1, 0, 1, 2)
    message = (
        r"6 experts top-2 \(blocks 0, 2\), 3 experts top-2 \(block 1\); "
        r"choose layout natural \(for moe2edge.load\), or target onnx"
    )
    with pytest.raises(Unsupported, match=message) as caught:
        HF.accepts(model)
    assert caught.value.exit_code == 6


@pytest.mark.parametrize("family", FAMILIES)
def test_two_writes_are_the_same_bytes(family: str, tiny: Make, tmp_path: Path) -> None:
    model = open_model(tiny(family))
    one, two = written(model, tmp_path / "1"), written(model, tmp_path / "2")
    names = sorted(path.name for path in one.iterdir())
    assert names == ["config.json", "model.safetensors"]
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in names)


@pytest.mark.parametrize("shard_bytes", [1 << 30, 50_000])
@pytest.mark.parametrize("family", FAMILIES)
def test_size_is_predicted(
    family: str, shard_bytes: int, tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safetensors_files, "SHARD_BYTES", shard_bytes)
    model = open_model(tiny(family))
    folder = written(model, tmp_path / "out")
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert HF.estimate(model).disk == pytest.approx(size, rel=0.02)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("model.norm.weight"), "missing_keys.*model.norm.weight"),
        (lambda tensors: tensors.update(odd=torch.zeros(2)), "unexpected_keys.*odd"),
        (
            lambda tensors: tensors.update({"model.norm.weight": torch.zeros(3)}),
            "model.norm.weight",
        ),
    ],
    ids=["missing", "unexpected", "mismatched"],
)
def test_reopening_a_wrong_folder_fails(
    change: Any, message: str, tiny: Make, tmp_path: Path
) -> None:
    folder = written(open_model(tiny("qwen3_moe")), tmp_path / "out")
    HF.reopen(folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(VerificationFailed, match=message) as caught:
        HF.reopen(folder)
    assert caught.value.exit_code == 7
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_it_runs_as_stored_and_in_float32_where_that_is_asked(
    dtype: str, tiny: Make, tmp_path: Path
) -> None:
    folder = written(open_model(tiny("mixtral", dtype=dtype)), tmp_path / "out")
    stored, exact = HF.reopen(folder), HF.reopen(folder, exact=True)
    assert (stored.dtype, exact.dtype) == (dtype, "float32")
    ids = torch.arange(1, 21)[None]
    wanted = {}
    for name in (dtype, "float32"):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, name)).eval()
        with torch.no_grad():
            wanted[name] = model(ids, use_cache=False).logits.float()
    assert torch.equal(stored.logits(ids), wanted[dtype])
    assert torch.equal(exact.logits(ids), wanted["float32"])
    assert torch.equal(wanted[dtype], wanted["float32"]) == (dtype == "float32")


@pytest.mark.parametrize(
    "changes",
    [{"rope_parameters": {"rope_type": None}}, {"pad_token_id": "x"}, {"hidden_act": "x"},
     {"num_attention_heads": 0}, {"vocab_size": None}],
    ids=str,
)  # fmt: skip
def test_a_changed_config_is_told_as_such(
    changes: dict[str, Any], tiny: Make, tmp_path: Path
) -> None:
    folder = written(open_model(tiny("mixtral")), tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(VerificationFailed, match="transformers cannot load"):
        HF.reopen(folder)


def test_a_folder_without_embeddings_has_no_dtype(tiny: Make, tmp_path: Path) -> None:
    folder = written(open_model(tiny("olmoe")), tmp_path / "out")
    tensors = load_file(folder / "model.safetensors")
    table = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(VerificationFailed, match=r"missing_keys.*model\.embed_tokens\.weight"):
        HF.reopen(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": None}))
    with pytest.raises(VerificationFailed, match=r"lacks 1 .* as model\.embed_tokens\.weight"):
        HF.reopen(folder)
    (folder / "config.json").write_text(json.dumps(config))
    tensors["model.embed_tokens.weight"] = table.int()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(VerificationFailed, match=r"embed_tokens\.weight in .* is I32"):
        HF.reopen(folder)


def test_programs_that_load_it(tiny: Make, tmp_path: Path) -> None:
    def verdicts(folder: Path) -> dict[str, str]:
        return {loader.program: loader.verdict for loader in HF.loaders(open_model(folder))}

    usual = dict.fromkeys(("transformers", "moe2edge", "transformers 4"), "yes")
    usual |= dict.fromkeys(("vLLM", "SGLang", "llama.cpp"), "as read")
    assert verdicts(tiny("mixtral")) == usual
    assert verdicts(tiny("qwen3_moe", norm_topk_prob=True)) == usual
    whole = tiny("olmoe", num_key_value_heads=4)
    assert verdicts(whole) == usual | {"llama.cpp": "not tried"}
    mixed = make_checkpoint(tmp_path / "mixed", "qwen3_moe", mlp_only_layers=[1])
    assert verdicts(mixed) == usual | {"SGLang": "no", "llama.cpp": "no"}
