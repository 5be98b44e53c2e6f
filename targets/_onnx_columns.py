"""Columns of the graph for the rows of a router: in the fused operator, or in separate nodes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import chain

from moe2edge.model.experts import Constant, Linear, Tied
from moe2edge.model.layers import MoELayer


@dataclass(frozen=True)
class ColumnGroup:
    """Rows of the router whose experts have the same matrices, or one that has factors alone.

    Attributes:
        base: the stored expert with these matrices; None: there is none.
        rows: numbers of the rows, those with factors first.
    """

    base: int | None
    rows: tuple[int, ...]


@dataclass(frozen=True)
class Columns:
    """Columns that the gates of a layer's rows are summed up in.

    First come the experts of the fused operator, then constants, linear maps, and groups. The
    fused operator has the quantized experts whose rows all go without factors, because it spends
    no time on a weight of zero; ``MoE``, which has those that are not quantized, does.
    """

    layer: MoELayer

    @cached_property
    def grouped(self) -> tuple[ColumnGroup, ...]:
        """Rows by expert, those with factors first; behind them the rows without a base."""
        found: dict[int, list[int]] = {}
        alone = []
        bases = self.layer.bases
        for row in self.layer.routed:
            base = bases[row]
            if base is None:
                alone.append(ColumnGroup(None, (row,)))
            else:
                found.setdefault(base, []).append(row)
        shared = (
            ColumnGroup(base, tuple(sorted(rows, key=lambda row: not self.has_factors(row))))
            for base, rows in sorted(found.items())
        )
        return (*shared, *alone)

    @cached_property
    def fused(self) -> tuple[int, ...]:
        """Experts in the fused operator."""
        return tuple(g.base for g in self.grouped if g.base is not None and self._fuses(g))

    @property
    def groups(self) -> tuple[ColumnGroup, ...]:
        """Groups of rows that are not in the fused operator."""
        return tuple(group for group in self.grouped if not self._fuses(group))

    @cached_property
    def stacks(self) -> tuple[tuple[int, ...], ...]:
        """Rows that run linear maps, those of one form together."""
        found: dict[tuple[object, ...], list[int]] = {}
        for n, row in enumerate(self.layer.rows):
            if isinstance(row, Linear):
                forms = (weight.scheme or weight.dtype for weight in (row.first, row.second))
                found.setdefault((row.rank, *forms), []).append(n)
        return tuple(map(tuple, found.values()))

    @cached_property
    def replaced(self) -> tuple[int, ...]:
        """Rows that run replacements, in the order of their columns."""
        constants = (n for n, row in enumerate(self.layer.rows) if isinstance(row, Constant))
        return (*constants, *chain.from_iterable(self.stacks))

    @property
    def of_rows(self) -> tuple[int, ...]:
        """Column of each row."""
        bases, found = self.layer.bases, dict[int, int]()
        for column, expert in enumerate(self.fused):
            found |= {row: column for row, base in enumerate(bases) if base == expert}
        for column, row in enumerate(self.replaced, len(self.fused)):
            found[row] = column
        for column, group in enumerate(self.groups, len(self.fused) + len(self.replaced)):
            found |= dict.fromkeys(group.rows, column)
        return tuple(found[row] for row in range(self.layer.router_rows))

    def has_factors(self, row: int) -> bool:
        """Return whether a row runs a tied expert."""
        return isinstance(self.layer.rows[row], Tied)

    def _fuses(self, group: ColumnGroup) -> bool:
        if group.base is None or any(map(self.has_factors, group.rows)):
            return False
        return self.layer.experts[group.base].gate.scheme is not None
