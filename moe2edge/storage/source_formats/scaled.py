"""Matrices of 8-bit floats or integers, each times a scale: of the whole, a row, or a block.

And matrices of four bits E2M1 with scales of blocks, of which two numbers lie in a byte.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from moe2edge.errors import InputError
from moe2edge.storage.source_formats.source_format import QuantizedTensor
from moe2edge.storage.source_formats.stored_tensors import StoredTensor

if TYPE_CHECKING:
    from torch import Tensor

NVFP4_GROUP = 16
FLOATS = ("F8_E4M3", "F8_E5M2")
SCALES = ("F32", "BF16", "F16", "F8_E8M0", "U8")

ScaleBlock = tuple[int, int]


def find_block(scale: StoredTensor, shape: tuple[int, ...], block: ScaleBlock | None) -> ScaleBlock:
    """Find the block of numbers that share a scale, from the shape of the scales.

    A single scale is that of the whole matrix, a column of them one for each row. Other grids are
    those of ``block``; blocks at the right and lower edges may be short.

    Args:
        scale: the scales.
        shape: rows and columns of the matrix.
        block: rows and columns of a block as the settings give them.

    Raises:
        InputError: the grid is another one.
    """
    rows, columns = shape
    if block is not None:
        grid = tuple(math.ceil(n / size) for n, size in zip(shape, block, strict=True))
        if scale.shape == grid:
            return block
    if math.prod(scale.shape) == 1:
        return rows, columns
    if scale.shape in ((rows,), (rows, 1)):
        return 1, columns
    wanted = "a block size" if block is None else f"{list(grid)} for blocks of {list(block)}"
    raise InputError(
        f"{scale.name} has shape {list(scale.shape)} for a matrix of {list(shape)}; config.json "
        f"gives {'none: it needs ' if block is None else ''}{wanted}; the scales would be taken "
        "for others: download the checkpoint again, with its config.json"
    )


def make_scaled(
    weight: StoredTensor,
    scale: StoredTensor,
    block: ScaleBlock | None,
    zeros: StoredTensor | None = None,
) -> QuantizedTensor:
    """Make the source of a matrix, or of fused matrices, of one number a byte.

    Args:
        weight: [out, in], or [experts, out, in].
        scale: its scales; those of fused matrices have the same first dimension.
        block: rows and columns of a block as the settings give them.
        zeros: zero points as the scales are.
    """
    _check_scale(scale)
    shape = weight.shape[-2:]
    found = find_block(_drop_first(scale) if len(weight.shape) == 3 else scale, shape, block)

    def decode(index: int | None) -> Tensor:
        numbers = weight.read_slice(index).float()
        if zeros is not None:
            numbers -= _spread(zeros.read_slice(index).float(), shape, found)
        return numbers.mul_(_spread(_read_scales(scale, index), shape, found))

    return QuantizedTensor(weight.shape, decode)


def make_paired(
    weight: StoredTensor,
    scale: StoredTensor,
    group: int,
    whole: StoredTensor | None = None,
    *,
    divides: bool = False,
) -> QuantizedTensor:
    """Make the source of a matrix of two E2M1 numbers a byte, the lower bits first.

    Args:
        weight: [out, in / 2].
        scale: [out, in / group].
        group: inputs that share a scale.
        whole: one more scale, of the whole matrix.
        divides: numbers are divided by it.

    Raises:
        InputError: the scales have another shape.
    """
    outs, ins = weight.shape[0], 2 * weight.shape[1]
    block = find_block(scale, (outs, ins), (1, group))

    def decode(_: int | None) -> Tensor:
        from moe2edge.numerics.decoding import decode_e2m1

        scales = _read_scales(scale, None)
        if whole is not None:
            common = whole.read().float().reshape(())
            scales = scales / common if divides else scales * common
        return decode_e2m1(weight.read()).mul_(_spread(scales, (outs, ins), block))

    if whole is not None and math.prod(whole.shape) != 1:
        raise InputError(f"{whole.name} has shape {list(whole.shape)}, expected one number")
    return QuantizedTensor((outs, ins), decode)


def _check_scale(scale: StoredTensor) -> None:
    """Refuse scales of an unknown dtype.

    Raises:
        InputError: so.
    """
    if scale.dtype not in SCALES:
        raise InputError(f"{scale.name} is {scale.dtype}, expected {', '.join(SCALES)}")


def _drop_first(tensor: StoredTensor) -> StoredTensor:
    """Return the header of one entry of the first dimension."""
    return StoredTensor(tensor.name, tensor.path, tensor.shape[1:], tensor.dtype, tensor.nbytes)


def _read_scales(scale: StoredTensor, index: int | None) -> Tensor:
    """Read scales in float32."""
    from moe2edge.numerics.decoding import decode_scales

    return decode_scales(scale.read_slice(index))


def _spread(scales: Tensor, shape: tuple[int, ...], block: ScaleBlock) -> Tensor:
    """Return scales in a shape that is multiplied with a matrix of ``shape``."""
    from moe2edge.numerics.decoding import spread_blocks

    rows, columns = shape
    if block == (rows, columns):
        return scales.reshape(1, 1)
    if block == (1, columns):
        return scales.reshape(rows, 1)
    return spread_blocks(scales, (rows, columns), block)
