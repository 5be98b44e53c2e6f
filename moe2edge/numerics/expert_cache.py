"""Hit rates of a cache of experts, by its size, from the order in which a text uses them.

Pure functions. A cache holds some experts of a layer in fast memory; an expert that is used and not
held is read from slow memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence


def count_recent_hits(uses: Iterable[int], experts: int) -> list[int]:
    """Count the hits of caches that hold the experts used last (LRU), for every size at once.

    An expert is in a cache of n if fewer than n others were used since its last use: its place in
    the list of experts by last use (Mattson et al. 1970, Evaluation techniques for storage
    hierarchies). A cache is empty at first.

    >>> count_recent_hits([0, 1, 0, 2, 1], 3)
    [0, 0, 1, 2]

    Args:
        uses: experts in the order in which they are used.
        experts: number of experts.

    Returns:
        Hits by size of the cache, 0 to ``experts``.
    """
    found = [0] * (experts + 1)
    latest: list[int] = []
    for expert in uses:
        try:
            place = latest.index(expert)
        except ValueError:
            place = -1
        else:
            del latest[place]
            found[place + 1] += 1
        latest.insert(0, expert)
    for size in range(1, experts + 1):
        found[size] += found[size - 1]
    return found


def count_fixed_hits(halves: Sequence[Sequence[int]], experts: int) -> list[int]:
    """Count the hits of caches that hold the same experts throughout, for every size.

    They hold the experts that another text uses most: those of each half are chosen on the other.
    Of equally used ones the first are held.

    >>> count_fixed_hits([[0, 0, 1], [0, 2, 2]], 3)
    [0, 3, 4, 6]

    Args:
        halves: experts used in one half of a text, and in the other.
        experts: number of experts.

    Returns:
        Hits by size of the cache, 0 to ``experts``.
    """
    found = [0] * (experts + 1)
    counts = [Counter(half) for half in halves]
    for own, other in zip(counts, reversed(counts), strict=True):
        ranking = sorted(range(experts), key=lambda e: (-other[e], e))
        hits = 0
        for size, expert in enumerate(ranking, 1):
            hits += own[expert]
            found[size] += hits
    return found
