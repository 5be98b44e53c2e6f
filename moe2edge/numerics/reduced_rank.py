"""Constants and linear maps that replace experts, in closed form. Pure functions on sums.

For token t with input ``h_t`` an expert puts out ``f(h_t)``, which counts with the gate weight
``g_t``. A replacement ``c + S F h`` of rank r makes ``sum_t g_t^2 |f(h_t) - c - S F h_t|^2`` least:
it is the reduced-rank regression of outputs on inputs (Izenman, 1975), weighted by the gate, with a
ridge on F and S together. At rank 0 it is the gate-weighted mean (MoNE,
https://arxiv.org/abs/2507.00390, takes the plain one).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from moe2edge.numerics.low_rank import compute_leading_eigenvectors

if TYPE_CHECKING:
    from torch import Tensor

# Lower bound of the ridge: a fraction of the mean diagonal, for linearly dependent inputs, and a
# constant, for inputs that never occur.
LEAST_PART, LEAST_WEIGHT = 1e-9, 1e-6
# Matrices [hidden, hidden], float64, that a fit holds at once, including LAPACK's work space.
FIT_MATRICES = 7


class RegressionSums:
    """Inputs and outputs of one expert over the tokens routed to it, in sums of float64.

    Attributes:
        tokens: number of tokens.
        mass: sum of ``g^2``.
        inputs, outputs: sums of ``g^2 h`` and ``g^2 f(h)``, [hidden].
        gram: sum of ``g^2 h h^T``, [hidden, hidden].
        cross: sum of ``g^2 h f(h)^T``, [hidden, hidden].
        squares: sum of ``g^2 ||f(h)||^2``.
    """

    def __init__(self, hidden: int, *, maps: bool = True) -> None:
        """Start with no tokens.

        Without ``maps`` there are no ``gram`` and ``cross``: constants need none.
        """
        self._maps = maps
        self.tokens, self.mass, self.squares = 0, 0.0, 0.0
        self.inputs, self.outputs = (torch.zeros(hidden, dtype=torch.float64) for _ in range(2))
        side = hidden if maps else 0
        self.gram, self.cross = (torch.zeros(side, side, dtype=torch.float64) for _ in range(2))

    def add(self, inputs: Tensor, outputs: Tensor, weights: Tensor) -> None:
        """Add inputs and outputs [n, hidden] with gate weights [n]."""
        x, y, g = inputs.double(), outputs.double(), weights.double().square()
        weighted = x * g[:, None]
        self.tokens += len(x)
        self.mass += float(g.sum())
        self.inputs += weighted.sum(0)
        self.outputs += g @ y
        if self._maps:
            self.gram += weighted.T @ x
            self.cross += weighted.T @ y
        self.squares += float(g @ y.square().sum(1))


def estimate_regression_bytes(hidden: int, experts: int, *, maps: bool) -> int:
    """Estimate the bytes of `RegressionSums` of several experts and of one `fit_reduced_rank`."""
    return 8 * hidden * (2 * experts * (hidden * maps + 1) + FIT_MATRICES * hidden * maps)


@dataclass(frozen=True)
class ReducedRankFit:
    """Replacement ``constant + second @ first @ h``, float64.

    Attributes:
        constant: [hidden].
        first, second: [rank, hidden] and [hidden, rank].
        residual: ``sum g^2 ||f - fit||^2`` over the tokens that it was fitted on.
    """

    constant: Tensor
    first: Tensor
    second: Tensor
    residual: float


@dataclass(frozen=True)
class Size:
    """Bytes of an expert and of its possible replacements.

    Attributes:
        expert: bytes of the expert as it is.
        constant: bytes of a constant.
        rank: bytes that each rank of a linear map adds to a constant.
    """

    expert: int
    constant: int
    rank: int

    @property
    def most(self) -> int:
        """Highest rank whose replacement is smaller than the expert."""
        return (self.expert - self.constant - 1) // self.rank


def compute_gains(sums: RegressionSums, ridge: float) -> tuple[float, Tensor]:
    """Compute the loss of a constant, and by how much each further rank lowers it, falling.

    Args:
        sums: sums of the expert.
        ridge: as in `fit_reduced_rank`.

    Returns:
        ``sum g^2 ||f - c||^2``, and float64 [hidden]: the ridged loss of each rank less that of
        the next.
    """
    _, spread = _fit_constant(sums)
    _, cross, full = _fit_full_rank(sums, ridge)
    values = torch.linalg.eigvalsh(cross.T @ full).flip(0).clamp(min=0)
    return spread, values


def allocate_ranks(
    spreads: Sequence[float], falls: Sequence[Tensor], size: Size, budget: int, step: int = 1
) -> list[int | None]:
    """Choose what each expert of a layer becomes, so that the loss is least within a budget.

    With a price for bytes, each expert decides for itself: it takes the ranks that lower the loss
    by more than they cost, or stays. The lowest price at which all fit into the budget is found by
    bisection; experts for which both cost the same at that price stay as long as they fit, and the
    rest of the budget buys the ranks that gain most. The result is optimal except for what the
    bytes of one expert could have bought. At least one expert stays.

    Args:
        spreads: loss of a constant for each expert, from `compute_gains`.
        falls: gains of the ranks of each expert, likewise.
        size: bytes of an expert and of its replacements.
        budget: bytes of the layer.
        step: ranks are multiples of it.

    Returns:
        For each expert the rank of its replacement; None: it stays.
    """
    if step > 1:
        counts = (len(gains) // step for gains in falls)
        summed = (
            gains[: n * step].reshape(n, step).sum(1)
            for n, gains in zip(counts, falls, strict=True)
        )
        steps = Size(size.expert, size.constant, step * size.rank)
        ranks = allocate_ranks(spreads, list(summed), steps, budget)
        return [None if rank is None else step * rank for rank in ranks]
    falls = [gains[: size.most] for gains in falls]
    totals = [torch.cat([gains.new_zeros(1), gains.cumsum(0)]) for gains in falls]

    def decide(price: float) -> list[int | None]:
        ranks: list[int | None] = []
        saved = []
        for spread, gains, total in zip(spreads, falls, totals, strict=True):
            rank = int((gains > price * size.rank).sum())
            cost = spread - float(total[rank]) + price * (size.constant + rank * size.rank)
            saved.append(price * size.expert - cost)
            ranks.append(rank if saved[-1] > 0 else None)
        if None not in ranks:
            ranks[min(range(len(ranks)), key=lambda j: (saved[j], -j))] = None
        return ranks

    low, high = 0.0, 1.0
    while _count_bytes(decide(high), size) > budget and high < 1e300:
        low, high = high, high * 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _count_bytes(decide(middle), size) > budget else (low, middle)
    ranks = decide(high)
    for j, rank in enumerate(decide(low)):
        richer = [*ranks[:j], rank, *ranks[j + 1 :]]
        if _count_bytes(richer, size) <= budget and None in richer:
            ranks = richer
    return _spend_remaining(ranks, falls, size, budget)


def _spend_remaining(
    ranks: list[int | None], falls: Sequence[Tensor], size: Size, budget: int
) -> list[int | None]:
    """Spend what is left of a budget on the ranks that lower the loss most."""
    left = budget - _count_bytes(ranks, size)
    while left >= size.rank:
        following = [
            (float(falls[j][rank]), -j)
            for j, rank in enumerate(ranks)
            if rank is not None and rank < len(falls[j])
        ]
        if not following or max(following)[0] <= 0:
            break
        j = -max(following)[1]
        ranks[j] = (ranks[j] or 0) + 1
        left -= size.rank
    return ranks


def _count_bytes(ranks: Sequence[int | None], size: Size) -> int:
    return sum(size.expert if rank is None else size.constant + rank * size.rank for rank in ranks)


def fit_reduced_rank(sums: RegressionSums, rank: int, ridge: float) -> ReducedRankFit:
    """Fit the best replacement of a given rank.

    With inputs and outputs centred, ``H`` the ridged Gram matrix and ``C`` the cross products, the
    map of full rank is ``B = H^-1 C``; of rank r it is ``B V V^T`` with V the first r eigenvectors
    of ``C^T H^-1 C``, which are the right singular vectors of ``H^(1/2) B``.

    Args:
        sums: sums of the expert.
        rank: 0 for a constant.
        ridge: fraction of the mean diagonal of the Gram matrix that is added to it.
    """
    (mean_x, mean_y), spread = _fit_constant(sums)
    if not rank:
        empty = mean_y.new_empty(0, len(mean_x))
        return ReducedRankFit(mean_y, empty, empty.T, spread)
    gram, cross, full = _fit_full_rank(sums, ridge)
    _, second = compute_leading_eigenvectors(cross.T @ full, rank)
    first = (full @ second).T
    # trace of (Y - X F^T S^T)^T (Y - X F^T S^T), in which S has orthonormal columns.
    gained = 2 * float((first @ cross * second.T).sum()) - float((first @ gram * first).sum())
    return ReducedRankFit(
        mean_y - second @ (first @ mean_x), first, second, max(0.0, spread - gained)
    )


def _fit_constant(sums: RegressionSums) -> tuple[tuple[Tensor, Tensor], float]:
    """Return the means of inputs and of outputs, and ``sum g^2 ||f - mean||^2``."""
    mass = max(sums.mass, torch.finfo(torch.float64).tiny)
    mean_x, mean_y = sums.inputs / mass, sums.outputs / mass
    return (mean_x, mean_y), max(0.0, sums.squares - mass * float(mean_y @ mean_y))


def _fit_full_rank(sums: RegressionSums, ridge: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the centred Gram matrix, the cross products C, and ``H^-1 C``."""
    (mean_x, mean_y), _ = _fit_constant(sums)
    gram = sums.gram - sums.mass * torch.outer(mean_x, mean_x)
    cross = sums.cross - sums.mass * torch.outer(mean_x, mean_y)
    ridged = gram.clone()
    ridged.diagonal().add_(max(ridge, LEAST_PART) * gram.diagonal().mean() + LEAST_WEIGHT)
    return gram, cross, torch.cholesky_solve(cross, torch.linalg.cholesky(ridged))
