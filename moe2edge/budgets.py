"""How many experts each MoE layer keeps when all layers share one budget.

An *allocation* is a count for each MoE layer, in order. Which experts stay in a layer of n is not
decided here: the n best of its ranking.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from moe2edge import criteria, quality, subsets, walk
from moe2edge.criteria import Criterion
from moe2edge.errors import InputError
from moe2edge.layers import MoELayer
from moe2edge.model import Block, Model
from moe2edge.pipeline import Facts
from moe2edge.quality import Sums
from moe2edge.subsets import Advance, Evidence, Gatherer

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.walk import Seen

Counts = tuple[int, ...]

GOLDEN = (math.sqrt(5) - 1) / 2
# Resamples of a bootstrap interval, and what it covers.
DRAWS, COVERED = 2000, 0.95
# Bytes of hidden states held at a time, where several allocations share a walk.
STREAM_BYTES = 1 << 30


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


def between(first: Counts, second: Counts, part: float) -> Counts:
    """The allocation at ``part`` of the way from one to another of the same total.

    Rounded down, then the largest remainders get what is missing; of equal ones the earlier layer.

    >>> between((4, 4, 4), (6, 4, 2), 0.25)
    (5, 4, 3)
    """
    exact = [a + part * (b - a) for a, b in zip(first, second, strict=True)]
    counts = [math.floor(x + 1e-9) for x in exact]
    order = sorted(range(len(exact)), key=lambda n: (round(counts[n] - exact[n], 9), n))
    for n in order[: sum(first) - sum(counts)]:
        counts[n] += 1
    return tuple(counts)


def grid(floor: int, experts: int, points: int) -> Counts:
    """At most ``points`` counts from ``floor`` to one less than all, evenly spaced, both ends in.

    >>> grid(2, 8, 8), grid(8, 64, 4), grid(3, 3, 4)
    ((2, 3, 4, 5, 6, 7), (8, 26, 45, 63), ())
    """
    last = experts - 1
    if last - floor < points:
        return tuple(range(floor, experts))
    return tuple(round(floor + n * (last - floor) / (points - 1)) for n in range(points))


def interpolated(known: Mapping[int, float], floor: int, experts: int) -> list[float]:
    """Costs of ``floor`` to ``experts`` experts from those of some counts, by straight lines.

    >>> interpolated({2: 6.0, 4: 2.0, 5: 0.0}, 2, 5)
    [6.0, 4.0, 2.0, 0.0]
    """
    counts = sorted(known)
    found = [known[floor]]
    for low, high in itertools.pairwise(counts):
        slope = (known[high] - known[low]) / (high - low)
        found += [known[low] + slope * step for step in range(1, high - low)] + [known[high]]
    return found[: experts - floor + 1]


# ---- samples -----------------------------------------------------------------------------------


def split(samples: int, held_out: float) -> tuple[list[int], list[int]]:
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


def interval(differences: Sequence[float], seed: int) -> Interval:
    """Percentile bootstrap over samples of the mean of paired differences.

    Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.
    """
    values = torch.tensor(differences, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(values), (DRAWS, len(values)), generator=generator)
    ends = torch.tensor([(1 - COVERED) / 2, (1 + COVERED) / 2], dtype=torch.float64)
    low, high = values[drawn].mean(1).quantile(ends).tolist()
    return Interval(float(values.mean()), low, high, len(values))


def differences(
    mine: Sequence[Sums], theirs: Sequence[Sums], seed: int
) -> tuple[Interval, Interval]:
    """Loss and KL of ``mine`` less those of ``theirs``, paired by sample, nats per token."""
    pairs = list(zip(mine, theirs, strict=True))
    loss = interval([(a.nll - b.nll) / a.tokens for a, b in pairs], seed)
    return loss, interval([(a.kl - b.kl) / a.tokens for a, b in pairs], seed)


# ---- rankings and reconstruction errors --------------------------------------------------------


def prefix_errors(
    evidence: Evidence, streams: Tensor, order: Sequence[int], floor: int
) -> list[float]:
    """What a layer does wrong with its ``floor`` best experts, with one more, ... with all.

    The mean over tokens of ``||Z_t - Z'_t||^2 / ||x_t||^2``, x being the residual stream behind the
    layer: an error counts for as much as it turns what later blocks see. Token by token, because a
    few have streams a thousand times as long as others (https://arxiv.org/abs/2402.17762).

    Args:
        evidence: of the layer; its Gram matrices are scaled in place.
        streams: squared norms ``||x_t||^2`` of its tokens, float64 [T].
        order: positions of the experts, the best first.
        floor: at least 1.
    """
    sizes = [len(part.gram) for part in evidence.parts]
    for part, norms in zip(evidence.parts, torch.split(streams, sizes), strict=True):
        part.gram.div_(norms.clamp(min=1e-30)[:, None, None])
    counts = range(floor, evidence.experts + 1)
    return [subsets.loss(evidence, order[:count]) / sum(sizes) for count in counts]


class Ranker:
    """Observer of a walk that ranks experts, and may tell what each layer's best n leave undone.

    Attributes:
        errors: `prefix_errors` by the index of the block.
    """

    def __init__(
        self,
        criterion: Criterion,
        seed: int,
        floors: Mapping[int, int],
        tokens: int,
        most: int | None,
    ) -> None:
        """Nothing seen yet.

        Args:
            criterion: ranks the experts.
            seed: for criterion ``random``.
            floors: of the errors, by the index of the block; empty: no errors are wanted.
            tokens: of the walk.
            most: tokens that errors are measured on; None: all.
        """
        self.errors: dict[int, list[float]] = {}
        self._criterion, self._seed = criterion, seed
        self._floors, self._most = floors, most
        self._gatherer = Gatherer(tokens, most) if floors else None
        self._observers = {kind: kind() for kind in criteria.observers(criterion)}
        self._streams: list[Tensor] = []

    @property
    def needs_walk(self) -> bool:
        """Whether there is anything to see."""
        return bool(self._observers) or self._gatherer is not None

    def see(self, seen: Seen) -> None:
        """Take in one batch."""
        for observer in self._observers.values():
            observer.see(seen)
        layer, index = seen.block.mlp, seen.block.index
        if self._gatherer is None or not isinstance(layer, MoELayer):
            return
        self._gatherer.see(seen)
        self._streams.append(seen.outputs.flatten(0, -2).double().square().sum(-1))
        if self._gatherer.complete:
            streams, self._streams = torch.cat(self._streams), []
            streams = streams[subsets.spread(len(streams), self._most)]
            order, evidence = self.ranking(seen.block), self._gatherer.take(layer)
            self.errors[index] = prefix_errors(evidence, streams, order, self._floors[index])

    def ranking(self, block: Block) -> tuple[int, ...]:
        """Positions of the experts of a block that was seen, the best first."""
        facts = Facts({kind: observer.fact() for kind, observer in self._observers.items()})
        scores = criteria.scores(self._criterion, block, facts, self._seed)
        return criteria.ranking(scores)

    def fact(self) -> Mapping[int, list[float]]:
        """The errors."""
        return self.errors


# ---- trying allocations on the whole model -----------------------------------------------------


@dataclass(frozen=True)
class Trimmer:
    """A model with experts ranked: makes its blocks and itself under any allocation.

    Attributes:
        model: with all of its experts.
        rankings: of each MoE layer, positions of experts, the best first.
        clamp_top_k: as of `Block.keep_experts`.
    """

    model: Model
    rankings: tuple[tuple[int, ...], ...]
    clamp_top_k: bool

    @property
    def full(self) -> Counts:
        """The allocation that keeps everything."""
        return self.model.expert_counts

    @property
    def layers(self) -> dict[int, int]:
        """Place among the MoE layers of each block that has one."""
        return {block.index: n for n, (block, _) in enumerate(self.model.moe_blocks)}

    def block(self, index: int, count: int) -> Block:
        """An MoE block with its best experts, in their old order."""
        block, order = self.model.blocks[index], self.rankings[self.layers[index]]
        if count == len(order):
            return block
        return block.keep_experts(sorted(order[:count]), clamp_top_k=self.clamp_top_k)

    def trimmed(self, counts: Counts) -> Model:
        """The model under an allocation."""
        model = self.model
        for index, n in self.layers.items():
            model = model.replace_block(self.block(index, counts[n]))
        return model


@dataclass(frozen=True)
class Trial:
    """Tries allocations on text: what they predict, against what the source predicts.

    Allocations that agree in their first layers share the run through them.

    Attributes:
        trimmer: makes the models.
        source: the intact model.
        source_hidden: what it makes of the tokens, after its last block.
        tokens: int64 [samples, length].
    """

    trimmer: Trimmer
    source: Model
    source_hidden: Tensor
    tokens: Tensor

    def first(self, samples: int) -> Trial:
        """The same on the first samples only."""
        return replace(
            self, source_hidden=self.source_hidden[:samples], tokens=self.tokens[:samples]
        )

    def judge(self, tried: Sequence[Counts], advance: Advance) -> list[list[Sums]]:
        """What each allocation does on each sample."""
        found: list[list[Sums]] = []
        done, total = 0, block_runs(self.trimmer.model, tried, self.at_once)

        def tell(steps: int) -> None:
            nonlocal done
            done += steps
            advance(done, total)

        tell(0)
        for some in self._groups(tried):
            found += self._compared(self._streams(some, tell))
        return found

    @property
    def at_once(self) -> int:
        """Allocations that share a walk; a block's inputs and outputs are held for all of them."""
        return at_once(self.source_hidden.numel())

    def _groups(self, tried: Sequence[Counts]) -> Iterator[Sequence[Counts]]:
        for at in range(0, len(tried), self.at_once):
            yield tried[at : at + self.at_once]

    def _streams(self, tried: Sequence[Counts], tell: Callable[[int], None]) -> list[Tensor]:
        """Hidden states after the last block under each allocation."""
        model = self.trimmer.model
        streams: dict[Counts, Tensor] = {(): walk.embed(model, self.tokens)}
        for block in model.blocks:
            longer: dict[Counts, Tensor] = {}
            for count, prefixes in _branches(model, block, tried).items():
                shape = block if count is None else self.trimmer.block(block.index, count)
                runner = walk.BlockRunner(model, shape)
                for before, after in prefixes:
                    longer[after] = _through(runner, streams[before], self.tokens)
                    tell(1)
            streams = longer
        return [streams[counts] for counts in tried]

    def _compared(self, streams: Sequence[Tensor]) -> list[list[Sums]]:
        """Figures per stream and sample; logits of two models for one sample are in memory."""
        found: list[list[Sums]] = [[] for _ in streams]
        # Sample by sample, so that the head is read once and the source's logits made once.
        turns = (stream[n] for n in range(len(self.tokens)) for stream in streams)
        mine = walk.head_logits(self.trimmer.model, turns)
        theirs = walk.head_logits(self.source, self.source_hidden)
        for row, expected in zip(self.tokens, theirs, strict=True):
            for sums in found:
                sums.append(quality.sums(row, next(mine), expected))
        return found


def _branches(
    model: Model, block: Block, tried: Sequence[Counts]
) -> dict[int | None, list[tuple[Counts, Counts]]]:
    """Runs through one block, by the number of experts it then has (None: it has no MoE layer).

    A run leads from what a group of allocations has in common before the block to what it has in
    common after it.
    """
    before = sum(index < block.index for index in (b.index for b, _ in model.moe_blocks))
    after = before + isinstance(block.mlp, MoELayer)
    found: dict[int | None, list[tuple[Counts, Counts]]] = {}
    for prefix in dict.fromkeys(counts[:after] for counts in tried):
        count = prefix[before] if after > before else None
        found.setdefault(count, []).append((prefix[:before], prefix))
    return found


def _through(runner: walk.BlockRunner, hidden: Tensor, tokens: Tensor) -> Tensor:
    """What a block makes of the stream ``hidden`` [samples, length, hidden], which stays."""
    out = torch.empty_like(hidden)
    for part in walk.batches(tokens):
        out[part] = runner.run(hidden[part])
    return out


def at_once(numbers: int) -> int:
    """Allocations that share a walk where each holds ``numbers`` float32 before and after a block.

    >>> at_once(64 * 512 * 2048), at_once(10**12)
    (2, 1)
    """
    return max(1, STREAM_BYTES // (2 * 4 * numbers))


def block_runs(model: Model, tried: Sequence[Counts], together: int) -> int:
    """Blocks that `Trial.judge` runs over its tokens, ``together`` allocations in a walk."""
    return sum(
        len(prefixes)
        for at in range(0, len(tried), together)
        for block in model.blocks
        for prefixes in _branches(model, block, tried[at : at + together]).values()
    )


def mean_kl(sums: Sequence[Sums]) -> float:
    """``KL(source || model)`` in nats per token."""
    return sum(one.kl for one in sums) / sum(one.tokens for one in sums)


def mean_loss(sums: Sequence[Sums]) -> float:
    """Negative log-likelihood in nats per token."""
    return sum(one.nll for one in sums) / sum(one.tokens for one in sums)


def one_layer_each(full: Counts, counts: Sequence[Counts]) -> list[Counts]:
    """Allocations that trim a single layer, for each layer to each of its ``counts``.

    >>> one_layer_each((4, 4), [(2, 3), (3,)])
    [(2, 4), (3, 4), (4, 3)]
    """
    return [(*full[:n], count, *full[n + 1 :]) for n, own in enumerate(counts) for count in own]
