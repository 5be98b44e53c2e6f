"""Choices of one router on a text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class RouterChoices:
    """Rows of one router that the tokens of a text choose.

    Attributes:
        rows: number of rows.
        by_token: rows that each token chooses; skipped choices are left out.
        entropies: entropy of the softmax of all logits of each token, in nats; empty: not known.
    """

    rows: int
    by_token: tuple[tuple[int, ...], ...]
    entropies: tuple[float, ...] = ()

    @classmethod
    def collect(cls, rows: int, ids: Tensor, logits: Tensor) -> RouterChoices:
        """Collect the choices of n tokens.

        Args:
            rows: number of rows.
            ids: int64 [n, k]; an id that is no row is a skipped choice.
            logits: of the router, [n, rows].
        """
        import torch

        chosen = tuple(tuple(row for row in one if row < rows) for one in ids.tolist())
        entropies = torch.special.entr(logits.double().softmax(-1)).sum(-1)
        return cls(rows, chosen, tuple(entropies.tolist()))

    def join(self, others: RouterChoices) -> RouterChoices:
        """Return the choices of these tokens and of others behind them."""
        tokens = (*self.by_token, *others.by_token)
        return RouterChoices(self.rows, tokens, (*self.entropies, *others.entropies))

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
