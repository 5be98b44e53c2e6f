"""Quantized numbers in their neutral form, and rounding to nearest. Pure functions on tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from moe2edge.scheme import Scheme

if TYPE_CHECKING:
    from torch import Tensor

SMALLEST_SCALE = 2.0**-24
LARGEST_SCALE = 32768.0


@dataclass(frozen=True)
class Quantized:
    """Integers and scales of one matrix; every target packs from these.

    Attributes:
        q: uint8 [out, in], values ``0 .. 2**bits - 1``.
        scales: float32 [out, in / group_size], each exact in bfloat16 and in float16.
        scheme: how to read them.
    """

    q: Tensor
    scales: Tensor
    scheme: Scheme

    def dequantize(self) -> Tensor:
        """The weights, float32 [out, in]: ``(q - zero_point) * scale``."""
        return dequantize(self.q, self.scales, self.scheme)


def dequantize(q: Tensor, scales: Tensor, scheme: Scheme) -> Tensor:
    """Weights float32 [..., out, in] of integers [..., out, in] and scales [..., out, groups]."""
    signed = q.float() - scheme.zero_point
    return signed * scales.float().repeat_interleave(scheme.group_size, dim=-1)


def portable_scales(scales: Tensor) -> Tensor:
    """Nearest scales that bfloat16 and float16 both hold exactly, float32, same shape.

    Runtimes differ in the dtype in which they keep scales (float16 in GPTQ files, bfloat16 after
    loading into a bfloat16 model); a scale that both hold is the same number everywhere. Scales
    are chosen so *before* weights are rounded to them, hence nothing is lost later.
    """
    bounded = scales.float().clamp(SMALLEST_SCALE, LARGEST_SCALE)
    return bounded.to(torch.float16).to(torch.bfloat16).float()


def group_scales(weight: Tensor, scheme: Scheme) -> Tensor:
    """Symmetric scales of each group of ``weight`` [..., out, in]: absmax / 7.5 at 4 bits.

    The grid reaches from -8 to 7 scales, so 7.5 splits the error of the two ends; it is GPTQ's
    own symmetric grid (Frantar et al., 2022, https://arxiv.org/abs/2210.17323).
    """
    grouped = weight.float().reshape(*weight.shape[:-1], -1, scheme.group_size)
    return portable_scales(grouped.abs().amax(-1) / (scheme.zero_point - 0.5))


def round_to(weight: Tensor, scales: Tensor, scheme: Scheme) -> Tensor:
    """Nearest integers uint8 [..., out, in] of ``weight`` under ``scales`` [..., out, groups]."""
    wide = scales.repeat_interleave(scheme.group_size, dim=-1)
    q = torch.round(weight.float() / wide) + scheme.zero_point
    return q.clamp(0, (1 << scheme.bits) - 1).to(torch.uint8)


def round_to_nearest(weight: Tensor, scheme: Scheme) -> Quantized:
    """Quantize ``weight`` [out, in] by rounding each number to its nearest grid point."""
    scales = group_scales(weight, scheme)
    return Quantized(round_to(weight, scales, scheme), scales, scheme)
