"""Numbers of the quantized formats of others, decoded. Pure functions on tensors.

Each follows the definition of its format; nothing is rounded here but by float32 arithmetic.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

# Numbers of four bits E2M1: sign, two bits of exponent, one of mantissa.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
# Place of each number of a word in AWQ: column 2 stands in the second lowest bits, and so on.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def unpack_words(words: Tensor, bits: int, count: int) -> Tensor:
    """Unpack ``count`` integers from each row of words that are one stream of bits.

    The lowest bits come first; with 3 bits some numbers lie across two words.

    Args:
        words: int32 [rows, n].
        bits: of each integer, 2 to 8.
        count: integers of a row.

    Returns:
        uint8 [rows, count].
    """
    wide = torch.nn.functional.pad(words, (0, 1)).to(torch.int64) & 0xFFFFFFFF
    at = torch.arange(count) * bits
    word, shift = at // 32, at % 32
    low = wide[:, word] >> shift
    if 32 % bits:
        low |= wide[:, word + 1] << (32 - shift)
    return (low & ((1 << bits) - 1)).to(torch.uint8)


def unpack_whole(words: Tensor, bits: int, count: int) -> Tensor:
    """Unpack integers of which each word holds ``32 // bits``; its highest bits may be unused.

    As `unpack_words`, which does the same where ``bits`` divides 32.
    """
    at = torch.arange(count)
    per_word = 32 // bits
    wide = words.to(torch.int64) & 0xFFFFFFFF
    numbers = wide[:, at // per_word] >> (at % per_word * bits)
    return (numbers & ((1 << bits) - 1)).to(torch.uint8)


def unpack_awq(words: Tensor, bits: int, count: int) -> Tensor:
    """Unpack integers of AWQ: with 4 bits, each word has its own order; int32 [rows, n]."""
    numbers = unpack_words(words, bits, count)
    if bits != 4:
        return numbers
    places = torch.empty(8, dtype=torch.int64)
    places[list(AWQ_ORDER)] = torch.arange(8)
    return numbers.view(len(numbers), -1, 8)[:, :, places].flatten(1)


def decode_e2m1(packed: Tensor) -> Tensor:
    """Decode two numbers of 4 bits a byte, the lower bits first: [..., n] -> float32 [..., 2n]."""
    table = torch.tensor(E2M1)
    halves = packed.view(torch.uint8).to(torch.int32)
    return torch.stack([table[halves & 15], table[halves >> 4]], -1).flatten(-2)


def decode_e8m0(exponents: Tensor) -> Tensor:
    """Decode scales of 8 bits of exponent, as bytes or as float8_e8m0fnu, to float32."""
    # Through float64: 2**-127 is not a normal number of float32.
    shifted = exponents.view(torch.uint8).to(torch.float64) - 127
    return torch.where(shifted == 128, torch.nan, torch.exp2(shifted)).to(torch.float32)


def decode_scales(scales: Tensor) -> Tensor:
    """Decode scales of any dtype to float32; bytes hold exponents, as in `decode_e8m0`."""
    if scales.dtype in (torch.uint8, torch.float8_e8m0fnu):
        return decode_e8m0(scales)
    return scales.to(torch.float32)


def spread_blocks(scales: Tensor, shape: tuple[int, int], block: tuple[int, int]) -> Tensor:
    """Repeat one scale per block for each number of a matrix; blocks at the edges may be short.

    Args:
        scales: [ceil(rows / block rows), ceil(columns / block columns)].
        shape: rows and columns of the matrix.
        block: rows and columns of a block.
    """
    rows, columns = (torch.arange(n) // size for n, size in zip(shape, block, strict=True))
    return scales[rows][:, columns]


def dequantize_in_order(q: Tensor, scales: Tensor, zeros: Tensor, groups: Tensor) -> Tensor:
    """Compute ``(q - zero point) * scale`` where inputs belong to groups in any order.

    Args:
        q: uint8 [out, in].
        scales: float32 [out, groups].
        zeros: uint8 of the same shape.
        groups: the group of each input, int64 [in].

    Returns:
        float32 [out, in].
    """
    return (q.float() - zeros.float()[:, groups]).mul_(scales[:, groups])
