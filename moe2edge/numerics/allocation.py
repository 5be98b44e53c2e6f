"""One budget shared by all MoE layers: exact allocation by dynamic programming."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from moe2edge.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

Counts = tuple[int, ...]


# ---- allocating --------------------------------------------------------------------------------


def allocate(costs: Sequence[Sequence[float]], floors: Counts, total: int) -> Counts:
    """The allocation of ``total`` experts with the least sum of costs, by dynamic programming.

    It is exact; of equal sums the first in lexicographic order is taken.

    Args:
        costs: for each layer the cost of keeping its floor, one more, ... all of its experts.
        floors: experts that each layer keeps at least.
        total: experts that stay in all.

    Raises:
        InputError: no allocation has this total.

    >>> allocate([[9.0, 1.0, 0.0], [2.0, 1.5, 0.0]], (1, 1), 3)
    (2, 1)
    """
    # From the last layer to the first: the least cost of all layers from here, by their total.
    best = torch.full((total + 1,), math.inf, dtype=torch.float64)
    best[0] = 0.0
    choices: list[Tensor] = []
    for floor, row in zip(reversed(floors), reversed(costs), strict=True):
        found = torch.full_like(best, math.inf)
        choice = torch.full((total + 1,), -1, dtype=torch.int64)
        for count, cost in enumerate(row, start=floor):
            if count > total:
                break
            sums = torch.full_like(best, math.inf)
            sums[count:] = best[: total + 1 - count] + cost
            better = sums < found
            found[better], choice[better] = sums[better], count
        best = found
        choices.append(choice)
    if not math.isfinite(best[total]):
        most = sum(floors) + sum(len(row) - 1 for row in costs)
        raise InputError(
            f"no allocation keeps {total} experts: the floors add up to {sum(floors)}, all "
            f"experts to {most}"
        )
    counts: list[int] = []
    for choice in reversed(choices):
        counts.append(int(choice[total - sum(counts)]))
    return tuple(counts)


def interpolate_counts(first: Counts, second: Counts, part: float) -> Counts:
    """The allocation at ``part`` of the way from one to another of the same total.

    Rounded down, then the largest remainders get what is missing; of equal ones the earlier layer.

    >>> interpolate_counts((4, 4, 4), (6, 4, 2), 0.25)
    (5, 4, 3)
    """
    exact = [a + part * (b - a) for a, b in zip(first, second, strict=True)]
    counts = [math.floor(x + 1e-9) for x in exact]
    order = sorted(range(len(exact)), key=lambda n: (round(counts[n] - exact[n], 9), n))
    for n in order[: sum(first) - sum(counts)]:
        counts[n] += 1
    return tuple(counts)


def spread_counts(floor: int, experts: int, points: int) -> Counts:
    """At most ``points`` counts from ``floor`` to one less than all, evenly spaced, both ends in.

    >>> spread_counts(2, 8, 8), spread_counts(8, 64, 4), spread_counts(3, 3, 4)
    ((2, 3, 4, 5, 6, 7), (8, 26, 45, 63), ())
    """
    last = experts - 1
    if last - floor < points:
        return tuple(range(floor, experts))
    return tuple(round(floor + n * (last - floor) / (points - 1)) for n in range(points))


def interpolate_costs(known: Mapping[int, float], floor: int, experts: int) -> list[float]:
    """Costs of ``floor`` to ``experts`` experts from those of some counts, by straight lines.

    >>> interpolate_costs({2: 6.0, 4: 2.0, 5: 0.0}, 2, 5)
    [6.0, 4.0, 2.0, 0.0]
    """
    counts = sorted(known)
    found = [known[floor]]
    for low, high in itertools.pairwise(counts):
        slope = (known[high] - known[low]) / (high - low)
        found += [known[low] + slope * step for step in range(1, high - low)] + [known[high]]
    return found[: experts - floor + 1]


def list_single_layer_allocations(full: Counts, counts: Sequence[Counts]) -> list[Counts]:
    """Allocations that trim a single layer, for each layer to each of its ``counts``.

    >>> list_single_layer_allocations((4, 4), [(2, 3), (3,)])
    [(2, 4), (3, 4), (4, 3)]
    """
    return [(*full[:n], count, *full[n + 1 :]) for n, own in enumerate(counts) for count in own]
