"""Column-by-column rounding with error feedback, the core of GPTQ and SparseGPT. Pure functions.

For inputs X [n, in] the loss of replacing W [out, in] by Q is ``|| (W - Q) X^T ||^2``, which is
``trace(E H E^T)`` with ``E = W - Q`` and the Hessian ``H = X^T X``. With ``H = L D L^T``, L unit
lower triangular, it is ``sum_i D_i || (E L)_i ||^2``, and ``(E L)_i`` contains no column of E
before the i-th. So columns are rounded from last to first, each to the grid point nearest to
``w_i + sum_{j > i} e_j L_ji``. The result is that of GPTQ's loop over the columns in this order
(Frantar et al., 2022, https://arxiv.org/abs/2210.17323), with one Cholesky factorization and no
inverse (LDLQ: Chee et al., 2023, https://arxiv.org/abs/2307.13304).

Several matrices of one shape are solved at once: with hundreds of small experts, a loop over
columns spends its time on launching operations on few numbers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch

from moe2edge.numerics import bfloat16, compiled
from moe2edge.numerics.grid import Grid
from moe2edge.numerics.rounding import Range, choose_grid
from moe2edge.numerics.scheme import WHOLE_ROW

if TYPE_CHECKING:
    from torch import Tensor

# Columns whose feedback is computed by one matrix product: for a panel from all columns after it,
# for a run within a panel from the runs after it.
PANEL, INNER = 128, 32
# Columns of a Hessian that are computed at once; the upper triangle is copied from the lower one.
HESSIAN_COLUMNS = 512
# Least number of rows of a matrix from which the size of its outputs is estimated.
SAMPLED_ROWS = 32


def sum_hessian(
    hessian: Tensor,
    batches: Iterable[tuple[Tensor, Tensor | None]],
    *,
    weighted: bool = True,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Sum the Hessian ``X^T diag(w) X`` [in, in] over batches of inputs X [n, in], weights w [n].

    Args:
        hessian: receives the sum; its previous content is overwritten.
        batches: X and w; None stands for weights of one.
        weighted: whether w counts.
        dtype: of the factors of products; bfloat16 only where the processor sums them in float32.
    """
    started = False
    fast = dtype == torch.bfloat16 and hessian.device.type == "cpu" and bfloat16.is_native()
    space = bfloat16.make_packing_space(len(hessian)) if fast else None
    for x, weights in batches:
        if not len(x):
            continue
        weights = weights if weighted else None
        # Weights of no router known are negative, and those have no roots.
        if space is not None and (weights is None or bool((weights >= 0).all())):
            bfloat16.add_products(hessian, x, weights, space, started=started)
        else:
            _add_products(hessian, x, weights, started=started)
        started = True
    if not started:
        hessian.zero_()
    elif fast:
        bfloat16.mirror(hessian)
    else:
        for start in range(0, len(hessian), HESSIAN_COLUMNS):
            end = start + HESSIAN_COLUMNS
            hessian[start:end, end:] = hessian[end:, start:end].T


def _add_products(hessian: Tensor, x: Tensor, weights: Tensor | None, *, started: bool) -> None:
    """Do the same as `moe2edge.numerics.bfloat16.add_products`, in torch and in float32.

    Numbers above the diagonal are computed near it.
    """
    x = x.to(hessian.dtype)
    weighed = x if weights is None else x * weights.unsqueeze(1)
    for start in range(0, len(hessian), HESSIAN_COLUMNS):
        end = start + HESSIAN_COLUMNS
        part = weighed[:, start:].T, x[:, start:end]
        hessian[start:, start:end].addmm_(*part, beta=float(started))


def estimate_output_size(weight: Tensor, hessian: Tensor) -> float:
    """Estimate the squared size of the outputs, ``trace(W H W^T)``, from some rows of W."""
    rows = weight[:: max(1, len(weight) // SAMPLED_ROWS)].to(hessian)
    return float((rows @ hessian * rows).sum()) * len(weight) / len(rows)


@dataclass(frozen=True)
class HessianFactors:
    """Factors ``L`` and ``D`` of ``H = L D L^T``, for one or more Hessians.

    Attributes:
        lower: L, unit lower triangular, float32 [batch, in, in].
        weight: the diagonal of D, [batch, in].
    """

    lower: Tensor
    weight: Tensor


def factorize(
    hessians: Tensor, damping: float, space: Tensor | None = None
) -> tuple[HessianFactors, list[bool]]:
    """Factorize damped Hessians [batch, in, in]; return the factors and which Hessians have some.

    Inputs that never occur get a diagonal of one, so that their weights are simply rounded. If the
    factorization fails, damping is raised tenfold while it is at most one; if that fails, too, the
    factors are those of the identity, with which columns are rounded without feedback.

    Args:
        hessians: symmetric; only the lower triangles are read, their diagonals are overwritten.
        damping: fraction of the mean diagonal that is added to it.
        space: float32 of the shape of ``hessians``, to hold the factors; None: it is allocated.
    """
    # Upper triangular in memory: LAPACK needs contiguous columns, and so do later products.
    lower = (torch.empty_like(hessians) if space is None else space).mT
    weight = hessians.new_empty(hessians.shape[:2])
    succeeded = [_factorize_one(h, lower[n], weight[n], damping) for n, h in enumerate(hessians)]
    return HessianFactors(lower, weight), succeeded


def _factorize_one(hessian: Tensor, lower: Tensor, weight: Tensor, damping: float) -> bool:
    """Factorize one damped Hessian into ``lower`` and ``weight``; return whether it succeeded."""
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
    """Rule that rounds the numbers of a column.

    Attributes:
        width: number of columns that are prepared together, before the last of them is rounded;
            None: none are.
    """

    width: int | None

    def round_panel(
        self, first: int, target: Tensor, weights: Tensor, lower: Tensor, weight: Tensor
    ) -> Tensor | None:
        """Do the same as `_round_panel`, with the same arguments; None: not supported."""
        ...

    def begin(self, first: int, completed: Tensor, weight: Tensor) -> None:
        """Prepare `width` columns before they are rounded.

        Args:
            first: index of the first of them.
            completed: [batch, width, out], their best values if they were free, after all later
                columns are rounded.
            weight: their part of D, [batch, width].
        """
        ...

    def round(self, column: int, target: Tensor, original: Tensor, error: Tensor) -> None:
        """Choose numbers [batch, out] near ``target``; set ``error`` to ``original`` minus them.

        Columns of one panel are rounded from last to first.
        """
        ...


def round_columns(
    weights: Tensor, factors: HessianFactors, rounder: Rounder, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Round a batch of matrices with error feedback.

    Args:
        weights: float32 [batch, in, out]: transposed, so that a column of W is contiguous;
            overwritten with ``E = W - Q``.
        factors: factors of their Hessians.
        rounder: rounds the columns, from last to first.
        dtype: dtype in which errors are carried from columns of other panels.

    Returns:
        The loss of each matrix, ``trace(E H E^T)``, float32 [batch].
    """
    columns = weights.shape[1]
    loss = weights.new_zeros(len(weights))
    errors = weights if dtype == weights.dtype else torch.empty_like(weights, dtype=dtype)
    for start in range((columns - 1) // PANEL * PANEL, -1, -PANEL):
        end = min(start + PANEL, columns)
        part = slice(start, end)
        target = weights[:, part].clone()
        factors_after = factors.lower[:, end:, part].mT
        if errors is weights:
            target.baddbmm_(factors_after, errors[:, end:])
        else:
            target += factors_after.to(dtype) @ errors[:, end:]
        inner = factors.lower[:, part, part].contiguous()
        arguments = target, weights[:, part], inner, factors.weight[:, part]
        panel_loss = rounder.round_panel(start, *arguments)
        loss += _round_panel(*arguments, start, rounder) if panel_loss is None else panel_loss
        if errors is not weights:
            errors[:, part] = weights[:, part]
    return loss


def _round_panel(
    target: Tensor,
    weights: Tensor,
    lower: Tensor,
    weight: Tensor,
    first: int,
    rounder: Rounder,
) -> Tensor:
    """Round some columns; return the loss of each matrix, [batch].

    Args:
        target: the numbers [batch, columns, out] with the feedback of all columns after them;
            overwritten.
        weights: the numbers without it; overwritten with their errors.
        lower: the part of L for these columns, [batch, columns, columns].
        weight: their part of D, [batch, columns].
        first: index of the first column.
        rounder: rounds each column.
    """
    columns, width = target.shape[1], rounder.width
    original = weights.clone()
    # Split into columns only once: a loop over columns spends its time on launching operations.
    targets, originals, errors = (t.unbind(1) for t in (target, original, weights))
    # Columns that the rounder prepares together must end where a run of columns ends.
    step = INNER if width is None or width >= INNER else width
    for end in range(columns, 0, -step):
        start = max(0, end - step)
        if width is not None and (first + end) % width == 0:
            part = slice(end - width, end)
            free = torch.linalg.solve_triangular(
                lower[:, part, part].mT,
                target[:, part] - original[:, part],
                upper=True,
                unitriangular=True,
            )
            rounder.begin(first + end - width, original[:, part] + free, weight[:, part])
        for n in range(end - 1, start - 1, -1):
            rounder.round(first + n, targets[n], originals[n], errors[n])
            if n > start:
                feedback = lower[:, n, start:n].unsqueeze(-1)
                target[:, start:n].addcmul_(feedback, errors[n].unsqueeze(1))
        if start:
            target[:, :start].baddbmm_(lower[:, start:end, :start].mT, weights[:, start:end])
    missed = target.sub_(original).add_(weights).square_().sum(-1)
    return (missed * weight).sum(-1)


class GridRounder:
    """Rounder to the grid of each group of inputs; it keeps the integers.

    Grids are given for all groups, or chosen when the turn of a group comes, from the values that
    would then be best.

    Attributes:
        width: columns of a group if grids are chosen on the way; None if they are given.
        uses_compiled: whether the compiled loops do the rounding.
    """

    def __init__(
        self, groups: Tensor, chosen: Grid, how: Range | None = None, mask: Tensor | None = None
    ) -> None:
        """Prepare for a batch of matrices.

        Args:
            groups: group of each column, int64 [batch, in].
            chosen: grids of all groups, [batch, out, groups]; overwritten if ``how`` is given.
            how: choose the grids on the way; then groups are adjacent columns.
            mask: [batch, out, in], False where a number is zero and stays zero; None: nowhere.
        """
        batch, outs, count = chosen.scales.shape
        ins = groups.shape[1]
        self.width = ins // count if how else None
        self._how, self._scheme, self._groups = how, chosen.scheme, groups
        # One row for each group or column, so that a column's numbers are contiguous.
        self._scales, self._zeros = transpose(chosen.scales), transpose(chosen.zeros)
        self._mask = None if mask is None else transpose(mask)
        # Integers minus their zero points: up to 9 bits.
        self._q = groups.new_empty(batch, ins, outs, dtype=torch.int16)
        self._columns: _Columns | None = None
        self.uses_compiled = how is None and compiled.supports(chosen.scales)

    def round_panel(
        self, first: int, target: Tensor, weights: Tensor, lower: Tensor, weight: Tensor
    ) -> Tensor | None:
        """Round to given grids by the compiled loop, if it is present."""
        if not self.uses_compiled:
            return None
        part = slice(first, first + target.shape[1])
        return compiled.round_panel(
            target,
            weights,
            lower,
            weight,
            Grid(self._scales, self._zeros, self._scheme),
            self._groups[:, part],
            self._q[:, part],
            None if self._mask is None else self._mask[:, part],
        )

    def integers(self, orders: Tensor | None = None) -> Tensor:
        """Return the integers uint8 [batch, out, in]; column i moves to ``orders[i]``, if given."""
        self._store_integers()
        zeros: Tensor | int = self._scheme.zero_point
        if not self._scheme.symmetric:
            zeros = gather_rows(self._zeros, self._groups).to(torch.int16)
        q = self._q.add(zeros).to(torch.uint8)
        if orders is not None:
            q = gather_rows(q, orders.argsort(dim=1))
        return transpose(q)

    @property
    def numbers(self) -> Tensor:
        """Integers minus zero points in the order of rounding, int16 [batch, in, out]."""
        self._store_integers()
        return self._q

    @property
    def grid(self) -> Grid:
        """Grids of all groups, [batch, out, groups]."""
        scales, zeros = transpose(self._scales), transpose(self._zeros)
        return Grid(scales, zeros, self._scheme)

    def begin(self, first: int, completed: Tensor, weight: Tensor) -> None:
        """Choose the grid of a group."""
        assert self._how is not None, "grids are given: there is no width to prepare"
        scheme = replace(self._scheme, group_size=WHOLE_ROW)
        chosen = choose_grid(completed.transpose(1, 2), scheme, self._how, weight)
        group = int(self._groups[0, first])
        self._scales[:, group] = chosen.scales[..., 0]
        self._zeros[:, group] = chosen.zeros[..., 0]
        self._load_columns(first, first + completed.shape[1])

    def round(self, column: int, target: Tensor, original: Tensor, error: Tensor) -> None:
        """Round to the nearest numbers on the grid."""
        if self._columns is None or column < self._columns.first:
            self._load_columns(max(0, column + 1 - PANEL), column + 1)
        assert self._columns is not None
        n = column - self._columns.first
        q, scale = self._columns.q[n], self._columns.scales[n]
        torch.div(target, scale, out=q).round_()
        if self._columns.zeros is None:
            middle = self._scheme.zero_point
            q.clamp_(-middle, self._scheme.largest - middle)
        else:
            low = -self._columns.zeros[n]
            q.clamp_(low, low + self._scheme.largest)
        if self._mask is not None:
            q.mul_(self._mask[:, column])
        torch.addcmul(original, q, scale, value=-1, out=error)

    def _load_columns(self, first: int, end: int) -> None:
        """Expand the grids of groups to the columns from ``first`` to ``end``."""
        self._store_integers()
        groups = self._groups[:, first:end]
        scales = gather_rows(self._scales, groups)
        zeros = None if self._scheme.symmetric else gather_rows(self._zeros, groups).unbind(1)
        q = torch.empty_like(scales)
        self._columns = _Columns(first, q, q.unbind(1), scales.unbind(1), zeros)

    def _store_integers(self) -> None:
        """Store the integers of the columns being rounded."""
        if self._columns is not None:
            first, whole = self._columns.first, self._columns.whole
            self._q[:, first : first + whole.shape[1]] = whole


@dataclass(frozen=True)
class _Columns:
    """Columns being rounded.

    Attributes:
        first: index of the first of them.
        whole: their integers minus zero points, float32 [batch, columns, out].
        q: views of ``whole``, one for each column, [batch, out].
        scales, zeros: likewise for each column; no zeros if the scheme is symmetric.
    """

    first: int
    whole: Tensor
    q: tuple[Tensor, ...]
    scales: tuple[Tensor, ...]
    zeros: tuple[Tensor, ...] | None


def transpose(matrices: Tensor) -> Tensor:
    """Transpose matrices [batch, a, b] to contiguous ones [batch, b, a].

    One at a time, because torch is fast for two dimensions only.
    """
    result = matrices.new_empty(len(matrices), matrices.shape[2], matrices.shape[1])
    for matrix, transposed in zip(matrices, result, strict=True):
        transposed.copy_(matrix.T)
    return result


def gather_rows(matrices: Tensor, places: Tensor) -> Tensor:
    """Gather rows [batch, n, b] of matrices [batch, a, b] at ``places``, int64 [batch, n]."""
    result = matrices.new_empty(*places.shape, matrices.shape[2])
    for matrix, indices, rows in zip(matrices, places, result, strict=True):
        torch.index_select(matrix, 0, indices, out=rows)
    return result
