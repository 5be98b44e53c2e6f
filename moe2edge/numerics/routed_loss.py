"""Loss of an MoE layer that keeps some of its experts, for routers of any rule.

The notation is that of `moe2edge.numerics.subset_loss`. The rule is not known: a function chooses
among the experts that there are. Where experts that are not chosen have no influence, only
the tokens of an expert that goes choose anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from moe2edge.numerics.subset_loss import Evidence, LossTerms, TokenPart, make_mask

if TYPE_CHECKING:
    from torch import Tensor

# From scores of a router [T, E] and which experts there are, bool [E], to the chosen experts, int64
# [T, k], and their weights, float64 [T, k].
Choose = Callable[["Tensor", "Tensor"], "tuple[Tensor, Tensor]"]


@dataclass(frozen=True)
class RoutedPart(TokenPart):
    """Choices for some tokens, with the scores that they follow from.

    Attributes:
        scores: what the router computes for each expert, [T, E].
    """

    scores: Tensor


@dataclass(frozen=True)
class RoutedEvidence(Evidence):
    """The evidence of a layer whose router is asked.

    Attributes:
        choose: the router.
        local: whether experts that a token does not choose have no influence on its choice.
    """

    choose: Choose
    local: bool
    experts: int
    groups: int
    parts: tuple[RoutedPart, ...]
    missing: float
    target_square: float

    def compute_loss(self, kept: Sequence[int]) -> float:
        """See `Evidence.compute_loss`."""
        mask = make_mask(self.experts, kept)
        return self.missing + sum(float(self._measure(p, mask)[1].sum()) for p in self.parts)

    def compute_removals(self, kept: Sequence[int], gone: Sequence[int]) -> list[float]:
        """See `Evidence.compute_removals`."""
        mask = make_mask(self.experts, kept)
        found = torch.full((len(gone),), self.missing, dtype=torch.float64)
        for part in self.parts:
            ids, losses = self._measure(part, mask)
            found += losses.sum()
            for place, n in enumerate(gone):
                chosen = (ids == n).any(1) if self.local else torch.ones(len(ids), dtype=torch.bool)
                rows = chosen.nonzero()[:, 0]
                if len(rows):
                    others = mask.index_fill(0, torch.tensor([n]), value=False)
                    found[place] += self._measure_some(part, others, rows) - losses[rows].sum()
        return found.tolist()

    def _measure(self, part: RoutedPart, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return the chosen experts [T, k] and the losses [T], without `missing`, of a set."""
        ids, weights = self.choose(part.scores, mask)
        terms = LossTerms.gather(part, ids)
        return ids, terms.compute_losses(terms.compute_shift(weights[:, None]))[:, 0]

    def _measure_some(self, part: RoutedPart, mask: Tensor, rows: Tensor) -> float:
        """Return the sum of these losses over some tokens."""
        ids, weights = self.choose(part.scores[rows], mask)
        terms = LossTerms.take(part, ids, rows)
        return float(terms.compute_losses(terms.compute_shift(weights[:, None])).sum())
