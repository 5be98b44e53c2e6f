"""Layouts of small integers. Pure functions, each with its inverse; no number changes here."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from moe2edge.numerics.grid import Quantized

if TYPE_CHECKING:
    from torch import Tensor

# A type for so many bytes; the lowest is the first, as in safetensors.
WORDS = {2: torch.int16, 4: torch.int32}


def pack_bytes(q: Tensor, bits: int) -> Tensor:
    """``8 // bits`` integers to a byte, the lowest index in the lowest bits; 3 bits take 4.

    The layout of ONNX Runtime's ``QMoE`` and ``MatMulNBits``. The last dimension is filled up with
    zeros to whole bytes: uint8 [..., n] -> [..., ceil(n / (8 // bits))].
    """
    bits = 4 if bits == 3 else bits
    per_byte = 8 // bits
    if short := -q.shape[-1] % per_byte:
        q = torch.nn.functional.pad(q, (0, short))
    if per_byte == 1:
        return q.clone(memory_format=torch.contiguous_format)
    # The integers of one byte as one word, in which they move together: a third of the time that
    # every other, or every fourth, of them takes by itself.
    words = q.flatten().view(WORDS[per_byte])
    packed = words.clone()
    for n in range(1, per_byte):
        packed |= words >> (n * (8 - bits))
    return packed.to(torch.uint8).view(*q.shape[:-1], -1)


def compute_packed_shape(shape: tuple[int, ...], bits: int) -> tuple[int, ...]:
    """Shape that `pack_bytes` makes of a shape."""
    per_byte = 8 // (4 if bits == 3 else bits)
    return (*shape[:-1], -(-shape[-1] // per_byte))


def unpack_bytes(packed: Tensor, bits: int, count: int | None = None) -> Tensor:
    """Inverse of `pack_bytes`; ``count`` integers, all that there is room for if not given."""
    bits = 4 if bits == 3 else bits
    mask, per_byte = (1 << bits) - 1, 8 // bits
    if per_byte == 1:
        return packed[..., :count].clone(memory_format=torch.contiguous_format)
    words = packed.to(WORDS[per_byte], memory_format=torch.contiguous_format)
    q = words & mask
    for n in range(1, per_byte):
        q |= (words << (n * (8 - bits))) & (mask << (8 * n))
    return q.view(torch.uint8)[..., :count]


def pack_int32(q: Tensor, dim: int, bits: int) -> Tensor:
    """``32 // bits`` integers to an int32 along ``dim``, the lowest index in the lowest bits."""
    moved = q.movedim(dim, -1).contiguous()
    # Little-endian, as safetensors is: the bytes of a word are those of `pack_bytes`.
    return pack_bytes(moved, bits).view(torch.int32).movedim(-1, dim).contiguous()


def unpack_int32(packed: Tensor, dim: int, bits: int) -> Tensor:
    """Inverse of `pack_int32`, uint8."""
    # A clone, because strides of a dimension of one are left as they are otherwise.
    moved = packed.movedim(dim, -1).clone(memory_format=torch.contiguous_format)
    return unpack_bytes(moved.view(torch.uint8), bits).movedim(-1, dim).contiguous()


def pack_gptq(numbers: Quantized) -> dict[str, Tensor]:
    """The tensors of one matrix [out, in] in a GPTQ version 1 checkpoint, no act-order.

    Args:
        numbers: ``out`` and ``in`` are multiples of ``32 // bits``, which is 4, 8 or 16.

    Returns:
        ``qweight`` int32 [in / (32 // bits), out], ``qzeros`` int32 [groups, out / (32 // bits)],
        ``scales`` float16 [groups, out], ``g_idx`` int32 [in]. Version 1 stores each zero point
        minus one.
    """
    scheme, (outs, ins) = numbers.scheme, numbers.q.shape
    zeros = numbers.zeros
    if zeros is None:
        zeros = torch.full((outs, scheme.groups(ins)), scheme.zero_point, dtype=torch.uint8)
    return {
        "qweight": pack_int32(numbers.q.T, 0, scheme.bits),
        "qzeros": pack_int32(zeros.T - 1, 1, scheme.bits),
        "scales": numbers.scales.T.to(torch.float16).contiguous(),
        "g_idx": torch.arange(ins, dtype=torch.int32) // scheme.width(ins),
    }


def unpack_gptq(tensors: dict[str, Tensor], bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Integers [out, in], scales [out, groups] and zero points [out, groups] of `pack_gptq`."""
    q = unpack_int32(tensors["qweight"].T, 1, bits)
    zeros = unpack_int32(tensors["qzeros"], 1, bits).T.contiguous() + 1
    return q, tensors["scales"].T.float().contiguous(), zeros


def interleave(gate: Tensor, up: Tensor) -> Tensor:
    """Rows g0, u0, g1, u1, ... of two tensors [rows, ...] -> [2 * rows, ...].

    The order of the first matrix of ``MoE`` and ``QMoE`` with ``swiglu_fusion=1``.
    """
    return torch.stack([gate, up], dim=1).flatten(0, 1)


def deinterleave(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse of `interleave`."""
    return rows[0::2].contiguous(), rows[1::2].contiguous()
