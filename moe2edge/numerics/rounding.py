"""Choice of grids, and rounding to the nearest number on them. Pure functions on tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch

from moe2edge.numerics import compiled
from moe2edge.numerics.grid import SMALLEST_SCALE, Grid, Quantized, round_scales, split_groups
from moe2edge.numerics.scheme import Scheme

if TYPE_CHECKING:
    from torch import Tensor

# Factors by which the search for scales shrinks the range of a group; with error feedback, smaller
# ones make the KL at 2 bits larger.
SHRINK = tuple(1 - step / 25 for step in range(6))
# Numbers that the search works on at once: few enough to stay in the cache of a CPU. A GPU needs
# more of them, because it spends its time on launching operations.
SEARCH_NUMBERS, GPU_SEARCH_NUMBERS = 1 << 16, 1 << 26
# Those where scales may be negative.
SIGNED_SHRINK = tuple(1 - 3 * step / 100 for step in range(8))
Range = Literal["absmax", "mse", "signed"]


def choose_grid(
    weight: Tensor, scheme: Scheme, how: Range = "absmax", importance: Tensor | None = None
) -> Grid:
    """Choose scales and zero points for each group of ``weight`` [..., out, in].

    Symmetric: the largest magnitude is ``2**(bits - 1) - 0.5`` scales. The grid reaches from -8 to
    7 scales at 4 bits, so 7.5 splits the error between the two ends. It is GPTQ's symmetric grid
    (Frantar et al., 2022, https://arxiv.org/abs/2210.17323). Asymmetric: the grid spans the range
    of the group together with zero; a zero point is at least 1, because GPTQ files of version 1
    store it minus one.

    Args:
        weight: the numbers.
        scheme: bits, group size, symmetric or not.
        how: ``absmax`` takes the whole range; ``mse`` shrinks it by the factor in `SHRINK` with the
            least squared error of rounding. ``signed``: symmetric scales are negative where the
            larger end of the group is positive, so that it meets the end of the grid that has one
            number more; factors are finer.
        importance: weight of each input in that error, [..., in] (leading dimensions as those of
            ``weight`` without ``out``); None: all are equal.
    """
    grouped = split_groups(weight.float(), scheme)
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    if how == "absmax":
        return _make_grid(low, high, 1.0, scheme)
    shrinks, signed = (SIGNED_SHRINK, True) if how == "signed" else (SHRINK, False)
    outs, groups, width = grouped.shape[-3:]
    numbers = grouped.reshape(-1, outs, groups, width)
    if importance is None:
        costs = numbers.new_ones(1, groups, width)
    else:
        costs = split_groups(importance, scheme).reshape(-1, groups, width)
        # Where no input of a group ever occurs, all count equally.
        costs = costs.masked_fill(costs.sum(-1, keepdim=True) == 0, 1)
    costs = costs.expand(len(numbers), -1, -1)
    low, high = (end.reshape(numbers.shape[:-1]) for end in (low, high))
    grids = [_make_grid(low, high, shrink, scheme, signed=signed) for shrink in shrinks]
    scales = torch.stack([grid.scales for grid in grids])
    zeros = torch.stack([grid.zeros for grid in grids])
    search = compiled.choose_best_grids if compiled.supports(numbers) else _choose_best_grids
    best = search(numbers, costs, scales, zeros, scheme).long()[None]
    scales, zeros = (t.gather(0, best).view(grouped.shape[:-1]) for t in (scales, zeros))
    return Grid(scales, zeros, scheme)


def _choose_best_grids(
    numbers: Tensor, costs: Tensor, scales: Tensor, zeros: Tensor, scheme: Scheme
) -> Tensor:
    """Do the same as `moe2edge.numerics.compiled.choose_best_grids`, in torch."""
    _, outs, groups, width = numbers.shape
    best = torch.zeros(numbers.shape[:-1], dtype=torch.uint8, device=numbers.device)
    most = SEARCH_NUMBERS if numbers.device.type == "cpu" else GPU_SEARCH_NUMBERS
    rows = min(outs, max(1, most // (groups * width)))
    matrices = max(1, most // (outs * groups * width))
    for n in range(0, len(numbers), matrices):
        for at in range(0, outs, rows):
            part = slice(n, n + matrices), slice(at, at + rows)
            weight, cost = numbers[part], costs[part[0], None]
            least = None
            for k, (scale, zero) in enumerate(zip(scales, zeros, strict=True)):
                scale, low = scale[part].unsqueeze(-1), -zero[part].unsqueeze(-1)
                q = (weight / scale).round_()
                if scheme.symmetric:
                    q.clamp_(-scheme.zero_point, scheme.largest - scheme.zero_point)
                else:
                    q.clamp_(low, low + scheme.largest)
                error = torch.addcmul(weight, q, scale, value=-1).square_()
                loss = error.mul_(cost).sum(-1)
                if least is None:
                    least = loss
                    continue
                better = loss < least
                least = torch.where(better, loss, least)
                best[part].masked_fill_(better, k)
    return best


def _make_grid(
    low: Tensor, high: Tensor, shrink: float, scheme: Scheme, *, signed: bool = False
) -> Grid:
    """Make the grid over the shrunk range of each group."""
    if scheme.symmetric:
        ends = torch.maximum(-low, high) * shrink
        scales = round_scales(ends / (scheme.zero_point - 0.5))
        if signed:
            scales = torch.where(high > -low, -scales, scales)
        return Grid(scales, torch.full_like(scales, scheme.zero_point), scheme)
    low, high = low * shrink, high * shrink
    zeros = torch.round(-low / ((high - low) / scheme.largest).clamp(min=SMALLEST_SCALE))
    zeros = zeros.clamp(1, scheme.largest - 1)
    # The range may no longer fit only where the zero point was clamped.
    fits = torch.maximum(-low / (zeros + 0.5), high / (scheme.largest - zeros + 0.5))
    scales = torch.maximum((high - low) / scheme.largest, fits)
    return Grid(round_scales(scales), zeros, scheme)


def round_to(weight: Tensor, grid: Grid) -> Tensor:
    """Round ``weight`` to the nearest integers on ``grid``, uint8 [..., out, in]."""
    grouped = split_groups(weight.float(), grid.scheme)
    q = torch.round(grouped / grid.scales.unsqueeze(-1)) + grid.zeros.unsqueeze(-1)
    return q.clamp_(0, grid.scheme.largest).to(torch.uint8).flatten(-2)


def round_to_nearest(
    weight: Tensor, scheme: Scheme, how: Range = "absmax", importance: Tensor | None = None
) -> Quantized:
    """Quantize ``weight`` [out, in] by rounding each number to its nearest grid point."""
    grid = choose_grid(weight, scheme, how, importance)
    return grid.to_quantized(round_to(weight, grid))
