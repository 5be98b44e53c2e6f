"""Progress of a solver's walk: its place, its speed and the error so far."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING

from moe2edge.model.block import Block
from moe2edge.model.model import Model
from moe2edge.model.roles import list_quantizable
from moe2edge.pipeline.solver import Solved
from moe2edge.storage.journal import BlockResult

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.numerics.grid import Quantized
    from moe2edge.progress import Advance


def describe_coverage(block: Block, counts: Sequence[int]) -> str:
    """Describe how many tokens the experts of a block saw."""
    return (
        f"block {block.index}: {len(counts)} experts saw {min(counts):,} to {max(counts):,} tokens "
        f"each, median {round(median(counts)):,}"
    )


class SolverProgress:
    """Progress and results of a walk, reported while it runs."""

    def __init__(self, label: str, advance: Advance, model: Model, tokens: int) -> None:
        """Start at the first block.

        Args:
            label: name of the work in progress lines.
            advance: reports progress.
            model: the model.
            tokens: number of tokens of the walk; 0: it looks at none.
        """
        self.changed: list[str] = []
        self.notes: list[str] = []
        self._label, self._advance, self._model = label, advance, model
        self._tokens = tokens
        self._sizes = [sum(1 for _ in list_quantizable(block)) for block in model.blocks]
        self._done = 0
        self._loss = self._reference = 0.0
        self._begun = self._seconds = 0.0
        self._blocks = 0
        self._solved: list[Solved] = []
        self._block: Block | None = None

    def add_known(self, done: BlockResult) -> None:
        """Count a block that was solved by an earlier run."""
        self._done += len(done.changed)
        self._count(done)

    def begin(self, block: Block) -> None:
        """Begin a block."""
        self._block, self._begun = block, time.perf_counter()
        self._solved = []

    def report(self, what: str) -> None:
        """Report the place of the work: the block, and ``what`` in it."""
        assert self._block is not None
        detail = f"block {self._block.index + 1} of {len(self._sizes)}, {what}"
        if self._tokens and self._blocks:
            # The speed is that of a pass through one block.
            detail += f", {self._tokens * self._blocks / self._seconds:,.0f} tokens/s"
        if self._reference:
            detail += f", error {(self._loss / self._reference) ** 0.5:.2%}"
        # Norms and routers that change with the matrices count as well, so it may exceed the sum.
        self._advance(self._label, min(self._done, sum(self._sizes)), sum(self._sizes), detail)

    def add(self, solved: Solved) -> None:
        """Count solved matrices."""
        self._done += len(solved.numbers)
        self._solved.append(solved)

    def end(self, block: Block, numbers: Mapping[str, Quantized | Tensor]) -> BlockResult:
        """End a block, and return what is kept of it for the report."""
        self._seconds += time.perf_counter() - self._begun
        self._blocks += 1
        done = BlockResult(
            tuple(self._model.disk_name(block, role) for role in numbers),
            tuple(note for solved in self._solved for note in solved.notes),
            (sum(s.loss[0] for s in self._solved), sum(s.loss[1] for s in self._solved)),
        )
        self._count(done)
        return done

    def _count(self, done: BlockResult) -> None:
        self.changed += done.changed
        self.notes += done.notes
        self._loss += done.loss[0]
        self._reference += done.loss[1]

    def finish(self) -> None:
        """Report that all is done."""
        error = f"error {(self._loss / self._reference) ** 0.5:.2%}" if self._reference else ""
        self._advance(self._label, sum(self._sizes), sum(self._sizes), error)
