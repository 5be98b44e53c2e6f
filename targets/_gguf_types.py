"""Types of tensors in GGUF files: what schemes become there, numbers as blocks, and back.

Each block holds some numbers of a row with a float16 scale, so that a group of a scheme is one
block or several with the same scale. Integers stay what they are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from moe2edge.errors import Unsupported, VerificationFailed
from moe2edge.model.weights import DTYPES, SourceBlocks, Weight, is_in_blocks
from moe2edge.numerics.scheme import Scheme

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.numerics.grid import Quantized


# What is added to the powers of two of MXFP4.
_BIAS = 127


@dataclass(frozen=True)
class BlockType:
    """A type of tensors.

    Attributes:
        name: as llama.cpp spells it.
        code: its number in files.
        block: numbers of a row that stand together.
        nbytes: bytes of them.
        file_type: ``general.file_type`` of a file that consists mostly of it.
        scheme: scheme of its integers; None: plain numbers.
        repacked: whether llama.cpp copies such tensors into memory of its own, in another order,
            where others stay a map of the file.
    """

    name: str
    code: int
    block: int
    nbytes: int
    file_type: int
    scheme: Scheme | None = None
    repacked: bool = False

    def measure(self, shape: tuple[int, ...]) -> int:
        """Return the bytes of a tensor."""
        return math.prod(shape) // self.block * self.nbytes


F32 = BlockType("F32", 0, 1, 4, 0)
F16 = BlockType("F16", 1, 1, 2, 1)
BF16 = BlockType("BF16", 30, 1, 2, 32)
Q4_0 = BlockType("Q4_0", 2, 32, 18, 2, Scheme(4, 32), repacked=True)
Q4_1 = BlockType("Q4_1", 3, 32, 20, 3, Scheme(4, 32, symmetric=False))
Q8_0 = BlockType("Q8_0", 8, 32, 34, 7, Scheme(8, 32))
Q2_0 = BlockType("Q2_0", 42, 64, 18, 41, Scheme(2, 64))
# Floats of 4 bits that share a power of two; kept from sources that have them.
MXFP4 = BlockType("MXFP4", 39, 32, 17, 38, repacked=True)
BLOCK_TYPES = {one.code: one for one in (F32, F16, BF16, Q4_0, Q4_1, Q8_0, Q2_0, MXFP4)}
_PLAIN = {"F32": F32, "F16": F16, "BF16": BF16}


def choose_type(name: str, weight: Weight) -> BlockType:
    """Choose the type that holds a weight as it is.

    Args:
        name: its name in files, for the message.
        weight: the weight.

    Raises:
        Unsupported: none does; says what to choose instead.
    """
    scheme = weight.scheme
    if is_in_blocks(weight, MXFP4.name) and weight.shape[-1] % MXFP4.block == 0:
        return MXFP4
    if scheme is None:
        if weight.dtype not in _PLAIN:
            raise Unsupported(
                f"{name} is {DTYPES.get(weight.dtype, weight.dtype)}, and llama.cpp computes with "
                f"{', '.join(DTYPES[one] for one in _PLAIN)}; convert the source to float32 "
                "(dtype=torch.float32 in from_pretrained, then save_pretrained)"
            )
        return _PLAIN[weight.dtype]
    if scheme.ordered:
        raise Unsupported(
            f"{name} is {scheme}, and blocks of GGUF are of neighbouring inputs; quantize it anew "
            "in the recipe (rtn or gptq)"
        )
    form = scheme.bits, scheme.symmetric
    fitting = (one for one in BLOCK_TYPES.values() if one.scheme is not None)
    found = next(
        (t for t in fitting if t.scheme and (t.scheme.bits, t.scheme.symmetric) == form), None
    )
    if found is None:
        raise Unsupported(
            f"{name} is {scheme}, for which GGUF has no type; choose 4 bits, or symmetric 2 or 8 "
            "(bits, symmetric), or write it unquantized with gguf:dequantize=true"
        )
    if scheme.width(weight.shape[1]) % found.block:
        fits = weight.shape[1] % found.block == 0
        change = f"set group_size to {found.block}, or " if fits else ""
        raise Unsupported(
            f"{name} has {weight.shape[1]} inputs and is {scheme}; {found.name} has a scale for "
            f"{found.block} inputs, so groups must hold a multiple of {found.block}; {change}leave "
            "it in 16 bits with a rule with bits: 16"
        )
    return found


def hold(weight: Weight, kind: BlockType) -> Weight:
    """Return a weight in the scheme or dtype of the type that holds it, with the same numbers."""
    if kind.scheme is None:
        if weight.dtype == kind.name or (kind is MXFP4 and weight.dtype == "F32"):
            return weight
        if kind is MXFP4:
            read = weight.load
            return replace(
                weight, dtype="F32", load=SourceBlocks(lambda: read().float(), kind.name)
            )
        load = weight.load
        return replace(weight, dtype=kind.name, load=lambda: load().float())
    if weight.scheme == kind.scheme:
        return weight
    scheme = kind.scheme
    return replace(
        weight, scheme=scheme, load_quantized=lambda: _refine(weight.quantized(), scheme)
    )


def _refine(quantized: Quantized, scheme: Scheme) -> Quantized:
    """Return the same numbers in smaller groups, which repeat scales and zero points."""
    from moe2edge.numerics.grid import Quantized

    times = quantized.scheme.width(quantized.q.shape[1]) // scheme.group_size
    scales = quantized.scales.repeat_interleave(times, dim=1)
    zeros = quantized.zeros
    return Quantized(
        quantized.q, scales, scheme, None if zeros is None else zeros.repeat_interleave(times, 1)
    )


# ---- blocks --------------------------------------------------------------------------------------


def encode(name: str, value: Tensor | Quantized, kind: BlockType) -> Tensor:
    """Return the bytes of a tensor, uint8 [bytes].

    Args:
        name: its name, for the message.
        value: plain numbers in the dtype of the type, or integers in its scheme.
        kind: the type.

    Raises:
        VerificationFailed: a scale is not exact in float16, or a minimum too large for it.
    """
    import torch

    from moe2edge.numerics.grid import Quantized

    if not isinstance(value, Quantized):
        if kind is MXFP4:
            return _encode_floats(name, value)
        return value.contiguous().view(-1).view(torch.uint8)
    scales = value.scales.to(torch.float16)
    if not torch.equal(scales.float(), value.scales):
        raise VerificationFailed(
            f"{name} has scales that float16 cannot represent exactly; target gguf cannot hold "
            "these integers: quantize the matrix anew in the recipe, or export to hf"
        )
    blocks = value.q.view(value.q.shape[0], -1, kind.block)
    parts = [scales.unsqueeze(-1).view(torch.uint8)]
    if kind is Q4_1:
        assert value.zeros is not None
        least = (-value.zeros.float() * value.scales).to(torch.float16)
        if not least.isfinite().all():
            raise VerificationFailed(
                f"{name} has zero points that float16 cannot hold as numbers; quantize it with "
                "symmetric: true"
            )
        parts.append(least.unsqueeze(-1).view(torch.uint8))
    if kind in (Q4_0, Q4_1):
        parts.append(blocks[..., :16] | blocks[..., 16:] << 4)
    elif kind is Q8_0:
        parts.append(blocks ^ 0x80)  # as int8, around zero
    else:
        # Its numbers run from -1 to 2, ours from -2 to 1: mirrored, with negative scales.
        parts = [(-scales).unsqueeze(-1).view(torch.uint8), _pack_quarters(3 - blocks)]
    return torch.cat(parts, dim=-1).view(-1)


def decode(data: Tensor, shape: tuple[int, ...], kind: BlockType) -> Tensor | Quantized:
    """Return the numbers of a tensor that `encode` wrote.

    Args:
        data: uint8 [bytes].
        shape: [out, in], or any for plain numbers.
        kind: the type.
    """
    import torch

    from moe2edge.numerics.grid import Quantized

    if kind is MXFP4:
        return _decode_floats(data, shape)
    if kind.scheme is None:
        return data.view(getattr(torch, DTYPES[kind.name])).view(shape)
    outs, ins = shape
    blocks = data.view(outs, ins // kind.block, kind.nbytes)
    scales = blocks[..., :2].contiguous().view(torch.float16).squeeze(-1).float()
    zeros = None
    if kind is Q4_1:
        least = blocks[..., 2:4].contiguous().view(torch.float16).squeeze(-1).float()
        zeros = torch.where(scales == 0, 0, (-least / scales).round()).to(torch.uint8)
    if kind in (Q4_0, Q4_1):
        nibbles = blocks[..., -16:]
        q = torch.cat([nibbles & 15, nibbles >> 4], dim=-1)
    elif kind is Q8_0:
        q = blocks[..., 2:] ^ 0x80
    else:
        q, scales = 3 - _unpack_quarters(blocks[..., 2:]), -scales
    return Quantized(q.reshape(outs, ins), scales, kind.scheme, zeros)


def _encode_floats(name: str, value: Tensor) -> Tensor:
    """Return MXFP4 blocks of numbers that are exact in it.

    Raises:
        VerificationFailed: some are not.
    """
    import torch

    from moe2edge.numerics.decoding import E2M1

    blocks = value.float().reshape(-1, MXFP4.block)
    # The largest number of a block is 4 or 6 times the power of two: with any larger power all
    # numbers that it allows are exact with this one, too.
    powers = (torch.frexp(blocks.abs().amax(1)).exponent - 3).clamp(-_BIAS, _BIAS)
    scaled = torch.ldexp(blocks, -powers[:, None])
    table = torch.tensor(E2M1[:8])
    codes = torch.bucketize(scaled.abs(), table).clamp(max=7).to(torch.uint8)
    if not torch.equal(table[codes.long()], scaled.abs()):
        raise VerificationFailed(
            f"{name} is not MXFP4, although its source says so; quantize the experts in the recipe"
        )
    codes |= torch.signbit(scaled).to(torch.uint8) << 3
    packed = codes[:, :16] | codes[:, 16:] << 4
    return torch.cat([(powers + _BIAS).to(torch.uint8)[:, None], packed], dim=1).view(-1)


def _decode_floats(data: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the numbers of MXFP4 blocks, float32."""
    import torch

    from moe2edge.numerics.decoding import decode_e2m1

    blocks = data.view(-1, MXFP4.nbytes)
    powers = blocks[:, :1].int() - _BIAS
    # Pairs of the low and of the high half of each byte.
    halves = decode_e2m1(blocks[:, 1:]).view(len(blocks), 16, 2)
    numbers = torch.cat([halves[..., 0], halves[..., 1]], dim=1)
    return torch.ldexp(numbers, powers).view(shape)


def _pack_quarters(codes: Tensor) -> Tensor:
    """Pack numbers of 2 bits [..., n] into bytes [..., n / 4], the first one lowest."""
    first, second, third, fourth = codes.view(*codes.shape[:-1], -1, 4).unbind(-1)
    packed: Tensor = first | second << 2 | third << 4 | fourth << 6
    return packed


def _unpack_quarters(data: Tensor) -> Tensor:
    import torch

    return torch.stack([data >> shift & 3 for shift in (0, 2, 4, 6)], dim=-1).flatten(-2)
