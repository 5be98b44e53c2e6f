"""Held-out samples and paired bootstrap intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from moe2edge.errors import InputError
from moe2edge.numerics.metrics import SampleSums

if TYPE_CHECKING:
    pass

GOLDEN = (math.sqrt(5) - 1) / 2
# Resamples of a bootstrap interval, and what it covers.
DRAWS, COVERED = 2000, 0.95


# ---- samples -----------------------------------------------------------------------------------


def split_samples(samples: int, held_out: float) -> tuple[list[int], list[int]]:
    """Places of the samples to choose by, and of those held out.

    Multiples of the golden ratio decide, so that both parts, and every run from the front of one,
    are spread evenly over the samples, whether the parts of a mix take turns in them or follow one
    another. At least two samples are held out, or there would be no interval.

    Raises:
        InputError: there are fewer than four samples, or none is left to choose by.
    """
    held = max(2, round(held_out * samples))
    if samples < 4 or held >= samples:
        raise InputError(
            f"{samples} calibration samples do not suffice to choose by some and hold out "
            f"{held_out:g} of them; use 4 or more, such as --set calibration.samples=64, and hold "
            "out fewer"
        )
    order = sorted(range(samples), key=lambda n: ((n + 1) * GOLDEN % 1, n))
    return order[held:], order[:held]


@dataclass(frozen=True)
class Interval:
    """A mean over samples and where it may lie.

    Attributes:
        mean: of the samples.
        low, high: ends of the bootstrap interval that covers 95 %.
        samples: number of samples.
    """

    mean: float
    low: float
    high: float
    samples: int

    def __str__(self) -> str:
        """Such as ``-0.0120 (95 % -0.0201 to -0.0043)``."""
        return f"{self.mean:+.4f} (95 % {self.low:+.4f} to {self.high:+.4f})"


def compute_interval(differences: Sequence[float], seed: int) -> Interval:
    """Percentile bootstrap over samples of the mean of paired differences.

    Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.
    """
    values = torch.tensor(differences, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(values), (DRAWS, len(values)), generator=generator)
    ends = torch.tensor([(1 - COVERED) / 2, (1 + COVERED) / 2], dtype=torch.float64)
    low, high = values[drawn].mean(1).quantile(ends).tolist()
    return Interval(float(values.mean()), low, high, len(values))


def compare_paired(
    mine: Sequence[SampleSums], theirs: Sequence[SampleSums], seed: int
) -> tuple[Interval, Interval]:
    """Loss and KL of ``mine`` less those of ``theirs``, paired by sample, nats per token."""
    pairs = list(zip(mine, theirs, strict=True))
    loss = compute_interval([(a.nll - b.nll) / a.tokens for a, b in pairs], seed)
    return loss, compute_interval([(a.kl - b.kl) / a.tokens for a, b in pairs], seed)


def compute_mean_kl(sums: Sequence[SampleSums]) -> float:
    """``KL(source || model)`` in nats per token."""
    return sum(one.kl for one in sums) / sum(one.tokens for one in sums)


def compute_mean_loss(sums: Sequence[SampleSums]) -> float:
    """Negative log-likelihood in nats per token."""
    return sum(one.nll for one in sums) / sum(one.tokens for one in sums)
