"""Search the experts to keep: those that change the output of an MoE layer least.

Every expert runs once on every token, and sets only re-weight: `moe2edge.numerics.subset_loss`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, field_validator

from moe2edge.errors import InputError
from moe2edge.model.layers import MoELayer
from moe2edge.model.model import Block, Model
from moe2edge.numerics.selection import count_kept
from moe2edge.pipeline.checks import check_amount, refuse_replaced
from moe2edge.pipeline.contract import Outcome, PassContext, Search

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.calibration.evidence import Gatherer
    from moe2edge.calibration.observation import BlockTrace
    from moe2edge.numerics.subset_loss import Found, SubsetEvidence
    from moe2edge.progress import Advance


class ExpertSearch(Search):
    """In every MoE layer keep the set of experts with the least reconstruction loss.

    The loss is ``||Z - Z'||_F``, of the layer's output and of its output with the kept experts
    only, over all calibration tokens (NAEE, https://arxiv.org/abs/2402.14800). NAEE's code adds up
    one norm per batch, so that its choice depends on the batch size; here it is one norm over all
    tokens. Sets of equal loss: the first in lexicographic order of what is kept.

    Every expert runs once on every token, and sets only re-weight. Dynamic skipping comes after
    this pass: its thresholds belong to the experts that stay.
    """

    keep: Annotated[
        int | float,
        Field(description="experts kept per layer: a count, or a fraction, rounded up"),
    ]
    method: Annotated[
        Literal["auto", "exhaustive", "greedy", "beam"],
        Field(
            description="exhaustive: every set; greedy: repeatedly remove the expert that costs "
            "least; beam: the same from several sets at once; auto: exhaustive within limit, "
            "else beam"
        ),
    ] = "auto"
    limit: Annotated[
        int, Field(ge=1, description="most sets per layer that an exhaustive search tries")
    ] = 2000
    width: Annotated[int, Field(ge=1, description="sets that a beam search extends")] = 4
    progressive: Annotated[
        bool,
        Field(
            description="false: each layer is evaluated within the intact model; true: with the "
            "inputs that it gets once earlier layers are trimmed, against the outputs of the "
            "source"
        ),
    ] = False
    tokens: Annotated[
        int | None,
        Field(ge=1, description="calibration tokens that are used, evenly spread; none: all"),
    ] = None
    clamp_top_k: Annotated[
        bool, Field(description="lower top-k where fewer experts stay than it chooses")
    ] = False

    @field_validator("keep", mode="before")
    @classmethod
    def _amount(cls, value: object) -> object:
        return check_amount(value)

    def count(self, experts: int) -> int:
        """Count how many of ``experts`` stay.

        >>> ExpertSearch(keep=0.75).count(6), ExpertSearch(keep=4).count(6)
        (5, 4)
        """
        return count_kept(self.keep, experts)

    def is_exhaustive(self, experts: int) -> bool:
        """Return whether every set of this many experts is tried; otherwise a beam search runs."""
        few = math.comb(experts, self.count(experts)) <= self.limit
        return few and self.method in ("auto", "exhaustive")

    @property
    def beam_width(self) -> int:
        """Number of sets that a beam search extends."""
        return 1 if self.method == "greedy" else self.width

    def tries(self, experts: int) -> int:
        """Count the losses computed at most for a layer of this many experts."""
        from moe2edge.numerics.subset_loss import count_beam_tries

        kept = self.count(experts)
        if self.is_exhaustive(experts):
            return math.comb(experts, kept)
        return count_beam_tries(experts, kept, self.beam_width)

    def check(self, model: Model) -> None:
        """Refuse counts that a layer cannot keep, and searches without end."""
        refuse_replaced("expert_search", model)
        for block, layer in model.moe_blocks:
            experts, top_k = len(layer.experts), layer.router.top_k
            kept, where = self.count(experts), f"block {block.index}"
            if kept > experts:
                raise InputError(f"expert_search: keep {kept} of the {experts} in {where}")
            if kept < top_k and not self.clamp_top_k:
                raise InputError(
                    f"expert_search: keep {self.keep} leaves {kept} experts in {where} where the "
                    f"router chooses {top_k} per token; keep at least {top_k}, or set "
                    "clamp_top_k: true"
                )
            if layer.router.skip_below:
                raise InputError(
                    f"expert_search: {where} skips experts dynamically, by thresholds that belong "
                    "to the set it has; put expert_skip after expert_search"
                )
            if self.method == "exhaustive" and (sets := math.comb(experts, kept)) > self.limit:
                raise InputError(
                    f"expert_search: an exhaustive search of {kept} of {experts} experts in "
                    f"{where} tries {sets:.3g} sets, more than limit {self.limit}; raise limit, "
                    "or set method: beam"
                )
        if not self._layers(model):
            raise InputError(f"expert_search: keep {self.keep} keeps every expert; nothing to do")

    def _layers(self, model: Model) -> dict[int, MoELayer]:
        """Return the layers that lose experts, by block."""
        return {
            block.index: layer
            for block, layer in model.moe_blocks
            if self.count(len(layer.experts)) < len(layer.experts)
        }

    def plan(self, model: Model) -> Model:
        """Each layer with its first experts."""
        for index, layer in self._layers(model).items():
            first = range(self.count(len(layer.experts)))
            model = model.replace_block(self._trimmed(model.blocks[index], tuple(first)))
        return model

    def _trimmed(self, block: Block, kept: tuple[int, ...]) -> Block:
        return block.keep_experts(kept, clamp_top_k=self.clamp_top_k)

    def search(self, context: PassContext) -> Outcome:
        """Decide layer after layer; one layer's evidence is in memory at a time.

        Raises:
            DoesNotFit: the machine lacks the memory.
        """
        from moe2edge.calibration import walk
        from moe2edge.calibration.evidence import Gatherer

        layers = self._layers(context.model)
        self._state_cost(context, layers)
        advance = context.reporter.advance
        decider = _Decider(
            self, Gatherer(context.tokens.numel(), self.tokens), set(layers), advance
        )
        if self.progressive:
            model = walk.change(
                context.source, context.model, context.tokens, decider, advance, "expert_search"
            )
        else:
            walk.observe(
                context.model, context.tokens, [_LayerWise(decider)], advance, "expert_search"
            )
            model = context.model
            for index in layers:
                block = model.blocks[index]
                model = model.replace_block(self._trimmed(block, decider.found[index].kept))
        return self._outcome(context.model, model, decider)

    def _state_cost(self, context: PassContext, layers: Mapping[int, MoELayer]) -> None:
        """Report the cost of the search before it starts."""
        from moe2edge.numerics import subset_loss
        from moe2edge.runtime.memory import check_memory as check_memory

        tokens = len(subset_loss.spread(context.tokens.numel(), self.tokens))
        counts = [len(layer.experts) for layer in layers.values()]
        needed = max(
            subset_loss.estimate_subset_evidence_bytes(tokens, experts) for experts in counts
        )
        tries = sorted({self.tries(experts) for experts in counts})
        other = "greedy" if self.method == "greedy" else f"beam of {self.width}"
        methods = sorted({"exhaustive" if self.is_exhaustive(n) else other for n in counts})
        gram = max(4 * tokens * experts**2 for experts in counts)
        context.reporter.log(
            f"expert_search: {len(layers)} MoE layers, {' and '.join(methods)}, at most "
            f"{' or '.join(f'{n:,}' for n in tries)} sets per layer; {tokens:,} tokens, "
            f"{tokens * sum(counts):,} expert evaluations in all (each expert once per token); "
            f"{gram / 1e6:,.0f} MB of Gram matrices at a time"
        )
        check_memory(
            needed,
            f"expert_search keeps products of the outputs of {max(counts)} experts for {tokens:,} "
            "tokens",
            "set tokens to fewer, or search on a larger one",
            context.memory.limit,
        )

    def _outcome(self, before: Model, after: Model, decider: _Decider) -> Outcome:
        """Report by layers; experts by their position in the source."""
        changed, notes = [], []
        for index, found in decider.found.items():
            old, new = before.blocks[index].expert_origins, after.blocks[index].expert_origins
            changed.append(f"block {index}: experts {sorted(set(old) - set(new))}")
            notes.append(
                f"block {index}: relative reconstruction error {decider.errors[index]:.4f}, "
                f"{found.tried:,} sets tried"
            )
        return Outcome(after, changed=tuple(changed), notes=tuple(notes))

    def choose(self, evidence: SubsetEvidence, advance: Advance, label: str) -> Found:
        """Choose the set to keep in one layer."""
        from moe2edge.numerics import subset_loss

        keep = self.count(evidence.experts)

        def progress(done: int, total: int) -> None:
            advance(label, done, total)

        if self.is_exhaustive(evidence.experts):
            return subset_loss.search_exhaustively(evidence, keep, progress)
        return subset_loss.search_beam(evidence, keep, self.beam_width, progress)


@dataclass(frozen=True)
class _Decider:
    """Decides a layer as soon as all of its tokens have been seen; changes blocks in a walk.

    Attributes:
        step: the pass.
        gatherer: of the evidence.
        blocks: those that lose experts.
        advance: receives progress within layers.
        found: decisions, by block.
        errors: relative reconstruction errors, by block.
    """

    step: ExpertSearch
    gatherer: Gatherer
    blocks: set[int]
    advance: Advance
    found: dict[int, Found] = field(default_factory=dict)
    errors: dict[int, float] = field(default_factory=dict)

    def observe(self, trace: BlockTrace, source: BlockTrace) -> None:
        """Take in one batch of a block and of its twin in the source."""
        self.take_in(trace, source.mlp_outputs)

    def take_in(self, trace: BlockTrace, target: Tensor | None) -> None:
        """Take in one batch of a block, and what it should put out; None: as it does."""
        layer, index = trace.block.mlp, trace.block.index
        if index not in self.blocks or not isinstance(layer, MoELayer):
            return
        self.gatherer.observe(trace, target)
        if self.gatherer.complete:
            evidence = self.gatherer.take(layer)
            label = f"expert_search: block {index}, sets"
            self.found[index] = self.step.choose(evidence, self.advance, label)
            self.errors[index] = evidence.relative(self.found[index].loss)

    def change(self, block: Block) -> Block:
        """Return the block with the experts that were chosen."""
        if block.index not in self.found:
            return block
        kept = self.found[block.index].kept
        return block.keep_experts(kept, clamp_top_k=self.step.clamp_top_k)


@dataclass(frozen=True)
class _LayerWise:
    """The same as an observer of a walk that changes nothing."""

    decider: _Decider

    def observe(self, trace: BlockTrace) -> None:
        """Take in one batch."""
        self.decider.take_in(trace, None)

    def result(self) -> Mapping[int, Found]:
        """Return the decisions, by block."""
        return self.decider.found
