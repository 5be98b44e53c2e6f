"""The work of a solver on one block: what all kinds of blocks have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch

from moe2edge.model.block import Block
from moe2edge.model.experts import Dense
from moe2edge.model.layers import MoELayer
from moe2edge.model.model import Model
from moe2edge.model.roles import list_quantizable
from moe2edge.model.weights import Weight
from moe2edge.pipeline.blockwise_report import SolverProgress, describe_coverage
from moe2edge.pipeline.solver import Batches, GroupSolver, MatrixGroup, Solved
from moe2edge.runtime.decoder_blocks import load_finite
from moe2edge.runtime.memory import Memory

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.numerics.grid import Quantized
    from moe2edge.runtime.mixed_experts import TiedExperts

# Intermediate activations of an expert that are computed at once; and the most that are kept for a
# second use, for all experts that are solved together.
CHUNK_NUMBERS, KEPT_NUMBERS = 1 << 24, 1 << 25


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
            self.solve_unseen(role)
        return self.numbers

    def solve_unseen(self, role: str) -> None:
        """Solve a matrix of whose inputs nothing is known."""
        self.solve(role, [self.make_group([role], lambda: iter(()), 0)])

    def solve_experts(self, layer: MoELayer, mlps: Sequence[Mlp], out: Tensor) -> None:
        """Solve the stored experts of a layer, a few at a time, and add what they put out."""
        counts = [len(mlp.tokens) for mlp in mlps]
        self.tally.add(Solved({}, (describe_coverage(self.block, counts),)))
        size = self._count_together(layer.experts[0])
        for at in range(0, len(mlps), size):
            self.solve_mlps(mlps[at : at + size], out)

    def solve_mlps(self, mlps: Sequence[Mlp], out: Tensor) -> None:
        """Solve MLPs of one shape, and add their outputs to ``out`` [tokens, hidden]."""
        kinds, parts = [mlp.kind for mlp in mlps], mlps[0].parts
        what = kinds[0] if len(kinds) == 1 else f"{kinds[0]} to {kinds[-1].rpartition('.')[2]}"
        self.solve(
            f"{what}: {', '.join(parts)}",
            [
                self.make_group(
                    [f"{m.kind}.{part}" for part in parts],
                    m.inputs,
                    len(m.tokens),
                    everyone=m.everyone,
                )
                for m in mlps
            ],
        )
        insides = [
            m.make_inside([self.load_matrix(f"{m.kind}.{part}", self.dtype) for part in parts])
            for m in mlps
        ]
        width = self.weights[f"{kinds[0]}.up"].shape[0]
        own = [
            KeptBatches(inside(m.inputs, routed=True), len(m.tokens) * width * len(mlps))
            for m, inside in zip(mlps, insides, strict=True)
        ]
        self.solve(
            f"{what}: down",
            [
                self.make_group(
                    (f"{m.kind}.down",),
                    kept,
                    len(m.tokens),
                    everyone=None if m.everyone is None else inside(m.everyone, routed=False),
                )
                for m, inside, kept in zip(mlps, insides, own, strict=True)
            ],
        )
        for m, kept in zip(mlps, own, strict=True):
            compute = m.make_outputs(self.load_matrix(f"{m.kind}.down", self.dtype))
            at = 0
            for x, weights in kept():
                y = compute(x, at)
                y = y if weights is None else y.mul_(weights[:, None])
                tokens = m.tokens[at : at + len(x)].to(out.device)
                out.index_add_(0, tokens, y.to(out.device))
                at += len(x)

    @abstractmethod
    def run(self, hidden: Tensor) -> Mapping[str, Quantized | Tensor]:
        """Solve the block for ``hidden`` [samples, length, hidden], which becomes its output."""

    def _count_together(self, expert: Dense) -> int:
        """Return the number of experts that are solved at once within the memory."""
        room = self.memory.group_bytes
        if self.device.type == "cuda":
            # On a GPU a loop over columns takes as long for one expert as for many.
            room = count_gpu_bytes(self.device) // 2
        return max(1, room // estimate_mlp_bytes(self.solver, expert))


class Inside(Protocol):
    """Computes what ``down`` of an MLP gets from what the MLP gets."""

    def __call__(self, inputs: Batches, *, routed: bool) -> Batches:
        """Return it for inputs in their order: those of the tokens it runs for, or of others."""
        ...


@dataclass(frozen=True)
class Mlp(ABC):
    """One MLP among those that are solved together.

    Attributes:
        kind: first part of the roles of its matrices.
        tokens: the tokens that it runs for, int64 [n], in rising order.
        inputs: their inputs, with the weight of its output for each.
        everyone: inputs of all tokens, as if it ran for all; None: it does.
        parts: its matrices before ``down``.
    """

    kind: str
    tokens: Tensor
    inputs: Batches
    everyone: Batches | None
    parts: tuple[str, ...]

    @abstractmethod
    def make_inside(self, matrices: Sequence[Tensor]) -> Inside:
        """Return how to compute what ``down`` gets, a few tokens at a time, with ``matrices``."""

    @abstractmethod
    def make_outputs(self, down: Tensor) -> Callable[[Tensor, int], Tensor]:
        """Return how to compute outputs, float32, from what ``down`` gets from some token on."""


@dataclass(frozen=True)
class LowRank:
    """Factors of the rows that use a stored expert.

    Attributes:
        experts: tied experts of the layer.
        which: tied expert of each token of the stored expert, int64 [n]; -1: it has no factors.
    """

    experts: TiedExperts
    which: Tensor

    def __call__(self, part: str, at: int, x: Tensor) -> Tensor:
        """Return what factors add to products of ``part`` for tokens from ``at`` on, float32."""
        which = self.which[at : at + len(x)].to(x.device)
        outs = getattr(self.experts, f"{part}_second").shape[1]
        out = x.new_zeros(len(x), outs, dtype=torch.float32)
        has = which >= 0
        out[has] = self.experts.apply_factors(part, which[has], x[has].float())
        return out


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


def make_like(hidden: Tensor, memory: Memory, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a tensor without numbers in the shape and on the device of ``hidden``."""
    if hidden.device.type == "cpu":
        return memory.empty(tuple(hidden.shape), dtype)
    return torch.empty_like(hidden, dtype=dtype)
