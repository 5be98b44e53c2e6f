"""Compiled loops of GPTQ whose products are of bfloat16 numbers and whose sums are in float32.

``_hessian.c`` and ``_feedback.c`` are built when the package is installed, if there is a C
compiler, and run where the processor has the instructions (AVX512-BF16). In torch, products of
bfloat16 numbers are bfloat16 themselves, too coarse for a Hessian; without these loops it sums
Hessians in float32.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from moe2edge.numerics import compiled
from moe2edge.numerics.compiled import check_tensor, split_between_threads

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.numerics.grid import Grid

_hessian: Any = compiled.find_built("_hessian")
_feedback: Any = compiled.find_built("_feedback")
# Version of both files; a build of another version is not used.
PAIRS_VERSION = 1


def is_native() -> bool:
    """Return whether the loops are present in the version needed, and run on this processor."""
    return compiled.is_built() and all(
        built is not None and built.VERSION == PAIRS_VERSION and bool(built.IS_NATIVE)
        for built in (_hessian, _feedback)
    )


def describe_loops() -> str:
    """Return the name of all active compiled loops, recorded for reproducibility."""
    more = f"; those in bfloat16, version {PAIRS_VERSION}" if is_native() else ""
    return compiled.describe_kernel() + more


def add_products(
    sums: Tensor, x: Tensor, weights: Tensor | None, space: Tensor, *, started: bool
) -> None:
    """Add ``Y^T Y`` to ``sums``, with rows of Y those of X times the roots of their weights.

    Numbers of Y are rounded to bfloat16, and their products are summed in float32.

    Args:
        sums: float32 [k, k]; only the lower triangle has a meaning, until `mirror`.
        x: X, bfloat16 or float32 [n, k].
        weights: at least zero, [n]; None: ones.
        space: from `make_packing_space`, for one call after another.
        started: False: ``sums`` has no numbers yet.

    Raises:
        ValueError: a tensor has the wrong shape, dtype or device.
    """
    columns = x.shape[1]
    _check_matrix("sums", sums, columns)
    check_tensor("space", space, _find_packed_shape(columns), torch.int32)
    check_tensor("x", x, x.shape, torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32)
    x = x if x.stride(1) == 1 else x.contiguous()
    roots = None if weights is None else weights.to(torch.float32).sqrt().contiguous()
    if roots is not None:
        check_tensor("weights", roots, (len(x),), torch.float32)
    strips = -(-columns // (2 * _hessian.STRIP))
    for at in range(0, len(x), 2 * _hessian.PAIRS):
        part = x[at : at + 2 * _hessian.PAIRS]
        pairs = -(-len(part) // 2)
        threads = torch.get_num_threads() if pairs * columns * columns > compiled.MANY else 1
        sizes = len(part), columns, x.stride(0), int(x.dtype == torch.float32)
        given = part.data_ptr(), 0 if roots is None else roots[at:].data_ptr(), space.data_ptr()
        split_between_threads(partial(_hessian.pack, sizes, given), pairs, threads)
        place = pairs, columns, int(started), space.data_ptr(), sums.data_ptr()
        split_between_threads(partial(_hessian.sum, place), strips, threads)
        started = True


def make_packing_space(columns: int) -> Tensor:
    """Return memory for `add_products` with inputs [n, columns]."""
    return torch.empty(_find_packed_shape(columns), dtype=torch.int32)


def _find_packed_shape(columns: int) -> tuple[int]:
    return (-(-columns // _hessian.LANES) * _hessian.STRIDE,)


def _check_matrix(name: str, matrix: Tensor, columns: int) -> None:
    """Refuse what is no square float32 matrix whose rows lie one directly after another."""
    check_tensor(name, matrix, (columns, columns), torch.float32)
    if not matrix.is_contiguous():
        raise ValueError(f"{name}: rows must be contiguous, one directly after another")


def mirror(sums: Tensor) -> None:
    """Copy the numbers below the diagonal of ``sums`` [k, k] to above it."""
    _check_matrix("sums", sums, len(sums))
    blocks = -(-len(sums) // _hessian.SIDE)
    threads = torch.get_num_threads() if sums.numel() > compiled.MANY else 1
    place = len(sums), sums.data_ptr()
    split_between_threads(partial(_hessian.mirror, place), blocks, threads)


def order_both(matrix: Tensor, order: Tensor, found: Tensor) -> None:
    """Bring rows and columns of a symmetric matrix into an order, below the diagonal only.

    Args:
        matrix: float32 [k, k].
        order: int64 [k].
        found: receives the numbers, float32 [k, k]; those above the diagonal are not written.
    """
    columns = len(order)
    _check_matrix("matrix", matrix, columns)
    _check_matrix("found", found, columns)
    check_tensor("order", order, (columns,), torch.int64)
    if int(order.min()) < 0 or int(order.max()) >= columns:
        raise ValueError(f"order: expected columns 0 to {columns - 1}")
    order = order.contiguous()
    threads = torch.get_num_threads() if matrix.numel() > compiled.MANY else 1
    place = columns, matrix.data_ptr(), order.data_ptr(), found.data_ptr()
    split_between_threads(partial(_hessian.order, place), -(-columns // 2), threads)


def can_round(weights: Tensor) -> bool:
    """Return whether `round_matrices` takes matrices [batch, out, in]."""
    return is_native() and weights.device.type == "cpu" and weights.shape[2] % _feedback.BLOCK == 0


def round_matrices(
    weights: Tensor,
    grid: Grid,
    orders: Tensor,
    upper: Tensor,
    costs: Tensor,
    *,
    sparse: bool,
) -> tuple[Tensor, Tensor]:
    """Round a batch of matrices with error feedback, as `error_feedback.round_columns` does.

    Errors that are carried to distant columns, and the factors of these, are bfloat16.

    Args:
        weights: float32 [batch, out, in].
        grid: scales and zero points, [batch, out, groups].
        orders: columns in the order of the factors, of which the last is rounded first, int64
            [batch, in].
        upper: transposed factors L of the Hessians, float32 [batch, in, in].
        costs: their factors D, [batch, in].
        sparse: whether weights that are zero stay zero.

    Returns:
        The integers uint8 [batch, out, in], and the loss of each matrix, float32 [batch].

    Raises:
        ValueError: a tensor has the wrong shape, dtype or device.
    """
    batch, outs, ins = weights.shape
    scheme = grid.scheme
    grids = batch, outs, scheme.groups(ins)
    far = upper.to(torch.bfloat16)
    inputs = [t.contiguous() for t in (weights, orders, far, upper, costs, grid.scales, grid.zeros)]
    for name, tensor, shape, dtype in zip(
        ("weights", "orders", "far", "upper", "costs", "scales", "zeros"),
        inputs,
        (weights.shape, (batch, ins), *[(batch, ins, ins)] * 2, (batch, ins), grids, grids),
        (torch.float32, torch.int64, torch.bfloat16, *[torch.float32] * 4),
        strict=True,
    ):
        check_tensor(name, tensor, tuple(shape), dtype)
    if int(orders.min()) < 0 or int(orders.max()) >= ins:
        raise ValueError(f"orders: expected columns 0 to {ins - 1}")
    slices = -(-outs // _feedback.SLICE)
    q = torch.empty(batch, outs, ins, dtype=torch.uint8)
    loss = torch.empty(batch, slices, dtype=torch.float64)
    groups = inputs[1] // scheme.width(ins)
    addresses = [t.data_ptr() for t in (*inputs, groups, q, loss)]
    if scheme.symmetric:
        addresses[6] = 0
    sizes = (batch, outs, ins, grids[2], scheme.largest, int(sparse))
    threads = torch.get_num_threads() if weights.numel() * ins > compiled.MANY else 1
    work = partial(_feedback.round_matrices, sizes, tuple(addresses), float(scheme.zero_point))
    split_between_threads(work, batch * slices, threads)
    return q, loss.sum(1).float()
