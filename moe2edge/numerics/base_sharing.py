"""LightMoE: which experts share a base, under a budget of bytes. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

# How far a layer's threshold may be from the common one.
CORRECTION = (0.8, 1.2)


# ---- which experts -------------------------------------------------------------------------------


def compute_depth_factors(norms: Sequence[float], strength: float) -> list[float]:
    """What the threshold of each layer is multiplied with.

    Logits grow with depth, and shallow layers are to lose more. LightMoE corrects by an
    exponential of the norm, clamped to 0.8 to 1.2; which one, we do not know. Ours is
    ``exp(- strength * (norm - mean) / deviation)``.

    Args:
        norms: mean norm of the router's logits, by layer.
        strength: 0 for one threshold for all.
    """
    found = torch.tensor(norms, dtype=torch.float64)
    deviation = found.std(correction=0).clamp(min=1e-12)
    exponent = -strength * (found - found.mean()) / deviation
    return exponent.exp().clamp(*CORRECTION).tolist()


def order_candidates(
    importance: Sequence[Sequence[float]], factors: Sequence[float]
) -> list[tuple[int, int]]:
    """All experts as (layer, expert), in the order in which a rising threshold takes them.

    An expert is under the threshold ``t`` if its share of the importance of its layer is below
    ``t`` times the layer's factor.
    """
    found = []
    for layer, (own, factor) in enumerate(zip(importance, factors, strict=True)):
        total = sum(own) or 1.0
        found += [(value / total / factor, layer, expert) for expert, value in enumerate(own)]
    return [(layer, expert) for _, layer, expert in sorted(found)]


@dataclass(frozen=True)
class SharingCost:
    """Bytes in a layer.

    Attributes:
        expert: of an expert, or of a base.
        factors: of what a replaced expert has of its own.
        group: experts to a base; None: there are no bases.
    """

    expert: int
    factors: int
    group: int | None

    def count_groups(self, candidates: int) -> int:
        """How many bases so many candidates have."""
        return 0 if self.group is None else -(-candidates // self.group)

    def compute_saved(self, replaced: int) -> int:
        """Bytes that are saved by replacing so many experts."""
        # A single one has nobody to share a base with.
        if not replaced or (self.group is not None and replaced < 2):
            return 0
        return (replaced - self.count_groups(replaced)) * self.expert - replaced * self.factors

    def choose_count(self, candidates: int) -> int:
        """How many of so many candidates are replaced: as many as save most.

        The first expert of a new group adds a base, and saves nothing until others join.
        """
        return max(range(candidates + 1), key=lambda n: (self.compute_saved(n), -n))


def compute_most_saved(costs: Sequence[SharingCost], sizes: Sequence[int]) -> int:
    """Bytes that are saved where every layer, of so many candidates, saves as many as it can."""
    return sum(c.compute_saved(c.choose_count(size)) for c, size in zip(costs, sizes, strict=True))


def choose_replaced(
    ordered: Sequence[tuple[int, int]], costs: Sequence[SharingCost], whole: int, budget: int
) -> list[list[int]]:
    """Experts to replace, by layer: as few, in that order, as it takes to meet the budget.

    The threshold rises from expert to expert instead of being bisected, which is exact and takes
    no time.

    Args:
        ordered: as by `order_candidates`.
        costs: by layer.
        whole: bytes of all experts.
        budget: bytes that there may be; `compute_most_saved` says what can be.

    Returns:
        Of the experts under the threshold those whose replacement saves something.
    """
    chosen: list[list[int]] = [[] for _ in costs]
    saved = [0] * len(costs)
    for layer, expert in ordered:
        if whole - sum(saved) <= budget:
            break
        chosen[layer].append(expert)
        cost, count = costs[layer], len(chosen[layer])
        saved[layer] = cost.compute_saved(cost.choose_count(count))
    return [
        sorted(own[: cost.choose_count(len(own))]) for own, cost in zip(chosen, costs, strict=True)
    ]


# ---- numbers -------------------------------------------------------------------------------------


def average_matrices(matrices: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Mean of matrices, float32; where no weight is above 0, of equal weights."""
    total = sum(weights)
    shares = [w / total for w in weights] if total > 0 else [1 / len(matrices)] * len(matrices)
    out = torch.zeros(matrices[0].shape, dtype=torch.float32)
    for matrix, share in zip(matrices, shares, strict=True):
        out.add_(matrix.float(), alpha=share)
    return out
