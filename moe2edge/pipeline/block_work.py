"""The work of a solver on one block: what all kinds of blocks have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from moe2edge.model.block import Block
from moe2edge.model.experts import Dense
from moe2edge.model.model import Model
from moe2edge.model.roles import list_quantizable
from moe2edge.model.weights import Weight
from moe2edge.pipeline.blockwise_report import SolverProgress
from moe2edge.pipeline.solver import GroupSolver, MatrixGroup
from moe2edge.runtime.decoder_blocks import load_finite
from moe2edge.runtime.memory import Memory

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.numerics.grid import Quantized

# Intermediate activations of an expert that are computed at once; and the most that are kept for a
# second use, for all experts that are solved together.
CHUNK_NUMBERS, KEPT_NUMBERS = 1 << 24, 1 << 25

Batches = Callable[[], Iterator[tuple["Tensor", "Tensor | None"]]]


class BlockWork(ABC):
    """The work on one block.

    Attributes:
        numbers: what was solved, by role.
        patterned: handles that carry a pattern from now on.
    """

    def __init__(
        self, model: Model, block: Block, solver: GroupSolver, tally: SolverProgress, memory: Memory
    ) -> None:
        self.numbers: dict[str, Quantized | Tensor] = {}
        self.patterned: dict[str, Weight] = {}
        self.model, self.block, self.solver = model, block, solver
        self.tally, self.memory = tally, memory
        self.device, self.dtype = solver.device, solver.dtype
        self.weights = dict(list_quantizable(block))

    def solve(self, what: str, groups: Sequence[MatrixGroup]) -> None:
        """Solve groups of equal shapes; ``what`` names them in progress lines."""
        self.tally.report(what)
        solved = self.solver.solve(self.block, groups)
        self.numbers.update(solved.numbers)
        if solved.pattern is not None:
            for role in solved.numbers:
                self.patterned[role] = replace(self.weights[role], pattern=solved.pattern)
        self.tally.add(solved)

    def make_group(
        self, roles: Sequence[str], inputs: Batches, tokens: int, **more: Any
    ) -> MatrixGroup:
        """Return a group of matrices with their inputs; ``more`` goes into `MatrixGroup`."""
        return MatrixGroup({role: self.weights[role] for role in roles}, inputs, tokens, **more)

    def load_matrix(self, role: str, dtype: torch.dtype) -> Tensor:
        """Return the matrix with which the next inputs are computed, solved or not."""
        if not self.solver.propagate or role not in self.numbers:
            return load_finite(self.weights[role]).to(self.device, dtype)
        numbers = self.numbers[role]
        found = numbers if isinstance(numbers, torch.Tensor) else numbers.dequantize()
        return found.to(self.device, dtype)

    def solve_without_tokens(self) -> Mapping[str, Quantized | Tensor]:
        """Solve each matrix by itself."""
        for role in self.weights:
            self.solve(role, [self.make_group([role], lambda: iter(()), 0)])
        return self.numbers

    @abstractmethod
    def run(self, hidden: Tensor) -> Mapping[str, Quantized | Tensor]:
        """Solve the block for ``hidden`` [samples, length, hidden], which becomes its output."""

    def count_together(self, expert: Dense) -> int:
        """Return the number of experts that are solved at once within the memory."""
        room = self.memory.group_bytes
        if self.device.type == "cuda":
            # On a GPU a loop over columns takes as long for one expert as for many.
            room = count_gpu_bytes(self.device) // 2
        return max(1, room // estimate_mlp_bytes(self.solver, expert))


class KeptBatches:
    """Batches that are computed once, if they are not too many numbers to keep."""

    def __init__(self, batches: Batches, numbers: int) -> None:
        """Wrap batches.

        Args:
            batches: computes them.
            numbers: how many numbers they and all that are kept at the same time have.
        """
        self._batches, self._keep = batches, numbers <= KEPT_NUMBERS
        self._known: list[tuple[Tensor, Tensor | None]] | None = None

    def __call__(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield the batches."""
        if not self._keep:
            return self._batches()
        if self._known is None:
            self._known = list(self._batches())
        return iter(self._known)


def estimate_mlp_bytes(solver: GroupSolver, mlp: Dense) -> int:
    """Estimate the bytes of one MLP while it is solved."""
    solving = max(solver.nbytes((mlp.gate.shape, mlp.up.shape)), solver.nbytes((mlp.down.shape,)))
    return solving + 4 * mlp.count


def count_gpu_bytes(device: torch.device) -> int:
    """Return all bytes of a GPU: free memory differs from run to run, and results must not."""
    return torch.cuda.get_device_properties(device).total_memory


def make_like(hidden: Tensor, memory: Memory) -> Tensor:
    """Return a tensor without numbers in the shape and on the device of ``hidden``."""
    if hidden.device.type == "cpu":
        return memory.empty(tuple(hidden.shape))
    return torch.empty_like(hidden)
