"""Solvers inside of transformers' own layers: every matrix gets what the walk says it gets."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from every_family import GENERIC, make_folder
from moe2edge.calibration import walk
from moe2edge.calibration.block_runner import BlockRunner
from moe2edge.model.block import Block, is_quantizable
from moe2edge.model.layers import MoELayer
from moe2edge.model.model import Model
from moe2edge.numerics.rounding import round_to_nearest
from moe2edge.numerics.scheme import Scheme
from moe2edge.passes.gptq import Gptq
from moe2edge.pipeline.blockwise import solve_blocks
from moe2edge.pipeline.blockwise_report import SolverProgress
from moe2edge.pipeline.solver import GroupSolver, MatrixGroup, Solved
from moe2edge.pipeline.staged_work import StagedWork
from moe2edge.runtime.memory import UNLIMITED, Memory
from moe2edge.storage.checkpoint import open_checkpoint
from moe2edge.storage.solved_blocks import attach_numbers
from moe2edge.testing import InMemory, Make

IDS = torch.randint(1, 96, (3, 24), generator=torch.Generator().manual_seed(5))
# One of each kind of experts and of mixers; all others are slow.
SAMPLE = ("deepseek_v3", "gpt_oss", "granitemoehybrid", "nemotron_h", "qwen3_next")


class Recorder(GroupSolver):
    """Keeps the inputs of all matrices, and rounds them or leaves them as they are."""

    propagate = True

    def __init__(self, scheme: Scheme | None = None) -> None:
        self.scheme = scheme
        self.inputs: dict[str, Tensor] = {}
        self.weights: dict[str, Tensor | None] = {}
        self.groups: list[tuple[str, ...]] = []

    def nbytes(self, shapes: Sequence[tuple[int, ...]]) -> int:
        return 8 * sum(shape[0] * shape[1] for shape in shapes)

    def solve(self, block: Block, groups: Sequence[MatrixGroup]) -> Solved:
        numbers: dict[str, Any] = {}
        for group in groups:
            self.groups.append(tuple(group.weights))
            found = list(group.batches())
            for role, weight in group.weights.items():
                if found:
                    self.inputs[role] = torch.cat([x for x, _ in found])
                    parts = [w for _, w in found if w is not None]
                    self.weights[role] = torch.cat(parts) if parts else None
                whole = weight.load().float()
                numbers[role] = (
                    whole if self.scheme is None else round_to_nearest(whole, self.scheme, "absmax")
                )
        return Solved(numbers)


def run_block(
    model: Model, block: Block, solver: GroupSolver, hidden: Tensor, memory: Memory = UNLIMITED
) -> tuple[Mapping[str, Any], Tensor]:
    """Solve a block; return its numbers and outputs."""
    tally = SolverProgress("test", lambda *_: None, model, hidden.shape[0] * hidden.shape[1])
    tally.begin(block)
    outputs = hidden.clone()
    return StagedWork(model, block, solver, tally, memory).run(outputs), outputs


def check_block(model: Model, block: Block, solver: Recorder, hidden: Tensor) -> None:
    """Compare what matrices got, and the output, with the walk over the block as solved."""
    numbers, outputs = run_block(model, block, solver, hidden)
    roles = {role for role, _ in block.weights() if is_quantizable(role)}
    assert numbers.keys() == roles
    kept = isinstance(next(iter(numbers.values()), None), torch.Tensor)
    solved = block if kept else attach_numbers(block, numbers)
    trace = BlockRunner(model, solved).watch(hidden)
    torch.testing.assert_close(outputs, trace.outputs, atol=2e-5, rtol=1e-5)
    for role, expected in trace.linear_inputs.items():
        torch.testing.assert_close(solver.inputs[role], expected, atol=2e-5, rtol=1e-5)
    if not isinstance(block.mlp, MoELayer):
        return
    routing = trace.routing
    assert routing is not None
    for n in range(len(block.mlp.experts)):
        token, place = torch.where(routing.ids == n)
        inputs = routing.inputs[token] if len(token) else None
        role = f"experts.{n}.up"
        if inputs is None:
            assert not len(solver.inputs.get(role, ()))
            continue
        torch.testing.assert_close(solver.inputs[role], inputs, atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(
            solver.weights[role], routing.weights[token, place], atol=1e-5, rtol=1e-5
        )
        inside = trace.expert_hidden(n, inputs)
        torch.testing.assert_close(solver.inputs[f"experts.{n}.down"], inside, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "family",
    [f if f in SAMPLE else pytest.param(f, marks=pytest.mark.slow) for f in GENERIC],
)
def test_every_matrix_gets_what_the_walk_says(family: str, tmp_path: Path) -> None:
    make_folder(tmp_path / "source", family)
    model = open_checkpoint(tmp_path / "source").model
    hidden = walk.embed(model, IDS)
    for block in model.blocks:
        if family in SAMPLE:
            check_block(model, block, Recorder(), hidden)
        check_block(model, block, Recorder(Scheme(4, -1, True)), hidden)
        hidden = BlockRunner(model, block).run(hidden)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "olmoe"])
def test_gptq_solves_a_block_as_the_work_of_the_table_does(family: str, tiny: Make) -> None:
    """Both ways to go through a block give the same integers."""
    model = open_checkpoint(tiny(family, num_hidden_layers=1)).model
    step = Gptq(group_size=32, compute="float32", min_tokens=8)
    solved, _, _ = solve_blocks(model, IDS, step.solver(model), InMemory(), lambda *_: None, "w")
    expected = dict(solved.blocks[0].weights())
    hidden = walk.embed(model, IDS)
    numbers, _ = run_block(model, model.blocks[0], step.solver(model), hidden)
    assert numbers.keys() == {role for role, weight in expected.items() if weight.scheme}
    for role, found in numbers.items():
        # The work of the table weighs the tokens of a shared expert by its gate.
        if role.startswith("shared."):
            continue
        assert torch.equal(found.q, expected[role].quantized().q), role


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss", "mixtral"])
def test_the_work_on_a_block_is_freed_without_a_collection(family: str, tmp_path: Path) -> None:
    """Nothing that is hooked into a layer points back at it."""
    make_folder(tmp_path, family)
    model = open_checkpoint(tmp_path).model
    block = model.blocks[1]
    tally = SolverProgress("test", lambda *_: None, model, IDS.numel())
    tally.begin(block)
    gc.collect()
    gc.disable()
    try:
        work = StagedWork(model, block, Recorder(), tally, UNLIMITED)
        work.run(walk.embed(model, IDS))
        numbers = [weakref.ref(p) for p in work._layer.parameters() if not p.is_meta]
        assert numbers
        del work
        assert not any(reference() is not None for reference in numbers)
    finally:
        gc.enable()
