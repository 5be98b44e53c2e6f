"""Packed layouts of small integers. Pure functions, each with its inverse.

No value changes here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from moe2edge.numerics.grid import Quantized

if TYPE_CHECKING:
    from torch import Tensor

# Integer type of a word of this many bytes; the lowest byte comes first, as in safetensors.
WORDS = {2: torch.int16, 4: torch.int32}


def pack_bytes(q: Tensor, bits: int) -> Tensor:
    """Pack ``8 // bits`` integers into a byte, the lowest index in the lowest bits; 3 bits take 4.

    The layout of ONNX Runtime's ``QMoE`` and ``MatMulNBits``. The last dimension is padded with
    zeros to whole bytes: uint8 [..., n] -> [..., ceil(n / (8 // bits))].
    """
    bits = 4 if bits == 3 else bits
    per_byte = 8 // bits
    if short := -q.shape[-1] % per_byte:
        q = torch.nn.functional.pad(q, (0, short))
    if per_byte == 1:
        return q.clone(memory_format=torch.contiguous_format)
    # View the integers of one byte as one word and shift them together: this takes a third of the
    # time of slices with every second or every fourth integer.
    words = q.flatten().view(WORDS[per_byte])
    packed = words.clone()
    for n in range(1, per_byte):
        packed |= words >> (n * (8 - bits))
    return packed.to(torch.uint8).view(*q.shape[:-1], -1)


def compute_packed_shape(shape: tuple[int, ...], bits: int) -> tuple[int, ...]:
    """Compute the shape that `pack_bytes` makes of a shape."""
    per_byte = 8 // (4 if bits == 3 else bits)
    return (*shape[:-1], -(-shape[-1] // per_byte))


def unpack_bytes(packed: Tensor, bits: int, count: int | None = None) -> Tensor:
    """Unpack ``count`` integers, or all that there is room for: the inverse of `pack_bytes`."""
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
    """Pack ``32 // bits`` integers into an int32 along ``dim``, lowest index in the lowest bits."""
    moved = q.movedim(dim, -1).contiguous()
    # Little-endian, as safetensors is: the bytes of a word are those of `pack_bytes`.
    return pack_bytes(moved, bits).view(torch.int32).movedim(-1, dim).contiguous()


def unpack_int32(packed: Tensor, dim: int, bits: int) -> Tensor:
    """Unpack to uint8 along ``dim``: the inverse of `pack_int32`."""
    # Clone, because contiguous() would leave the strides of a dimension of size one as they are.
    moved = packed.movedim(dim, -1).clone(memory_format=torch.contiguous_format)
    return unpack_bytes(moved.view(torch.uint8), bits).movedim(-1, dim).contiguous()


def pack_words(q: Tensor, bits: int) -> Tensor:
    """Pack each row into a stream of bits, the lowest index in the lowest bits: whole words.

    The layout of compressed-tensors and MLX. Words hold the bytes of `pack_bytes` where ``bits``
    divides 8; otherwise integers lie across them. The inverse of `decoding.unpack_words`.

    Args:
        q: integers, uint8 [..., n].
        bits: of each, 2 to 8.

    Returns:
        int32 [..., ceil(n * bits / 32)].
    """
    if 8 % bits == 0:
        packed = pack_bytes(q, bits)
    else:
        # Eight integers take ``bits`` bytes.
        padded = torch.nn.functional.pad(q, (0, -q.shape[-1] % 8))
        eights = padded.view(*padded.shape[:-1], -1, 8)
        stream = torch.zeros(eights.shape[:-1], dtype=torch.int64)
        for n in range(8):
            stream |= eights[..., n].to(torch.int64) << (n * bits)
        packed = stream.unsqueeze(-1).view(torch.uint8)[..., :bits].flatten(-2)
    count = -(-q.shape[-1] * bits // 32)
    packed = packed[..., : 4 * count]
    padded = torch.nn.functional.pad(packed, (0, 4 * count - packed.shape[-1]))
    return padded.contiguous().view(torch.int32)


def pack_compressed(numbers: Quantized, dtype: torch.dtype) -> dict[str, Tensor]:
    """Pack one matrix [out, in] as the tensors of compressed-tensors' ``pack-quantized``.

    Args:
        numbers: a matrix whose inputs are in order.
        dtype: of the scales.

    Returns:
        ``weight_packed`` int32 [out, ceil(in * bits / 32)], ``weight_scale`` [out, groups],
        ``weight_shape`` int64 [2]; if not symmetric, ``weight_zero_point`` int32
        [ceil(out * bits / 32), groups], packed along the outputs.
    """
    bits = numbers.scheme.bits
    packed = {
        "weight_packed": pack_words(numbers.q, bits),
        "weight_scale": numbers.scales.to(dtype).contiguous(),
        "weight_shape": torch.tensor(numbers.q.shape),
    }
    if numbers.zeros is not None:
        packed["weight_zero_point"] = pack_words(numbers.zeros.T, bits).T.contiguous()
    return packed


def pack_gptq(numbers: Quantized) -> dict[str, Tensor]:
    """Pack one matrix [out, in] as the tensors of a GPTQ version 1 checkpoint.

    Args:
        numbers: a matrix whose ``out`` and ``in`` are multiples of ``32 // bits``: 4, 8 or 16.

    Returns:
        ``qweight`` int32 [in / (32 // bits), out], ``qzeros`` int32 [groups, out / (32 // bits)],
        ``scales`` float16 [groups, out], ``g_idx`` int32 [in]. Version 1 stores each zero point
        minus one, and 0 as the largest integer.
    """
    scheme, (outs, ins) = numbers.scheme, numbers.q.shape
    zeros = numbers.zeros
    if zeros is None:
        zeros = torch.full((outs, scheme.groups(ins)), scheme.zero_point, dtype=torch.uint8)
    order = numbers.order
    if order is None:
        order = torch.arange(ins, dtype=torch.int32) // scheme.width(ins)
    return {
        "qweight": pack_int32(numbers.q.T, 0, scheme.bits),
        "qzeros": pack_int32((zeros.T - 1) & scheme.largest, 1, scheme.bits),
        "scales": numbers.scales.T.to(torch.float16).contiguous(),
        "g_idx": order.to(torch.int32),
    }


def unpack_gptq(tensors: dict[str, Tensor], bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Unpack `pack_gptq` to integers [out, in], scales and zero points [out, groups]."""
    q = unpack_int32(tensors["qweight"].T, 1, bits)
    zeros = unpack_int32(tensors["qzeros"], 1, bits).T.contiguous() + 1 & ((1 << bits) - 1)
    return q, tensors["scales"].T.float().contiguous(), zeros


def interleave(gate: Tensor, up: Tensor) -> Tensor:
    """Interleave the rows of two tensors as g0, u0, g1, u1, ...: [rows, ...] -> [2 * rows, ...].

    The order of the first matrix of ``MoE`` and ``QMoE`` with ``swiglu_fusion=1``.
    """
    return torch.stack([gate, up], dim=1).flatten(0, 1)


def deinterleave(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Split interleaved rows into two tensors: the inverse of `interleave`."""
    return rows[0::2].contiguous(), rows[1::2].contiguous()
