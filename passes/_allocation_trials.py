"""Trials of allocations: experts of each MoE layer when all layers share one budget.

An *allocation* is a count for each MoE layer, in order. Which experts stay in a layer of n is not
decided here: the n best of its ranking.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from moe2edge.calibration import criteria, walk
from moe2edge.calibration.criteria import Criterion
from moe2edge.calibration.evidence import Gatherer
from moe2edge.calibration.observation import Facts
from moe2edge.model.layers import MoELayer
from moe2edge.model.model import Block, Model
from moe2edge.numerics import metrics, selection, subset_loss
from moe2edge.numerics.allocation import Counts
from moe2edge.numerics.metrics import SampleSums
from moe2edge.numerics.subset_loss import CountProgress, compute_prefix_errors

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.calibration.observation import BlockTrace

# Bytes of hidden states held at a time, where several allocations share a walk.
STREAM_BYTES = 1 << 30


class Ranker:
    """Observer that ranks experts, and may measure the error of keeping each layer's best n.

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
        """Start without observations.

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
        self._observers = {kind: kind() for kind in criteria.list_observers(criterion)}
        self._streams: list[Tensor] = []

    @property
    def needs_walk(self) -> bool:
        """True if it needs a walk."""
        return bool(self._observers) or self._gatherer is not None

    def observe(self, trace: BlockTrace) -> None:
        """Take in one batch."""
        for observer in self._observers.values():
            observer.observe(trace)
        layer, index = trace.block.mlp, trace.block.index
        if self._gatherer is None or not isinstance(layer, MoELayer):
            return
        self._gatherer.observe(trace)
        self._streams.append(trace.outputs.flatten(0, -2).double().square().sum(-1))
        if self._gatherer.complete:
            streams, self._streams = torch.cat(self._streams), []
            streams = streams[subset_loss.spread(len(streams), self._most)]
            order, evidence = self.ranking(trace.block), self._gatherer.take(layer)
            self.errors[index] = compute_prefix_errors(
                evidence, streams, order, self._floors[index]
            )

    def ranking(self, block: Block) -> tuple[int, ...]:
        """Positions of the experts of a block that was seen, the best first."""
        facts = Facts({kind: observer.result() for kind, observer in self._observers.items()})
        scores = criteria.score_experts(self._criterion, block, facts, self._seed)
        return selection.rank_by_score(scores)

    def result(self) -> Mapping[int, list[float]]:
        """Return the errors."""
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
        """Return an MoE block with its best experts, in their old order."""
        block, order = self.model.blocks[index], self.rankings[self.layers[index]]
        if count == len(order):
            return block
        return block.keep_experts(sorted(order[:count]), clamp_top_k=self.clamp_top_k)

    def trim(self, counts: Counts) -> Model:
        """Return the model under an allocation."""
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
        """Return the trial on the first samples only."""
        return replace(
            self, source_hidden=self.source_hidden[:samples], tokens=self.tokens[:samples]
        )

    def judge(self, tried: Sequence[Counts], advance: CountProgress) -> list[list[SampleSums]]:
        """Measure each allocation on each sample."""
        found: list[list[SampleSums]] = []
        done, total = 0, count_block_runs(self.trimmer.model, tried, self.at_once)

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
        return count_at_once(self.source_hidden.numel())

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

    def _compared(self, streams: Sequence[Tensor]) -> list[list[SampleSums]]:
        """Measure each allocation and sample; logits of two models for one sample are in memory."""
        found: list[list[SampleSums]] = [[] for _ in streams]
        # Sample by sample, so that the head is read once and the source's logits made once.
        turns = (stream[n] for n in range(len(self.tokens)) for stream in streams)
        mine = walk.compute_logits(self.trimmer.model, turns)
        theirs = walk.compute_logits(self.source, self.source_hidden)
        for row, expected in zip(self.tokens, theirs, strict=True):
            for sums in found:
                sums.append(metrics.sum_sample(row, next(mine), expected))
        return found


def _branches(
    model: Model, block: Block, tried: Sequence[Counts]
) -> dict[int | None, list[tuple[Counts, Counts]]]:
    """List the runs through a block, by its number of experts (None: it has no MoE layer).

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
    """Run a block on ``hidden`` [samples, length, hidden], which stays unchanged."""
    out = torch.empty_like(hidden)
    for part in walk.split_batches(tokens):
        out[part] = runner.run(hidden[part])
    return out


def count_at_once(numbers: int) -> int:
    """Allocations that share a walk where each holds ``numbers`` float32 before and after a block.

    >>> count_at_once(64 * 512 * 2048), count_at_once(10**12)
    (2, 1)
    """
    return max(1, STREAM_BYTES // (2 * 4 * numbers))


def count_block_runs(model: Model, tried: Sequence[Counts], together: int) -> int:
    """Count the blocks that `Trial.judge` runs, with ``together`` allocations in a walk."""
    return sum(
        len(prefixes)
        for at in range(0, len(tried), together)
        for block in model.blocks
        for prefixes in _branches(model, block, tried[at : at + together]).values()
    )
