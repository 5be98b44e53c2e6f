"""What a walk of a solver has to tell: where it is, how fast, how large the error is."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING

from moe2edge.model.model import Block, Model
from moe2edge.model.roles import list_quantizable
from moe2edge.pipeline.solver import Solved
from moe2edge.storage.journal import BlockResult

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.numerics.grid import Quantized
    from moe2edge.progress import Advance


def describe_coverage(block: Block, counts: Sequence[int]) -> str:
    """What is told of the numbers of tokens that the experts of a block saw."""
    return (
        f"block {block.index}: {len(counts)} experts saw {min(counts):,} to {max(counts):,} tokens "
        f"each, median {round(median(counts)):,}"
    )


class SolverProgress:
    """What a walk has to tell, and tells while it runs."""

    def __init__(self, label: str, advance: Advance, model: Model, tokens: int) -> None:
        """For a walk over ``tokens`` tokens; 0: it looks at none."""
        self.changed: list[str] = []
        self.notes: list[str] = []
        self._label, self._advance, self._model = label, advance, model
        self._tokens = tokens
        self._sizes = [sum(1 for _ in list_quantizable(block)) for block in model.blocks]
        self._done = 0
        self._loss = self._reference = 0.0
        self._begun = self._seconds = 0.0
        self._blocks = 0
        self._mine: list[Solved] = []
        self._block: Block | None = None

    def take(self, done: BlockResult) -> None:
        """Count a block that was solved by an earlier run."""
        self._done += len(done.changed)
        self._count(done)

    def begin(self, block: Block) -> None:
        """Turn to a block."""
        self._block, self._begun = block, time.perf_counter()
        self._mine = []

    def tell(self, what: str) -> None:
        """Tell where the work is."""
        assert self._block is not None
        detail = f"block {self._block.index + 1} of {len(self._sizes)}, {what}"
        if self._tokens and self._blocks:
            # Through a block.
            detail += f", {self._tokens * self._blocks / self._seconds:,.0f} tokens/s"
        if self._reference:
            detail += f", error {(self._loss / self._reference) ** 0.5:.2%}"
        # Norms and routers that change with the matrices count as well.
        self._advance(self._label, min(self._done, sum(self._sizes)), sum(self._sizes), detail)

    def add(self, solved: Solved) -> None:
        """Count what was solved."""
        self._done += len(solved.numbers)
        self._mine.append(solved)

    def end(self, block: Block, numbers: Mapping[str, Quantized | Tensor]) -> BlockResult:
        """What there is to tell of a block."""
        self._seconds += time.perf_counter() - self._begun
        self._blocks += 1
        done = BlockResult(
            tuple(self._model.family.disk_name(block.index, role) for role in numbers),
            tuple(note for solved in self._mine for note in solved.notes),
            (sum(s.loss[0] for s in self._mine), sum(s.loss[1] for s in self._mine)),
        )
        self._count(done)
        return done

    def _count(self, done: BlockResult) -> None:
        self.changed += done.changed
        self.notes += done.notes
        self._loss += done.loss[0]
        self._reference += done.loss[1]

    def finished(self) -> None:
        """Tell that all is done."""
        error = f"error {(self._loss / self._reference) ** 0.5:.2%}" if self._reference else ""
        self._advance(self._label, sum(self._sizes), sum(self._sizes), error)
