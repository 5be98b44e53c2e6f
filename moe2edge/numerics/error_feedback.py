"""Rounding column by column with feedback: the core of GPTQ and of SparseGPT. Pure functions.

For inputs X [n, in] the loss of replacing W [out, in] by Q is ``|| (W - Q) X^T ||^2``, which is
``trace(E H E^T)`` with ``E = W - Q`` and the Hessian ``H = X^T X``. With ``H = L D L^T``, L unit
lower triangular, it is ``sum_i D_i || (E L)_i ||^2``, and ``(E L)_i`` holds no column of E before
the i-th. So columns are rounded from the last to the first, each to the grid point nearest to
``w_i + sum_{j > i} e_j L_ji``. It is the same result as that of the loop in GPTQ (Frantar et al.,
2022, https://arxiv.org/abs/2210.17323) over the columns in that order, with one Cholesky
factorization and no inverse (LDLQ: Chee et al., 2023, https://arxiv.org/abs/2307.13304).

Several matrices of one shape are solved at once: with hundreds of small experts, the time of a
loop over columns is that of starting operations on few numbers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch

from moe2edge.numerics import compiled
from moe2edge.numerics.grid import Grid
from moe2edge.numerics.rounding import Range, choose_grid
from moe2edge.numerics.scheme import WHOLE_ROW

if TYPE_CHECKING:
    from torch import Tensor

# Columns whose feedback is computed by one product of matrices: from all columns behind them, then
# from those inside.
PANEL, INNER = 128, 32
# Columns of a Hessian that are computed at once; what is above the diagonal is not.
HESSIAN_COLUMNS = 512
# Rows of a matrix, at least, from which the size of its outputs is estimated.
SAMPLED_ROWS = 32


def sum_hessian(
    hessian: Tensor, batches: Iterable[tuple[Tensor, Tensor | None]], *, weighted: bool = True
) -> None:
    """Sum up ``X^T diag(w) X`` of inputs X [n, in] with weights w [n]: the Hessian [in, in].

    Args:
        hessian: where to; what was there is overwritten.
        batches: X and w; None stands for weights of one.
        weighted: whether w counts.
    """
    found = False
    for x, weights in batches:
        x = x.to(hessian.dtype)
        weighed = x if weights is None or not weighted else x * weights.unsqueeze(1)
        for start in range(0, len(hessian), HESSIAN_COLUMNS):
            end = start + HESSIAN_COLUMNS
            part = weighed[:, start:].T, x[:, start:end]
            hessian[start:, start:end].addmm_(*part, beta=float(found))
        found = True
    if not found:
        hessian.zero_()
    for start in range(0, len(hessian), HESSIAN_COLUMNS):
        end = start + HESSIAN_COLUMNS
        hessian[start:end, end:] = hessian[end:, start:end].T


def estimate_output_size(weight: Tensor, hessian: Tensor) -> float:
    """Estimate of the squared size of the outputs, ``trace(W H W^T)``, from some rows of W."""
    rows = weight[:: max(1, len(weight) // SAMPLED_ROWS)].to(hessian)
    return float((rows @ hessian * rows).sum()) * len(weight) / len(rows)


@dataclass(frozen=True)
class HessianFactors:
    """``H = L D L^T`` of one or more Hessians.

    Attributes:
        lower: unit lower triangular, float32 [batch, in, in].
        weight: the diagonal of D, [batch, in].
    """

    lower: Tensor
    weight: Tensor


def factorize(
    hessians: Tensor, damping: float, space: Tensor | None = None
) -> tuple[HessianFactors, list[bool]]:
    """Factors of damped Hessians [batch, in, in]; which of them have some.

    Inputs that never occur get a diagonal of one, so that their weights are simply rounded. Where
    the factorization fails, damping is raised tenfold while it is below one; where that fails,
    too, the factors are those of the identity, with which columns are rounded without feedback.

    Args:
        hessians: symmetric, only the lower triangles are read; their diagonals are overwritten.
        damping: part of the mean diagonal that is added.
        space: float32 of the shape of ``hessians``, for the factors; None: it is made.
    """
    # Upper triangular in memory: LAPACK wants columns in one piece, and so do later products.
    lower = (torch.empty_like(hessians) if space is None else space).mT
    weight = hessians.new_empty(hessians.shape[:2])
    fine = [_factorize(h, lower[n], weight[n], damping) for n, h in enumerate(hessians)]
    return HessianFactors(lower, weight), fine


def _factorize(hessian: Tensor, lower: Tensor, weight: Tensor, damping: float) -> bool:
    diagonal = hessian.diagonal()
    clean = diagonal.clone()
    dead = clean == 0
    mean = clean.mean()
    info = torch.empty((), dtype=torch.int32, device=hessian.device)
    while damping <= 1:
        diagonal.copy_(torch.where(dead, torch.ones_like(clean), clean + damping * mean))
        torch.linalg.cholesky_ex(hessian, out=(lower, info))
        pivots = lower.diagonal().clone()
        if info == 0 and bool(pivots.isfinite().all()):
            lower /= pivots
            weight.copy_(pivots.square_())
            return True
        damping *= 10
    lower.copy_(torch.eye(len(hessian), device=hessian.device))
    weight.fill_(1)
    return False


class Rounder(Protocol):
    """Decides to what the numbers of a column are rounded.

    Attributes:
        width: columns that it decides about together, before the last of them; None: none.
    """

    width: int | None

    def round_panel(
        self, first: int, wanted: Tensor, weights: Tensor, lower: Tensor, weight: Tensor
    ) -> Tensor | None:
        """Do at once what `_panel` does, with the same arguments; None: column by column."""
        ...

    def begin(self, first: int, completed: Tensor, weight: Tensor) -> None:
        """Look at `width` columns before they are rounded.

        Args:
            first: the first of them.
            completed: [batch, width, out], what they would best be, were they free, after the
                columns behind them are rounded.
            weight: their part of D, [batch, width].
        """
        ...

    def round(self, column: int, wanted: Tensor, original: Tensor, error: Tensor) -> None:
        """Choose numbers [batch, out] near to ``wanted``; ``error`` becomes ``original`` less them.

        Columns of one panel are rounded from the last to the first.
        """
        ...


def round_columns(
    weights: Tensor, factors: HessianFactors, rounder: Rounder, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Round a batch of matrices with feedback.

    Args:
        weights: float32 [batch, in, out]: transposed, so that a column of W lies in one piece;
            overwritten with ``E = W - Q``.
        factors: of their Hessians.
        rounder: rounds the columns, from the last to the first.
        dtype: in which errors are carried from columns far behind.

    Returns:
        The loss of each matrix, ``trace(E H E^T)``, float32 [batch].
    """
    columns = weights.shape[1]
    loss = weights.new_zeros(len(weights))
    errors = weights if dtype == weights.dtype else torch.empty_like(weights, dtype=dtype)
    for start in range((columns - 1) // PANEL * PANEL, -1, -PANEL):
        end = min(start + PANEL, columns)
        part = slice(start, end)
        wanted = weights[:, part].clone()
        far = factors.lower[:, end:, part].mT
        if errors is weights:
            wanted.baddbmm_(far, errors[:, end:])
        else:
            wanted += far.to(dtype) @ errors[:, end:]
        inside = factors.lower[:, part, part].contiguous()
        given = wanted, weights[:, part], inside, factors.weight[:, part]
        lost = rounder.round_panel(start, *given)
        loss += _panel(*given, start, rounder) if lost is None else lost
        if errors is not weights:
            errors[:, part] = weights[:, part]
    return loss


def _panel(
    wanted: Tensor,
    weights: Tensor,
    lower: Tensor,
    weight: Tensor,
    first: int,
    rounder: Rounder,
) -> Tensor:
    """Round some columns; the loss of each matrix, [batch].

    Args:
        wanted: the numbers [batch, columns, out] with the feedback of all columns behind them;
            overwritten.
        weights: without it; overwritten with their errors.
        lower: the part of L for these columns, [batch, columns, columns].
        weight: of D, [batch, columns].
        first: the first column.
        rounder: rounds.
    """
    columns, width = wanted.shape[1], rounder.width
    original = weights.clone()
    # Taken apart at once, because a loop over columns spends its time on starting operations.
    wants, originals, errors = (t.unbind(1) for t in (wanted, original, weights))
    # Columns that the rounder looks at together end where a run of columns ends.
    step = INNER if width is None or width >= INNER else width
    for end in range(columns, 0, -step):
        start = max(0, end - step)
        if width is not None and (first + end) % width == 0:
            part = slice(end - width, end)
            free = torch.linalg.solve_triangular(
                lower[:, part, part].mT,
                wanted[:, part] - original[:, part],
                upper=True,
                unitriangular=True,
            )
            rounder.begin(first + end - width, original[:, part] + free, weight[:, part])
        for n in range(end - 1, start - 1, -1):
            rounder.round(first + n, wants[n], originals[n], errors[n])
            if n > start:
                feedback = lower[:, n, start:n].unsqueeze(-1)
                wanted[:, start:n].addcmul_(feedback, errors[n].unsqueeze(1))
        if start:
            wanted[:, :start].baddbmm_(lower[:, start:end, :start].mT, weights[:, start:end])
    missed = wanted.sub_(original).add_(weights).square_().sum(-1)
    return (missed * weight).sum(-1)


class GridRounder:
    """Rounds to the grid of each group of inputs, and keeps the integers.

    Grids are given for all groups, or chosen when a group's turn comes, from its numbers as they
    would then best be.
    """

    def __init__(
        self, groups: Tensor, chosen: Grid, how: Range | None = None, mask: Tensor | None = None
    ) -> None:
        """Make one for a batch of matrices.

        Args:
            groups: of each column, int64 [batch, in].
            chosen: grids of all groups, [batch, out, groups]; overwritten if ``how`` is given.
            how: choose them on the way; then groups are columns side by side.
            mask: [batch, out, in], False where a number is zero and stays so; None: nowhere.
        """
        batch, outs, count = chosen.scales.shape
        ins = groups.shape[1]
        self.width = ins // count if how else None
        self._how, self._scheme, self._groups = how, chosen.scheme, groups
        # A row for each group or column, so that a column's numbers lie in one piece.
        self._scales, self._zeros = transpose(chosen.scales), transpose(chosen.zeros)
        self._mask = None if mask is None else transpose(mask)
        # Integers without their zero points: up to 9 bits.
        self._q = groups.new_empty(batch, ins, outs, dtype=torch.int16)
        self._columns: _Columns | None = None
        self.uses_compiled = how is None and compiled.supports(chosen.scales)

    def round_panel(
        self, first: int, wanted: Tensor, weights: Tensor, lower: Tensor, weight: Tensor
    ) -> Tensor | None:
        """Round to given grids by the compiled loop, where there is one."""
        if not self.uses_compiled:
            return None
        part = slice(first, first + wanted.shape[1])
        return compiled.round_panel(
            wanted,
            weights,
            lower,
            weight,
            Grid(self._scales, self._zeros, self._scheme),
            self._groups[:, part],
            self._q[:, part],
            None if self._mask is None else self._mask[:, part],
        )

    def integers(self, orders: Tensor | None = None) -> Tensor:
        """Integers uint8 [batch, out, in]; column i goes to place ``orders[i]``, if given."""
        self._keep()
        zeros: Tensor | int = self._scheme.zero_point
        if not self._scheme.symmetric:
            zeros = gather_rows(self._zeros, self._groups).to(torch.int16)
        q = self._q.add(zeros).to(torch.uint8)
        if orders is not None:
            q = gather_rows(q, orders.argsort(dim=1))
        return transpose(q)

    @property
    def grid(self) -> Grid:
        """Grids of all groups, [batch, out, groups]."""
        scales, zeros = transpose(self._scales), transpose(self._zeros)
        return Grid(scales, zeros, self._scheme)

    def begin(self, first: int, completed: Tensor, weight: Tensor) -> None:
        """Choose the grid of a group."""
        assert self._how is not None, "grids are given, so that no width is asked for"
        one = replace(self._scheme, group_size=WHOLE_ROW)
        chosen = choose_grid(completed.transpose(1, 2), one, self._how, weight)
        group = int(self._groups[0, first])
        self._scales[:, group] = chosen.scales[..., 0]
        self._zeros[:, group] = chosen.zeros[..., 0]
        self._turn_to(first, first + completed.shape[1])

    def round(self, column: int, wanted: Tensor, original: Tensor, error: Tensor) -> None:
        """Round to the nearest numbers on the grid."""
        if self._columns is None or column < self._columns.first:
            self._turn_to(max(0, column + 1 - PANEL), column + 1)
        assert self._columns is not None
        n = column - self._columns.first
        q, scale = self._columns.q[n], self._columns.scales[n]
        torch.div(wanted, scale, out=q).round_()
        if self._columns.zeros is None:
            middle = self._scheme.zero_point
            q.clamp_(-middle, self._scheme.largest - middle)
        else:
            low = -self._columns.zeros[n]
            q.clamp_(low, low + self._scheme.largest)
        if self._mask is not None:
            q.mul_(self._mask[:, column])
        torch.addcmul(original, q, scale, value=-1, out=error)

    def _turn_to(self, first: int, end: int) -> None:
        """Spread the grids of groups over the columns from ``first`` to ``end``."""
        self._keep()
        groups = self._groups[:, first:end]
        scales = gather_rows(self._scales, groups)
        zeros = None if self._scheme.symmetric else gather_rows(self._zeros, groups).unbind(1)
        q = torch.empty_like(scales)
        self._columns = _Columns(first, q, q.unbind(1), scales.unbind(1), zeros)

    def _keep(self) -> None:
        """Keep the integers of the columns at work."""
        if self._columns is not None:
            first, whole = self._columns.first, self._columns.whole
            self._q[:, first : first + whole.shape[1]] = whole


@dataclass(frozen=True)
class _Columns:
    """The columns at work.

    Attributes:
        first: the first of them.
        whole: their integers without zero points, float32 [batch, columns, out].
        q: the same, of each column [batch, out].
        scales, zeros: likewise; no zeros if the scheme is symmetric.
    """

    first: int
    whole: Tensor
    q: tuple[Tensor, ...]
    scales: tuple[Tensor, ...]
    zeros: tuple[Tensor, ...] | None


def transpose(matrices: Tensor) -> Tensor:
    """Matrices [batch, a, b] as [batch, b, a], in one piece each.

    One at a time, as torch has a fast way for two dimensions alone.
    """
    found = matrices.new_empty(len(matrices), matrices.shape[2], matrices.shape[1])
    for matrix, turned in zip(matrices, found, strict=True):
        turned.copy_(matrix.T)
    return found


def gather_rows(matrices: Tensor, places: Tensor) -> Tensor:
    """Rows [batch, n, b] of matrices [batch, a, b] at the places of each, int64 [batch, n]."""
    found = matrices.new_empty(*places.shape, matrices.shape[2])
    for matrix, own, rows in zip(matrices, places, found, strict=True):
        torch.index_select(matrix, 0, own, out=rows)
    return found
