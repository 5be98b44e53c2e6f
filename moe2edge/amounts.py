"""How much stays or goes: counts, fractions, budgets, and what reaches a threshold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, ClassVar, Self

from pydantic import Field, field_validator

from moe2edge.errors import InputError
from moe2edge.model import Model
from moe2edge.pipeline import Outcome, Trim
from moe2edge.registry import name_of


def number(value: float, of: int) -> int:
    """A count, or a fraction of ``of`` rounded down.

    >>> number(2, 32), number(0.25, 32), number(0.4, 6)
    (2, 8, 2)
    """
    return value if isinstance(value, int) else int(value * of + 1e-9)


def check_amount(value: object) -> object:
    """Refuse what is neither a count nor a fraction; for validators of options.

    Raises:
        ValueError: it is not.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("a count (2) or a fraction (0.25)")
    if not value > 0:
        raise ValueError("a count of at least 1, or a fraction between 0 and 1")
    if isinstance(value, float) and value >= 1:
        raise ValueError("a fraction lies between 0 and 1; write a count without a point")
    return value


def kept(keep: float, experts: int) -> int:
    """How many of ``experts`` stay: a count, or a fraction of them rounded up.

    >>> kept(4, 6), kept(0.75, 6)
    (4, 5)
    """
    return keep if isinstance(keep, int) else math.ceil(keep * experts - 1e-9)


def check_keep(value: object) -> object:
    """Refuse what is neither an amount nor a list of counts; for validators of options.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(value, list):
        return check_amount(value)
    if not value or not all(type(count) is int and count >= 1 for count in value):
        raise ValueError("a list of counts of at least 1, one for each MoE layer")
    return value


def kept_in_layers(keep: float | list[int], sizes: Sequence[int], name: str) -> list[int]:
    """How many experts stay in each MoE layer.

    Args:
        keep: as `kept` has it, or one count for each layer.
        sizes: experts of the layers.
        name: of the pass, for the message.

    Raises:
        InputError: it is a list of another length, or keeps more than there are.

    >>> kept_in_layers(0.5, [6, 4], "p"), kept_in_layers([5, 2], [6, 4], "p")
    ([3, 2], [5, 2])
    """
    if isinstance(keep, list) and len(keep) != len(sizes):
        raise InputError(f"{name}: keep has {len(keep)} counts for {len(sizes)} MoE layers")
    counts = keep if isinstance(keep, list) else [kept(keep, experts) for experts in sizes]
    for layer, (count, experts) in enumerate(zip(counts, sizes, strict=True)):
        if count > experts:
            raise InputError(f"{name}: keep {count} of the {experts} experts in MoE layer {layer}")
    return counts


def as_uneven_as_may_be(floors: Sequence[int], full: Sequence[int], total: int) -> list[int]:
    """``total`` experts on layers: floors, and the first layers take what these leave.

    >>> as_uneven_as_may_be([2, 2, 2], [6, 6, 6], 9)
    [5, 2, 2]
    """
    left, counts = total - sum(floors), []
    for floor, experts in zip(floors, full, strict=True):
        more = min(left, experts - floor)
        counts.append(floor + more)
        left -= more
    return counts


class DropAlike(Trim):
    """What the passes share that drop whatever changes the stream least: how much of it.

    Attributes:
        unit: what is dropped.
    """

    unit: ClassVar[str]

    drop: Annotated[
        int | float | None,
        Field(description="how many to drop: a count, or a fraction of the source's, rounded down"),
    ] = None
    threshold: Annotated[
        float | None,
        Field(ge=-1, le=1, description="instead of drop: the cosine from which one is dropped"),
    ] = None
    most: Annotated[
        int | float | None,
        Field(
            description="with threshold, at most so many: a count or a fraction; none: a quarter, "
            "and one at least"
        ),
    ] = None

    @field_validator("drop", "most", mode="before")
    @classmethod
    def _amount(cls, value: object) -> object:
        return check_amount(value)

    def whole(self, model: Model) -> int:
        """How many there are."""
        raise NotImplementedError

    @property
    def option(self) -> str:
        """The option that limits how many may go."""
        return "drop" if self.threshold is None else "most"

    @property
    def limit(self) -> float:
        """As many as may go: a count, once it is `resolved`."""
        limit = self.most if self.drop is None else self.drop
        return 1 if limit is None else limit

    def resolved(self, model: Model) -> Self:
        """With counts in place of fractions of the source."""
        whole = self.whole(model)
        if self.drop is not None:
            return self.model_copy(update={"drop": number(self.drop, whole)})
        most = max(1, whole // 4) if self.most is None else number(self.most, whole)
        return self.model_copy(update={"most": most})

    def check(self, model: Model) -> None:
        """Refuse both or neither of a number and a threshold, and to drop nothing, or everything.

        Raises:
            InputError: with the options of the pass.
        """
        name = name_of(self)
        if (self.drop is None) == (self.threshold is None):
            raise InputError(f"{name}: give drop (a count or a fraction) or threshold (a cosine)")
        if self.threshold is None and self.most is not None:
            raise InputError(f"{name}: most goes with threshold")
        whole, count = self.whole(model), self.limit
        if not 1 <= count < whole:
            raise InputError(
                f"{name}: {self.option} is {count} of {whole} {self.unit}s; at least 1 and at most "
                f"{whole - 1}"
            )

    @property
    def planned(self) -> int:
        """How many go for sure: by threshold, one at least."""
        return int(self.limit) if self.threshold is None else 1

    def none_reaches(self, model: Model, highest: float) -> Outcome:
        """Nothing was dropped: the highest cosine is below the threshold."""
        reason = f"the highest cosine is {highest:.4f}, below the threshold {self.threshold}"
        return Outcome(model, skipped={f"every {self.unit}": reason})
