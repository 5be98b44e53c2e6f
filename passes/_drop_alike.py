"""Base of passes that drop whatever changes the hidden states least."""

from __future__ import annotations

from typing import Annotated, ClassVar, Self

from pydantic import Field, field_validator

from moe2edge.errors import InputError
from moe2edge.model.model import Model
from moe2edge.numerics.selection import resolve_number
from moe2edge.pipeline.checks import check_amount
from moe2edge.pipeline.contract import Outcome, Trim


class DropAlike(Trim):
    """Base of passes that drop the most redundant layers or blocks: the options for their number.

    Attributes:
        unit: name of a thing that is dropped.
    """

    unit: ClassVar[str]

    drop: Annotated[
        int | float | None,
        Field(
            description="how many to drop: a count, or a fraction of those in the source, rounded "
            "down"
        ),
    ] = None
    threshold: Annotated[
        float | None,
        Field(
            ge=-1,
            le=1,
            description="instead of drop: drop those whose input and output have at least this "
            "cosine",
        ),
    ] = None
    most: Annotated[
        int | float | None,
        Field(
            description="with threshold: the most to drop, a count or a fraction; default: a "
            "quarter, at least one"
        ),
    ] = None

    @field_validator("drop", "most", mode="before")
    @classmethod
    def _amount(cls, value: object) -> object:
        return check_amount(value)

    def whole(self, model: Model) -> int:
        """Return how many there are in all."""
        raise NotImplementedError

    @property
    def option(self) -> str:
        """Name of the option that limits how many are dropped."""
        return "drop" if self.threshold is None else "most"

    @property
    def limit(self) -> float:
        """Most that are dropped: a count, after `resolve`."""
        limit = self.most if self.drop is None else self.drop
        return 1 if limit is None else limit

    def resolve(self, model: Model) -> Self:
        """Return the pass with counts in place of fractions of the source."""
        whole = self.whole(model)
        if self.drop is not None:
            return self.model_copy(update={"drop": resolve_number(self.drop, whole)})
        most = max(1, whole // 4) if self.most is None else resolve_number(self.most, whole)
        return self.model_copy(update={"most": most})

    def check(self, model: Model) -> None:
        """Refuse both or neither of a number and a threshold, and dropping nothing or everything.

        Raises:
            InputError: the options contradict each other, or do not fit the model.
        """
        name = self.name
        if (self.drop is None) == (self.threshold is None):
            raise InputError(f"{name}: give drop (a count or a fraction) or threshold (a cosine)")
        if self.threshold is None and self.most is not None:
            raise InputError(
                f"{name}: most needs threshold; leave most out, or give threshold in place of drop"
            )
        whole, most, count = self.whole(model), self.count_droppable(model), self.limit
        if most < 1:
            raise InputError(
                f"{name}: the model has {whole} {self.unit}s, and one with experts has to stay; "
                f"leave {name} out"
            )
        if not 1 <= count <= most:
            raise InputError(
                f"{name}: {self.option} is {count} of {whole} {self.unit}s; choose at least 1 and "
                f"at most {most}"
            )

    def count_droppable(self, model: Model) -> int:
        """Return how many may be dropped: one stays."""
        return self.whole(model) - 1

    @property
    def planned(self) -> int:
        """Number that are dropped in any case; with a threshold at least one."""
        return int(self.limit) if self.threshold is None else 1

    def none_reaches(self, model: Model, highest: float) -> Outcome:
        """Return that nothing was dropped, as the highest cosine is below the threshold."""
        reason = f"the highest cosine is {highest:.4f}, below the threshold {self.threshold}"
        return Outcome(model, skipped={f"every {self.unit}": reason})
