"""Trials of allocations of one budget of experts to all MoE layers, on the whole model.

An *allocation* is a number of experts for each MoE layer, in order. A layer keeps that many of the
best experts of its ranking.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from moe2edge.calibration import criteria, walk
from moe2edge.calibration.block_runner import BlockRunner
from moe2edge.calibration.criteria import Criterion
from moe2edge.calibration.evidence import EvidenceObserver
from moe2edge.calibration.observation import Facts, Resumable, SeesOutputs
from moe2edge.calibration.walk_keeper import make_keeper
from moe2edge.model.block import Block
from moe2edge.model.layers import MoELayer
from moe2edge.model.model import Model
from moe2edge.numerics import metrics, selection, subset_loss
from moe2edge.numerics.allocation import Counts
from moe2edge.numerics.metrics import SampleSums
from moe2edge.numerics.subset_loss import CountProgress, compute_prefix_errors

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.calibration.observation import BlockTrace
    from moe2edge.storage.kept_walk import KeptWalk

# Bytes of hidden states in memory at a time, where several allocations share a walk.
STREAM_BYTES = 1 << 30


class Ranker(Resumable):
    """Observer that ranks experts, and may measure the error of keeping each layer's n best.

    Attributes:
        errors: results of `compute_prefix_errors`, by the index of the block.
    """

    def __init__(
        self,
        criterion: Criterion,
        seed: int,
        floors: Mapping[int, int],
        tokens: int,
        most: int | None,
    ) -> None:
        """Prepare for a walk.

        Args:
            criterion: criterion that ranks the experts.
            seed: seed of the criterion ``random``.
            floors: fewest experts for which errors are measured, by the index of the block; empty:
                no errors are measured.
            tokens: number of tokens of the walk.
            most: most tokens that errors are measured on; None: all.
        """
        self.errors: dict[int, list[float]] = {}
        self._criterion, self._seed = criterion, seed
        self._floors, self._most = floors, most
        self._evidence = EvidenceObserver(tokens, most) if floors else None
        self._observers = {kind: kind() for kind in criteria.list_observers(criterion)}
        # Squared norms of the residual stream after the current block, by batch.
        self._norms: list[Tensor] = []

    @property
    def needs_walk(self) -> bool:
        """True if it needs activations: some criteria score by weights alone."""
        return bool(self._observers) or self._evidence is not None

    def visit(self, block: Block, row: int, outputs: Tensor, weights: Tensor) -> None:
        """Show outputs of an expert to the observers of the criterion."""
        for observer in self._observers.values():
            if isinstance(observer, SeesOutputs):
                observer.visit(block, row, outputs, weights)

    def observe(self, trace: BlockTrace) -> None:
        """Add one batch of one block."""
        for observer in self._observers.values():
            observer.observe(trace)
        layer, index = trace.block.mlp, trace.block.index
        if self._evidence is None or not isinstance(layer, MoELayer):
            return
        self._evidence.observe(trace)
        self._norms.append(trace.outputs.flatten(0, -2).double().square().sum(-1))
        if self._evidence.complete:
            norms, self._norms = torch.cat(self._norms), []
            norms = norms[subset_loss.spread(len(norms), self._most)]
            order, evidence = self.ranking(trace.block), self._evidence.take(layer)
            self.errors[index] = compute_prefix_errors(evidence, norms, order, self._floors[index])

    def save(self, block: Block) -> Any:
        """Return what was gathered in a block, and its errors."""
        gathered = []
        for observer in self._observers.values():
            assert isinstance(observer, Resumable)
            gathered.append(observer.save(block))
        return {"gathered": gathered, "errors": self.errors.get(block.index)}

    def restore(self, block: Block, saved: Any) -> None:
        """Take the same."""
        for observer, own in zip(self._observers.values(), saved["gathered"], strict=True):
            assert isinstance(observer, Resumable)
            observer.restore(block, own)
        if saved["errors"] is not None:
            self.errors[block.index] = saved["errors"]

    def ranking(self, block: Block) -> tuple[int, ...]:
        """Return positions of the experts of an observed block, the best first.

        Groups of a router take turns, so that each prefix has the best of each.
        """
        facts = Facts({kind: observer.result() for kind, observer in self._observers.items()})
        scores = criteria.score_experts(self._criterion, block, facts, self._seed)
        groups = block.mlp.router.groups if isinstance(block.mlp, MoELayer) else 1
        return selection.rank_in_turns(scores, groups)

    def result(self) -> Mapping[int, list[float]]:
        """Return the errors."""
        return self.errors


# ---- trying allocations on the whole model -----------------------------------------------------


@dataclass(frozen=True)
class Trimmer:
    """A model with ranked experts, which can be pruned to any allocation.

    Attributes:
        model: the model with all of its experts.
        rankings: for each MoE layer, positions of its experts, the best first.
        clamp_top_k: argument of `Block.keep_experts`.
    """

    model: Model
    rankings: tuple[tuple[int, ...], ...]
    clamp_top_k: bool

    @property
    def full(self) -> Counts:
        """Allocation that keeps all experts."""
        return self.model.expert_counts

    @property
    def layers(self) -> dict[int, int]:
        """Position among the MoE layers, by the index of the block."""
        return {block.index: n for n, (block, _) in enumerate(self.model.moe_blocks)}

    def block(self, index: int, count: int) -> Block:
        """Return an MoE block with its ``count`` best experts, in their old order."""
        block, order = self.model.blocks[index], self.rankings[self.layers[index]]
        if count == len(order):
            return block
        return block.keep_experts(sorted(order[:count]), clamp_top_k=self.clamp_top_k)

    def trim(self, counts: Counts) -> Model:
        """Return the model pruned to an allocation."""
        model = self.model
        for index, n in self.layers.items():
            model = model.replace_block(self.block(index, counts[n]))
        return model


@dataclass(frozen=True)
class Trial:
    """Comparison of allocations by their predictions on a text, against those of the source.

    Allocations that agree in their first layers share the run through these.

    Attributes:
        trimmer: prunes the model to allocations.
        source: the intact model.
        source_hidden: its hidden states of the tokens after the last block.
        tokens: int64 [samples, length].
    """

    trimmer: Trimmer
    source: Model
    source_hidden: Tensor
    tokens: Tensor

    def first(self, samples: int) -> Trial:
        """Return the same comparison on the first samples only."""
        return replace(
            self, source_hidden=self.source_hidden[:samples], tokens=self.tokens[:samples]
        )

    def judge(
        self,
        tried: Sequence[Counts],
        advance: CountProgress,
        keep_walk: Callable[[str], KeptWalk | None] = lambda _: None,
    ) -> list[list[SampleSums]]:
        """Measure the predictions of each allocation on each sample.

        Args:
            tried: the allocations.
            advance: receives progress, in runs of blocks.
            keep_walk: returns the folder of a walk by a name for it; see `KeptWalk`.
        """
        results: list[list[SampleSums]] = []
        done, total = 0, count_block_runs(self.trimmer.model, tried, self.at_once)

        def count_runs(runs: int) -> None:
            nonlocal done
            done += runs
            advance(done, total)

        count_runs(0)
        for n, group in enumerate(self._split_into_groups(tried)):
            results += self._judge_group(group, count_runs, keep_walk(f"{n}"))
        return results

    @property
    def at_once(self) -> int:
        """Number of allocations that share a walk; hidden states of all of them are in memory."""
        return count_at_once(self.source_hidden.numel())

    def _split_into_groups(self, tried: Sequence[Counts]) -> Iterator[Sequence[Counts]]:
        """Split allocations into groups that share a walk."""
        for at in range(0, len(tried), self.at_once):
            yield tried[at : at + self.at_once]

    def _judge_group(
        self, tried: Sequence[Counts], count_runs: Callable[[int], None], kept: KeptWalk | None
    ) -> list[list[SampleSums]]:
        """Measure allocations that share a walk, which is kept block by block."""
        model = self.trimmer.model
        models = [] if kept is None else [self.source, *map(self.trimmer.trim, tried)]
        keeper = make_keeper(kept, [], models, self.tokens, torch.float32)
        done, state = keeper.resume(model.blocks) if keeper else (0, {})
        if done == len(model.blocks):
            count_runs(count_block_runs(model, tried, len(tried)))
            return [[SampleSums(**own) for own in sums] for sums in state["results"]]
        # By the counts of the MoE layers so far.
        hidden: dict[Counts, Tensor] = {} if done else {(): walk.embed(model, self.tokens)}
        results: list[list[SampleSums]] = []
        for block in model.blocks:
            runs = _list_runs(model, block, tried)
            if block.index < done:
                after = [pair[1] for prefixes in runs.values() for pair in prefixes]
                count_runs(len(after))
                if block.index + 1 == done:
                    hidden = dict(zip(after, state["hidden"], strict=True))
                continue
            hidden = self._run_prefixes(block, runs, hidden, count_runs)
            last = block.index + 1 == len(model.blocks)
            if last:
                results = self._compare([hidden[counts] for counts in tried])
            if keeper is not None:
                sums = [[asdict(own) for own in each] for each in results]
                found = {"results": sums} if last else {"hidden": list(hidden.values())}
                keeper.keep(block, found, last=last)
        return results

    def _run_prefixes(
        self,
        block: Block,
        runs: Mapping[int | None, Sequence[tuple[Counts, Counts]]],
        hidden: Mapping[Counts, Tensor],
        count_runs: Callable[[int], None],
    ) -> dict[Counts, Tensor]:
        """Run one block for each prefix of allocations; return hidden states after it."""
        outputs: dict[Counts, Tensor] = {}
        for count, prefixes in runs.items():
            shape = block if count is None else self.trimmer.block(block.index, count)
            runner = BlockRunner(self.trimmer.model, shape)
            for before, after in prefixes:
                outputs[after] = _run_block(runner, hidden[before], self.tokens)
                count_runs(1)
        return outputs

    def _compare(self, hidden: Sequence[Tensor]) -> list[list[SampleSums]]:
        """Compare each allocation with the source, sample by sample.

        Logits of two models for one sample are in memory.

        Args:
            hidden: for each allocation, hidden states after the last block.
        """
        results: list[list[SampleSums]] = [[] for _ in hidden]
        # Sample by sample, so that the head is read once and the source's logits computed once.
        in_turn = (states[n] for n in range(len(self.tokens)) for states in hidden)
        mine = walk.compute_logits(self.trimmer.model, in_turn)
        theirs = walk.compute_logits(self.source, self.source_hidden)
        for row, expected in zip(self.tokens, theirs, strict=True):
            for sums in results:
                sums.append(metrics.sum_sample(row, next(mine), expected))
        return results


def _list_runs(
    model: Model, block: Block, tried: Sequence[Counts]
) -> dict[int | None, list[tuple[Counts, Counts]]]:
    """List the runs through one block, by its number of experts (None: it has no MoE layer).

    A run is a pair of prefixes that a group of allocations has in common: the counts of the MoE
    layers before the block, and those including it.
    """
    before = sum(index < block.index for index in (b.index for b, _ in model.moe_blocks))
    after = before + isinstance(block.mlp, MoELayer)
    runs: dict[int | None, list[tuple[Counts, Counts]]] = {}
    for prefix in dict.fromkeys(counts[:after] for counts in tried):
        count = prefix[before] if after > before else None
        runs.setdefault(count, []).append((prefix[:before], prefix))
    return runs


def _run_block(runner: BlockRunner, hidden: Tensor, tokens: Tensor) -> Tensor:
    """Return the outputs of a block for ``hidden`` [samples, length, hidden], which stays as is."""
    out = torch.empty_like(hidden)
    for part in walk.split_batches(tokens):
        out[part] = runner.run(hidden[part])
    return out


def count_at_once(numbers: int) -> int:
    """Count the allocations that share a walk, with ``numbers`` float32 in and out of a block each.

    >>> count_at_once(64 * 512 * 2048), count_at_once(10**12)
    (2, 1)
    """
    return max(1, STREAM_BYTES // (2 * 4 * numbers))


def count_block_runs(model: Model, tried: Sequence[Counts], together: int) -> int:
    """Count the runs of blocks in `Trial.judge`, with ``together`` allocations in a walk."""
    return sum(
        len(prefixes)
        for at in range(0, len(tried), together)
        for block in model.blocks
        for prefixes in _list_runs(model, block, tried[at : at + together]).values()
    )
