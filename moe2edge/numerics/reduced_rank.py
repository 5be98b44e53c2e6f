"""Constants and linear maps in the place of experts, in closed form. Pure functions on sums.

An expert f answers token t, whose input is ``h_t``, and its output counts with the gate weight
``g_t``. A substitute ``c + S F h`` of rank r makes ``sum_t g_t^2 |f(h_t) - c - S F h_t|^2`` least:
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

# Of the ridge at least: a part of the mean diagonal, for inputs that depend on one another; and for
# inputs that never occur.
LEAST_PART, LEAST_WEIGHT = 1e-9, 1e-6
# [hidden, hidden], float64, that a fit holds at once: what it makes of the sums, and LAPACK's own.
FIT_MATRICES = 7


class RegressionSums:
    """What one expert was asked and put out, in sums of float64.

    Attributes:
        tokens: how many it was asked.
        mass: sum of ``g^2``.
        inputs, outputs: sums of ``g^2 h`` and ``g^2 f(h)``, [hidden].
        gram: sum of ``g^2 h h^T``, [hidden, hidden].
        cross: sum of ``g^2 h f(h)^T``, [hidden, hidden].
        squares: sum of ``g^2 ||f(h)||^2``.
    """

    def __init__(self, hidden: int, *, maps: bool = True) -> None:
        """Nothing seen yet; without ``maps`` there are no ``gram`` and ``cross``, for constants."""
        self._maps = maps
        self.tokens, self.mass, self.squares = 0, 0.0, 0.0
        self.inputs, self.outputs = (torch.zeros(hidden, dtype=torch.float64) for _ in range(2))
        side = hidden if maps else 0
        self.gram, self.cross = (torch.zeros(side, side, dtype=torch.float64) for _ in range(2))

    def add(self, inputs: Tensor, outputs: Tensor, weights: Tensor) -> None:
        """Take in inputs and outputs [n, hidden] with gate weights [n]."""
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
    """Bytes of `RegressionSums` of so many experts, and of the matrices that one `fit_reduced_rank` takes besides."""
    return 8 * hidden * (2 * experts * (hidden * maps + 1) + FIT_MATRICES * hidden * maps)


@dataclass(frozen=True)
class ReducedRankFit:
    """A substitute ``constant + second @ first @ h``, float64.

    Attributes:
        constant: [hidden].
        first, second: [rank, hidden] and [hidden, rank].
        residual: ``sum g^2 ||f - fit||^2``, of the tokens that it was fitted on.
    """

    constant: Tensor
    first: Tensor
    second: Tensor
    residual: float


@dataclass(frozen=True)
class Size:
    """Bytes of what an expert can become.

    Attributes:
        expert: as it is.
        constant: of a constant.
        rank: of each rank of a linear map besides.
    """

    expert: int
    constant: int
    rank: int

    @property
    def most(self) -> int:
        """Highest rank that is smaller than the expert."""
        return (self.expert - self.constant - 1) // self.rank


def compute_gains(sums: RegressionSums, ridge: float) -> tuple[float, Tensor]:
    """The ridged loss of a constant, and by how much each further rank lowers it, falling.

    Args:
        sums: of the expert.
        ridge: as of `fit_reduced_rank`.

    Returns:
        ``sum g^2 ||f - c||^2``, and float64 [hidden].
    """
    _, spread = _constant(sums)
    _, cross, full = _regression(sums, ridge)
    values = torch.linalg.eigvalsh(cross.T @ full).flip(0).clamp(min=0)
    return spread, values


def allocate_ranks(
    spreads: Sequence[float], falls: Sequence[Tensor], size: Size, budget: int, step: int = 1
) -> list[int | None]:
    """What each expert of a layer becomes, so that as little as can be is missed within a budget.

    With a price for bytes, each expert decides for itself: ranks that lower the loss by more than
    they cost, or to stay. The lowest price at which all fit into the budget is found by bisection;
    those for whom it is all one at that price stay as long as they fit, and what is left buys the
    ranks that gain most. That is the best but for what one expert's bytes would have bought. One
    expert stays.

    Args:
        spreads: of `compute_gains`, of each expert.
        falls: of `compute_gains`, likewise.
        size: in bytes.
        budget: bytes of the layer.
        step: what ranks are multiples of.

    Returns:
        Of each expert the rank of what replaces it; None: it stays.
    """
    if step > 1:
        counts = (len(own) // step for own in falls)
        whole = (
            own[: n * step].reshape(n, step).sum(1) for n, own in zip(counts, falls, strict=True)
        )
        steps = Size(size.expert, size.constant, step * size.rank)
        found = allocate_ranks(spreads, list(whole), steps, budget)
        return [None if rank is None else step * rank for rank in found]
    falls = [own[: size.most] for own in falls]
    totals = [torch.cat([own.new_zeros(1), own.cumsum(0)]) for own in falls]

    def decided(price: float) -> list[int | None]:
        found: list[int | None] = []
        saved = []
        for spread, own, total in zip(spreads, falls, totals, strict=True):
            rank = int((own > price * size.rank).sum())
            cost = spread - float(total[rank]) + price * (size.constant + rank * size.rank)
            saved.append(price * size.expert - cost)
            found.append(rank if saved[-1] > 0 else None)
        if None not in found:
            found[min(range(len(found)), key=lambda j: (saved[j], -j))] = None
        return found

    low, high = 0.0, 1.0
    while _bytes(decided(high), size) > budget and high < 1e300:
        low, high = high, high * 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _bytes(decided(middle), size) > budget else (low, middle)
    found = decided(high)
    for j, rank in enumerate(decided(low)):
        richer = [*found[:j], rank, *found[j + 1 :]]
        if _bytes(richer, size) <= budget and None in richer:
            found = richer
    return _filled(found, falls, size, budget)


def _filled(
    found: list[int | None], falls: Sequence[Tensor], size: Size, budget: int
) -> list[int | None]:
    """With what is left of a budget spent on the ranks that lower the loss most."""
    left = budget - _bytes(found, size)
    while left >= size.rank:
        following = [
            (float(falls[j][rank]), -j)
            for j, rank in enumerate(found)
            if rank is not None and rank < len(falls[j])
        ]
        if not following or max(following)[0] <= 0:
            break
        j = -max(following)[1]
        found[j] = (found[j] or 0) + 1
        left -= size.rank
    return found


def _bytes(ranks: Sequence[int | None], size: Size) -> int:
    return sum(size.expert if rank is None else size.constant + rank * size.rank for rank in ranks)


def fit_reduced_rank(sums: RegressionSums, rank: int, ridge: float) -> ReducedRankFit:
    """The best substitute of a rank.

    With inputs and outputs centred, ``H`` the ridged Gram matrix and ``C`` the cross products, the
    map of full rank is ``B = H^-1 C``; of rank r it is ``B V V^T`` with V the first r eigenvectors
    of ``C^T H^-1 C``, which are the right singular vectors of ``H^(1/2) B``.

    Args:
        sums: of the expert.
        rank: 0 for a constant.
        ridge: part of the mean diagonal of the Gram matrix that is added to it.
    """
    (mean_x, mean_y), spread = _constant(sums)
    if not rank:
        empty = mean_y.new_empty(0, len(mean_x))
        return ReducedRankFit(mean_y, empty, empty.T, spread)
    gram, cross, full = _regression(sums, ridge)
    _, second = compute_leading_eigenvectors(cross.T @ full, rank)
    first = (full @ second).T
    # trace of (Y - X F^T S^T)^T (Y - X F^T S^T), in which S has orthonormal columns.
    gained = 2 * float((first @ cross * second.T).sum()) - float((first @ gram * first).sum())
    return ReducedRankFit(
        mean_y - second @ (first @ mean_x), first, second, max(0.0, spread - gained)
    )


def _constant(sums: RegressionSums) -> tuple[tuple[Tensor, Tensor], float]:
    """Means of inputs and of outputs, and ``sum g^2 ||f - mean||^2``."""
    mass = max(sums.mass, torch.finfo(torch.float64).tiny)
    mean_x, mean_y = sums.inputs / mass, sums.outputs / mass
    return (mean_x, mean_y), max(0.0, sums.squares - mass * float(mean_y @ mean_y))


def _regression(sums: RegressionSums, ridge: float) -> tuple[Tensor, Tensor, Tensor]:
    """Centred Gram matrix and cross products C, and ``H^-1 C``."""
    (mean_x, mean_y), _ = _constant(sums)
    gram = sums.gram - sums.mass * torch.outer(mean_x, mean_x)
    cross = sums.cross - sums.mass * torch.outer(mean_x, mean_y)
    ridged = gram.clone()
    ridged.diagonal().add_(max(ridge, LEAST_PART) * gram.diagonal().mean() + LEAST_WEIGHT)
    return gram, cross, torch.cholesky_solve(cross, torch.linalg.cholesky(ridged))
