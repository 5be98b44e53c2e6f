"""Fit routers to the remaining experts, if that lowers the loss on held-out text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from moe2edge.errors import InputError, Unsupported
from moe2edge.model.block import Block
from moe2edge.model.layers import MoELayer
from moe2edge.model.model import Model
from moe2edge.model.traits import Trait
from moe2edge.pipeline.checks import refuse_replaced
from moe2edge.pipeline.contract import Outcome, PassContext, PlannedStep, Search, TextSizes
from moe2edge.pipeline.kept_transform import KeptTransform
from moe2edge.runtime.memory import Estimate

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.calibration.observation import BlockTrace
    from moe2edge.numerics.metrics import SampleSums
    from moe2edge.numerics.router_fit import RouterEvidence
    from moe2edge.numerics.subset_loss import RoutingRule


class Routing(Search):
    """Adapt the rows of routers to the remaining experts, by least squares.

    A router was trained to choose among all experts. Block by block, its rows are fitted so that
    the residual stream after the block comes closest to that of the source (Gauss-Newton steps);
    later blocks get the outputs of the fitted one. A part of the calibration samples is held out of
    the fit. The new rows of a block are kept only if they lower the error there, and all of them
    only if the language-model loss falls there as well, by more than the bootstrap interval over
    samples. Otherwise the model does not change, and the report says so. Layers that still have all
    experts of the source are fitted as well, if blocks before them changed. In families without a
    row, routers that take a softmax without biases or groups are fitted.
    """

    may_change_nothing: ClassVar[bool] = True
    needs: ClassVar[tuple[Trait, ...]] = (Trait.SOFTMAX,)

    held_out: Annotated[
        float,
        Field(
            gt=0,
            lt=1,
            description="fraction of the calibration samples that is held out, and decides",
        ),
    ] = 0.25
    rounds: Annotated[int, Field(ge=1, description="most steps per layer")] = 6
    margin: Annotated[
        float,
        Field(ge=0, lt=1, description="fraction by which a step must lower the held-out error"),
    ] = 1e-3
    damping: Annotated[
        float,
        Field(ge=0, description="penalty on changes of logits, relative to the mean curvature"),
    ] = 1.0
    ridge: Annotated[
        float,
        Field(
            gt=0, description="penalty on changes of rows, relative to the mean square of inputs"
        ),
    ] = 0.01

    def check(self, model: Model) -> None:
        """Refuse models without routers, with biases in them, or with dynamic skipping.

        Raises:
            InputError: there is nothing to fit, or thresholds would no longer be right.
            Unsupported: a router has a bias per expert, or outputs of experts are not just added.
        """
        refuse_replaced("routing", model)
        layers = [layer for _, layer in model.moe_blocks]
        if not any(len(layer.experts) > 1 for layer in layers):
            raise InputError("routing: no layer has a router left; nothing to fit")
        if model.skips:
            raise InputError(
                "routing: thresholds of expert_skip belong to the router before the fit; put "
                "expert_skip after routing"
            )
        if any(layer.router.per_expert for layer in layers):
            raise Unsupported(
                "routing: routers with a bias per expert are not supported; leave routing out"
            )
        find_rules(model)

    @property
    def changes_routers(self) -> bool:
        """True: that is what it does."""
        return True

    def estimate(self, planned: PlannedStep, texts: TextSizes) -> Estimate:
        """Estimate the evidence of one layer, hidden states of both models, and their blocks.

        Raises:
            InputError: there are too few samples to hold some of them out.
        """
        from moe2edge.numerics.bootstrap import split_samples

        split_samples(texts.calibration.samples, self.held_out)
        model, tokens = planned.before, texts.calibration.tokens
        experts = max(model.expert_counts)
        hidden = 4 * tokens * model.family.geometry(model.config).hidden
        return replace(
            super().estimate(planned, texts),
            memory=self._estimate_evidence(model, tokens) + 2 * (hidden + model.block_nbytes),
            purpose=f"routing keeps products of the outputs of {experts} experts for {tokens:,} "
            "tokens",
            remedy="set calibration.samples to fewer, or fit on a larger machine",
        )

    def _estimate_evidence(self, model: Model, tokens: int) -> int:
        """Estimate the bytes of what a layer is fitted on."""
        from moe2edge.numerics.router_fit import estimate_router_evidence_bytes

        hidden = model.family.geometry(model.config).hidden
        return estimate_router_evidence_bytes(tokens, max(model.expert_counts), hidden)

    def plan(self, model: Model) -> Model:
        """Return the model itself: shapes do not change."""
        return model

    def search(self, context: PassContext) -> Outcome:
        """Fit block by block, then decide by the loss of the whole model.

        Raises:
            InputError: there are too few calibration samples to hold some out.
        """
        from moe2edge.calibration import walk
        from moe2edge.numerics import bootstrap

        held_out, kept = self._hold_out(len(context.tokens)), context.keep_walk("fitting")
        self._report_cost(context)
        fitter = _Fitter(context.store, kept, self, held_out, find_rules(context.model))
        advance = context.reporter.advance
        fitted, _ = walk.walk(
            context.model,
            context.tokens,
            transform=fitter,
            source=context.source,
            advance=advance,
            label="routing",
            kept=kept,
            needs_hidden=False,
        )
        notes = tuple(fitter.notes)
        if not fitter.changed:
            return Outcome(
                context.model,
                notes=(*notes, "no router was changed: no fit lowered the held-out error"),
            )
        before, after = self._compare(context, fitted, context.tokens[held_out])
        fall, _ = bootstrap.compare_paired(before, after, seed=0)
        result = (
            f"{fall.samples} held-out calibration samples: loss lower by {fall.mean:.4f} (95 % "
            f"confidence interval {fall.low:.4f} to {fall.high:.4f}), KL from "
            f"{bootstrap.compute_mean_kl(before):.5f} to {bootstrap.compute_mean_kl(after):.5f}"
        )
        if fall.low <= 0:
            reason = f"routers were not changed: the loss does not fall measurably: {result}"
            return Outcome(context.model, notes=(*notes, reason))
        return Outcome(fitted, changed=tuple(fitter.changed), notes=(*notes, result))

    def _hold_out(self, samples: int) -> Tensor:
        """Return the mask of the samples that are held out, bool [samples]."""
        import torch

        from moe2edge.numerics.bootstrap import split_samples

        mask = torch.zeros(samples, dtype=torch.bool)
        mask[split_samples(samples, self.held_out)[1]] = True
        return mask

    def _report_cost(self, context: PassContext) -> None:
        """Report the cost of the fit before it starts."""
        tokens = context.tokens.numel()
        needed = self._estimate_evidence(context.model, tokens)
        context.reporter.log(
            f"routing: {len(context.model.moe_blocks)} layers, {tokens:,} tokens, each expert once "
            f"per token, at most {self.rounds} steps; {needed / 1e6:,.0f} MB for a layer at a time"
        )

    def _compare(
        self, context: PassContext, fitted: Model, ids: Tensor
    ) -> tuple[list[SampleSums], list[SampleSums]]:
        """Compare the model before and after the fit with the source, sample by sample."""
        from moe2edge.calibration import walk
        from moe2edge.numerics import metrics

        advance = context.reporter.advance
        kept = context.keep_walk("source")
        source = walk.observe(context.source, ids, (), advance, "routing: source", kept=kept)
        results = []
        for model, name in ((context.model, "before"), (fitted, "after")):
            kept = context.keep_walk(name)
            hidden = walk.observe(model, ids, (), advance, "routing: held-out text", kept=kept)
            mine, theirs = (
                walk.compute_logits(model, hidden),
                walk.compute_logits(context.source, source),
            )
            results.append(list(metrics.measure_per_sample(ids, mine, theirs)))
        return results[0], results[1]


@dataclass
class _Fitter(KeptTransform):
    """Gathers the evidence of one layer after another and fits its router.

    Attributes:
        step: the pass.
        held_out: samples that decide, bool [samples].
        rules: rule of each router, and what multiplies the weighted outputs of its experts on their
            way into the residual stream, by the index of the block.
        parts: evidence of the current layer, by batch.
    """

    step: Routing
    held_out: Tensor
    rules: Mapping[int, tuple[RoutingRule, float]]
    parts: list[RouterEvidence] = field(default_factory=list)

    def observe(self, trace: BlockTrace, source: BlockTrace | None) -> None:
        """Add one batch of a layer with a router."""
        assert source is not None, "the walk has a source"
        if isinstance(trace.block.mlp, MoELayer) and trace.routing is not None:
            rule, scale = self.rules[trace.block.index]
            self.parts.append(gather_evidence(trace, trace.block.mlp, source, rule, scale))

    def compute(self, block: Block) -> tuple[Block, Any] | None:
        """Return the block with rows that lower the held-out error; None: there are none."""
        import torch

        from moe2edge.numerics import router_fit

        parts, self.parts = self.parts, []
        if not isinstance(block.mlp, MoELayer) or not parts:
            return None
        evidence = router_fit.join_evidence(parts)
        parts.clear()
        weight = block.mlp.router.weight
        stored = weight.load()
        length = len(evidence.inputs) // len(self.held_out)
        fit = router_fit.fit_router(
            evidence,
            self.held_out.repeat_interleave(length),
            stored.float(),
            stored.dtype,
            damping=self.step.damping,
            ridge=self.step.ridge,
            rounds=self.step.rounds,
            margin=self.step.margin,
        )
        if fit.router is None:
            self.notes.append(f"block {block.index}: router not changed, no fit lowered the error")
            return None
        fall = 1 - (fit.after / fit.before if fit.before else 1.0)
        self.notes.append(
            f"block {block.index}: held-out error of the residual stream {fall:.2%} lower, "
            f"{fit.rounds} steps"
        )
        self.changed.append(f"block {block.index}: router")
        assert torch.equal(fit.router.to(stored.dtype).float(), fit.router)
        return self.put(block, {"router.weight": fit.router}), {}

    def reshape(self, block: Block, shape: Any) -> Block:
        """Return the block itself: only numbers of its router change."""
        return block


def find_rules(model: Model) -> dict[int, tuple[RoutingRule, float]]:
    """Find the rule of each router, and what multiplies the experts' outputs, by block.

    Raises:
        Unsupported: more than that is done to them.
    """
    from moe2edge.model.traits import find_softmax
    from moe2edge.numerics.subset_loss import RoutingRule
    from moe2edge.runtime.layer_stage import measure_expert_scale

    found: dict[int, tuple[RoutingRule, float]] = {}
    scales: dict[tuple[str, ...], float | None] = {}
    for block, layer in model.moe_blocks:
        top_k = layer.router.top_k
        if not model.family.generic:
            found[block.index] = RoutingRule(top_k, layer.router.renormalize), 1.0
            continue
        # Layers with the same tensors are of the same code.
        kind = tuple(model.architecture.anatomy[block.origin].roles)
        if kind not in scales:
            scales[kind] = measure_expert_scale(model, block)
        rule = find_softmax(model.architecture, block.origin)
        if (scale := scales[kind]) is None or rule is None:
            raise Unsupported(
                f"routing does not work on {model.family.model_type}: what its experts put out is "
                f"not just scaled and added to the residual stream (block {block.index}); leave "
                "routing out"
            )
        found[block.index] = RoutingRule(top_k, rule[0]), scale * rule[1]
    return found


def gather_evidence(
    trace: BlockTrace, layer: MoELayer, source: BlockTrace, rule: RoutingRule, scale: float
) -> RouterEvidence:
    """Gather the evidence of one batch; errors are relative to the source's hidden states."""
    import torch

    from moe2edge.calibration.evidence import compute_products
    from moe2edge.numerics.router_fit import RouterEvidence, route

    routing = trace.routing
    assert routing is not None
    gap = (source.outputs - trace.outputs).flatten(0, 1)
    gram, pull = compute_products(trace, routing.inputs, len(layer.experts), gap)
    assert pull is not None
    if trace.router is None:
        weights = torch.zeros(len(gap), len(layer.experts))
        weights = weights.scatter(1, routing.ids, routing.weights)
    else:
        weights, _ = route(routing.logits, rule)
        gram.mul_(scale**2)
        pull.mul_(scale)
    return RouterEvidence(
        rule=rule,
        inputs=routing.inputs.clone(),
        gram=gram,
        pull=pull.float(),
        missing=gap.square().sum(1),
        weights=weights,
        scale=1 / source.outputs.flatten(0, 1).square().sum(1),
    )
