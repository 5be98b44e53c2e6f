"""Search the set of experts to keep that changes the output of each MoE layer least."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from moe2edge.calibration.observation import Resumable
from moe2edge.errors import InputError
from moe2edge.model.block import Block
from moe2edge.model.layers import MoELayer
from moe2edge.model.model import Model
from moe2edge.model.traits import Trait
from moe2edge.numerics.selection import choose_best, count_kept
from moe2edge.pipeline.checks import (
    advise_top_k,
    check_amount,
    refuse_replaced,
    refuse_too_many,
    refuse_uneven_groups,
)
from moe2edge.pipeline.contract import Outcome, PassContext, PlannedStep, Search, TextSizes
from moe2edge.runtime.memory import Estimate

if TYPE_CHECKING:
    from moe2edge.calibration.evidence import EvidenceObserver
    from moe2edge.calibration.observation import BlockTrace
    from moe2edge.numerics.subset_loss import Evidence, SearchResult
    from moe2edge.progress import Advance


class ExpertSearch(Search):
    """In every MoE layer, keep the set of experts with the least reconstruction loss.

    The loss is ``||Z - Z'||_F`` over all calibration tokens, with Z the output of the layer and Z'
    its output with the kept experts only (NAEE, https://arxiv.org/abs/2402.14800). NAEE's code sums
    one norm per batch, so its choice depends on the batch size; here, one norm covers all tokens.
    Among sets of equal loss, the first in lexicographic order is kept.

    Every expert runs once on every token; sets only re-weight the outputs. In families without a
    row, Z is the sum of the experts' outputs, and transformers' own router is asked for each set;
    where it chooses among groups of experts, each keeps the same number. Dynamic skipping comes
    after this pass, because its thresholds belong to the experts that stay.
    """

    needs: ClassVar[tuple[Trait, ...]] = (Trait.ROUTER,)

    keep: Annotated[
        int | float,
        Field(description="experts to keep per layer: a count, or a fraction, rounded up"),
    ]
    method: Annotated[
        Literal["auto", "exhaustive", "greedy", "beam"],
        Field(
            description="exhaustive: try every set; greedy: remove the expert that costs least, "
            "again and again; beam: the same from several sets at once; auto: exhaustive within "
            "limit, else beam"
        ),
    ] = "auto"
    limit: Annotated[
        int, Field(ge=1, description="most sets per layer that an exhaustive search tries")
    ] = 2000
    width: Annotated[int, Field(ge=1, description="beam width: number of sets that are kept")] = 4
    progressive: Annotated[
        bool,
        Field(
            description="false: judge each layer in the intact model; true: with the inputs that "
            "it gets once earlier layers are pruned, against the outputs of the source"
        ),
    ] = False
    tokens: Annotated[
        int | None,
        Field(ge=1, description="calibration tokens to use, spread evenly; default: all"),
    ] = None
    clamp_top_k: Annotated[
        bool,
        Field(
            description="lower top-k where fewer experts than top-k stay; otherwise that is an "
            "error"
        ),
    ] = False

    @field_validator("keep", mode="before")
    @classmethod
    def _amount(cls, value: object) -> object:
        return check_amount(value)

    def count(self, experts: int) -> int:
        """Return how many of ``experts`` stay.

        >>> ExpertSearch(keep=0.75).count(6), ExpertSearch(keep=4).count(6)
        (5, 4)
        """
        return count_kept(self.keep, experts)

    def is_exhaustive(self, experts: int, groups: int = 1) -> bool:
        """Return whether every set is tried for a layer of so many experts, not only a beam."""
        from moe2edge.numerics.subset_loss import count_sets

        few = count_sets(experts, self.count(experts), groups) <= self.limit
        return few and self.method in ("auto", "exhaustive")

    @property
    def beam_width(self) -> int:
        """Number of sets that a beam keeps; greedy search is a beam of one."""
        return 1 if self.method == "greedy" else self.width

    def tries(self, experts: int, groups: int = 1) -> int:
        """Return the most losses that are computed for a layer of so many experts."""
        from moe2edge.numerics.subset_loss import count_beam_tries, count_sets

        kept = self.count(experts)
        if self.is_exhaustive(experts, groups):
            return count_sets(experts, kept, groups)
        return count_beam_tries(experts, kept, self.beam_width, groups)

    def check(self, model: Model) -> None:
        """Refuse counts that a layer cannot keep, and exhaustive searches beyond the limit."""
        from moe2edge.numerics.subset_loss import count_sets

        refuse_replaced("expert_search", model)
        places = [f"block {block.index}" for block, _ in model.moe_blocks]
        sizes, counts = model.expert_counts, [self.count(n) for n in model.expert_counts]
        refuse_too_many("expert_search", self.keep, counts, sizes, places)
        refuse_uneven_groups("expert_search", "keep", self.keep, counts, model)
        for block, layer in model.moe_blocks:
            experts, top_k = len(layer.experts), layer.router.top_k
            kept, where = self.count(experts), f"block {block.index}"
            if kept < top_k and not self.clamp_top_k:
                raise InputError(
                    f"expert_search: keep {self.keep} leaves {kept} experts in {where} where the "
                    f"router chooses {top_k} per token; "
                    f"{advise_top_k(top_k, experts, 'set clamp_top_k: true')}"
                )
            if layer.router.skip_below:
                raise InputError(
                    f"expert_search: {where} has thresholds of expert_skip, which would no longer "
                    "fit its experts; put expert_skip after expert_search"
                )
            sets = count_sets(experts, kept, layer.router.groups)
            if self.method == "exhaustive" and sets > self.limit:
                raise InputError(
                    f"expert_search: an exhaustive search of {kept} of {experts} experts in "
                    f"{where} tries {sets:.3g} sets, more than limit {self.limit}; raise limit, "
                    "or set method: beam"
                )
        if not self._find_layers(model):
            raise InputError(f"expert_search: keep {self.keep} keeps every expert; nothing to do")

    def _find_layers(self, model: Model) -> dict[int, MoELayer]:
        """Find the layers that lose experts, by block."""
        return {
            block.index: layer
            for block, layer in model.moe_blocks
            if self.count(len(layer.experts)) < len(layer.experts)
        }

    def plan(self, model: Model) -> Model:
        """Return the model with the first experts of each layer."""
        for index, layer in self._find_layers(model).items():
            count, groups = self.count(len(layer.experts)), layer.router.groups
            first = choose_best([0.0] * len(layer.experts), count, groups)
            model = model.replace_block(self._prune(model.blocks[index], tuple(first)))
        return model

    def estimate(self, planned: PlannedStep, texts: TextSizes) -> Estimate:
        """Estimate the evidence of one layer, hidden states, and a block."""
        from moe2edge.numerics import subset_loss

        model, size = planned.before, texts.calibration
        tokens = subset_loss.count_spread(size.tokens, self.tokens)
        most = max((len(layer.experts) for layer in self._find_layers(model).values()), default=0)
        streams = 2 if self.progressive else 1  # those of the source as well
        hidden = 4 * size.tokens * model.family.geometry(model.config).hidden * streams
        evidence = subset_loss.estimate_subset_evidence_bytes(tokens, most)
        return replace(
            super().estimate(planned, texts),
            memory=evidence + hidden + streams * model.block_nbytes,
            purpose=f"expert_search keeps products of the outputs of {most} experts for "
            f"{tokens:,} tokens",
            remedy="set tokens or calibration.samples to fewer, or search on a larger machine",
        )

    def _prune(self, block: Block, kept: tuple[int, ...]) -> Block:
        return block.keep_experts(kept, clamp_top_k=self.clamp_top_k)

    def search(self, context: PassContext) -> Outcome:
        """Decide layer by layer; the evidence of one layer is in memory at a time."""
        from moe2edge.calibration import walk
        from moe2edge.calibration.evidence import EvidenceObserver

        layers = self._find_layers(context.model)
        self._report_cost(context, layers)
        advance = context.reporter.advance
        decider = _Decider(
            self, EvidenceObserver(context.tokens.numel(), self.tokens), set(layers), advance
        )
        if self.progressive:
            model, _ = walk.walk(
                context.model,
                context.tokens,
                transform=decider,
                source=context.source,
                advance=advance,
                label="expert_search",
                kept=context.keep_walk("search"),
                needs_hidden=False,
            )
        else:
            walk.walk(
                context.model,
                context.tokens,
                [_DecidingObserver(decider)],
                advance=advance,
                label="expert_search",
                kept=context.keep_walk("search"),
                needs_hidden=False,
            )
            model = context.model
            for index in layers:
                block = model.blocks[index]
                model = model.replace_block(self._prune(block, decider.decisions[index].kept))
        return self._make_outcome(context.model, model, decider)

    def _report_cost(self, context: PassContext, layers: Mapping[int, MoELayer]) -> None:
        """Report the cost of the search before it starts."""
        from moe2edge.numerics import subset_loss

        tokens = subset_loss.count_spread(context.tokens.numel(), self.tokens)
        counts = [len(layer.experts) for layer in layers.values()]
        shapes = {(len(layer.experts), layer.router.groups) for layer in layers.values()}
        tries = sorted({self.tries(*shape) for shape in shapes})
        other = "greedy" if self.method == "greedy" else f"beam of {self.width}"
        methods = sorted({"exhaustive" if self.is_exhaustive(*own) else other for own in shapes})
        gram = max(4 * tokens * experts**2 for experts in counts)
        context.reporter.log(
            f"expert_search: {len(layers)} MoE layers, {' and '.join(methods)}, at most "
            f"{' or '.join(f'{n:,}' for n in tries)} sets per layer; {tokens:,} tokens, "
            f"{tokens * sum(counts):,} expert evaluations in all (each expert once per token); "
            f"{gram / 1e6:,.0f} MB of Gram matrices at a time"
        )

    def _make_outcome(self, before: Model, after: Model, decider: _Decider) -> Outcome:
        """Make the outcome, with the dropped experts of each layer by their index in the source."""
        changed, notes = [], []
        for index, decision in decider.decisions.items():
            old, new = before.blocks[index].expert_origins, after.blocks[index].expert_origins
            changed.append(f"block {index}: experts {sorted(set(old) - set(new))}")
            notes.append(
                f"block {index}: relative reconstruction error {decider.errors[index]:.4f}, "
                f"{decision.tried:,} sets tried"
            )
        return Outcome(after, changed=tuple(changed), notes=tuple(notes))

    def choose(self, evidence: Evidence, advance: Advance, label: str) -> SearchResult:
        """Choose the set to keep in one layer."""
        from moe2edge.numerics import subset_loss

        keep = self.count(evidence.experts)

        def progress(done: int, total: int) -> None:
            advance(label, done, total)

        if self.is_exhaustive(evidence.experts, evidence.groups):
            return subset_loss.search_exhaustively(evidence, keep, progress)
        return subset_loss.search_beam(evidence, keep, self.beam_width, progress)


@dataclass(frozen=True)
class _Decider(Resumable):
    """Decides each layer once all of its tokens are observed; prunes blocks in a walk.

    Attributes:
        step: the pass.
        evidence: gathers the evidence of one layer after another.
        blocks: indices of the blocks that lose experts.
        advance: reports progress within layers.
        decisions: sets of experts to keep, by block.
        errors: relative reconstruction errors, by block.
    """

    step: ExpertSearch
    evidence: EvidenceObserver
    blocks: set[int]
    advance: Advance
    decisions: dict[int, SearchResult] = field(default_factory=dict)
    errors: dict[int, float] = field(default_factory=dict)

    def observe(self, trace: BlockTrace, source: BlockTrace | None = None) -> None:
        """Add one batch of a block, and of its twin, whose output is the target if given."""
        layer, index = trace.block.mlp, trace.block.index
        if index not in self.blocks or not isinstance(layer, MoELayer):
            return
        self.evidence.observe(trace, source)
        if self.evidence.complete:
            evidence = self.evidence.take(layer)
            label = f"expert_search: block {index}, sets"
            self.decisions[index] = self.step.choose(evidence, self.advance, label)
            self.errors[index] = evidence.compute_relative_error(self.decisions[index].loss)

    def save(self, block: Block) -> Any:
        """Return the decision on a block."""
        if (found := self.decisions.get(block.index)) is None:
            return None
        return {**dataclasses.asdict(found), "error": self.errors[block.index]}

    def restore(self, block: Block, saved: Any) -> None:
        """Take the decision on a block."""
        from moe2edge.numerics.subset_loss import SearchResult

        if saved is not None:
            found = SearchResult(tuple(saved["kept"]), saved["loss"], saved["tried"])
            self.decisions[block.index], self.errors[block.index] = found, saved["error"]

    def change(self, block: Block) -> Block:
        """Return the block with the chosen experts."""
        if block.index not in self.decisions:
            return block
        kept = self.decisions[block.index].kept
        return block.keep_experts(kept, clamp_top_k=self.step.clamp_top_k)


@dataclass(frozen=True)
class _DecidingObserver(Resumable):
    """Observer that decides each layer in a walk that changes nothing."""

    decider: _Decider

    def observe(self, trace: BlockTrace) -> None:
        """Add one batch of a block."""
        self.decider.observe(trace)

    def save(self, block: Block) -> Any:
        """Return the decision on a block."""
        return self.decider.save(block)

    def restore(self, block: Block, saved: Any) -> None:
        """Take the decision on a block."""
        self.decider.restore(block, saved)

    def result(self) -> Mapping[int, SearchResult]:
        """Return the decisions, by block."""
        return self.decider.decisions
