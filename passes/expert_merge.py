"""Merge similar experts: one takes the place of several.

Formulas are in `moe2edge.numerics.expert_groups`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from moe2edge.calibration import criteria
from moe2edge.calibration.block_runner import BlockRunner
from moe2edge.calibration.criteria import Criterion
from moe2edge.calibration.observation import Facts, Observer, ObserverFactory
from moe2edge.errors import InputError
from moe2edge.model.block import Block
from moe2edge.model.experts import Full
from moe2edge.model.layers import MoELayer
from moe2edge.model.model import Model
from moe2edge.model.traits import Trait
from moe2edge.model.weights import plan_weight
from moe2edge.passes._merge_experts import (
    LayerSamples,
    get_merged_role,
    list_expert_parts,
    load_matrices,
    reorder_neurons,
)
from moe2edge.pipeline import checks
from moe2edge.pipeline.checks import refuse_replaced, refuse_slimmed
from moe2edge.pipeline.contract import Outcome, PassContext, PlannedStep, Search, TextSizes
from moe2edge.pipeline.facts import UntiedModel
from moe2edge.pipeline.kept_transform import KeptTransform
from moe2edge.runtime.memory import Estimate

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from moe2edge.calibration.observation import BlockTrace
    from moe2edge.numerics.expert_groups import ExpertGroup, ExpertSums, Matrices

Method = Literal["hc-smoe", "m-smoe", "ream"]

# The criterion that weights experts and chooses centroids.
WEIGHTED_BY: Mapping[Method, Criterion] = {
    "hc-smoe": "frequency",
    "m-smoe": "frequency",
    "ream": "reap",
}
GROUP_LIMIT = 16
# Number of tokens on which activations are aligned and the error of a layer is measured.
SAMPLED = 2048


class ExpertMerge(Search):
    """Group the experts of each layer, and put a weighted mean in the place of each group.

    HC-SMoE (https://arxiv.org/abs/2410.08589) clusters mean outputs, M-SMoE
    (https://arxiv.org/abs/2310.01334) lets experts join the often used one with the most similar
    router logits, REAM (https://arxiv.org/abs/2604.04356) lets the most salient experts absorb
    their neighbours.
    """

    writes: ClassVar[tuple[type, ...]] = (UntiedModel,)
    needs: ClassVar[tuple[Trait, ...]] = ()

    method: Annotated[Method, Field(description="how experts are grouped, aligned and weighted")]
    keep: Annotated[
        int | float | list[int],
        Field(
            description="experts that are left: a count, a fraction of each layer, rounded up, or "
            "a list with a count for each MoE layer"
        ),
    ]
    routing: Annotated[
        Literal["members", "centroids"] | None,
        Field(
            description="members: every router row stays and runs the merged expert; "
            "centroids: one row of each group stays; default: centroids for ream and for families "
            "without a row, otherwise members"
        ),
    ] = None
    align: Annotated[
        bool | None,
        Field(
            description="first permute neurons into the centroid's order: ream by activations and "
            "weights, others by weights; default: true, but false for hc-smoe"
        ),
    ] = None
    group_limit: Annotated[
        int | None,
        Field(ge=1, description="for ream: most experts that join a centroid; default: 16"),
    ] = None
    fitted_on: Annotated[
        Literal["changed", "intact"],
        Field(description="inputs of later layers: from the model as changed so far, or as it was"),
    ] = "changed"
    seed: Annotated[
        int,
        Field(ge=0, le=2**32 - 1, description="seed of the reduction of weights when ream aligns"),
    ] = 0

    @field_validator("keep", mode="before")
    @classmethod
    def _keep_is_sensible(cls, value: object) -> object:
        return checks.check_keep(value)

    @model_validator(mode="after")
    def _limit_goes_with_ream(self) -> Self:
        if self.group_limit is not None and self.method != "ream":
            raise ValueError("group_limit is for method: ream; set that, or leave group_limit out")
        return self

    # ---- what there will be ------------------------------------------------------------------

    def resolve(self, model: Model) -> Self:
        """Fill in the choices of the method where none was made."""
        ream = self.method == "ream"
        own = {
            "routing": "centroids" if ream or model.family.generic else "members",
            "align": self.method != "hc-smoe",
            "group_limit": GROUP_LIMIT if ream else None,
        }
        unset = {key: value for key, value in own.items() if getattr(self, key) is None}
        return self.model_copy(update=unset)

    def _count_left(self, model: Model) -> dict[int, int]:
        """Count the experts that are left, by the index of their block."""
        counts = checks.count_kept_per_layer(self.keep, model.expert_counts, "expert_merge")
        blocks = [block.index for block, _ in model.moe_blocks]
        return dict(zip(blocks, counts, strict=True))

    def check(self, model: Model) -> None:
        """Refuse what leaves too few experts to choose, and numbers that a mean would not keep."""
        refuse_replaced("expert_merge", model, "use expert_merge once, before expert_replace")
        if not model.moe_blocks:
            raise InputError("expert_merge: no layer has experts")
        refuse_slimmed("expert_merge", model)
        step = self.resolve(model)
        if step.routing == "centroids" and model.skips:
            raise InputError(
                "expert_merge: the thresholds of expert_skip would no longer fit the experts; put "
                "expert_skip after it"
            )
        left = self._count_left(model)
        if step.routing == "centroids":
            counts = list(left.values())
            checks.refuse_uneven_groups("expert_merge", "keep", self.keep, counts, model)
        for block, layer in model.moe_blocks:
            step._check_count(block, layer, left[block.index])
        if tuple(left.values()) == model.expert_counts:
            raise InputError(f"expert_merge: keep {self.keep} keeps every expert; nothing to do")

    def _check_count(self, block: Block, layer: MoELayer, kept: int) -> None:
        """Refuse a count that one layer cannot have; every choice is made."""
        experts, top_k = len(layer.experts), layer.router.top_k
        if self.routing == "centroids" and kept < top_k:
            raise InputError(
                f"expert_merge: keep {self.keep} leaves {kept} experts in block {block.index} "
                f"where the router chooses {top_k} per token; "
                f"{checks.advise_top_k(top_k, experts, 'set routing: members')}"
            )
        if self.group_limit is not None and kept * self.group_limit < experts - kept:
            raise InputError(
                f"expert_merge: {kept} centroids of block {block.index} absorb at most "
                f"{kept * self.group_limit} of the {experts - kept} others; set group_limit to at "
                f"least {-(-(experts - kept) // kept)}, or keep more"
            )

    def plan(self, model: Model) -> Model:
        """Each layer with its first experts, with which those that go are merged in turn."""
        step, left = self.resolve(model), self._count_left(model)
        for block, layer in model.moe_blocks:
            kept, count = left[block.index], len(layer.experts)
            if kept < count:
                # As many as possible are tied: recover needs memory for each.
                parts = step._split(layer)
                each, size = kept // len(parts), count // len(parts)
                groups = [
                    tuple(part[at] for at in (n, *range(each + n, size, each)))
                    for part in parts
                    for n in range(each)
                ]
                model = model.replace_block(step._plan_merged(block, layer, groups))
        return model

    def _split(self, layer: MoELayer) -> list[range]:
        """Split the experts of a layer into those that may be merged with each other.

        A router that chooses among groups needs as many experts in each.
        """
        groups = layer.router.groups if self.routing == "centroids" else 1
        size = len(layer.experts) // groups
        return [range(first, first + size) for first in range(0, size * groups, size)]

    def _plan_merged(self, block: Block, layer: MoELayer, groups: Sequence[ExpertGroup]) -> Block:
        """Return the block with merged experts, whose numbers are not computed yet."""
        centroids = [group[0] for group in groups]
        if self.routing == "centroids":
            new = block.keep_experts(centroids)
        else:
            base = {n: place for place, group in enumerate(groups) for n in group}
            rows = tuple(Full(e.origin, base[n]) for n, e in enumerate(layer.experts))
            experts = tuple(layer.experts[n] for n in centroids)
            new = replace(block, mlp=replace(layer, experts=experts, rows=rows))
        weights = dict(new.weights())
        roles = [
            get_merged_role(new, place, part)
            for place, group in enumerate(groups)
            if len(group) > 1
            for part in list_expert_parts(layer.experts[group[0]])
        ]
        return new.with_weights({role: plan_weight(weights[role]) for role in roles})

    def estimate(self, planned: PlannedStep, texts: TextSizes) -> Estimate:
        """Estimate sums over tokens, sampled tokens, hidden states and a layer's new experts."""
        from moe2edge.calibration.walk import BATCH_TOKENS
        from moe2edge.numerics.expert_groups import estimate_merge_bytes

        model, tokens = planned.before, texts.calibration.tokens
        step, hidden = self.resolve(model), model.family.geometry(model.config).hidden
        experts = max(model.expert_counts)
        width = max(layer.experts[0].up.shape[0] for _, layer in model.moe_blocks)
        sampled = 4 * 2 * SAMPLED * (hidden + width)
        means = 4 * 3 * hidden * width * max(step._count_left(model).values())
        inside = 4 * 4 * min(tokens, BATCH_TOKENS) * width  # an expert on all tokens of a batch
        sums = estimate_merge_bytes(experts, hidden, width, align=bool(step.align))
        return replace(
            super().estimate(planned, texts),
            memory=sums + sampled + means + inside + 4 * tokens * hidden + model.block_nbytes,
            purpose=f"expert_merge keeps statistics of {experts} experts",
            remedy="set calibration.samples to fewer, or use a larger machine",
        )

    # ---- doing it ----------------------------------------------------------------------------

    def search(self, context: PassContext) -> Outcome:
        """Group and merge block after block."""
        from moe2edge.calibration import walk

        step, kept = self.resolve(context.model), context.keep_walk("merging")
        left = self._count_left(context.model)
        merger = _Merger(context.store, kept, step, context.model, context.tokens.numel(), left)
        model, _ = walk.walk(
            context.model,
            context.tokens,
            transform=merger,
            propagate=self.fitted_on == "changed",
            advance=context.reporter.advance,
            label="expert_merge",
            memory=context.memory,
            kept=kept,
            needs_hidden=False,
        )
        untied = context.model
        for block in merger.originals:
            untied = untied.replace_block(block)
        return Outcome(
            model,
            changed=tuple(merger.changed),
            notes=tuple(merger.notes),
            facts=(UntiedModel(untied),) if step.routing == "members" else (),
        )


@dataclass
class _Merger(KeptTransform):
    """Accumulates statistics of experts, and merges some; one layer at a time.

    The statistics are those of the current layer, and dropped when it is changed. ``originals``
    has blocks as they were, with neurons in the order in which they were merged.
    """

    step: ExpertMerge
    model: Model
    tokens: int
    left: Mapping[int, int]
    sums: ExpertSums | None = None
    samples: LayerSamples | None = None
    observers: dict[ObserverFactory, Observer[object]] = field(default_factory=dict)
    originals: list[Block] = field(default_factory=list)

    def observe(self, trace: BlockTrace, source: BlockTrace | None = None) -> None:
        """Add one batch."""
        from moe2edge.numerics.expert_groups import ExpertSums

        layer, routing, method = trace.block.mlp, trace.routing, self.step.method
        if not isinstance(layer, MoELayer) or routing is None:
            return
        if self.left[trace.block.index] == len(layer.experts):
            return
        if self.sums is None or self.samples is None:
            self.sums = ExpertSums(len(layer.experts), routing.inputs.shape[1])
            self.samples = LayerSamples(-(-self.tokens // SAMPLED))
            self.observers = {k: k() for k in criteria.list_observers(WEIGHTED_BY[method])}
        for observer in self.observers.values():
            observer.observe(trace)
        self.samples.add(routing, trace.mlp_outputs.flatten(0, -2))
        self.sums.add_logits(routing.logits)
        if method != "m-smoe":
            self.sums.add_outputs(routing.inputs, trace.expert_output, cosines=method == "ream")

    def compute(self, block: Block) -> tuple[Block, Any] | None:
        """Return the block with merged experts, their groups, and the orders of their neurons."""
        import torch

        layer, sums, samples = block.mlp, self.sums, self.samples
        self.sums = self.samples = None
        if not isinstance(layer, MoELayer) or sums is None or samples is None:
            return None
        facts = Facts({kind: observer.result() for kind, observer in self.observers.items()})
        scores = criteria.score_experts(WEIGHTED_BY[self.step.method], block, facts)
        groups = self._find_groups(layer, self.left[block.index], sums, scores)
        inputs = torch.cat(samples.inputs)
        orders = self._match_orders(block, layer, groups, inputs)
        shape = {"groups": groups, "orders": {str(n): order for n, order in orders.items()}}
        merged = self.reshape(block, shape)
        numbers: dict[str, Tensor] = {}
        for place, group in enumerate(groups):
            if len(group) > 1:
                mean = self._average(block, layer, group, scores, orders)
                numbers |= {get_merged_role(merged, place, part): own for part, own in mean.parts()}
        merged = self.put(merged, numbers)
        del numbers  # before the block is in memory again
        self._account(block, merged, groups, samples)
        return merged, shape

    def reshape(self, block: Block, shape: Any) -> Block:
        """Return the block with experts merged in groups, without numbers; note the original."""
        layer = block.mlp
        assert isinstance(layer, MoELayer)
        orders = {int(n): order for n, order in shape["orders"].items()}
        if self.step.routing == "members" and orders:
            self.originals.append(reorder_neurons(block, layer, orders))
        return self.step._plan_merged(block, layer, [tuple(group) for group in shape["groups"]])

    def _find_groups(
        self, layer: MoELayer, kept: int, sums: ExpertSums, scores: Sequence[float]
    ) -> list[ExpertGroup]:
        """Group the experts that may be merged with each other."""
        parts = self.step._split(layer)
        found: list[ExpertGroup] = []
        for part in parts:
            some = slice(part.start, part.stop)
            own = self._group(kept // len(parts), sums.select(some), scores[some])
            found += [tuple(part[n] for n in group) for group in own]
        return found

    def _group(
        self, kept: int, sums: ExpertSums, scores: Sequence[float]
    ) -> tuple[ExpertGroup, ...]:
        from moe2edge.numerics import expert_groups
        from moe2edge.numerics.expert_groups import compute_cosines

        if self.step.method == "hc-smoe":
            return expert_groups.cluster_experts(sums.outputs / sums.tokens, kept, scores)
        if self.step.method == "m-smoe":
            return expert_groups.join_nearest(compute_cosines(sums.logits), kept, scores)
        limit = self.step.group_limit or GROUP_LIMIT
        return expert_groups.absorb_nearest(
            expert_groups.compute_ream_similarity(sums), kept, scores, limit
        )

    def _match_orders(
        self, block: Block, layer: MoELayer, groups: Sequence[ExpertGroup], inputs: Tensor
    ) -> dict[int, torch.Tensor]:
        """Order the neurons of experts that are not centroids; empty: the order stays."""
        from moe2edge.numerics import expert_groups
        from moe2edge.runtime.decoder_blocks import find_activation

        if not self.step.align:
            return {}
        activate = find_activation(self.model, block)
        everyone = range(len(layer.experts))
        found = None
        if self.step.method == "ream":
            found = expert_groups.compute_layer_axes(
                lambda: (load_matrices(layer, n) for n in everyone), self.step.seed
            )
        orders = {}
        for centroid, *others in groups:
            first = load_matrices(layer, centroid) if others else None
            for n in others:
                assert first is not None
                orders[n] = expert_groups.align_neurons(
                    first, load_matrices(layer, n), inputs, found, activate
                )
        return orders

    def _average(
        self,
        block: Block,
        layer: MoELayer,
        group: ExpertGroup,
        scores: Sequence[float],
        orders: Mapping[int, Tensor],
    ) -> Matrices:
        """Compute the expert that takes the place of a group."""
        from moe2edge.numerics import expert_groups

        weights = expert_groups.normalize_shares([scores[n] for n in group])
        if weights is None:
            origins = [layer.experts[n].origin for n in group]
            self.notes.append(
                f"block {block.index}: experts {origins} saw no tokens: merged in equal parts"
            )
            weights = (1 / len(group),) * len(group)

        def experts() -> Iterator[tuple[float, Matrices]]:
            for n, weight in zip(group, weights, strict=True):
                numbers = load_matrices(layer, n)
                yield weight, numbers.permute(orders[n]) if n in orders else numbers

        return expert_groups.average_experts(experts())

    def _account(
        self,
        block: Block,
        merged: Block,
        groups: Sequence[ExpertGroup],
        samples: LayerSamples,
    ) -> None:
        """Report which experts were merged, and the error of the output of the layer."""
        import torch

        origins = block.expert_origins
        told = [
            f"{sorted(origins[n] for n in others)} into {origins[centroid]}"
            for centroid, *others in groups
            if others
        ]
        self.changed.append(f"block {block.index}: experts {', '.join(told)}")
        inputs, outputs, logits = map(torch.cat, (samples.inputs, samples.outputs, samples.logits))
        if self.step.routing == "centroids":
            logits = logits[:, [centroid for centroid, *_ in groups]]
        found = BlockRunner(self.model, merged).run_mlp(inputs, logits)
        error = float((found - outputs).norm() / outputs.norm())
        self.notes.append(
            f"block {block.index}: the layer's output on {len(inputs)} calibration tokens has a "
            f"relative error of {error:.3f}"
        )
