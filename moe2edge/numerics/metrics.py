"""Quality of a model on held-out text, and its distance from its source. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# Positions at a time: with a large vocabulary, several copies of their logits take much memory.
CHUNK_POSITIONS = 64


@dataclass(frozen=True)
class Quality:
    """Metrics over held-out tokens.

    Attributes:
        tokens: number of predicted tokens.
        perplexity: ``exp`` of the mean negative log-likelihood.
        kl: mean ``KL(source || model)`` in nats per token, None without a source.
        top1: fraction of the tokens where both have the same most likely next token, None without a
            source.
        perplexity_error: standard error of ``perplexity``, from the spread between samples; None
            with a single sample.
        kl_error: that of ``kl``, None without a source as well.
        top1_error: that of ``top1``, None without a source as well.
    """

    tokens: int
    perplexity: float
    kl: float | None = None
    top1: float | None = None
    perplexity_error: float | None = None
    kl_error: float | None = None
    top1_error: float | None = None


@dataclass(frozen=True)
class SampleSums:
    """Sums over the predicted tokens of one sample.

    Attributes:
        tokens: number of predicted tokens.
        nll: negative log-likelihood, nats.
        kl: ``KL(source || model)``, nats; 0 without a source.
        agree: number of tokens where both have the same most likely next token; 0 without a source.
    """

    tokens: int
    nll: float
    kl: float
    agree: int


def measure(ids: Tensor, logits: Iterable[Tensor], source: Iterable[Tensor] | None) -> Quality:
    """Measure the quality of a model, with one sample in memory at a time.

    Args:
        ids: int64 [samples, length].
        logits: logits for each sample, float32 [length, vocabulary].
        source: the same of the source model.
    """
    samples = list(measure_per_sample(ids, logits, source))
    tokens = sum(one.tokens for one in samples)
    counts = [one.tokens for one in samples]
    perplexity = math.exp(min(sum(one.nll for one in samples) / tokens, 700.0))
    spread = estimate_error([one.nll for one in samples], counts)
    found = Quality(
        tokens,
        perplexity,
        # exp(x) changes by exp(x) where x changes by 1.
        perplexity_error=None if spread is None else perplexity * spread,
    )
    if source is None:
        return found
    return replace(
        found,
        kl=max(sum(one.kl for one in samples) / tokens, 0.0),
        top1=sum(one.agree for one in samples) / tokens,
        kl_error=estimate_error([one.kl for one in samples], counts),
        top1_error=estimate_error([one.agree for one in samples], counts),
    )


def estimate_error(sums: Sequence[float], counts: Sequence[int]) -> float | None:
    """Estimate the standard error of a mean over all tokens, from how samples differ.

    Tokens of one sample are not independent of each other; samples are. This is the error of a
    ratio of sums (Cochran, Sampling Techniques, 1977, section 6.3).

    Args:
        sums: of each sample, the sum over its tokens.
        counts: of each sample, the number of its tokens.

    Returns:
        The error; None with a single sample, or if a sum is not finite.

    >>> estimate_error([1.0, 3.0], [1, 1])
    1.0
    """
    many, total = len(sums), sum(counts)
    if many < 2 or not all(map(math.isfinite, sums)):
        return None
    mean = sum(sums) / total
    squares = sum((one - mean * count) ** 2 for one, count in zip(sums, counts, strict=True))
    return math.sqrt(many / (many - 1) * squares) / total


def measure_per_sample(
    ids: Tensor, logits: Iterable[Tensor], source: Iterable[Tensor] | None
) -> Iterator[SampleSums]:
    """Yield the sums over the tokens of each sample; arguments as in `measure`."""
    reference = iter(source) if source is not None else None
    for row, mine in zip(ids, logits, strict=True):
        yield sum_sample(row, mine, None if reference is None else next(reference))


def sum_sample(row: Tensor, mine: Tensor, theirs: Tensor | None) -> SampleSums:
    """Sum over the tokens of one sample.

    Args:
        row: int64 [length].
        mine: logits of a model, float32 [length, vocabulary].
        theirs: the same of its source; None: no source.
    """
    nll = kl = agree = 0.0
    for at in range(0, len(row) - 1, CHUNK_POSITIONS):
        part = slice(at, min(at + CHUNK_POSITIONS, len(row) - 1))
        log_q = mine[part].log_softmax(-1)
        nll -= float(log_q.gather(1, row[1:][part, None]).double().sum())
        if theirs is not None:
            log_p = theirs[part].log_softmax(-1)
            kl += float((log_p.exp() * (log_p - log_q)).double().sum())
            agree += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
    return SampleSums(len(row) - 1, nll, kl, int(agree))
