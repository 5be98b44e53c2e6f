"""Compiled innermost loops of GPTQ and of the search for grids; torch does the same without them.

``_columns.c`` is built when the package is installed, if there is a C compiler. It adds in another
order than torch, so a number near the middle between two grid points may be rounded to the other
one.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import lru_cache, partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.numerics.grid import Grid
    from moe2edge.numerics.scheme import Scheme


def find_built(name: str) -> Any:
    """Return a compiled module; None: it was not built."""
    try:
        return import_module(f"moe2edge.{name}")
    except ModuleNotFoundError:
        return None


_columns = find_built("_columns")

# With more multiplications than this, splitting the work between threads pays.
MANY = 1 << 20
# Version of `_columns.c`; a build of another version is not used.
VERSION = 1


def is_built() -> bool:
    """Return whether the compiled loops are present in the version needed."""
    return _columns is not None and _columns.VERSION == VERSION


def supports(numbers: Tensor) -> bool:
    """Return whether the compiled loops can process numbers on the device of ``numbers``."""
    return is_built() and numbers.device.type == "cpu"


def describe_kernel() -> str:
    """Return the name of the active kernel, recorded for reproducibility."""
    if not is_built():
        return "torch"
    return f"compiled, version {VERSION}, {torch.backends.cpu.get_cpu_capability()}"


def round_panel(
    target: Tensor,
    errors: Tensor,
    lower: Tensor,
    weight: Tensor,
    grid: Grid,
    column_groups: Tensor,
    q: Tensor,
    mask: Tensor | None = None,
) -> Tensor:
    """Round the columns of a panel from last to first, each with the errors of those after it.

    Args:
        target: float32 [batch, columns, out], with the feedback from columns after the panel.
        errors: the weights, float32 of the same shape; overwritten with weights minus rounded
            numbers. It is a slice of [batch, in, out], and so are ``q`` and ``mask``.
        lower: unit lower triangular, [batch, columns, columns].
        weight: weight of the squared error of each column, [batch, columns].
        grid: with one row per group: scales and zeros [batch, groups, out].
        column_groups: the group of each column, int64 [batch, columns].
        q: int16, overwritten with the integers minus their zero points.
        mask: bool, False where a number is zero.

    Returns:
        The loss of each matrix, float32 [batch].

    Raises:
        ValueError: a tensor has the wrong shape, dtype, layout or device.
    """
    batch, columns, outs = target.shape
    parts = -(-outs // _columns.ROWS)
    loss = torch.empty(batch, parts, dtype=torch.float64)
    inputs = [t.contiguous() for t in (target, lower, weight, grid.scales, column_groups)]
    zeros = None if grid.scheme.symmetric else grid.zeros.contiguous()
    groups = (batch, grid.scales.shape[1], outs)
    check_tensor("target", inputs[0], (batch, columns, outs), torch.float32)
    check_tensor("lower", inputs[1], (batch, columns, columns), torch.float32)
    check_tensor("weight", inputs[2], (batch, columns), torch.float32)
    check_tensor("scales", inputs[3], groups, torch.float32)
    check_tensor("column_groups", inputs[4], (batch, columns), torch.int64)
    if int(column_groups.min()) < 0 or int(column_groups.max()) >= groups[1]:
        raise ValueError(f"column_groups: expected groups 0 to {groups[1] - 1}")
    if zeros is not None:
        check_tensor("zeros", zeros, groups, torch.float32)
    for name, part, dtype in (
        ("errors", errors, torch.float32),
        ("q", q, torch.int16),
        *([] if mask is None else [("mask", mask, torch.bool)]),
    ):
        check_tensor(name, part, (batch, columns, outs), dtype)
        layout = part.stride()[1:], part.stride(0) if batch > 1 else 0
        if layout != ((outs, 1), errors.stride(0) if batch > 1 else 0):
            raise ValueError(f"{name}: columns must be contiguous, one directly after another")
    sizes = (batch, columns, outs, groups[1], grid.scheme.largest, errors.stride(0))
    places = tuple(
        0 if t is None else t.data_ptr()
        for t in (inputs[0], errors, *inputs[1:4], zeros, inputs[4], mask, q, loss)
    )
    middle = float(grid.scheme.zero_point)
    threads = torch.get_num_threads() if batch * columns * columns * outs > MANY else 1
    split_between_threads(
        partial(_columns.round_panel, sizes, places, middle), batch * parts, threads
    )
    return loss.sum(1).float()


def choose_best_grids(
    numbers: Tensor, importance: Tensor, scales: Tensor, zeros: Tensor, scheme: Scheme
) -> Tensor:
    """Choose the one of several grids that rounds each group with the least error.

    Args:
        numbers: float32 [batch, out, groups, width].
        importance: weight of the squared error of each number, [batch, groups, width].
        scales: scales of the grids, [candidates, batch, out, groups].
        zeros: zero points of the same shape; ignored if the scheme is symmetric.
        scheme: bits.

    Returns:
        Index of the first best grid, uint8 [batch, out, groups].

    Raises:
        ValueError: a tensor has the wrong shape, dtype or device.
    """
    batch, outs, groups, width = numbers.shape
    count = batch * outs * groups
    best = torch.empty(batch, outs, groups, dtype=torch.uint8)
    inputs = [t.contiguous() for t in (numbers, importance, scales, zeros)]
    check_tensor("numbers", numbers, (batch, outs, groups, width), torch.float32)
    check_tensor("importance", importance, (batch, groups, width), torch.float32)
    for name, grids in (("scales", scales), ("zeros", zeros)):
        check_tensor(name, grids, (len(scales), batch, outs, groups), torch.float32)
    sizes = (count, width, groups, outs * groups, len(scales), scheme.largest)
    addresses = [t.data_ptr() for t in (*inputs, best)]
    if scheme.symmetric:
        addresses[3] = 0
    threads = torch.get_num_threads() if len(scales) * numbers.numel() > MANY else 1
    middle = float(scheme.zero_point)
    split_between_threads(partial(_columns.search, sizes, tuple(addresses), middle), count, threads)
    return best


def split_between_threads(work: Callable[[int, int], None], count: int, threads: int) -> None:
    """Do ``count`` pieces of work in several threads."""
    step = -(-count // threads)
    starts = range(0, count, step)
    if len(starts) == 1:
        work(0, count)
    else:
        futures = [_get_pool(threads).submit(work, at, min(at + step, count)) for at in starts]
        try:
            for future in futures:
                future.result()
        finally:  # an interrupt must not free tensors that threads still write to
            wait(futures)


def check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Refuse a tensor whose memory the compiled loops would misread."""
    if tuple(tensor.shape) != shape or tensor.dtype != dtype or tensor.device.type != "cpu":
        raise ValueError(
            f"{name}: found {tensor.dtype} {list(tensor.shape)} on {tensor.device}, expected "
            f"{dtype} {list(shape)} on cpu"
        )


@lru_cache(maxsize=1)
def _get_pool(threads: int) -> ThreadPoolExecutor:
    """Return the thread pool, which is kept between calls."""
    return ThreadPoolExecutor(threads, thread_name_prefix="columns")
