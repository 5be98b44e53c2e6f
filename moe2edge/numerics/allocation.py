"""Allocation of one budget of experts over all MoE layers. Pure functions.

`allocate` is exact, by dynamic programming. The other functions make candidate allocations and
interpolate their costs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from moe2edge.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

# Experts that each MoE layer keeps.
Counts = tuple[int, ...]


def allocate(costs: Sequence[Sequence[float]], floors: Counts, total: int) -> Counts:
    """Allocate ``total`` experts to layers so that the sum of costs is least.

    Exact, by dynamic programming; among equal sums the first in lexicographic order is taken.

    Args:
        costs: for each layer the cost of keeping its floor, one more, ... all of its experts.
        floors: least number of experts that each layer keeps.
        total: number of experts that all layers keep together.

    Raises:
        InputError: no allocation has this total.

    >>> allocate([[9.0, 1.0, 0.0], [2.0, 1.5, 0.0]], (1, 1), 3)
    (2, 1)
    """
    # From the last layer to the first: best[n] is the least cost of the layers so far that keep n
    # experts together.
    best = torch.full((total + 1,), math.inf, dtype=torch.float64)
    best[0] = 0.0
    choices: list[Tensor] = []
    for floor, row in zip(reversed(floors), reversed(costs), strict=True):
        lowest = torch.full_like(best, math.inf)
        choice = torch.full((total + 1,), -1, dtype=torch.int64)
        for count, cost in enumerate(row, start=floor):
            if count > total:
                break
            sums = torch.full_like(best, math.inf)
            sums[count:] = best[: total + 1 - count] + cost
            better = sums < lowest
            lowest[better], choice[better] = sums[better], count
        best = lowest
        choices.append(choice)
    if not math.isfinite(best[total]):
        most = sum(floors) + sum(len(row) - 1 for row in costs)
        raise InputError(
            f"no allocation keeps {total} experts: the floors add up to {sum(floors)}, all "
            f"experts to {most}; choose a number between them"
        )
    counts: list[int] = []
    for choice in reversed(choices):
        counts.append(int(choice[total - sum(counts)]))
    return tuple(counts)


def interpolate_counts(first: Counts, second: Counts, part: float) -> Counts:
    """Interpolate between two allocations of the same total.

    ``part`` 0 gives the first, 1 the second. Counts are rounded down, then the layers with the
    largest remainders get the missing experts; among equal ones the earlier layer.

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
    """Return up to ``points`` evenly spaced counts from ``floor`` to ``experts - 1``, both ends in.

    >>> spread_counts(2, 8, 8), spread_counts(8, 64, 4), spread_counts(3, 3, 4)
    ((2, 3, 4, 5, 6, 7), (8, 26, 45, 63), ())
    """
    last = experts - 1
    if last - floor < points:
        return tuple(range(floor, experts))
    return tuple(round(floor + n * (last - floor) / (points - 1)) for n in range(points))


def interpolate_costs(known: Mapping[int, float], floor: int, experts: int) -> list[float]:
    """Interpolate the costs of ``floor`` to ``experts`` experts linearly between known ones.

    >>> interpolate_costs({2: 6.0, 4: 2.0, 5: 0.0}, 2, 5)
    [6.0, 4.0, 2.0, 0.0]
    """
    counts = sorted(known)
    costs = [known[floor]]
    for low, high in itertools.pairwise(counts):
        slope = (known[high] - known[low]) / (high - low)
        costs += [known[low] + slope * step for step in range(1, high - low)] + [known[high]]
    return costs[: experts - floor + 1]


def list_single_layer_allocations(full: Counts, counts: Sequence[Counts]) -> list[Counts]:
    """List the allocations that prune a single layer, to each of its ``counts``.

    >>> list_single_layer_allocations((4, 4), [(2, 3), (3,)])
    [(2, 4), (3, 4), (4, 3)]
    """
    return [
        (*full[:n], count, *full[n + 1 :]) for n, choices in enumerate(counts) for count in choices
    ]
