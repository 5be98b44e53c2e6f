"""Counts, fractions and rankings: how many stay, and who. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


def number(value: float, of: int) -> int:
    """A count, or a fraction of ``of`` rounded down.

    >>> number(2, 32), number(0.25, 32), number(0.4, 6)
    (2, 8, 2)
    """
    return value if isinstance(value, int) else int(value * of + 1e-9)


def kept(keep: float, experts: int) -> int:
    """How many of ``experts`` stay: a count, or a fraction of them rounded up.

    >>> kept(4, 6), kept(0.75, 6)
    (4, 5)
    """
    return keep if isinstance(keep, int) else math.ceil(keep * experts - 1e-9)


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


def ranking(scores: Sequence[float]) -> tuple[int, ...]:
    """Positions by falling score; of equal scores the lower position first."""
    return tuple(sorted(range(len(scores)), key=lambda j: (-scores[j], j)))
