"""Low-rank factors of a matrix that are nearest in its outputs. Pure functions on tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import scipy.linalg
import torch

if TYPE_CHECKING:
    from torch import Tensor

# Added to the diagonal of a Gram matrix: a fraction of its mean diagonal, and a constant.
RIDGE, LEAST_EIGENVALUE = 0.01, 1e-6


def compute_leading_eigenvectors(gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Compute the largest eigenvalues, falling, and their vectors: float64 [rank] and [n, rank].

    LAPACK computes only these, in about a quarter of the time of all (n = 2048, rank 64).

    Args:
        gram: symmetric, float64 [n, n].
        rank: number of eigenvalues, at most n.
    """
    n = len(gram)
    values, vectors = scipy.linalg.eigh(
        gram.numpy(), subset_by_index=[n - rank, n - 1], driver="evr", check_finite=False
    )
    return torch.from_numpy(values).flip(0), torch.from_numpy(vectors).flip(1)


def factorize_low_rank(difference: Tensor, gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factorize a matrix at a low rank, so that its outputs change least: (first, second), float32.

    With ``G = L L^T`` the Gram matrix of inputs, ``|| X (D - S F)^T ||`` is least for the truncated
    singular value decomposition ``U s V^T`` of ``D L``, which is computed from the smaller of its
    Gram matrices: ``S F = U U^T D``, or ``D L V V^T L^-1``. Each row of F is as long as its column
    of S, however many tokens there were, because training takes steps of one size for all numbers.

    Args:
        difference: D, [out, in].
        gram: G, [in, in], of the inputs; a fraction of its mean diagonal is added.
        rank: rank of the factors.

    Returns:
        F [rank, in] and S [out, rank].
    """
    outs, ins = difference.shape
    ridged, matrix = gram.to(torch.float64, copy=True), difference.double()
    ridged.diagonal().add_(RIDGE * float(gram.diagonal().mean()) + LEAST_EIGENVALUE)
    if outs <= ins:
        _, second = compute_leading_eigenvectors(matrix @ ridged @ matrix.T, rank)
        return _balance(second.T @ matrix, second)
    half = torch.linalg.cholesky(ridged)
    scaled = matrix @ half
    _, right = compute_leading_eigenvectors(scaled.T @ scaled, rank)
    first = torch.linalg.solve_triangular(half, right.T, upper=False, left=False)
    return _balance(first, scaled @ right)


def _balance(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Rescale factors: same product, each row of one as long as its column of the other."""
    ins, outs = first.norm(dim=1), second.norm(dim=0)
    root = (outs / ins.clamp(min=LEAST_EIGENVALUE * LEAST_EIGENVALUE)).sqrt()
    # Beyond the rank of the matrix, one side may be zero.
    root = torch.where((ins > 0) & (outs > 0), root, 1.0)
    return (first * root[:, None]).float(), (second / root).float()


def make_zero_factors(
    shape: tuple[int, int], rank: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Make factors for training whose product is zero, because the second one is.

    Args:
        shape: shape of the matrix, [out, in].
        rank: rank of the factors.
        generator: draws the numbers of the first factor, uniform as in LoRA.
    """
    outs, ins = shape
    first = (torch.rand(rank, ins, generator=generator) * 2 - 1) / ins**0.5
    return first, torch.zeros(outs, rank)
