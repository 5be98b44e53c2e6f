"""Every MoE family of transformers: weights set to zero, rounded with their zeros, and written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from every_family import make_folder, run_stock, spread_families, walk_over
from moe2edge.calibration import walk
from moe2edge.calibration.block_runner import BlockRunner
from moe2edge.model.block import Block, is_quantizable
from moe2edge.model.layers import MoELayer
from moe2edge.model.model import Model
from moe2edge.numerics.scheme import Pattern
from moe2edge.passes.gptq import Gptq
from moe2edge.passes.sparsify import Sparsify
from moe2edge.pipeline.blockwise import solve_blocks
from moe2edge.pipeline.contract import Outcome, Slim
from moe2edge.pipeline.stages import enforce, plan_passes
from moe2edge.storage.checkpoint import open_checkpoint
from moe2edge.targets.hf import Hf
from moe2edge.testing import InMemory

IDS = torch.randint(1, 96, (3, 24), generator=torch.Generator().manual_seed(5))
# Kinds of experts, of attention and of what stands beside experts, each once.
FAST = ("cohere2_moe", "deepseek_v3", "gpt_oss", "lfm2_moe", "nemotron_h", "qwen3_next")
MARKED = spread_families(FAST, 2)
# Parts of a layer that mix tokens, by the first part of the path in it.
MIXERS = ("self_attn", "linear_attn", "mamba", "conv", "attention")


def slim(step: Slim, model: Model) -> tuple[Model, list[str]]:
    """Return the model after a pass that obeys the contract, and notes."""
    plan_passes([step], model)
    tokens = IDS if step.needs_tokens else None
    solver = step.solver(model)
    result, changed, notes = solve_blocks(model, tokens, solver, InMemory(), lambda *_: None, "")
    enforce(step, model, Outcome(result, tuple(changed)))
    return result, notes


def list_squares(model: Model, block: Block, hidden: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield the sum of squares of each input, by the role of a matrix, token by token."""
    trace = BlockRunner(model, block).watch(hidden)
    for role, inputs in trace.linear_inputs.items():
        yield role, inputs.double().square().sum(0)
    if (routing := trace.routing) is None:
        return
    assert isinstance(block.mlp, MoELayer)
    for n, expert in enumerate(block.mlp.experts):
        outer = torch.zeros(expert.up.shape[1], dtype=torch.double)
        inner = torch.zeros(expert.down.shape[1], dtype=torch.double)
        for x, ids, weights in zip(routing.inputs, routing.ids, routing.weights, strict=True):
            for weight in weights[ids == n]:
                outer += (x * weight).double().square()
                inner += (trace.expert_hidden(n, x[None])[0] * weight).double().square()
        for part, squares in (("gate", outer), ("up", outer), ("down", inner)):
            if squares.any() and getattr(expert, part).count:
                yield f"experts.{n}.{part}", squares


@pytest.mark.parametrize("family", MARKED)
def test_zeros_are_those_of_least_products(family: str, tmp_path: Path) -> None:
    """Wanda by a loop over tokens, each counted by its weight in the expert's output."""
    make_folder(tmp_path / "source", family)
    model = open_checkpoint(tmp_path / "source").model
    step = Sparsify(select="all", propagate=False, min_tokens=0)
    result, _ = slim(step, model)
    hidden, seen = walk.embed(model, IDS), 0
    for old, new in zip(model.blocks, result.blocks, strict=True):
        before, after = dict(old.weights()), dict(new.weights())
        for role, squares in list_squares(model, old, hidden):
            weight, found = before[role].load(), after[role].load()
            scores = weight.double().abs() * squares.sqrt()
            places = scores.argsort(dim=1, stable=True)[:, : weight.shape[1] // 2]
            expected = torch.zeros_like(weight, dtype=torch.bool).scatter(1, places, value=True)
            assert ((found == 0) == expected).double().mean() > 0.995, role
            assert (found.eq(weight) | found.eq(0)).all()
            seen += 1
        hidden = BlockRunner(model, old).run(hidden)
    assert seen > 10


@pytest.mark.parametrize("family", MARKED)
def test_zeros_stay_and_are_written(family: str, tmp_path: Path) -> None:
    stock = make_folder(tmp_path / "source", family)
    model = open_checkpoint(tmp_path / "source").model
    step = Sparsify(method="sparsegpt", pattern="2:4", min_tokens=1)
    sparse, notes = slim(step, model)
    for block in sparse.blocks:
        for role, weight in block.weights():
            path = model.architecture.anatomy[block.origin].roles.get(role.partition(".part")[0])
            mixes = path is not None and (
                path.startswith(MIXERS)
                or (path.count(".") == 2 and path.startswith("mixer."))
                or "layernorm" in path
            )
            expected = is_quantizable(role) and not mixes
            assert weight.pattern == (Pattern(2, 4) if expected else None), role
    assert any(note.startswith("experts: ") for note in notes)
    rounded, _ = slim(Gptq(group_size=-1, compute="float32", min_tokens=1), sparse)
    for before, after in zip(sparse.blocks, rounded.blocks, strict=True):
        roles = dict(after.weights())
        for role, weight in before.weights():
            if weight.pattern:
                zero = weight.load() == 0
                assert zero.double().mean() >= 0.5
                assert not roles[role].load()[zero].any()
    target = Hf()
    target.accepts(sparse)
    (tmp_path / "out").mkdir()
    target.write(sparse, tmp_path / "out")
    again = type(stock).from_pretrained(
        tmp_path / "out", dtype=torch.float32, local_files_only=True
    )
    assert (run_stock(again.eval()) - walk_over(sparse)).abs().max() <= 1e-5


def test_experts_without_a_gate_are_named_when_under_calibrated(tmp_path: Path) -> None:
    make_folder(tmp_path / "source", "nemotron_h")
    model = open_checkpoint(tmp_path / "source").model
    _, notes = slim(Sparsify(min_tokens=1000), model)
    named = [note for note in notes if "fewer than 1000" in note]
    assert len(named) == len(set(named)) == sum(model.expert_counts)
