"""Held-out samples and paired bootstrap intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from moe2edge.errors import InputError
from moe2edge.numerics.metrics import SampleSums

# The golden ratio, less one.
GOLDEN = (math.sqrt(5) - 1) / 2
# Resamples of a bootstrap interval, and its coverage.
DRAWS, COVERED = 2000, 0.95
# Numbers that are drawn at once.
_AT_ONCE = 1 << 20


def split_samples(samples: int, held_out: float) -> tuple[list[int], list[int]]:
    """Split samples into those to choose by and those held out; return the positions of both.

    Multiples of the golden ratio decide. So both parts, and any number of samples from the front
    of either, are spread evenly over the samples, whether the parts of a mix alternate or follow
    one another. At least two samples are held out, since a single one gives no interval.

    Args:
        samples: number of samples.
        held_out: the fraction to hold out.

    Raises:
        InputError: there are fewer than four samples, or none is left to choose by.
    """
    count = max(2, round(held_out * samples))
    if samples < 4 or count >= samples:
        fewer = "lower held_out, such as to 0.25"
        more = "use 4 or more, such as --set calibration.samples=64"
        raise InputError(
            f"{samples} calibration samples are too few to choose by some and hold out a "
            f"fraction of {held_out:g}; {more if samples < 4 else fewer}"
        )
    order = sorted(range(samples), key=lambda n: ((n + 1) * GOLDEN % 1, n))
    return order[count:], order[:count]


@dataclass(frozen=True)
class Interval:
    """Mean over samples with its bootstrap interval.

    Attributes:
        mean: mean over the samples.
        low, high: ends of the bootstrap interval, which covers 95 %.
        samples: number of samples.
    """

    mean: float
    low: float
    high: float
    samples: int

    def __str__(self) -> str:
        """Format such as ``-0.0120 (95 % -0.0201 to -0.0043)``."""
        return f"{self.mean:+.4f} (95 % {self.low:+.4f} to {self.high:+.4f})"


def compute_interval(differences: Sequence[float], seed: int) -> Interval:
    """Compute the percentile bootstrap interval of the mean of paired differences, over samples.

    Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.
    """
    values = torch.tensor(differences, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(values), (DRAWS, len(values)), generator=generator)
    ends = torch.tensor([(1 - COVERED) / 2, (1 + COVERED) / 2], dtype=torch.float64)
    low, high = values[drawn].mean(1).quantile(ends).tolist()
    return Interval(float(values.mean()), low, high, len(values))


def compute_median_interval(
    groups: Sequence[Sequence[float]], seed: int
) -> tuple[float, float] | None:
    """Compute the percentile bootstrap interval of the median of samples in groups.

    Groups are drawn first, and then samples of each that was drawn, since samples of one group are
    more alike than those of two. It covers 95 %, or less where there are few groups.
    Davison and Hinkley, Bootstrap Methods and their Application, 1997, section 3.8.

    Args:
        groups: samples of each group, as many of each.
        seed: of the draws.

    Returns:
        The ends; None if there are fewer than two groups, of whose differences nothing is known.
    """
    table = np.array(groups, dtype=float)
    if len(groups) < 2 or not table.size:
        return None
    count, size = table.shape
    drawn, medians = np.random.default_rng(seed), []
    at_once = max(1, _AT_ONCE // table.size)
    for begin in range(0, DRAWS, at_once):
        draws = min(at_once, DRAWS - begin)
        rows = drawn.integers(count, size=(draws, count, 1))
        columns = drawn.integers(size, size=(draws, count, size))
        medians.append(np.median(table[rows, columns].reshape(draws, -1), axis=1))
    low, high = np.quantile(np.concatenate(medians), [(1 - COVERED) / 2, (1 + COVERED) / 2])
    return float(low), float(high)


def compare_paired(
    mine: Sequence[SampleSums], theirs: Sequence[SampleSums], seed: int
) -> tuple[Interval, Interval]:
    """Return the differences in loss and in KL, ``mine`` minus ``theirs``, in nats per token.

    They are paired by sample.
    """
    pairs = list(zip(mine, theirs, strict=True))
    loss = compute_interval([(a.nll - b.nll) / a.tokens for a, b in pairs], seed)
    return loss, compute_interval([(a.kl - b.kl) / a.tokens for a, b in pairs], seed)


def compute_mean_kl(sums: Sequence[SampleSums]) -> float:
    """Compute the mean ``KL(source || model)`` in nats per token."""
    return sum(one.kl for one in sums) / sum(one.tokens for one in sums)


def compute_mean_loss(sums: Sequence[SampleSums]) -> float:
    """Compute the mean negative log-likelihood in nats per token."""
    return sum(one.nll for one in sums) / sum(one.tokens for one in sums)
