"""Quantized matrices in a neutral form: integers, scales and zero points. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from moe2edge.numerics.decoding import dequantize_in_order
from moe2edge.numerics.scheme import Scheme

if TYPE_CHECKING:
    from torch import Tensor

# Range of scales; both ends are exact in float16 and in bfloat16.
SMALLEST_SCALE = 2.0**-24
LARGEST_SCALE = 32768.0


@dataclass(frozen=True)
class Quantized:
    """Integers, scales and zero points of one matrix; every target packs from these.

    Attributes:
        q: uint8 [out, in], values ``0 .. 2**bits - 1``.
        scales: float32 [out, groups], each exact in bfloat16 and in float16; those of a quantized
            source in one of the two. Some may be negative.
        scheme: how to read them.
        zeros: uint8 [out, groups], at least 1 but in a quantized source; None if symmetric.
        order: the group of each input, int32 [in]; None if the scheme is not ordered.
    """

    q: Tensor
    scales: Tensor
    scheme: Scheme
    zeros: Tensor | None = None
    order: Tensor | None = None

    def dequantize(self) -> Tensor:
        """Compute the weights, float32 [out, in]: ``(q - zero_point) * scale``."""
        if self.order is not None:
            zeros = self.zeros
            if zeros is None:
                zeros = torch.full_like(self.scales, self.scheme.zero_point)
            return dequantize_in_order(self.q, self.scales, zeros, self.order.long())
        return dequantize(self.q, self.scales, self.scheme, self.zeros)

    def split(self, rows: Sequence[int]) -> list[Quantized]:
        """Split into matrices with these numbers of rows, from top to bottom."""
        counts = list(rows)
        zeros = [None] * len(counts) if self.zeros is None else torch.split(self.zeros, counts)
        parts = zip(
            torch.split(self.q, counts), torch.split(self.scales, counts), zeros, strict=True
        )
        return [Quantized(q, scales, self.scheme, z, self.order) for q, scales, z in parts]


@dataclass(frozen=True)
class Grid:
    """Grid of numbers that the weights of each group are rounded to.

    Attributes:
        scales: float32 [..., out, groups].
        zeros: zero points, float32 of the same shape.
        scheme: bits and group size.
    """

    scales: Tensor
    zeros: Tensor
    scheme: Scheme

    def to_quantized(self, q: Tensor) -> Quantized:
        """Join integers uint8 [out, in] with the scales and zero points of this grid."""
        zeros = None if self.scheme.symmetric else self.zeros.to(torch.uint8)
        return Quantized(q, self.scales, self.scheme, zeros)

    def cpu(self) -> Grid:
        """Copy the grid to CPU memory."""
        return Grid(self.scales.cpu(), self.zeros.cpu(), self.scheme)

    def __getitem__(self, n: int) -> Grid:
        """Return the grid of one matrix of a batch."""
        return Grid(self.scales[n], self.zeros[n], self.scheme)


def dequantize(q: Tensor, scales: Tensor, scheme: Scheme, zeros: Tensor | None = None) -> Tensor:
    """Compute weights float32 [..., out, in] from integers and scales [..., out, groups]."""
    grouped = split_groups(q.to(torch.float32, copy=True), scheme)
    zero_points = scheme.zero_point if zeros is None else zeros.float().unsqueeze(-1)
    return grouped.sub_(zero_points).mul_(scales.float().unsqueeze(-1)).flatten(-2)


def split_groups(weight: Tensor, scheme: Scheme) -> Tensor:
    """Reshape [..., out, in] to [..., out, groups, inputs of a group]."""
    width = scheme.width(weight.shape[-1])
    return weight.reshape(*weight.shape[:-1], weight.shape[-1] // width, width)


def round_scales(scales: Tensor) -> Tensor:
    """Round scales to numbers that bfloat16 and float16 both hold exactly, float32, same shape.

    Runtimes differ in the dtype in which they keep scales (float16 in GPTQ files, bfloat16 after
    loading into a bfloat16 model); a scale that both hold is the same number everywhere. Scales
    are rounded *before* weights are rounded to them, so nothing is lost later.
    """
    bounded = scales.float().clamp(SMALLEST_SCALE, LARGEST_SCALE)
    return bounded.to(torch.float16).to(torch.bfloat16).float()
