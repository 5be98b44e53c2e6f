"""AWQ on every MoE family of transformers: folding keeps the function, alpha is the best one."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import moe2edge
from benchmarks.support.cells import CELLS, try_cell
from every_family import make_folder, run_stock, spread_families, walk_over
from helpers import run
from moe2edge.calibration import walk
from moe2edge.calibration.block_runner import BlockRunner
from moe2edge.errors import Unsupported
from moe2edge.evaluation import verify
from moe2edge.model.block import Block
from moe2edge.model.edits import restore_source_integers
from moe2edge.model.layers import MoELayer
from moe2edge.model.model import Model
from moe2edge.numerics import awq_scales
from moe2edge.numerics.rounding import round_to_nearest
from moe2edge.passes import _awq_folding
from moe2edge.passes._awq_trials import TRIALS, _Trial, find_places_by_trial
from moe2edge.passes.awq import Awq
from moe2edge.pipeline.blockwise import solve_blocks
from moe2edge.pipeline.contract import Outcome
from moe2edge.pipeline.stages import enforce, plan_passes
from moe2edge.storage.checkpoint import open_checkpoint
from moe2edge.storage.solved_blocks import attach_numbers
from moe2edge.targets.gptq import Gptq
from moe2edge.testing import InMemory, make_tokenizer
from test_real_layouts import make_fp8, make_gpt_oss, make_kimi, make_wrapped

IDS = torch.randint(1, 96, (3, 24), generator=torch.Generator().manual_seed(5))
# Kinds of norms, of experts and of attention, each once.
FAST = ("deepseek_v3", "gemma4_text", "gpt_oss", "minimax", "nemotron_h", "phimoe", "qwen3_next")
MARKED = spread_families(FAST, 0)
# Families whose experts have a gate that is clipped, or none.
OTHERS = ("gpt_oss", "minimax_m3_vl_text", "nemotron_h")
# So few tokens are attended to that it matters which.
OWN: dict[str, dict[str, Any]] = {"deepseek_v32": {"index_topk": 4}}


def open_tiny(folder: Path, family: str) -> Model:
    make_folder(folder, family, **OWN.get(family, {}))
    return open_checkpoint(folder).model


def fold(model: Model) -> Model:
    """Fold random scales in all places, and round nothing."""
    draw = torch.Generator().manual_seed(1)
    for block in model.blocks:
        weights, folding = dict(block.weights()), _awq_folding.Folding()
        for place in find_places_by_trial(model, block):
            channels = weights[place.producers[-1]].shape[0]
            scales = torch.randn(channels, generator=draw).mul(0.7).exp()
            assert not {*place.consumers} & folding.columns.keys()
            assert not {*place.producers} & folding.rows.keys()
            folding.add(place, scales)
        numbers = {role: folding.apply(role, weights[role].load()) for role in folding.roles}
        for role, found in numbers.items():
            assert not torch.allclose(found, weights[role].load())
        model = model.replace_block(attach_numbers(block, numbers))
    return model


def quantize(step: Awq, model: Model) -> tuple[Model, list[str]]:
    """Return the model after the pass, held against the contract, and notes."""
    plan_passes([step], model)
    found, changed, notes = solve_blocks(
        model, IDS, step.solver(model), InMemory(), lambda *_: None, "awq"
    )
    enforce(step, model, Outcome(found, tuple(changed)))
    return found, notes


@pytest.mark.parametrize("family", MARKED)
def test_folding_keeps_the_function(family: str, tmp_path: Path) -> None:
    model = open_tiny(tmp_path / "source", family)
    changed = fold(model)
    before, after = walk_over(model), walk_over(changed)
    assert (after - before).norm() <= 1e-5 * before.norm()


def list_places(folder: Path, family: str) -> set[tuple[str, str, int, float]]:
    """Shorten the places of all blocks: first role of either side, copies, and offset."""
    model = open_tiny(folder, family)
    return {
        (p.producers[-1], p.consumers[0], p.copies, p.offset)
        for block in model.blocks
        for p in find_places_by_trial(model, block)
        if "experts.0" in p.producers[-1] or not p.producers[-1].startswith("experts.")
    }


def test_places_of_gpt_oss(tmp_path: Path) -> None:
    """None through its clipped activation."""
    assert list_places(tmp_path / "source", "gpt_oss") == {
        ("norms.input_layernorm.weight", "attention.q_proj.weight", 1, 0.0),
        ("norms.post_attention_layernorm.weight", "router.weight", 1, 0.0),
        ("attention.v_proj.weight", "attention.o_proj.weight", 2, 0.0),
    }


def test_places_of_gemma4(tmp_path: Path) -> None:
    """None through normed values; the router has a norm of its own, and experts another."""
    assert list_places(tmp_path / "source", "gemma4_text") == {
        ("norms.input_layernorm.weight", "attention.q_proj.weight", 1, 0.0),
        ("norms.pre_feedforward_layernorm.weight", "linear.mlp.gate_proj.weight", 1, 0.0),
        ("norms.pre_feedforward_layernorm_2.weight", "experts.0.gate", 1, 0.0),
        ("linear.mlp.up_proj.weight", "linear.mlp.down_proj.weight", 1, 0.0),
        ("experts.0.up", "experts.0.down", 1, 0.0),
    }


def test_places_of_minimax(tmp_path: Path) -> None:
    """None in norms, whose output is the residual stream."""
    assert list_places(tmp_path / "source", "minimax") == {
        ("attention.v_proj.weight", "attention.o_proj.weight", 2, 0.0),
        ("experts.0.up", "experts.0.down", 1, 0.0),
    }


def test_norms_that_add_one_are_found(tmp_path: Path) -> None:
    places = list_places(tmp_path / "source", "qwen3_next")
    assert {(p, offset) for p, _, _, offset in places if p.startswith("norms.")} == {
        ("norms.input_layernorm.weight", 1.0),
        ("norms.post_attention_layernorm.weight", 1.0),
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_scales_are_what_a_norm_that_adds_one_is_divided_by(dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(2)
    stored = (torch.randn(400, generator=draw) * 0.3).to(dtype)
    scales = torch.randn(400, generator=draw).exp()
    found = awq_scales.round_to_exact(scales, stored, 1.0)
    quotients = (stored.float() + 1) / found - 1
    changed = found != 1  # nothing is divided where the quotient would vanish
    assert changed.double().mean() > 0.99
    exact = quotients.bfloat16().float()
    torch.testing.assert_close(quotients[changed], exact[changed], rtol=0, atol=1e-6)
    close = (quotients + 1).abs() > 0.25  # elsewhere the stored numbers are far apart
    assert ((found / scales)[close] - 1).abs().max() < 0.02


def test_a_layer_is_freed_when_its_trial_ends(tmp_path: Path) -> None:
    """At once, not when garbage is collected: two layers may not fit."""
    model = open_tiny(tmp_path / "source", "qwen3_next")
    gc.disable()
    try:
        trial = _Trial(model, model.blocks[0], *TRIALS[0])
        trial.fit_norms(list(trial.list_norms()))
        layer = weakref.ref(trial._layer)
        del trial
        assert layer() is None
    finally:
        gc.enable()


# ---- choosing ------------------------------------------------------------------------------------


def list_uses(model: Model, block: Block, hidden: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """List the inputs of the matrices of a block, with the weights of their outputs, by role."""
    trace = BlockRunner(model, block).watch(hidden)
    uses = {role: (x, torch.ones(len(x))) for role, x in trace.linear_inputs.items()}
    routing = trace.routing
    assert routing is not None
    assert isinstance(block.mlp, MoELayer)
    for n in range(len(block.mlp.experts)):
        rows = torch.argwhere(routing.ids == n).tolist()
        x = torch.stack([routing.inputs[t] for t, _ in rows])
        weights = torch.stack([routing.weights[t, k] for t, k in rows])
        uses |= {f"experts.{n}.{part}": (x, weights) for part in ("gate", "up")}
        uses[f"experts.{n}.down"] = trace.expert_hidden(n, x), weights
    uses["all"] = routing.inputs, torch.ones(len(routing.inputs))
    return uses


@pytest.mark.parametrize("family", ["qwen3_next", "gpt_oss"])
def test_the_best_scales_are_chosen(family: str, tmp_path: Path) -> None:
    """By a loop over alphas, matrices and tokens, for the norm before the experts."""
    model = open_tiny(tmp_path / "source", family)
    step = Awq(group_size=-1, min_tokens=1)
    result, _ = quantize(step, model)
    block, norm = model.blocks[0], "norms.post_attention_layernorm.weight"
    uses = list_uses(model, block, walk.embed(model, IDS))
    before, after = dict(block.weights()), dict(result.blocks[0].weights())
    (place,) = [p for p in find_places_by_trial(model, block) if norm in p.producers]
    schemes = {role: after[role].scheme for role in place.consumers if after[role].scheme}
    assert len(schemes) > 10
    magnitudes = uses["all"][0].abs().mean(0)
    ends = (magnitudes.max() * magnitudes.min()).sqrt()
    base = before[norm].load() + place.offset
    best, least = torch.ones(0), float("inf")
    for n in range(20):
        scales = (magnitudes / ends) ** (n / 20)
        if place.offset:
            scales = base / ((base / scales - 1).bfloat16().float() + 1)
        error = 0.0
        for role, scheme in schemes.items():
            x, weights = uses[role]
            weight = before[role].load().float()
            assert scheme is not None
            importance = ((x / scales) * weights[:, None]).square().mean(0)
            found = round_to_nearest(weight * scales, scheme, "mse", importance).dequantize()
            outputs = (x @ weight.T - (x / scales) @ found.T) * weights[:, None]
            error += float(outputs.double().square().sum())
        if error < least:
            best, least = scales, error
    torch.testing.assert_close(after[norm].load(), base / best - place.offset, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", MARKED)
def test_what_is_rounded_is_written_and_loaded(family: str, tmp_path: Path) -> None:
    model = open_tiny(tmp_path / "source", family)
    rules = [{"match": "in_proj", "bits": 16}] if family == "granitemoehybrid" else []
    step = Awq.model_validate({"group_size": -1, "steps": 4, "min_tokens": 4, "rules": rules})
    result, notes = quantize(step, model)
    unscaled = [note.partition(":")[0] for note in notes if "no scales fold in" in note]
    assert ("down of experts" in unscaled) == (family in OTHERS)
    folder = tmp_path / "out"
    folder.mkdir()
    target = Gptq()
    target.accepts(result)
    target.write(result, folder)
    verify.audit(target, folder, target.stored(result))
    loaded = moe2edge.load(folder, dtype=torch.float32)
    assert (run_stock(loaded) - walk_over(result)).abs().max() <= 1e-4


def test_a_model_without_a_place_is_refused(tmp_path: Path) -> None:
    model = open_tiny(tmp_path / "source", "flex_olmo")
    rules = [{"match": "o_proj|experts", "bits": 16}]
    with pytest.raises(Unsupported, match=r"awq does not work on flex_olmo: .* use gptq or rtn"):
        plan_passes([Awq.model_validate({"rules": rules})], model)


def test_matrices_of_a_quantized_source_are_scaled_with_the_others(tmp_path: Path) -> None:
    """One that a rule keeps is a plain matrix then, not the source's integers."""
    make_kimi(tmp_path / "source")
    source = open_checkpoint(tmp_path / "source").model
    rules = [{"match": r"experts\.\d", "bits": 16}]
    step = Awq.model_validate({"group_size": -1, "min_tokens": 1, "steps": 8, "rules": rules})
    planned = plan_passes([step], source).steps[0]
    found, _, _ = solve_blocks(
        planned.before, IDS, step.solver(planned.before), InMemory(), lambda *_: None, "awq"
    )
    result = restore_source_integers(found, source)
    changed = 0
    norm = "norms.post_attention_layernorm.weight"
    for block, layer in source.moe_blocks:
        before, after = dict(block.weights()), dict(result.blocks[block.index].weights())
        scales = before[norm].load().float() / after[norm].load().float()
        if torch.equal(scales, torch.ones_like(scales)):
            continue
        changed += 1
        for n in range(len(layer.experts)):
            assert before[f"experts.{n}.gate"].scheme is not None
            assert after[f"experts.{n}.gate"].scheme is None
            expected = before[f"experts.{n}.gate"].load().float() * scales
            found_there = after[f"experts.{n}.gate"].load().float()
            torch.testing.assert_close(found_there, expected, rtol=0.01, atol=1e-3)
    assert changed


@pytest.mark.slow
@pytest.mark.parametrize("make", [make_gpt_oss, make_fp8, make_kimi, make_wrapped])
@pytest.mark.parametrize("title", ["`awq` → `gptq`", "`expert_drop`, `recover` → `hf`"])
def test_real_layouts_are_exported(title: str, make: Callable[[Path], Any], tmp_path: Path) -> None:
    make(tmp_path / "source")
    make_tokenizer(tmp_path / "source")
    (tmp_path / "work").mkdir()
    (cell,) = (cell for cell in CELLS if cell.title == title)
    assert try_cell(cell, tmp_path / "source", tmp_path / "work", run) == "yes"
