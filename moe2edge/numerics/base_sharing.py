"""Choice of the experts that share a base, under a budget of bytes. Pure functions.

LightMoE (https://arxiv.org/abs/2603.12645) replaces the less important experts of a layer in
groups: a group shares a base, the mean of its experts weighted by their importance, and each tied
expert has low-rank factors of its own. There is no public code, and the paper's correction of the
threshold by depth is not known to us; `compute_depth_factors` is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

# Bounds of a layer's threshold, relative to the common one.
CORRECTION = (0.8, 1.2)


# ---- choice of experts ---------------------------------------------------------------------------


def compute_depth_factors(norms: Sequence[float], strength: float) -> list[float]:
    """Compute the factor of each layer's threshold from the norm of its router logits.

    Logits grow with depth, and shallow layers are to lose more experts. LightMoE corrects by an
    exponential of the norm, clamped to 0.8 to 1.2, and does not say which one. Ours is
    ``exp(- strength * (norm - mean) / deviation)``.

    Args:
        norms: mean norm of the router's logits, by layer.
        strength: 0 for the same threshold in all layers.
    """
    values = torch.tensor(norms, dtype=torch.float64)
    deviation = values.std(correction=0).clamp(min=1e-12)
    exponent = -strength * (values - values.mean()) / deviation
    return exponent.exp().clamp(*CORRECTION).tolist()


def order_candidates(
    importance: Sequence[Sequence[float]], factors: Sequence[float]
) -> list[tuple[int, int]]:
    """Order all experts as (layer, expert) as a rising threshold takes them.

    An expert is under the threshold ``t`` if its share of the importance of its layer is below
    ``t`` times the layer's factor.
    """
    ranked = []
    for layer, (scores, factor) in enumerate(zip(importance, factors, strict=True)):
        total = sum(scores) or 1.0
        ranked += [(value / total / factor, layer, expert) for expert, value in enumerate(scores)]
    return [(layer, expert) for _, layer, expert in sorted(ranked)]


@dataclass(frozen=True)
class SharingCost:
    """Bytes of experts, bases and factors in a layer.

    Attributes:
        expert: bytes of an expert, and of a base.
        factors: bytes of the low-rank factors of one tied expert.
        group: experts that share a base; None: there are no bases.
    """

    expert: int
    factors: int
    group: int | None

    def count_groups(self, candidates: int) -> int:
        """Return the number of bases for this many replaced experts."""
        return 0 if self.group is None else -(-candidates // self.group)

    def compute_saved(self, replaced: int) -> int:
        """Return the bytes that replacing this many experts saves."""
        # A single expert has no other to share a base with.
        if not replaced or (self.group is not None and replaced < 2):
            return 0
        return (replaced - self.count_groups(replaced)) * self.expert - replaced * self.factors

    def choose_count(self, candidates: int) -> int:
        """Return how many of this many candidates to replace: the number that saves most.

        The first expert of a new group adds a base and saves nothing until others join.
        """
        return max(range(candidates + 1), key=lambda n: (self.compute_saved(n), -n))


def compute_most_saved(costs: Sequence[SharingCost], sizes: Sequence[int]) -> int:
    """Compute the bytes saved if every layer replaces as many candidates as saves most."""
    return sum(c.compute_saved(c.choose_count(size)) for c, size in zip(costs, sizes, strict=True))


def choose_replaced(
    ordered: Sequence[tuple[int, int]], costs: Sequence[SharingCost], total_bytes: int, budget: int
) -> list[list[int]]:
    """Choose the experts to replace in each layer: the fewest, in order, that meet the budget.

    The threshold rises from expert to expert instead of being bisected, which is exact and takes
    no noticeable time.

    Args:
        ordered: experts in the order of `order_candidates`.
        costs: costs of each layer.
        total_bytes: bytes of all experts before any is replaced.
        budget: bytes allowed; `compute_most_saved` says how many can be saved.

    Returns:
        For each layer the experts under the threshold, as far as replacing them saves bytes.
    """
    chosen: list[list[int]] = [[] for _ in costs]
    saved = [0] * len(costs)
    for layer, expert in ordered:
        if total_bytes - sum(saved) <= budget:
            break
        chosen[layer].append(expert)
        cost, count = costs[layer], len(chosen[layer])
        saved[layer] = cost.compute_saved(cost.choose_count(count))
    return [
        sorted(experts[: cost.choose_count(len(experts))])
        for experts, cost in zip(chosen, costs, strict=True)
    ]


# ---- bases ---------------------------------------------------------------------------------------


def average_matrices(matrices: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Average matrices by weights, float32; equally where no weight is above 0."""
    total = sum(weights)
    shares = [w / total for w in weights] if total > 0 else [1 / len(matrices)] * len(matrices)
    mean = torch.zeros(matrices[0].shape, dtype=torch.float32)
    for matrix, share in zip(matrices, shares, strict=True):
        mean.add_(matrix.float(), alpha=share)
    return mean
