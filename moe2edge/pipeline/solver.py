"""Solvers of a slimming pass, and the groups of matrices that they solve."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import (
    TYPE_CHECKING,
    Annotated,
    Protocol,
    runtime_checkable,
)

from pydantic import Field

from moe2edge.model.block import Block
from moe2edge.model.weights import Weight

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from moe2edge.calibration.observation import BlockTrace
    from moe2edge.numerics.grid import Quantized
    from moe2edge.numerics.scheme import Pattern


class Solver(Protocol):
    """The work of a slimming pass during its walk."""

    def observe(self, trace: BlockTrace) -> None:
        """Add the trace of one batch of the current block."""
        ...

    def solve(self, block: Block) -> Solved:
        """Compute new numbers of the current block; then forget the block."""
        ...


# Yields inputs [n, in] of matrices, with the weight of each token [n] or None.
Batches = Callable[[], Iterator[tuple["Tensor", "Tensor | None"]]]


@dataclass(frozen=True)
class MatrixGroup:
    """Matrices of a block that share their input.

    Attributes:
        weights: by role, unquantized.
        batches: yields inputs [n, in] with the weight of each token in its expert's output [n],
            None where there is no router; a group is asked for them as often as one likes.
        tokens: number of tokens of all batches; 0 if the walk has none.
        everyone: like ``batches``, of all tokens, whether or not they are routed here; None where
            that is the same.
    """

    weights: Mapping[str, Weight]
    batches: Batches
    tokens: int
    everyone: Batches | None = None

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the matrices."""
        return tuple(weight.shape for weight in self.weights.values())

    def is_under_calibrated(self, least: int) -> bool:
        """Return whether it belongs to an expert that saw fewer than ``least`` tokens."""
        return self.everyone is not None and self.tokens < least

    def describe_under_calibrated(self, block: Block, least: int, what: str) -> list[str]:
        """Describe an under-calibrated expert, once: with the first of its groups."""
        kind, _, part = next(iter(self.weights)).rpartition(".")
        if part == "down":
            return []
        return [
            f"block {block.index}: expert {kind.partition('.')[2]} saw {self.tokens} tokens, fewer "
            f"than {least}: {what}"
        ]


@dataclass(frozen=True)
class Solved:
    """Results of a solver for some groups.

    Attributes:
        numbers: by role.
        notes: remarks for the user.
        loss: squared error of the outputs on the tokens that were seen, or of the weights where
            there are no tokens, and the squared size that it is relative to; zeros: not known.
        pattern: which of the numbers are zero and stay so; None: the earlier pattern holds.
    """

    numbers: Mapping[str, Quantized | Tensor]
    notes: tuple[str, ...] = ()
    loss: tuple[float, float] = (0.0, 0.0)
    pattern: Pattern | None = None


@runtime_checkable
class GroupSolver(Protocol):
    """Solves groups of matrices in the order of computation.

    The inputs of a group come from what is before it as solved, in earlier blocks and in its own.

    Attributes:
        propagate: whether that is so; otherwise inputs come from the model as it was.
        device: of the inputs of groups and of the work; numbers are returned on the CPU.
        dtype: in which inputs are multiplied with the matrices that are before the next one.
    """

    propagate: bool

    @property
    def device(self) -> torch.device:
        """The CPU, unless a solver says otherwise."""
        import torch

        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """Full precision, unless a solver says otherwise."""
        import torch

        return torch.float32

    def solve_alone(self, block: Block) -> Mapping[str, Quantized]:
        """Compute numbers, by role, of matrices outside of groups, which need no inputs."""
        return {}

    def nbytes(self, shapes: Sequence[tuple[int, ...]]) -> int:
        """Count the bytes of memory that solving one group of these shapes takes."""
        ...

    def solve(self, block: Block, groups: Sequence[MatrixGroup]) -> Solved:
        """Solve groups of equal shapes, together if that is faster."""
        ...


@dataclass(frozen=True)
class EndSolver:
    """Solver of matrices outside of blocks.

    Attributes:
        early: names in ``Model.rest`` of those that are solved before the walk, which sees them so.
        late: names of those that are solved behind it.
    """

    early: tuple[str, ...] = ()
    late: tuple[str, ...] = ()

    def nbytes(self, weight: Weight) -> int:
        """Estimate the bytes of memory that solving one matrix takes."""
        raise NotImplementedError

    def solve(self, name: str, weight: Weight, inputs: Batches | None) -> Solved:
        """Solve one matrix; its numbers are those of ``name``.

        Args:
            name: its name in ``Model.rest``.
            weight: the matrix.
            inputs: yields its inputs, if it is the head; None: the walk has no tokens, or it is
                not over.
        """
        raise NotImplementedError


# Options of passes that look at the tokens of each expert.
GateWeighted = Annotated[bool, Field(description="weight each token by its gate weight")]
MinTokens = Annotated[
    int,
    Field(ge=0, description="an expert with fewer routed tokens is under-calibrated; see starved"),
]
