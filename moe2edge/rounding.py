"""Quantized numbers in their neutral form, and rounding to nearest. Pure functions on tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from moe2edge import native
from moe2edge.scheme import Scheme

if TYPE_CHECKING:
    from torch import Tensor

SMALLEST_SCALE = 2.0**-24
LARGEST_SCALE = 32768.0
# Factors by which the search for scales shrinks the range of a group; with feedback, smaller ones
# make the KL at 2 bits larger.
SHRINK = tuple(1 - step / 25 for step in range(6))
# Numbers that the search works on at once: few enough to stay in the cache of a processor. A GPU
# spends its time on starting operations instead.
SEARCH_NUMBERS, GPU_SEARCH_NUMBERS = 1 << 16, 1 << 26
Range = Literal["absmax", "mse"]


@dataclass(frozen=True)
class Quantized:
    """Integers, scales and zero points of one matrix; every target packs from these.

    Attributes:
        q: uint8 [out, in], values ``0 .. 2**bits - 1``.
        scales: float32 [out, groups], each exact in bfloat16 and in float16.
        scheme: how to read them.
        zeros: uint8 [out, groups], from 1; None if symmetric.
    """

    q: Tensor
    scales: Tensor
    scheme: Scheme
    zeros: Tensor | None = None

    def dequantize(self) -> Tensor:
        """The weights, float32 [out, in]: ``(q - zero_point) * scale``."""
        return dequantize(self.q, self.scales, self.scheme, self.zeros)

    def split(self, rows: Sequence[int]) -> list[Quantized]:
        """Matrices of so many rows each, which stand below one another."""
        counts = list(rows)
        zeros = [None] * len(counts) if self.zeros is None else torch.split(self.zeros, counts)
        parts = zip(
            torch.split(self.q, counts), torch.split(self.scales, counts), zeros, strict=True
        )
        return [Quantized(q, scales, self.scheme, z) for q, scales, z in parts]


@dataclass(frozen=True)
class Grid:
    """The numbers that the weights of each group are rounded to.

    Attributes:
        scales: float32 [..., out, groups].
        zeros: the integers that stand for zero, float32 of the same shape.
        scheme: bits and group size.
    """

    scales: Tensor
    zeros: Tensor
    scheme: Scheme

    def quantized(self, q: Tensor) -> Quantized:
        """Integers uint8 [out, in] with the scales and zero points of this grid."""
        zeros = None if self.scheme.symmetric else self.zeros.to(torch.uint8)
        return Quantized(q, self.scales, self.scheme, zeros)

    def cpu(self) -> Grid:
        """The same in the memory of the processor."""
        return Grid(self.scales.cpu(), self.zeros.cpu(), self.scheme)

    def __getitem__(self, n: int) -> Grid:
        """Of one matrix of a batch."""
        return Grid(self.scales[n], self.zeros[n], self.scheme)


def dequantize(q: Tensor, scales: Tensor, scheme: Scheme, zeros: Tensor | None = None) -> Tensor:
    """Weights float32 [..., out, in] of integers [..., out, in] and scales [..., out, groups]."""
    grouped = _grouped(q.to(torch.float32, copy=True), scheme)
    middle = scheme.zero_point if zeros is None else zeros.float().unsqueeze(-1)
    return grouped.sub_(middle).mul_(scales.float().unsqueeze(-1)).flatten(-2)


def _grouped(weight: Tensor, scheme: Scheme) -> Tensor:
    """[..., out, in] -> [..., out, groups, inputs of a group]."""
    width = scheme.width(weight.shape[-1])
    return weight.reshape(*weight.shape[:-1], weight.shape[-1] // width, width)


def portable_scales(scales: Tensor) -> Tensor:
    """Nearest scales that bfloat16 and float16 both hold exactly, float32, same shape.

    Runtimes differ in the dtype in which they keep scales (float16 in GPTQ files, bfloat16 after
    loading into a bfloat16 model); a scale that both hold is the same number everywhere. Scales
    are chosen so *before* weights are rounded to them, hence nothing is lost later.
    """
    bounded = scales.float().clamp(SMALLEST_SCALE, LARGEST_SCALE)
    return bounded.to(torch.float16).to(torch.bfloat16).float()


def choose_grid(
    weight: Tensor, scheme: Scheme, how: Range = "absmax", importance: Tensor | None = None
) -> Grid:
    """Scales and zero points for each group of ``weight`` [..., out, in].

    Symmetric, the largest magnitude is ``2**(bits - 1) - 0.5`` scales: the grid reaches from -8 to
    7 scales at 4 bits, so 7.5 splits the error of the two ends. It is GPTQ's own symmetric grid
    (Frantar et al., 2022, https://arxiv.org/abs/2210.17323). Asymmetric, the grid spans the range
    of the group together with zero; a zero point is at least 1, because GPTQ files of version 1
    store it minus one.

    Args:
        weight: the numbers.
        scheme: bits, group size, symmetric or not.
        how: ``absmax`` takes the whole range; ``mse`` shrinks it to where the squared error of
            rounding is least, of the factors in `SHRINK`.
        importance: of each input in that error, [..., in] (leading dimensions as ``weight``'s
            without ``out``); None: all alike.
    """
    grouped = _grouped(weight.float(), scheme)
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    if how == "absmax":
        return _grid(low, high, 1.0, scheme)
    outs, groups, width = grouped.shape[-3:]
    numbers = grouped.reshape(-1, outs, groups, width)
    if importance is None:
        costs = numbers.new_ones(1, groups, width)
    else:
        costs = _grouped(importance, scheme).reshape(-1, groups, width)
        # Where no input of a group ever occurs, all count alike.
        costs = costs.masked_fill(costs.sum(-1, keepdim=True) == 0, 1)
    costs = costs.expand(len(numbers), -1, -1)
    low, high = (end.reshape(numbers.shape[:-1]) for end in (low, high))
    grids = [_grid(low, high, shrink, scheme) for shrink in SHRINK]
    scales = torch.stack([grid.scales for grid in grids])
    zeros = torch.stack([grid.zeros for grid in grids])
    search = native.best_grids if native.serves(numbers) else _best_grids
    best = search(numbers, costs, scales, zeros, scheme).long()[None]
    scales, zeros = (t.gather(0, best).view(grouped.shape[:-1]) for t in (scales, zeros))
    return Grid(scales, zeros, scheme)


def _best_grids(
    numbers: Tensor, costs: Tensor, scales: Tensor, zeros: Tensor, scheme: Scheme
) -> Tensor:
    """What `moe2edge.native.best_grids` does."""
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


def _grid(low: Tensor, high: Tensor, shrink: float, scheme: Scheme) -> Grid:
    """The grid over part of the range of each group."""
    if scheme.symmetric:
        ends = torch.maximum(-low, high) * shrink
        scales = portable_scales(ends / (scheme.zero_point - 0.5))
        return Grid(scales, torch.full_like(scales, scheme.zero_point), scheme)
    low, high = low * shrink, high * shrink
    zeros = torch.round(-low / ((high - low) / scheme.largest).clamp(min=SMALLEST_SCALE))
    zeros = zeros.clamp(1, scheme.largest - 1)
    # Only where the zero point was moved, the range does not fit any more.
    fits = torch.maximum(-low / (zeros + 0.5), high / (scheme.largest - zeros + 0.5))
    scales = torch.maximum((high - low) / scheme.largest, fits)
    return Grid(portable_scales(scales), zeros, scheme)


def round_to(weight: Tensor, grid: Grid) -> Tensor:
    """Nearest integers uint8 [..., out, in] of ``weight`` on ``grid``."""
    grouped = _grouped(weight.float(), grid.scheme)
    q = torch.round(grouped / grid.scales.unsqueeze(-1)) + grid.zeros.unsqueeze(-1)
    return q.clamp_(0, grid.scheme.largest).to(torch.uint8).flatten(-2)


def round_to_nearest(
    weight: Tensor, scheme: Scheme, how: Range = "absmax", importance: Tensor | None = None
) -> Quantized:
    """Quantize ``weight`` [out, in] by rounding each number to its nearest grid point."""
    grid = choose_grid(weight, scheme, how, importance)
    return grid.quantized(round_to(weight, grid))
