"""MoE layers: routers, experts, and the rows that tie them together. Nothing reads a number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

from moe2edge.errors import InputError, Moe2EdgeError
from moe2edge.model.experts import (
    Dense,
    Expert,
    Full,
    Replacement,
    Row,
    Tied,
    list_full_rows,
)
from moe2edge.model.weights import Weight

if TYPE_CHECKING:
    from torch import Tensor


# Experts that a group of a router has at least.
FEWEST_IN_GROUP = 2


@dataclass(frozen=True)
class Shared:
    """A shared expert, always on.

    Attributes:
        mlp: its matrices.
        gate: [1, hidden]; its output is multiplied with the sigmoid of it, if there is one.
    """

    mlp: Dense
    gate: Weight | None


@dataclass(frozen=True)
class Router:
    """The linear scorer of an MoE layer, with everything that has one entry per row.

    Attributes:
        weight: [rows, hidden].
        top_k: rows chosen per token.
        renormalize: whether the chosen weights are scaled to sum to one.
        per_expert: further tensors with one entry per row (bias, correction bias), by suffix.
        axes: axis of these tensors that has the entries, where it is not the first.
        groups: groups of adjacent rows, all of one size, of which the router chooses some first.
        skip_below: dynamic skipping: of the chosen experts in the order of their weights, the
            second is left out where its weight is below ``skip_below[0]`` times the first's, the
            third by ``skip_below[1]``, and so on; empty: none is.
    """

    weight: Weight
    top_k: int
    renormalize: bool
    per_expert: Mapping[str, Weight] = field(default_factory=dict)
    skip_below: tuple[float, ...] = ()
    axes: Mapping[str, int] = field(default_factory=dict)
    groups: int = 1

    def select(self, rows: tuple[int, ...], top_k: int | None = None) -> Router:
        """Return the router with only some rows, in that order.

        Args:
            rows: their numbers.
            top_k: rows chosen per token from now on; None: as many as before.
        """
        top_k = self.top_k if top_k is None else top_k
        return replace(
            self,
            weight=_select_rows(self.weight, rows),
            per_expert={
                k: _select_rows(w, rows, self.axes.get(k, 0)) for k, w in self.per_expert.items()
            },
            top_k=top_k,
            skip_below=self.skip_below[: top_k - 1],
        )


@dataclass(frozen=True)
class MoELayer:
    """Router and experts, kept in step by construction.

    Attributes:
        router: the scorer.
        experts: the stored matrices of experts.
        rows: what each row of the router runs, in any order.
        shared: the shared expert, if there is one.
    """

    router: Router
    experts: tuple[Expert, ...]
    rows: tuple[Row, ...]
    shared: Shared | None = None

    @classmethod
    def make_plain(
        cls, router: Router, experts: tuple[Expert, ...], shared: Shared | None = None
    ) -> MoELayer:
        """Return a layer with one row for each expert, in the order of the experts."""
        return cls(router, experts, list_full_rows(experts), shared)

    @property
    def router_rows(self) -> int:
        """Number of rows of the router."""
        return len(self.rows)

    @property
    def hidden(self) -> int:
        """Width of what experts get and return: the hidden states, or a latent in their place."""
        return self.experts[0].down.shape[0]

    @property
    def routed(self) -> tuple[int, ...]:
        """Numbers of the rows that run full or tied experts."""
        return tuple(n for n, row in enumerate(self.rows) if isinstance(row, Full | Tied))

    @property
    def replaced(self) -> tuple[int, ...]:
        """Numbers of the rows that run replacements: linear maps and constants."""
        return tuple(n for n, row in enumerate(self.rows) if isinstance(row, Replacement))

    @property
    def row_numbers(self) -> tuple[int, ...]:
        """Place of each row among `routed`, or among `replaced`."""
        places = {row: n for kind in (self.routed, self.replaced) for n, row in enumerate(kind)}
        return tuple(places[row] for row in range(len(self.rows)))

    @property
    def row_roles(self) -> tuple[str, ...]:
        """First part of the roles of each row's tensors: ``members.3``, ``substitutes.0``."""
        kinds = ("substitutes" if isinstance(r, Replacement) else "members" for r in self.rows)
        return tuple(f"{kind}.{n}" for kind, n in zip(kinds, self.row_numbers, strict=True))

    @property
    def is_tied(self) -> bool:
        """True if routed rows are anything but all experts as they are, each once, in order."""
        ran = [self.rows[n] for n in self.routed]
        return [row.expert if isinstance(row, Full) else None for row in ran] != list(
            range(len(self.experts))
        )

    @property
    def is_plain(self) -> bool:
        """True if row i runs expert i as it is, and there are no other rows."""
        return not self.replaced and not self.is_tied

    @property
    def bases(self) -> tuple[int | None, ...]:
        """Position of the stored expert whose matrices each row uses; None: it uses none."""
        return tuple(map(_find_base, self.rows))

    @property
    def sharing(self) -> tuple[int, ...]:
        """Rows whose expert is not what it was: with factors, or one that several rows run."""
        bases = self.bases
        return tuple(
            n
            for n, row in enumerate(self.rows)
            if isinstance(row, Tied) or (isinstance(row, Full) and bases.count(row.expert) > 1)
        )

    @cached_property
    def inactive_parameters(self) -> int:
        """Parameters of experts and rows that one token does not use.

        A token chooses the largest; an expert that two rows share counts for each.
        """
        parts = [row.count for row in self.rows]
        sizes = [
            own + (0 if base is None else self.experts[base].count)
            for base, own in zip(self.bases, parts, strict=True)
        ]
        used = sum(sorted(sizes, reverse=True)[: self.router.top_k])
        return max(0, sum(expert.count for expert in self.experts) + sum(parts) - used)

    def find_uses(self, expert: int, ids: Tensor) -> Tensor:
        """Find the choices that use the matrices of a stored expert, bool [tokens, k].

        Args:
            expert: its position in the layer.
            ids: rows of the router that were chosen, int64 [tokens, k].
        """
        import torch

        rows = [n for n, base in enumerate(self.bases) if base == expert]
        return torch.isin(ids, torch.tensor(rows, device=ids.device))

    def check_rows(self) -> None:
        """Check that every row fits, and that every expert is run by one.

        Raises:
            Moe2EdgeError: something does not fit.
        """
        for row in self.rows:
            row.check(self.experts, self.hidden)
        if unused := set(range(len(self.experts))) - set(self.bases):
            raise Moe2EdgeError(f"experts {sorted(unused)} have no row of the router")
        if len({row.rank for row in self.rows if isinstance(row, Tied)}) > 1:
            raise Moe2EdgeError("tied experts of one layer have factors of different ranks")

    def keep(self, ids: Sequence[int], *, clamp_top_k: bool = False) -> MoELayer:
        """Return the layer with only the experts ``ids`` (positions in this layer), in that order.

        Rows that run other experts go, and what has one entry per row is sliced with the rows.
        Rows that run no stored expert stay, behind the others; in groups, where they were.

        Raises:
            InputError: an id is unknown or repeated, or fewer rows stay than top-k chooses
                and ``clamp_top_k`` is not set.
        """
        if len(set(ids)) != len(ids) or not all(0 <= i < len(self.experts) for i in ids):
            raise InputError(f"cannot keep experts {list(ids)}: the layer has {len(self.experts)}")
        found = self._rows_by_base()
        kept = tuple(row for base in (*ids, None) for row in found.get(base, ()))
        self._check_groups(kept)
        if self.router.groups > 1 and self.replaced:
            kept = tuple(sorted(kept))
        top_k, count = self.router.top_k, len(kept)
        if count < top_k:
            if not clamp_top_k or not ids:
                raise InputError(
                    f"{count} experts would stay where the router chooses {top_k} per token; "
                    f"keep at least {top_k}, or set clamp_top_k: true"
                )
            top_k = count
        places = {expert: place for place, expert in enumerate(ids)}
        return replace(
            self,
            router=self.router.select(kept, top_k),
            experts=tuple(self.experts[i] for i in ids),
            rows=tuple(_renumber(self.rows[row], places) for row in kept),
        )

    def _check_groups(self, rows: Sequence[int]) -> None:
        """Refuse to keep other than the same number of rows of each group, two at least.

        Raises:
            InputError: names the numbers.
        """
        if self.router.groups == 1:
            return
        kept = [0] * self.router.groups
        for n in rows:
            kept[n * len(kept) // self.router_rows] += 1
        # A group is scored by its two best experts, so it has two.
        if len(set(kept)) > 1 or kept[0] < FEWEST_IN_GROUP:
            raise InputError(
                f"the router chooses among {len(kept)} groups of experts, of which the same "
                f"number has to stay, {FEWEST_IN_GROUP} at least; found {kept}"
            )

    def replace_experts(self, new: Mapping[int, Replacement]) -> MoELayer:
        """Return the layer with replacements for some experts; the scores of the rows stay.

        Rows of new replacements stand behind those of experts, before those of older replacements.
        In groups each row stays where it is.

        Args:
            new: replacements by the position of the expert in this layer.

        Raises:
            InputError: a position is unknown, no expert would stay, or an expert to replace is
                not run by a single row as it is.
        """
        stay = [n for n in range(len(self.experts)) if n not in new]
        if len(stay) + len(new) != len(self.experts) or not stay:
            raise InputError(
                f"cannot replace experts {sorted(new)}: the layer has {len(self.experts)}"
            )
        found, gone = self._rows_by_base(), sorted(new)
        if any([type(self.rows[row]) for row in found[n]] != [Full] for n in gone):
            raise InputError(f"cannot replace experts {gone}, some of which are tied")
        gone_rows = [found[n][0] for n in gone]
        kept = [row for row in self.routed if row not in gone_rows]
        places = {expert: place for place, expert in enumerate(stay)}
        changed = dict(zip(gone_rows, (new[n] for n in gone), strict=True))
        order = [*kept, *gone_rows, *self.replaced]
        if self.router.groups > 1:
            order.sort()
        return replace(
            self,
            router=self.router.select(tuple(order)),
            experts=tuple(self.experts[n] for n in stay),
            rows=tuple(changed.get(n) or _renumber(self.rows[n], places) for n in order),
        )

    def _rows_by_base(self) -> dict[int | None, list[int]]:
        """Return the numbers of rows by the stored expert that they use."""
        found: dict[int | None, list[int]] = {}
        for row, base in enumerate(self.bases):
            found.setdefault(base, []).append(row)
        return found


def _renumber(row: Row, places: Mapping[int, int]) -> Row:
    """Return ``row`` where its stored expert stands at another place of the layer."""
    match row:
        case Full():
            return replace(row, expert=places[row.expert])
        case Tied(base=int(base)):
            return replace(row, base=places[base])
        case _:
            return row


def _find_base(row: Row) -> int | None:
    """Return the position of the stored expert whose matrices a row uses, if it uses one."""
    match row:
        case Full():
            return row.expert
        case Tied():
            return row.base
        case _:
            return None


def _select_rows(weight: Weight, rows: tuple[int, ...], axis: int = 0) -> Weight:
    """Return a handle on some rows of ``weight``, or entries of another axis."""
    index = (slice(None),) * axis + (list(rows),)
    return replace(
        weight,
        shape=(*weight.shape[:axis], len(rows), *weight.shape[axis + 1 :]),
        load=lambda: weight.load()[index],
    )


@dataclass(frozen=True)
class UnroutedMLP:
    """The rest of an MoE layer with nothing to choose, in families with shared experts.

    Attributes:
        shared: the shared expert.
        expert: the one routed expert that stayed, always on with weight one; None: none stayed.
    """

    shared: Shared
    expert: Dense | None = None
