"""A runtime is tried on one block of each kind, without weights, before an export computes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helpers import each_family, export
from moe2edge.commands import trial
from moe2edge.errors import Unsupported
from moe2edge.model.model import Model
from moe2edge.numerics.scheme import Scheme
from moe2edge.passes.rtn import Rtn
from moe2edge.pipeline.registry import make_target
from moe2edge.storage.checkpoint import Checkpoint, open_checkpoint
from moe2edge.testing import Make

QUANTIZED = (Scheme(4, 32), Scheme(8, 32, False), Scheme(2, 32))


@pytest.fixture(autouse=True)
def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "_tried", set())


def open_model(folder: Path) -> Model:
    return open_checkpoint(str(folder)).model


@pytest.mark.parametrize("family", each_family("qwen2_moe"))
def test_every_form_that_targets_hold_passes(family: str, tiny: Make) -> None:
    model = open_model(tiny(family, dtype="bfloat16"))
    trial.try_targets([make_target("hf", {}), make_target("onnx", {})], model)
    for scheme in QUANTIZED:
        options = {"bits": scheme.bits, "group_size": 32, "symmetric": scheme.symmetric}
        quantized = Rtn.model_validate(options).plan(model)
        targets = [make_target("gptq", {}), make_target("onnx", {})]
        trial.try_targets(targets, quantized)
    assert len(trial._tried) == 2 + 2 * len(QUANTIZED)


def test_one_block_of_each_kind_is_kept(tiny: Make) -> None:
    model = open_model(tiny("qwen3_moe"))
    assert len(trial.reduce_model(model).blocks) == 1
    block = model.blocks[1].keep_experts([0, 2, 4])
    uneven = model.replace_block(block).replace_block(model.blocks[2].without_mlp())
    small = trial.reduce_model(uneven)
    assert len(small.blocks) == 3
    assert small.vocabulary == small.config["vocab_size"] == trial.VOCABULARY
    for _, _, weight in small.tensors():
        assert not weight.load().any()
    planned = trial.reduce_model(Rtn(group_size=32, symmetric=False).plan(model))
    quantized = [w for _, _, w in planned.tensors() if w.scheme]
    assert quantized
    assert all(not w.quantized().dequantize().any() for w in quantized)


def test_special_tokens_are_left_out(tiny: Make) -> None:
    model = open_model(tiny("mixtral"))
    model = replace(model, config={**model.config, "pad_token_id": 90})
    trial.try_targets([make_target("hf", {})], model)
    assert len(trial._tried) == 1


def test_a_refusal_comes_before_any_work(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worked: list[str] = []

    def hash_source(_: Checkpoint) -> str:
        worked.append("hashed")
        return "0"

    def refuse(*_: object, **__: object) -> Any:
        raise RuntimeError("no kernel for this\nshape")

    monkeypatch.setattr("moe2edge.targets._onnx_runtime.OnnxRuntime.start", refuse)
    monkeypatch.setattr(Checkpoint, "sha256", property(hash_source))
    code, said, _ = export(tiny("mixtral"), tmp_path / "out", [{"rtn": {"group_size": 32}}], "onnx")
    assert code == 6
    assert "the runtime of target onnx refuses blocks of this model" in said
    assert "RuntimeError: no kernel for this shape; choose another target" in said
    assert not worked
    assert not list(tmp_path.glob("out*/*"))


def test_equal_shapes_are_tried_once(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model, runs = open_model(tiny("olmoe")), []
    monkeypatch.setattr(trial, "_try_target", lambda *given: runs.append(given))
    targets = [make_target("onnx", {}), make_target("onnx", {"accuracy_level": 0})]
    trial.try_targets(targets, model)
    trial.try_targets(targets, model)
    assert len(runs) == 2


def test_a_shape_that_the_runtime_really_refuses(tiny: Make) -> None:
    """A model whose queries do not fit its output projection."""
    model = open_model(tiny("mixtral"))
    block = model.blocks[0]
    narrow = trial.make_zero_weight(block.attention["o_proj.weight"])
    wrong = {"attention.o_proj.weight": replace(narrow, shape=(64, 60))}
    broken = model.replace_block(block.with_weights(wrong))
    with pytest.raises(Unsupported, match="the runtime of target onnx refuses blocks"):
        trial.try_targets([make_target("onnx", {})], broken)
