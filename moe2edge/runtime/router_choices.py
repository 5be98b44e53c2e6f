"""Choices of one router on a text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class RouterChoices:
    """Rows of one router that the tokens of a text choose.

    Attributes:
        rows: number of rows.
        by_token: rows that each token chooses; skipped choices are left out.
    """

    rows: int
    by_token: tuple[tuple[int, ...], ...]

    @classmethod
    def collect(cls, rows: int, ids: Iterable[Sequence[int]]) -> RouterChoices:
        """Collect the choices of each token; an id that is no row is a skipped choice."""
        return cls(rows, tuple(tuple(row for row in chosen if row < rows) for chosen in ids))

    @property
    def counts(self) -> list[int]:
        """Tokens that choose each row.

        >>> RouterChoices(3, ((0, 2), (2,))).counts
        [1, 0, 2]
        """
        found = [0] * self.rows
        for chosen in self.by_token:
            for row in chosen:
                found[row] += 1
        return found
