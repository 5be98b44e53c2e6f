"""Counts, fractions and rankings: how many experts stay, and which. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence


def resolve_number(value: float, total: int) -> int:
    """Resolve a count, or a fraction of ``total`` rounded down.

    >>> resolve_number(2, 32), resolve_number(0.25, 32), resolve_number(0.4, 6)
    (2, 8, 2)
    """
    return value if isinstance(value, int) else int(value * total + 1e-9)


def count_kept(keep: float, experts: int) -> int:
    """Return how many of ``experts`` stay: a count, or a fraction of them rounded up.

    >>> count_kept(4, 6), count_kept(0.75, 6)
    (4, 5)
    """
    return keep if isinstance(keep, int) else math.ceil(keep * experts - 1e-9)


def allocate_least_even(floors: Sequence[int], full: Sequence[int], total: int) -> list[int]:
    """Allocate ``total`` experts: the floors, and all that is left to the first layers.

    >>> allocate_least_even([2, 2, 2], [6, 6, 6], 9)
    [5, 2, 2]
    """
    left, counts = total - sum(floors), []
    for floor, experts in zip(floors, full, strict=True):
        more = min(left, experts - floor)
        counts.append(floor + more)
        left -= more
    return counts


def rank_by_score(scores: Sequence[float]) -> tuple[int, ...]:
    """Rank positions by falling score; among equal scores the lower position first."""
    return tuple(sorted(range(len(scores)), key=lambda j: (-scores[j], j)))
