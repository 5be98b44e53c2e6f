"""Scales that are best for given integers, for the inputs that a Hessian describes.

With ``W - Q = W - sum_g s_g N_g``, where N_g has the integers of group g and zeros elsewhere, the
loss of a row, ``e H e^T``, is quadratic in its scales: ``A s = b`` with ``A_gh = n_g H n_h^T`` and
``b_g = n_g H w^T``. Pure functions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from moe2edge.numerics.error_feedback import HessianFactors
from moe2edge.numerics.grid import round_scales

if TYPE_CHECKING:
    from torch import Tensor

# Added to the diagonal of A, as a part of its mean; and by what a scale may change at most.
FIT_RIDGE, MOST_CHANGE = 1e-6, 2.0


def fit_scales(
    weights: Tensor, numbers: Tensor, scales: Tensor, groups: Tensor, factors: HessianFactors
) -> Tensor:
    """Return scales [batch, out, groups] that are best for the integers.

    A scale that would change its sign, or by more than a factor of two, stays.

    Args:
        weights: float32 [batch, in, out].
        numbers: integers minus zero points, [batch, in, out].
        scales: those that the integers were chosen for, [batch, out, groups].
        groups: group of each input, int64 [batch, in].
        factors: factors of the Hessians.
    """
    found = torch.empty_like(scales)
    for n in range(len(weights)):
        lower, weight = factors.lower[n], factors.weight[n]
        hessian = (lower * weight) @ lower.T
        found[n] = _fit(weights[n], numbers[n].float(), scales[n], groups[n], hessian)
    return found


def _fit(
    weights: Tensor, numbers: Tensor, scales: Tensor, groups: Tensor, hessian: Tensor
) -> Tensor:
    outs, count = scales.shape

    def sum_groups(values: Tensor) -> Tensor:
        return values.new_zeros(count, outs).index_add_(0, groups, values)

    left = weights.new_empty(count, count, outs)
    for group in range(count):
        inside = (groups == group).nonzero()[:, 0]
        left[group] = sum_groups(hessian[:, inside] @ numbers[inside] * numbers)
    right = sum_groups(hessian @ weights * numbers).T
    left = left.permute(2, 0, 1)
    ridge = FIT_RIDGE * left.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-30)
    left = left + ridge[:, None, None] * torch.eye(count, device=left.device)
    fitted, _ = torch.linalg.solve_ex(left, right[..., None])
    ratio = fitted[..., 0] / scales
    good = ratio.isfinite() & (ratio > 1 / MOST_CHANGE) & (ratio < MOST_CHANGE)
    kept = torch.where(good, fitted[..., 0], scales)
    return torch.where(kept < 0, -1.0, 1.0) * round_scales(kept.abs())


def measure_rows(errors: Tensor, factors: HessianFactors) -> Tensor:
    """Return the loss of each row, [batch, out].

    Args:
        errors: numbers minus what they were rounded to, float32 [batch, in, out].
        factors: factors of the Hessians.
    """
    spread = factors.lower.mT @ errors
    return (spread.square_() * factors.weight[..., None]).sum(1)
