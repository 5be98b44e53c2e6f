"""The innermost loops of GPTQ, compiled, where they were built; without them torch does the same.

``_columns.c`` is built when the package is installed, if there is a C compiler. Its sums are in
another order than torch's, so that a number near the middle of two grid points may fall to the
other one.
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

try:
    _columns: Any = import_module("moe2edge._columns")
except ModuleNotFoundError:  # it was not built
    _columns = None

# Multiplications from which on it pays to share the work out.
MANY = 1 << 20
# Of `_columns.c`; one that was built from an older one is not used.
VERSION = 1


def is_built() -> bool:
    """Whether the compiled loops are there, as this version wants them."""
    return _columns is not None and _columns.VERSION == VERSION


def supports(numbers: Tensor) -> bool:
    """Whether the compiled loops can take numbers that lie where these do."""
    return is_built() and numbers.device.type == "cpu"


def describe_kernel() -> str:
    """Which loops run, for who compares numbers."""
    if not is_built():
        return "torch"
    return f"compiled, version {VERSION}, {torch.backends.cpu.get_cpu_capability()}"


def round_panel(
    wanted: Tensor,
    errors: Tensor,
    lower: Tensor,
    weight: Tensor,
    grid: Grid,
    of_column: Tensor,
    q: Tensor,
    mask: Tensor | None = None,
) -> Tensor:
    """Round the columns of a panel from the last to the first, each with the errors behind it.

    Args:
        wanted: float32 [batch, columns, out], with the feedback from behind the panel.
        errors: the weights, float32 of the same shape; overwritten with weights less numbers. It
            is a part of [batch, in, out], and so are ``q`` and ``mask``.
        lower: unit lower triangular, [batch, columns, columns].
        weight: what the square of what is missed counts, [batch, columns].
        grid: with a row for each group: scales and zeros [batch, groups, out].
        of_column: the group of each column, int64 [batch, columns].
        q: int16, for the integers less their zero points.
        mask: bool, False where a number is zero.

    Returns:
        The loss of each matrix, float32 [batch].

    Raises:
        ValueError: a tensor has another shape, dtype, layout or place.
    """
    batch, columns, outs = wanted.shape
    parts = -(-outs // _columns.ROWS)
    loss = torch.empty(batch, parts, dtype=torch.float64)
    near = [t.contiguous() for t in (wanted, lower, weight, grid.scales, of_column)]
    zeros = None if grid.scheme.symmetric else grid.zeros.contiguous()
    groups = (batch, grid.scales.shape[1], outs)
    _expect("wanted", near[0], (batch, columns, outs), torch.float32)
    _expect("lower", near[1], (batch, columns, columns), torch.float32)
    _expect("weight", near[2], (batch, columns), torch.float32)
    _expect("scales", near[3], groups, torch.float32)
    _expect("of_column", near[4], (batch, columns), torch.int64)
    if int(of_column.min()) < 0 or int(of_column.max()) >= groups[1]:
        raise ValueError(f"of_column: expected groups 0 to {groups[1] - 1}")
    if zeros is not None:
        _expect("zeros", zeros, groups, torch.float32)
    for name, part, dtype in (
        ("errors", errors, torch.float32),
        ("q", q, torch.int16),
        *([] if mask is None else [("mask", mask, torch.bool)]),
    ):
        _expect(name, part, (batch, columns, outs), dtype)
        layout = part.stride()[1:], part.stride(0) if batch > 1 else 0
        if layout != ((outs, 1), errors.stride(0) if batch > 1 else 0):
            raise ValueError(f"{name}: columns must lie in one piece below one another")
    sizes = (batch, columns, outs, groups[1], grid.scheme.largest, errors.stride(0))
    places = tuple(
        0 if t is None else t.data_ptr()
        for t in (near[0], errors, *near[1:4], zeros, near[4], mask, q, loss)
    )
    middle = float(grid.scheme.zero_point)
    threads = torch.get_num_threads() if batch * columns * columns * outs > MANY else 1
    _share_out(partial(_columns.round_panel, sizes, places, middle), batch * parts, threads)
    return loss.sum(1).float()


def choose_best_grids(
    numbers: Tensor, importance: Tensor, scales: Tensor, zeros: Tensor, scheme: Scheme
) -> Tensor:
    """Which of several grids rounds each group with the least error.

    Args:
        numbers: float32 [batch, out, groups, width].
        importance: of the squared error of each, [batch, groups, width].
        scales: of the grids, [candidates, batch, out, groups].
        zeros: likewise; not looked at if the scheme is symmetric.
        scheme: bits.

    Returns:
        Index of the first best, uint8 [batch, out, groups].

    Raises:
        ValueError: a tensor has another shape, dtype or place.
    """
    batch, outs, groups, width = numbers.shape
    count = batch * outs * groups
    best = torch.empty(batch, outs, groups, dtype=torch.uint8)
    given = [t.contiguous() for t in (numbers, importance, scales, zeros)]
    _expect("numbers", numbers, (batch, outs, groups, width), torch.float32)
    _expect("importance", importance, (batch, groups, width), torch.float32)
    for name, grids in (("scales", scales), ("zeros", zeros)):
        _expect(name, grids, (len(scales), batch, outs, groups), torch.float32)
    sizes = (count, width, groups, outs * groups, len(scales), scheme.largest)
    addresses = [t.data_ptr() for t in (*given, best)]
    if scheme.symmetric:
        addresses[3] = 0
    threads = torch.get_num_threads() if len(scales) * numbers.numel() > MANY else 1
    middle = float(scheme.zero_point)
    _share_out(partial(_columns.search, sizes, tuple(addresses), middle), count, threads)
    return best


def _share_out(work: Callable[[int, int], None], count: int, threads: int) -> None:
    """Do parts of ``count`` pieces of work in some threads."""
    step = -(-count // threads)
    starts = range(0, count, step)
    if len(starts) == 1:
        work(0, count)
    else:
        futures = [_pool(threads).submit(work, at, min(at + step, count)) for at in starts]
        try:
            for future in futures:
                future.result()
        finally:  # an interrupt must not free what they work on
            wait(futures)


def _expect(name: str, given: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Refuse what the compiled loops would read as something else."""
    if tuple(given.shape) != shape or given.dtype != dtype or given.device.type != "cpu":
        raise ValueError(
            f"{name}: found {given.dtype} {list(given.shape)} on {given.device}, expected "
            f"{dtype} {list(shape)} on cpu"
        )


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="columns")
