"""Shared bases with low-rank factors in the place of experts. Pure functions on tensors.

LightMoE (https://arxiv.org/abs/2603.12645) replaces the less important experts of a layer in
groups: a group shares a base, the mean of its experts weighted by their importance, and each member
has factors of low rank of its own. There is no public code, and the paper's correction of the
threshold by depth is not known to us; `depth_factors` is ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from moe2edge.spectral import leading

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.layers import MoELayer
    from moe2edge.walk import Seen

# How far a layer's threshold may be from the common one.
CORRECTION = (0.8, 1.2)
# Of a Gram matrix, the part of its mean diagonal that is added to it; and what is added anyway.
RIDGE, LEAST = 0.01, 1e-6


# ---- what a walk gathers -------------------------------------------------------------------------


@dataclass(frozen=True)
class RouterOutputs:
    """What routers put out, per MoE block by its origin.

    Attributes:
        norm: mean over tokens of the norm of the logits.
        gram: float64 [E, E], sum over tokens of products of logits.
    """

    norm: Mapping[int, float]
    gram: Mapping[int, Tensor]


class RouterOutputObserver:
    """Gathers `RouterOutputs`."""

    def __init__(self) -> None:
        self._norm: dict[int, float] = {}
        self._gram: dict[int, Tensor] = {}
        self._tokens: dict[int, int] = {}

    def see(self, seen: Seen) -> None:
        """Add one batch."""
        if seen.routing is None:
            return
        routing, key = seen.routing, seen.block.origin
        logits = routing.logits.double()
        self._norm[key] = self._norm.get(key, 0.0) + float(logits.norm(dim=1).sum())
        self._gram[key] = self._gram.get(key, 0) + logits.T @ logits
        self._tokens[key] = self._tokens.get(key, 0) + len(logits)

    def fact(self) -> RouterOutputs:
        """The sums."""
        norms = {key: total / self._tokens[key] for key, total in self._norm.items()}
        return RouterOutputs(norms, self._gram)


# ---- which experts -------------------------------------------------------------------------------


def depth_factors(norms: Sequence[float], strength: float) -> list[float]:
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


def order(importance: Sequence[Sequence[float]], factors: Sequence[float]) -> list[tuple[int, int]]:
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
class Cost:
    """Bytes in a layer.

    Attributes:
        expert: of an expert, or of a base.
        factors: of what a replaced expert has of its own.
        group: experts to a base; None: there are no bases.
    """

    expert: int
    factors: int
    group: int | None

    def groups(self, candidates: int) -> int:
        """How many bases so many candidates have."""
        return 0 if self.group is None else -(-candidates // self.group)

    def saved(self, replaced: int) -> int:
        """Bytes that are saved by replacing so many experts."""
        # A single one has nobody to share a base with.
        if not replaced or (self.group is not None and replaced < 2):
            return 0
        return (replaced - self.groups(replaced)) * self.expert - replaced * self.factors

    def replaced(self, candidates: int) -> int:
        """How many of so many candidates are replaced: as many as save most.

        The first expert of a new group adds a base, and saves nothing until others join.
        """
        return max(range(candidates + 1), key=lambda n: (self.saved(n), -n))


def most_saved(costs: Sequence[Cost], sizes: Sequence[int]) -> int:
    """Bytes that are saved where every layer, of so many candidates, saves as many as it can."""
    return sum(c.saved(c.replaced(size)) for c, size in zip(costs, sizes, strict=True))


def choose(
    ordered: Sequence[tuple[int, int]], costs: Sequence[Cost], whole: int, budget: int
) -> list[list[int]]:
    """Experts to replace, by layer: as few, in that order, as it takes to meet the budget.

    The threshold rises from expert to expert instead of being bisected, which is exact and takes
    no time.

    Args:
        ordered: as by `order`.
        costs: by layer.
        whole: bytes of all experts.
        budget: bytes that there may be; `most_saved` says what can be.

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
        saved[layer] = cost.saved(cost.replaced(count))
    return [sorted(own[: cost.replaced(len(own))]) for own, cost in zip(chosen, costs, strict=True)]


# ---- groups --------------------------------------------------------------------------------------


def cosines(gram: Tensor) -> Tensor:
    """Cosines between vectors of which ``gram`` [n, n] holds the products."""
    norms = gram.diagonal().clamp(min=1e-300).sqrt()
    return gram / norms[:, None] / norms


def group(
    candidates: Sequence[int], importance: Sequence[float], similarity: Tensor, groups: int
) -> list[list[int]]:
    """Groups of experts: the most important ones, each with those most similar to it.

    Args:
        candidates: experts of a layer.
        importance: of all experts of the layer.
        similarity: [E, E].
        groups: how many.

    Returns:
        Of each group the representative, then the others in rising order.
    """
    ranked = sorted(candidates, key=lambda j: (-importance[j], j))
    found = [[j] for j in ranked[:groups]]
    for j in sorted(ranked[groups:]):
        nearest = max(range(groups), key=lambda g: (float(similarity[j, found[g][0]]), -g))
        found[nearest].append(j)
    return found


# ---- numbers -------------------------------------------------------------------------------------


def weighted_mean(matrices: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Mean of matrices, float32; where no weight is above 0, of equal weights."""
    total = sum(weights)
    shares = [w / total for w in weights] if total > 0 else [1 / len(matrices)] * len(matrices)
    out = torch.zeros(matrices[0].shape, dtype=torch.float32)
    for matrix, share in zip(matrices, shares, strict=True):
        out.add_(matrix.float(), alpha=share)
    return out


def nbytes(layer: MoELayer) -> int:
    """Bytes of the products of inputs of all experts of a layer, and of one `low_rank` besides."""
    width, hidden = layer.experts[0].gate.shape
    # In float64: ridged products, their root, the matrix and what it is multiplied to; and the
    # smaller Gram matrix with what LAPACK makes of it.
    work = 2 * max(width, hidden) ** 2 + 3 * width * hidden + 3 * min(width, hidden) ** 2
    added = 4 * max(width, hidden) ** 2  # products of one batch
    return 4 * len(layer.experts) * (width**2 + hidden**2) + added + 8 * work


def low_rank(difference: Tensor, gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The matrix of a rank that is nearest in what it puts out: (first, second), float32.

    With ``G = L L^T`` the Gram matrix of inputs, ``|| X (D - S F)^T ||`` is least for the truncated
    singular value decomposition ``U s V^T`` of ``D L``, which is found from the smaller of its
    Gram matrices: ``S F = U U^T D``, or ``D L V V^T L^-1``. Each row of F is as long as its column
    of S, however many tokens there were, since training takes steps of one size for all numbers.

    Args:
        difference: D, [out, in].
        gram: G, [in, in], of the inputs; a part of its mean diagonal is added.
        rank: of the result.

    Returns:
        F [rank, in] and S [out, rank].
    """
    outs, ins = difference.shape
    ridged, whole = gram.to(torch.float64, copy=True), difference.double()
    ridged.diagonal().add_(RIDGE * float(gram.diagonal().mean()) + LEAST)
    if outs <= ins:
        _, second = leading(whole @ ridged @ whole.T, rank)
        return _balanced(second.T @ whole, second)
    half = torch.linalg.cholesky(ridged)
    scaled = whole @ half
    _, right = leading(scaled.T @ scaled, rank)
    first = torch.linalg.solve_triangular(half, right.T, upper=False, left=False)
    return _balanced(first, scaled @ right)


def _balanced(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Factors with the same product, each row of one as long as the column of the other."""
    ins, outs = first.norm(dim=1), second.norm(dim=0)
    root = (outs / ins.clamp(min=LEAST * LEAST)).sqrt()
    # Of ranks that the matrix does not have, one side may be nothing.
    root = torch.where((ins > 0) & (outs > 0), root, 1.0)
    return (first * root[:, None]).float(), (second / root).float()


def untrained(
    shape: tuple[int, int], rank: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Factors whose product is zero, to be trained: the second one is.

    Args:
        shape: of the matrix, [out, in].
        rank: of the factors.
        generator: of the numbers of the first, uniform as those of LoRA are.
    """
    outs, ins = shape
    first = (torch.rand(rank, ins, generator=generator) * 2 - 1) / ins**0.5
    return first, torch.zeros(outs, rank)
