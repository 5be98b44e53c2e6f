"""Factors and linear maps in 8 bits: what passes make of them, and what targets hold."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import export, run, search, slow_except
from moe2edge.errors import InputError, Unsupported, VerificationFailed
from moe2edge.evaluation.verify import audit
from moe2edge.model.block import is_low_rank
from moe2edge.model.experts import Linear
from moe2edge.model.family import FAMILIES
from moe2edge.model.model import Model
from moe2edge.numerics.rounding import round_to_nearest
from moe2edge.numerics.scheme import LOW_RANK
from moe2edge.passes._quantize import Quantize
from moe2edge.passes.awq import Awq
from moe2edge.passes.expert_replace import ExpertReplace
from moe2edge.passes.gptq import Gptq
from moe2edge.passes.rtn import Rtn
from moe2edge.pipeline.blockwise import solve_blocks
from moe2edge.runtime.load import build_transformers_model, load
from moe2edge.storage.checkpoint import open_checkpoint
from moe2edge.storage.output import open_stored_model
from moe2edge.storage.solved_blocks import attach_numbers
from moe2edge.targets.gptq import Gptq as GptqTarget
from moe2edge.testing import InMemory, Make

PASSES: dict[str, Quantize] = {
    "rtn": Rtn(factors=8),
    "gptq": Gptq(factors=8, min_tokens=8),
    "awq": Awq(factors=8, steps=4),
}
KINDS: dict[str, dict[str, Any]] = {
    "base": {"with": "base", "budget": 0.8, "rank": 4},
    "svd": {"with": "svd", "budget": 0.8, "rank": 4},
    "linear": {"with": "linear", "keep": 3, "rank": 4},
}


def tokens(samples: int = 8) -> Tensor:
    return torch.randint(0, 96, (samples, 40), generator=torch.Generator().manual_seed(1))


def replaced(folder: Path, kind: str) -> Model:
    """Return a model with such replacements for some of its experts."""
    model = open_checkpoint(str(folder)).model
    step = ExpertReplace.model_validate(KINDS[kind]).resolve(model)
    return search(step, model, tokens()).model


def quantized(model: Model, step: Quantize) -> Model:
    """As the pass makes it of that model, held against what it promises."""
    step.check(model)
    ids = tokens() if step.needs_tokens else None
    found, changed, _ = solve_blocks(
        model, ids, step.solver(model), InMemory(), lambda *_: None, "quantize"
    )
    step.check_result(model, found)
    assert [str(w.scheme) for _, _, w in step.plan(model).tensors()] == [
        str(w.scheme) for _, _, w in found.tensors()
    ]
    names = {n for n, role, w in found.tensors() if w.scheme}
    assert names <= set(changed)
    return found


@pytest.mark.parametrize(
    ("family", "name", "kind"),
    slow_except(
        [
            ("olmoe", "rtn", "linear"),
            ("mixtral", "gptq", "base"),
            *((family, "awq", "svd") for family in sorted(FAMILIES)),
        ],
        ("olmoe", "rtn", "linear"),
        ("mixtral", "gptq", "base"),
        ("qwen2_moe", "awq", "svd"),
    ),
)
def test_every_pass_rounds_them(family: str, name: str, kind: str, tiny: Make) -> None:
    model = replaced(tiny(family), kind)
    found = quantized(model, PASSES[name])
    before = {name: weight for name, _, weight in model.tensors()}
    seen = 0
    for own, role, weight in found.tensors():
        if not is_low_rank(role):
            continue
        seen += 1
        assert weight.scheme == LOW_RANK
        if name != "awq":  # which scales columns and rows before
            expected = round_to_nearest(before[own].load().float(), LOW_RANK, "mse")
            assert torch.equal(weight.quantized().q, expected.q)
        outs, ins = weight.shape
        assert weight.nbytes == outs * ins + 2 * outs
    assert seen
    # It costs next to nothing beside what 4 bits of all else cost.
    alone = quantized(model, PASSES[name].model_copy(update={"factors": 16}))
    ids = tokens()
    with torch.no_grad():
        source, plain, both = (
            build_transformers_model(m, torch.float32)(ids).logits for m in (model, alone, found)
        )
    assert not torch.equal(plain, both)
    assert (both - source).norm() < 1.1 * (plain - source).norm()


def test_linear_maps_are_rounded_per_row_with_the_best_scale(tiny: Make) -> None:
    """A slow loop: each row has the scale with the least squared error, and 255 steps at most."""
    model = replaced(tiny("mixtral"), "linear")
    found = quantized(model, PASSES["rtn"])
    for (_, role, before), (_, _, after) in zip(model.tensors(), found.tensors(), strict=True):
        if is_low_rank(role):
            for row, got in zip(before.load().float(), after.load().float(), strict=True):
                assert (got - row).abs().max() <= row.abs().max() / 127


@pytest.mark.parametrize(
    ("family", "kind"), [("mixtral", "base"), ("olmoe", "svd"), ("qwen2_moe", "linear")]
)
def test_a_gptq_folder_holds_them(family: str, kind: str, tiny: Make, tmp_path: Path) -> None:
    model = quantized(replaced(tiny(family), kind), PASSES["gptq"])
    target = GptqTarget(layout="natural")
    target.accepts(model)
    target.write(model, tmp_path)
    assert audit(target, tmp_path, model)
    stored = open_stored_model(open_checkpoint(str(tmp_path)))
    schemes = {name: weight.scheme for name, _, weight in model.tensors()}
    assert {name: weight.scheme for name, _, weight in stored.tensors()} == schemes
    settings = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert settings["bits"] == 4
    assert [own["bits"] for own in settings["dynamic"].values() if own] == [8]
    ids = tokens(2)
    with torch.no_grad():
        expected = build_transformers_model(model, torch.float32)(ids).logits
        loaded = load(tmp_path, dtype=torch.float32)
        assert (loaded(ids).logits - expected).abs().max() < 1e-4
    assert "factors of 8 bits" in str(loaded.moe2edge_packed)
    # What the config does not say is not taken for a factor of 8 bits.
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["dynamic"] = {}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(VerificationFailed, match="lacks"):
        open_stored_model(open_checkpoint(str(tmp_path)))


def test_sixteen_bits_need_no_entry(tiny: Make, tmp_path: Path) -> None:
    model = quantized(replaced(tiny("olmoe"), "base"), Gptq(min_tokens=8))
    GptqTarget(layout="natural").write(model, tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert "dynamic" not in settings
    stored = open_stored_model(open_checkpoint(str(tmp_path)))
    assert all(w.scheme is None for _, role, w in stored.tensors() if is_low_rank(role))


def test_low_rank_matrices_alone_are_quantized(tiny: Make, tmp_path: Path) -> None:
    """A rule that leaves all else, so that experts keep their precision."""
    rules = ({"bits": 16},)
    step = Rtn.model_validate({"factors": 8, "rules": rules})
    model = quantized(replaced(tiny("mixtral"), "svd"), step)
    assert {is_low_rank(role) for _, role, w in model.tensors() if w.scheme} == {True}
    target = GptqTarget(layout="natural")
    target.write(model, tmp_path)
    assert audit(target, tmp_path, model)
    ids = tokens(2)
    with torch.no_grad():
        expected = build_transformers_model(model, torch.float32)(ids).logits
        assert (load(tmp_path, dtype=torch.float32)(ids).logits - expected).abs().max() < 1e-4


# ---- refusals ------------------------------------------------------------------------------------


def test_nothing_to_round_is_refused(tiny: Make) -> None:
    model = open_checkpoint(str(tiny("mixtral"))).model
    with pytest.raises(InputError, match="factors: 8 applies to factors and linear maps"):
        Rtn(factors=8).check(model)


def test_maps_that_became_constants_are_nothing_to_round(tiny: Make) -> None:
    """A budget leaves no bytes for a rank, or an expert has too few tokens for a map."""
    model = open_checkpoint(str(tiny("mixtral"))).model
    for options in ({"budget": 0.2, "min_tokens": 0}, {"keep": 3, "rank": 4, "min_tokens": 10**6}):
        step = ExpertReplace.model_validate({"with": "linear", **options})
        Rtn(factors=8).check(step.plan(model))
        found = search(step, model, tokens(4)).model
        Rtn(factors=8).check(found)
    assert found.replaced_count
    assert not any(is_low_rank(role) for _, role, _ in found.tensors())


def test_quantizing_them_twice_is_refused(tiny: Make) -> None:
    model = replaced(tiny("mixtral"), "base")
    for block in model.blocks:
        numbers = Rtn(factors=8).solve_alone(block, "mse")
        model = model.replace_block(attach_numbers(block, numbers))
    with pytest.raises(InputError, match="quantizes twice"):
        Rtn(factors=8).check(model)


def test_a_rank_that_fills_no_words_is_refused(tiny: Make) -> None:
    model = open_checkpoint(str(tiny("mixtral"))).model
    block, layer = model.moe_blocks[0]

    def zeros(*shape: int) -> Any:
        return replace(layer.experts[0].gate, shape=shape, load=lambda: torch.zeros(shape))

    new = Linear(0, zeros(64), zeros(3, 64), zeros(64, 3))
    model = model.replace_block(replace(block, mlp=layer.replace_experts({0: new})))
    model = quantized(model, Rtn(factors=8))
    with pytest.raises(
        Unsupported, match="divisible by 4; choose a rank that 4 divides, or factors: 16"
    ):
        GptqTarget(layout="natural").accepts(model)


@pytest.mark.parametrize(
    ("kind", "target"),
    [
        ("base", "gptq:layout=natural"),
        ("linear", "hf:dequantize=true:layout=natural"),
        *((kind, "onnx") for kind in KINDS),
    ],
)
@pytest.mark.slow
def test_an_export_is_verified(kind: str, target: str, tiny: Make, tmp_path: Path) -> None:
    passes = [{"expert_replace": KINDS[kind]}, {"gptq": {"factors": 8}}]
    code, stderr, _ = export(tiny("qwen2_moe"), tmp_path / "out", passes, target)
    assert code == 0, stderr
    assert run("verify", tmp_path / "out").exit_code == 0
