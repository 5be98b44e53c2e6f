"""Judge the change of a noisy metric between two sides that were measured in pairs.

Drift of a machine hits both runs of a pair, so that their ratio is free of it; spikes meet one run
of few pairs, so that the median is free of them. A first round that can say nothing is extended
once; one that says "changed" is confirmed by a second one. ``benchmarks/gate`` simulates how often
that is wrong, and what it finds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from moe2edge.errors import InputError

Side = Literal["lower", "higher"]
Judgement = Literal["regressed", "improved", "equivalent", "inconclusive"]
# Resamples of an interval, and its coverage.
RESAMPLES, COVERAGE = 2000, 0.95
# Normal quantiles of the coverage (two-sided) and of the power of the smallest effect.
_Z_COVERAGE, _Z_POWER = 1.96, 0.84


@dataclass(frozen=True)
class Change:
    """Relative change of a metric from base to head, as natural logarithms of the ratio.

    Attributes:
        median: median over the pairs.
        low, high: ends of its bootstrap interval, which covers 95 %.
        pairs: number of pairs.
    """

    median: float
    low: float
    high: float
    pairs: int

    @property
    def percent(self) -> float:
        """The median change in percent."""
        return 100 * math.expm1(self.median)

    def __str__(self) -> str:
        """Format such as ``+5.1 % (95 % +3.0 to +7.2)``."""
        low, high = (100 * math.expm1(end) for end in (self.low, self.high))
        return f"{self.percent:+.1f} % (95 % {low:+.1f} to {high:+.1f})"

    def find_smallest_effect(self, tolerance: float) -> float:
        """Return the change that a round with this spread finds in four of five cases.

        Args:
            tolerance: as in `judge_change`.

        Returns:
            A fraction, such as 0.04.
        """
        half = (self.high - self.low) / 2
        needed = max(math.log1p(tolerance), half)
        return math.expm1(needed + _Z_POWER * half / _Z_COVERAGE)


def estimate_change(base: Sequence[float], head: Sequence[float], seed: int = 0) -> Change:
    """Estimate the median change over pairs with its percentile bootstrap interval.

    Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.

    Args:
        base: the metric of the one side, pair by pair; positive.
        head: that of the other side.
        seed: of the resamples.

    Raises:
        InputError: there is no pair, a side lacks one, or a number is not positive.
    """
    import numpy as np

    sides = np.array([base, head], dtype=float) if len(base) == len(head) else np.zeros((2, 0))
    if not sides.size or not (np.isfinite(sides).all() and (sides > 0).all()):
        raise InputError(
            f"{len(base)} and {len(head)} measurements cannot be compared in pairs; both sides "
            "need as many, one or more, and all positive"
        )
    differences = np.log(sides[1]) - np.log(sides[0])
    drawn = np.random.default_rng(seed).integers(0, differences.size, (RESAMPLES, differences.size))
    medians = np.median(differences[drawn], axis=1)
    low, high = np.quantile(medians, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    return Change(float(np.median(differences)), float(low), float(high), differences.size)


def measure_floor(first: Sequence[float], second: Sequence[float], seed: int = 0) -> float:
    """Measure the change that this machine shows between a side and itself.

    Args:
        first: the metric of one side, run by run.
        second: that of the runs that are paired with these.
        seed: of the resamples.

    Returns:
        Half of the width of the interval, or the median if that is larger, as a fraction.

    Raises:
        InputError: see `estimate_change`.
    """
    found = estimate_change(first, second, seed)
    return math.expm1(max(abs(found.median), (found.high - found.low) / 2))


def judge_change(
    change: Change, tolerance: float, better: Side = "lower", floor: float = 0.0
) -> Judgement:
    """Judge one round.

    It is a change if the interval is beyond zero and the median beyond tolerance and noise floor;
    equivalent if the interval lies within the tolerance; otherwise nothing is known.

    Args:
        change: the estimate.
        tolerance: fraction up to which a change does not count.
        better: direction of the metric.
        floor: noise of this machine, a fraction.
    """
    sign = 1 if better == "lower" else -1
    median = sign * change.median
    low, high = sorted((sign * change.low, sign * change.high))
    limit, least = math.log1p(tolerance), math.log1p(max(tolerance, floor))
    if low > 0 and median > least:
        return "regressed"
    if high < 0 and median < -least:
        return "improved"
    return "equivalent" if -limit <= low and high <= limit else "inconclusive"


Pairs = tuple[Sequence[float], Sequence[float]]
NextStep = Literal["stop", "extend", "confirm"]


@dataclass(frozen=True)
class PairedRuns:
    """Runs of one metric of two sides, of which the first is base; lower is better.

    Attributes:
        tolerance: as in `judge_change`.
        again: base, run a second time in each turn of the first round.
        first: base and head of the first round, pair by pair.
        second: of the round that has to confirm the first; None: there was none.
    """

    tolerance: float
    again: Sequence[float]
    first: Pairs
    second: Pairs | None = None

    def extend(
        self, again: Sequence[float], base: Sequence[float], head: Sequence[float]
    ) -> PairedRuns:
        """Return them with more runs in the first round."""
        first = [*self.first[0], *base], [*self.first[1], *head]
        return replace(self, again=[*self.again, *again], first=first)

    def confirm(self, base: Sequence[float], head: Sequence[float]) -> PairedRuns:
        """Return them with a second round."""
        return replace(self, second=(base, head))

    @property
    def floor(self) -> float:
        """Change that this machine shows between base and itself, a fraction."""
        return measure_floor(self.again, self.first[0])

    @property
    def pooled(self) -> Pairs:
        """Base and head of both rounds."""
        base, head = (
            [value for one in (self.first, self.second) if one for value in one[side]]
            for side in (0, 1)
        )
        return base, head

    def judge_first(self) -> Judgement:
        """Judge the first round alone, which decides what is run next."""
        return judge_change(estimate_change(*self.first), self.tolerance, floor=self.floor)

    def judge(self) -> Judgement:
        """Judge all that was run, see `judge_rounds`."""
        rounds = [one for one in (self.first, self.second) if one]
        return judge_rounds(rounds, self.tolerance, floor=self.floor)


def choose_step(judgements: Iterable[Judgement], *, extended: bool) -> NextStep:
    """Choose what to run after the first round of pairs.

    Args:
        judgements: of the first round, of each metric that matters.
        extended: whether the first round was extended already.

    Returns:
        ``extend``: as many pairs again, for the first round, because nothing can be said of a
        metric; ``confirm``: a second round, because one has changed; ``stop``: nothing.
    """
    found = set(judgements)
    if "inconclusive" in found and not extended:
        return "extend"
    return "confirm" if found & {"regressed", "improved"} else "stop"


def judge_rounds(
    rounds: Sequence[tuple[Sequence[float], Sequence[float]]],
    tolerance: float,
    better: Side = "lower",
    floor: float = 0.0,
    seed: int = 0,
) -> Judgement:
    """Judge all rounds: a change counts only if every one of them, two or more, found it.

    A change that a later round does not confirm is inconclusive, or equivalent if the pairs of all
    rounds say so.

    Args:
        rounds: base and head of each round, pair by pair.
        tolerance: as in `judge_change`.
        better: likewise.
        floor: likewise.
        seed: of the resamples.

    Raises:
        InputError: see `estimate_change`.
    """
    found = {
        judge_change(estimate_change(base, head, seed + n), tolerance, better, floor)
        for n, (base, head) in enumerate(rounds)
    }
    if len(rounds) > 1 and len(found) == 1:
        return found.pop()
    base, head = ([value for one in rounds for value in one[side]] for side in (0, 1))
    pooled = judge_change(estimate_change(base, head, seed), tolerance, better, floor)
    return pooled if pooled == "equivalent" else "inconclusive"
