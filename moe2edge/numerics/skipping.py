"""Dynamic skipping: the thresholds, and the rule that applies them. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def compute_thresholds(ratios: Tensor, quantile: float) -> tuple[float, ...]:
    """Compute a quantile of each column of ``ratios`` [tokens, k - 1]; 0.5 gives medians.

    A threshold lies in the middle between two neighbouring ratios: on one of them, rounding would
    decide whether that token skips, and runtimes would differ. For an even number of tokens the
    quantile 0.5 is the median; for an odd one it lies between the median and the ratio below.
    """
    thresholds = []
    for column in ratios.double().T:
        ordered = torch.sort(column).values
        values = torch.unique(ordered)
        place = ordered[min(len(ordered) - 1, int(quantile * len(ordered)))]
        above = int(torch.searchsorted(values, place))
        lower = values[above - 1] if above else torch.zeros(())
        thresholds.append(float((lower + values[above]) / 2))
    return tuple(thresholds)


def apply_skipping(
    weights: Tensor, skip_below: Sequence[float], *, renormalize: bool
) -> tuple[Tensor, Tensor]:
    """Apply dynamic skipping; return the weights and which places are skipped.

    Efficient Expert Pruning and Skipping (https://arxiv.org/abs/2402.14800), whose rule for two
    experts, ``w2 < beta * w1``, is applied here to each place after the first.

    Args:
        weights: [N, k], in falling order.
        skip_below: k - 1 thresholds.
        renormalize: scale the remaining weights to sum to one, as the router does.
    """
    below = torch.tensor([0.0, *skip_below], dtype=weights.dtype, device=weights.device)
    skipped = weights < below * weights[:, :1]
    kept = weights.masked_fill(skipped, 0)
    if renormalize:
        kept = kept / kept.sum(-1, keepdim=True)
    return kept, skipped


def skip_in_any_order(
    weights: Tensor, skip_below: Sequence[float], *, renormalize: bool
) -> tuple[Tensor, Tensor]:
    """Apply dynamic skipping to weights [N, k] in any order, of any sum.

    Args:
        weights: [N, k].
        skip_below: k - 1 thresholds.
        renormalize: scale the remaining weights to the sum that all of them had.
    """
    falling, order = weights.sort(dim=1, descending=True, stable=True)
    _, gone = apply_skipping(falling, skip_below, renormalize=False)
    skipped = torch.zeros_like(gone).scatter(1, order, gone)
    kept = weights.masked_fill(skipped, 0)
    if renormalize:
        kept = kept * (weights.sum(1, keepdim=True) / kept.sum(1, keepdim=True))
    return kept, skipped
