"""Layouts of 4-bit integers. Pure functions, each with its inverse; no number changes here."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def pack_nibbles(q: Tensor) -> Tensor:
    """Two integers to a byte, the lower index in the low nibble: uint8 [..., n] -> [..., n / 2].

    The layout of ONNX Runtime's ``QMoE`` and ``MatMulNBits``.
    """
    return q[..., 0::2] | (q[..., 1::2] << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """Inverse of `pack_nibbles`: uint8 [..., n / 2] -> [..., n]."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)


def pack_int32(q: Tensor, dim: int) -> Tensor:
    """Eight integers to an int32 along ``dim``, the lowest index in the lowest nibble."""
    moved = q.movedim(dim, -1).to(torch.int64)
    shifts = torch.arange(0, 32, 4, dtype=torch.int64)
    words = (moved.reshape(*moved.shape[:-1], -1, 8) << shifts).sum(-1)
    signed = torch.where(words >= 1 << 31, words - (1 << 32), words)
    return signed.to(torch.int32).movedim(-1, dim).contiguous()


def unpack_int32(packed: Tensor, dim: int) -> Tensor:
    """Inverse of `pack_int32`, uint8."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    parts = (packed.movedim(dim, -1).unsqueeze(-1) >> shifts) & 15
    return parts.flatten(-2).to(torch.uint8).movedim(-1, dim).contiguous()


def pack_gptq(q: Tensor, scales: Tensor, group_size: int) -> dict[str, Tensor]:
    """The tensors of a GPTQ version 1 checkpoint, symmetric 4 bits, no act-order.

    Args:
        q: uint8 [out, in]; ``out`` and ``in`` are multiples of 8.
        scales: [out, in / group_size].
        group_size: inputs per scale.

    Returns:
        ``qweight`` int32 [in / 8, out], ``qzeros`` int32 [groups, out / 8], ``scales`` float16
        [groups, out], ``g_idx`` int32 [in]. Version 1 stores each zero point minus one, so every
        nibble of ``qzeros`` is 7.
    """
    outs, ins = q.shape
    zeros = torch.full((ins // group_size, outs), 7, dtype=torch.uint8)
    return {
        "qweight": pack_int32(q.T, dim=0),
        "qzeros": pack_int32(zeros, dim=1),
        "scales": scales.T.to(torch.float16).contiguous(),
        "g_idx": torch.arange(ins, dtype=torch.int32) // group_size,
    }


def unpack_gptq(tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Integers [out, in], scales [out, groups] and zero points [out, groups] of `pack_gptq`."""
    q = unpack_int32(tensors["qweight"], dim=0).T.contiguous()
    zeros = unpack_int32(tensors["qzeros"], dim=1).T.contiguous() + 1
    return q, tensors["scales"].T.float().contiguous(), zeros


def interleave(gate: Tensor, up: Tensor) -> Tensor:
    """Rows g0, u0, g1, u1, ... of two tensors [rows, ...] -> [2 * rows, ...].

    The order of the first matrix of ``MoE`` and ``QMoE`` with ``swiglu_fusion=1``.
    """
    return torch.stack([gate, up], dim=1).flatten(0, 1)


def deinterleave(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse of `interleave`."""
    return rows[0::2].contiguous(), rows[1::2].contiguous()
