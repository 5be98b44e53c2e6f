"""Experts that share matrices: every way to run them against experts with matrices of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import compute_logits, ignore
from moe2edge.calibration import walk
from moe2edge.calibration.block_runner import BlockRunner
from moe2edge.errors import Moe2EdgeError
from moe2edge.model.block import Block
from moe2edge.model.edits import materialize
from moe2edge.model.experts import PARTS, Expert, Factors, Full, Tied
from moe2edge.model.family import FAMILIES
from moe2edge.model.layers import MoELayer
from moe2edge.model.model import Model
from moe2edge.model.weights import Weight
from moe2edge.passes._awq_folding import Folding, find_folding_places
from moe2edge.passes.awq import Awq
from moe2edge.pipeline.blockwise import solve_blocks
from moe2edge.pipeline.solver import GroupSolver, MatrixGroup, Solved
from moe2edge.runtime.load import build_transformers_model, load
from moe2edge.storage.checkpoint import open_checkpoint
from moe2edge.storage.output import open_stored_model
from moe2edge.storage.solved_blocks import attach_numbers
from moe2edge.targets.hf import Hf
from moe2edge.testing import InMemory, Make, assert_cache_changes_nothing

# Of the six experts: two share one with factors, two without, one is its own, one has no base.
BASES = (0, 0, 1, 1, 2, None)
RANKS = (2, 2, 0, 0, 0, 2)


def with_tied_rows(model: Model, dtype: str = "F32") -> Model:
    """``model`` whose layers have such rows, with random factors."""
    draw = torch.Generator().manual_seed(0)

    def weight(name: str, *shape: int) -> Weight:
        numbers = 0.3 * torch.randn(shape, generator=draw)
        if dtype == "BF16":
            numbers = numbers.bfloat16()
        return Weight(name, shape, dtype, lambda: numbers)

    def factors(expert: Expert, rank: int) -> dict[str, Factors]:
        found = {}
        for part in PARTS if rank else ():
            outs, ins = getattr(expert, part).shape
            first, second = weight(part, rank, ins), weight(part, outs, rank)
            found[part] = Factors(first, second)
        return found

    for block, layer in model.moe_blocks:
        rows = tuple(
            Tied(n, base, factors(layer.experts[0], rank)) if rank else Full(n, base or 0)
            for n, (base, rank) in enumerate(zip(BASES, RANKS, strict=True))
        )
        mlp = replace(layer, experts=layer.experts[:3], rows=rows)
        model = model.replace_block(replace(block, mlp=mlp))
    model.verify()
    return model


@pytest.fixture(params=sorted(FAMILIES))
def models(request: pytest.FixtureRequest, tiny: Make) -> tuple[Model, Model]:
    """Return a model with tied experts, and the same with every expert in full."""
    found = with_tied_rows(open_checkpoint(str(tiny(request.param))).model)
    return found, materialize(found)


def tokens(samples: int = 3) -> Tensor:
    return torch.randint(0, 96, (samples, 40), generator=torch.Generator().manual_seed(1))


def logits(model: Model, ids: Tensor) -> Tensor:
    return compute_logits(model, ids)


def test_tied_experts_compute_what_whole_experts_do(models: tuple[Model, Model]) -> None:
    """In the walk, and as a transformers model with a cache."""
    model, whole = models
    assert model.parameters < whole.parameters
    assert all(layer.is_plain for _, layer in whole.moe_blocks)
    expected = logits(whole, tokens())
    assert torch.allclose(logits(model, tokens()), expected, atol=1e-4)
    loaded = build_transformers_model(model, torch.float32)
    with torch.no_grad():
        assert torch.allclose(loaded(tokens()).logits, expected, atol=1e-4)
    assert sum(p.numel() for p in set(loaded.parameters())) == model.parameters
    assert_cache_changes_nothing(loaded, tokens(2))


def test_every_expert_of_a_walk_is_that_of_a_row(models: tuple[Model, Model]) -> None:
    """What an observer is offered belongs to rows of the router."""
    model, whole = models
    ids, x = tokens(), torch.randn(5, 64, generator=torch.Generator().manual_seed(2))
    seen = [BlockRunner(m, m.blocks[0]).watch(walk.embed(m, ids)) for m in (model, whole)]
    for row in range(6):
        for offered in ("expert_hidden", "expert_output"):
            one, other = (getattr(s, offered)(row, x) for s in seen)
            assert torch.allclose(one, other, atol=1e-5)


class Same(GroupSolver):
    """Finds the numbers that there are, and keeps the inputs that it was shown."""

    propagate = True

    def __init__(self) -> None:
        self.inputs: dict[str, Tensor] = {}

    def nbytes(self, shapes: Sequence[tuple[int, ...]]) -> int:
        return 1

    def solve(self, block: Block, groups: Sequence[MatrixGroup]) -> Solved:
        numbers: dict[str, Any] = {}
        for group in groups:
            for role, weight in group.weights.items():
                numbers[role] = weight.load()
                self.inputs[f"{block.index} {role}"] = torch.cat([x for x, _ in group.batches()])
        return Solved(numbers)


def test_the_walk_of_solvers_moves_the_same_stream(models: tuple[Model, Model]) -> None:
    """And shows the matrices of a base the tokens of all rows that use it."""
    model, whole = models
    ledger, solver = InMemory(), Same()
    solve_blocks(model, tokens(), solver, ledger, ignore, "same")
    ahead = replace(whole, blocks=whole.blocks[:2])
    expected = walk.observe(ahead, tokens(), [], ignore, "")
    assert ledger.last is not None
    assert torch.allclose(ledger.last, expected, atol=1e-4)
    seen = BlockRunner(whole, whole.blocks[0]).watch(walk.embed(whole, tokens()))
    assert seen.routing is not None
    counts = torch.bincount(seen.routing.ids.flatten(), minlength=6).tolist()
    inputs = [solver.inputs[f"0 experts.{n}.down"] for n in range(3)]
    assert [len(x) for x in inputs] == [counts[0] + counts[1], counts[2] + counts[3], counts[4]]
    own = [
        seen.expert_hidden(n, seen.routing.inputs[torch.where(seen.routing.ids == n)[0]])
        for n in (0, 1)
    ]
    # Whatever their order.
    assert torch.allclose(inputs[0].T @ inputs[0], torch.cat(own).T @ torch.cat(own), atol=1e-3)


def test_scales_fold_through_factors(models: tuple[Model, Model]) -> None:
    """Random ones, through every place of every block: nothing changes."""
    model, _ = models
    draw = torch.Generator().manual_seed(3)
    folded = model
    for block in model.blocks:
        weights, folding = dict(block.weights()), Folding()
        for place in find_folding_places(block, model.family.geometry(model.config)):
            channels = weights[place.producers[0]].shape[0]
            folding.add(place, torch.rand(channels, generator=draw) + 0.5)
        numbers = {role: folding.apply(role, weights[role].load()) for role in folding.roles}
        assert {"members.0.up.second", "members.0.down.first", "members.5.up.first"} <= set(numbers)
        folded = folded.replace_block(attach_numbers(block, numbers))
    before, after = logits(model, tokens()), logits(folded, tokens())
    assert torch.allclose(before, after, atol=1e-3)


def test_awq_takes_tied_experts(models: tuple[Model, Model]) -> None:
    model, _ = models
    step = Awq(bits=8, group_size=32)
    solved, _, _ = solve_blocks(model, tokens(6), step.solver(model), InMemory(), ignore, "awq")
    step.check_result(model, solved)
    before, after = logits(model, tokens()), logits(solved, tokens())
    assert float((before - after).abs().mean()) < 0.1 * float(before.abs().mean())


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_folder_holds_tied_experts(tiny: Make, tmp_path: Path, family: str) -> None:
    """Written, read again from headers, and loaded: one base in memory for all rows that use it."""
    source = tiny(family)
    model = with_tied_rows(open_checkpoint(str(source)).model)
    target = Hf(layout="natural")
    target.accepts(model)
    out = tmp_path / "out"
    out.mkdir()
    target.write(model, out)
    again = open_stored_model(open_checkpoint(str(out)))
    assert [layer.bases for _, layer in again.moe_blocks] == [BASES] * 3
    assert [[row.rank for row in layer.rows] for _, layer in again.moe_blocks] == [list(RANKS)] * 3
    loaded = load(out, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(
            loaded(tokens()).logits, build_transformers_model(model, torch.float32)(tokens()).logits
        )
    assert sum(p.numel() for p in set(loaded.parameters())) == model.parameters


def test_what_does_not_fit_is_told(tiny: Make) -> None:
    model = with_tied_rows(open_checkpoint(str(tiny("olmoe"))).model)
    block = model.blocks[0]
    layer = block.mlp
    assert isinstance(layer, MoELayer)
    first, *others = layer.rows
    assert isinstance(first, Tied)
    for rows, said in (
        ((replace(first, base=7), *others), "has base 7, but there are 3"),
        ((Tied(0, None, {}), *others), "neither a base nor factors"),
        ((Tied(0, 1, {}), *others), "a base but no factors"),
        (
            (first, *others[:3], Full(4, 3), others[4]),
            "row of expert 4 runs stored expert 3, but there are 3",
        ),
        ((first, *others[:3], Full(4, 0), others[4]), r"\[2\] have no row"),
    ):
        wrong = model.replace_block(replace(block, mlp=replace(layer, rows=rows)))
        with pytest.raises(Moe2EdgeError, match=said):
            wrong.verify()
