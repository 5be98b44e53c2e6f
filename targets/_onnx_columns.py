"""How the rows of a router come into the graph: by the fused operator, or by nodes of their own."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import chain

from moe2edge.model.layers import MoELayer


@dataclass(frozen=True)
class ColumnGroup:
    """Rows of the router whose experts have the same matrices, or one that has factors alone.

    Attributes:
        base: the expert whose matrices these are; None: there are none.
        rows: first those with factors.
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
        """Rows by expert; within, those with factors first. Behind them those without a base."""
        found: dict[int, list[int]] = {}
        alone = []
        for row, base in enumerate(self.layer.bases):
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
        """What is not."""
        return tuple(group for group in self.grouped if not self._fuses(group))

    @cached_property
    def stacks(self) -> tuple[tuple[int, ...], ...]:
        """Positions of the substitutes that are more than a constant, those alike together."""
        found: dict[tuple[object, ...], list[int]] = {}
        for n, own in enumerate(self.layer.substitutes):
            if own.first is not None and own.second is not None:
                forms = (weight.scheme or weight.dtype for weight in (own.first, own.second))
                found.setdefault((own.rank, *forms), []).append(n)
        return tuple(map(tuple, found.values()))

    @cached_property
    def substitutes(self) -> tuple[int, ...]:
        """Positions of all substitutes, in the order of their columns."""
        constants = (n for n, own in enumerate(self.layer.substitutes) if not own.rank)
        return (*constants, *chain.from_iterable(self.stacks))

    @property
    def of_rows(self) -> tuple[int, ...]:
        """The column of each row."""
        layer = self.layer
        found: dict[int, int] = {}
        for column, expert in enumerate(self.fused):
            found |= {row: column for row, base in enumerate(layer.bases) if base == expert}
        for column, n in enumerate(self.substitutes, len(self.fused)):
            found[layer.routed + n] = column
        for column, group in enumerate(self.groups, len(self.fused) + len(self.substitutes)):
            found |= dict.fromkeys(group.rows, column)
        return tuple(found[row] for row in range(layer.router_rows))

    def has_factors(self, row: int) -> bool:
        """Whether a row is a member with factors."""
        return row < len(self.layer.members) and bool(self.layer.members[row].factors)

    def _fuses(self, group: ColumnGroup) -> bool:
        if group.base is None or any(map(self.has_factors, group.rows)):
            return False
        return self.layer.experts[group.base].gate.scheme is not None
