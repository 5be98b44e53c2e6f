"""The innermost loops of GPTQ, compiled, where they were built; without them torch does the same.

``_columns.c`` is built when the package is installed, if there is a C compiler. Its sums are in
another order than torch's, so that a number near the middle of two grid points may fall to the
other one.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from typing import TYPE_CHECKING

import torch

try:
    from moe2edge import _columns
except ImportError:  # there was no compiler
    _columns = None

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.rounding import Grid
    from moe2edge.scheme import Scheme

# Multiplications from which on it pays to share the work out.
MANY = 1 << 20


def is_built() -> bool:
    """Whether the compiled loop is there."""
    return _columns is not None


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
    """
    assert _columns is not None
    batch, columns, outs = wanted.shape
    parts = -(-outs // _columns.ROWS)
    loss = torch.empty(batch, parts, dtype=torch.float64)
    near = [t.contiguous() for t in (wanted, lower, weight, grid.scales, of_column)]
    zeros = None if grid.scheme.symmetric else grid.zeros.contiguous()
    for part in (errors, q, *([] if mask is None else [mask])):
        assert part.stride()[1:] == (outs, 1), "columns lie in one piece below one another"
        assert part.stride(0) == errors.stride(0) or batch == 1
    sizes = (batch, columns, outs, grid.scales.shape[1], grid.scheme.largest, errors.stride(0))
    places = tuple(
        0 if t is None else t.data_ptr()
        for t in (near[0], errors, *near[1:4], zeros, near[4], mask, q, loss)
    )
    middle = float(grid.scheme.zero_point)
    threads = torch.get_num_threads() if batch * columns * columns * outs > MANY else 1
    _share_out(partial(_columns.round_panel, sizes, places, middle), batch * parts, threads)
    return loss.sum(1).float()


def best_grids(
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
    """
    assert _columns is not None
    batch, outs, groups, width = numbers.shape
    count = batch * outs * groups
    best = torch.empty(batch, outs, groups, dtype=torch.uint8)
    given = [t.contiguous() for t in (numbers, importance, scales, zeros)]
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
        list(_pool(threads).map(lambda at: work(at, min(at + step, count)), starts))


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="columns")
