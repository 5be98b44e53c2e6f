"""Counts, fractions and rankings: how many experts stay, and which. Needs no torch."""

from __future__ import annotations

import itertools
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


def choose_best(scores: Sequence[float], count: int, groups: int = 1) -> list[int]:
    """Choose the best positions, in order; of each of some groups of neighbours the same number.

    >>> choose_best([3, 1, 2, 0], 2), choose_best([3, 1, 2, 0], 2, groups=2)
    ([0, 2], [0, 2])
    >>> choose_best([3, 4, 2, 0], 2), choose_best([3, 4, 2, 0], 2, groups=2)
    ([0, 1], [1, 2])
    """
    size, chosen = len(scores) // groups, []
    for first in range(0, size * groups, size):
        best = rank_by_score(scores[first : first + size])[: count // groups]
        chosen += sorted(first + n for n in best)
    return chosen


def list_group_counts(experts: int, groups: int, smallest: int) -> list[int]:
    """List how many experts may stay where each group keeps the same number.

    >>> list_group_counts(16, 4, 2)
    [8, 12, 16]
    """
    return [groups * n for n in range(smallest, experts // groups + 1)]


def rank_in_turns(scores: Sequence[float], groups: int) -> tuple[int, ...]:
    """Rank positions by falling score, where groups of neighbours take turns.

    >>> rank_in_turns([3, 1, 2, 0], 1), rank_in_turns([3, 1, 2, 0], 2)
    ((0, 2, 1, 3), (0, 2, 1, 3))
    >>> rank_in_turns([3, 4, 2, 0], 1), rank_in_turns([3, 4, 2, 0], 2)
    ((1, 0, 2, 3), (1, 2, 0, 3))
    """
    size = len(scores) // groups
    places = range(0, size * groups, size)
    ranked = [[at + n for n in rank_by_score(scores[at : at + size])] for at in places]
    return tuple(itertools.chain(*zip(*ranked, strict=True)))


def rank_by_score(scores: Sequence[float]) -> tuple[int, ...]:
    """Rank positions by falling score; among equal scores the lower position first."""
    return tuple(sorted(range(len(scores)), key=lambda j: (-scores[j], j)))
