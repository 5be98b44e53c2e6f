"""Quantize by rounding each weight to its nearest grid point; needs no calibration data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from moe2edge.model.block import Block
from moe2edge.model.model import Model
from moe2edge.model.roles import list_quantizable
from moe2edge.model.traits import Trait
from moe2edge.passes._ends import RoundedEnds
from moe2edge.passes._quantize import Quantize, Scales
from moe2edge.pipeline.contract import PlannedStep, TextSizes
from moe2edge.pipeline.solver import EndSolver, GroupSolver, MatrixGroup, Solved
from moe2edge.pipeline.work import estimate_new_bytes
from moe2edge.runtime.memory import Estimate

if TYPE_CHECKING:
    from moe2edge.numerics.grid import Quantized


class Rtn(Quantize):
    """Quantize by rounding to nearest, with one scale per group of inputs.

    Covers attention, experts, shared experts and dense MLPs. Needs no calibration data.
    """

    needs: ClassVar[tuple[Trait, ...]] = ()
    scales: Scales = "absmax"

    @property
    def needs_tokens(self) -> bool:
        """False: rounding to nearest needs no calibration data."""
        return False

    def estimate(self, planned: PlannedStep, texts: TextSizes) -> Estimate:
        """Estimate what it will take: one matrix at a time, and the numbers."""
        solver = self.solver(planned.before)
        shapes = (w.shape for b in planned.before.blocks for _, w in list_quantizable(b))
        outs_ins = [(shape[0], shape[1]) for shape in shapes]
        return Estimate(
            max(self.estimate_ends(planned.before), *(solver.nbytes([s]) for s in outs_ins)),
            estimate_new_bytes(planned.before, planned.after),
            purpose=f"{self.name} holds the largest matrix at once",
            remedy="raise --max-memory, or use a larger machine",
        )

    def solver(self, model: Model) -> GroupSolver:
        """Create the solver, which rounds one matrix after another."""
        return _Solver(self, model)

    def end_solver(self, model: Model) -> EndSolver:
        """Create the solver of head and embedding, which rounds them in the same way."""
        return RoundedEnds(*self.list_ends(model), self.scales)


class _Solver(GroupSolver):
    """Solver that rounds one matrix after another."""

    propagate = False

    def __init__(self, options: Rtn, model: Model) -> None:
        self._options, self._model, self._schemes = options, model, options.schemes(model)

    def solve_alone(self, block: Block) -> Mapping[str, Quantized]:
        """Round factors and linear maps to nearest."""
        return self._options.solve_alone(block, self._options.scales)

    def nbytes(self, shapes: Sequence[tuple[int, ...]]) -> int:
        """Estimate the bytes of one matrix, its integers and temporary results."""
        return max(16 * outs * ins for outs, ins in shapes)

    def solve(self, block: Block, groups: Sequence[MatrixGroup]) -> Solved:
        """Round every tensor that has a scheme."""
        from moe2edge.numerics.rounding import round_to_nearest
        from moe2edge.runtime.decoder_blocks import load_finite

        numbers = {}
        lost = size = 0.0
        for group in groups:
            for role, weight in group.weights.items():
                scheme = self._schemes.get(self._model.disk_name(block, role))
                if scheme is not None:
                    matrix = load_finite(weight)
                    numbers[role] = round_to_nearest(matrix, scheme, self._options.scales)
                    size += float(matrix.square().sum())
                    lost += float(numbers[role].dequantize().sub_(matrix).square_().sum())
        return Solved(numbers, loss=(lost, size))
