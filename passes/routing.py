"""Fit routers to the experts that stayed, where that lowers the loss on held-out text.

Formulas are in `moe2edge.numerics.router_fit`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from moe2edge.errors import InputError, Unsupported
from moe2edge.model.layers import MoELayer
from moe2edge.model.model import Block, Model
from moe2edge.pipeline.checks import refuse_replaced
from moe2edge.pipeline.contract import Outcome, PassContext, Search
from moe2edge.pipeline.work import Store

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.calibration.observation import BlockTrace
    from moe2edge.numerics.metrics import SampleSums
    from moe2edge.numerics.router_fit import RouterEvidence


class Routing(Search):
    """Adapt the rows of routers to the smaller set of experts, by least squares.

    A router was trained to choose among all experts. Block after block, its rows are fitted anew so
    that the hidden states after the block come closest to the source's; later blocks see the
    output of the fitted one. A part of the calibration samples is held out of the fit: a block's
    new rows stay only if they lower the error there, and all of them only if the language-model
    loss falls there as well, by more than the bootstrap interval over samples. Otherwise the model
    is unchanged, and the report says so. Layers with all experts of the source are fitted, too,
    where blocks before them changed.
    """

    may_change_nothing: ClassVar[bool] = True

    held_out: Annotated[
        float, Field(gt=0, lt=1, description="fraction of the calibration samples that decides")
    ] = 0.25
    rounds: Annotated[int, Field(ge=1, description="maximum number of steps per layer")] = 6
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
        """Refuse a model without routers, with biases in them, or one that skips.

        Raises:
            InputError: there is nothing to fit, or thresholds would fit no longer.
            Unsupported: a router has more than its matrix.
        """
        refuse_replaced("routing", model)
        layers = [layer for _, layer in model.moe_blocks]
        if not any(len(layer.experts) > 1 for layer in layers):
            raise InputError("routing: no layer has a router left; nothing to fit")
        if model.skips:
            raise InputError(
                "routing: thresholds of expert_skip belong to the router as it was; put "
                "expert_skip after routing"
            )
        if any(layer.router.per_expert for layer in layers):
            raise Unsupported("routing: a router with a bias per expert is not supported")

    def plan(self, model: Model) -> Model:
        """Return the same shape."""
        return model

    def search(self, context: PassContext) -> Outcome:
        """Fit block after block, then decide by the loss of the whole.

        Raises:
            InputError: there are too few calibration samples to hold some out.
            DoesNotFit: the machine lacks the memory.
        """
        from moe2edge.calibration import walk
        from moe2edge.numerics import bootstrap

        held_out = self._held_out(len(context.tokens))
        self._state_cost(context)
        fitter = _Fitter(self, context.store, held_out)
        advance = context.reporter.advance
        fitted = walk.change(
            context.source, context.model, context.tokens, fitter, advance, "routing"
        )
        notes = tuple(fitter.notes)
        if not fitter.changed:
            return Outcome(context.model, notes=(*notes, "no router was changed: none got better"))
        before, after = self._compare(context, fitted, context.tokens[held_out])
        fall, _ = bootstrap.compare_paired(before, after, seed=0)
        said = (
            f"{fall.samples} held-out calibration samples: loss {fall.mean:.4f} lower (95 % "
            f"{fall.low:.4f} to {fall.high:.4f}), KL {bootstrap.compute_mean_kl(before):.5f} to "
            f"{bootstrap.compute_mean_kl(after):.5f}"
        )
        if fall.low <= 0:
            reason = f"left alone, the loss does not fall measurably: {said}"
            return Outcome(context.model, notes=(*notes, reason))
        return Outcome(fitted, changed=tuple(fitter.changed), notes=(*notes, said))

    def _held_out(self, samples: int) -> Tensor:
        """Return a mask of the held-out samples, bool [samples]."""
        import torch

        from moe2edge.numerics.bootstrap import split_samples

        found = torch.zeros(samples, dtype=torch.bool)
        found[split_samples(samples, self.held_out)[1]] = True
        return found

    def _state_cost(self, context: PassContext) -> None:
        from moe2edge.numerics.router_fit import estimate_router_evidence_bytes
        from moe2edge.runtime.memory import check_memory as check_memory

        tokens = context.tokens.numel()
        hidden = context.model.family.geometry(context.model.config).hidden
        experts = max(context.model.expert_counts)
        needed = estimate_router_evidence_bytes(tokens, experts, hidden)
        context.reporter.log(
            f"routing: {len(context.model.moe_blocks)} layers, {tokens:,} tokens, each expert once "
            f"per token, at most {self.rounds} steps; {needed / 1e6:,.0f} MB for a layer at a time"
        )
        check_memory(
            needed,
            f"routing keeps products of the outputs of {experts} experts for {tokens:,} tokens",
            "give it fewer calibration samples, or fit on a larger one",
            context.memory.limit,
        )

    def _compare(
        self, context: PassContext, fitted: Model, ids: Tensor
    ) -> tuple[list[SampleSums], list[SampleSums]]:
        """Figures per sample of the model as it was and as fitted, against the source."""
        from moe2edge.calibration import walk
        from moe2edge.numerics import metrics

        advance = context.reporter.advance
        source = walk.observe(context.source, ids, (), advance, "routing: source")
        found = []
        for model in (context.model, fitted):
            hidden = walk.observe(model, ids, (), advance, "routing: held-out text")
            mine, theirs = (
                walk.compute_logits(model, hidden),
                walk.compute_logits(context.source, source),
            )
            found.append(list(metrics.measure_per_sample(ids, mine, theirs)))
        return found[0], found[1]


@dataclass
class _Fitter:
    """Gathers a layer's evidence and changes its router; one layer at a time."""

    step: Routing
    store: Store
    held_out: Tensor
    changed: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    parts: list[RouterEvidence] = field(default_factory=list)

    def observe(self, trace: BlockTrace, source: BlockTrace) -> None:
        """Add one batch of a layer with a router."""
        if isinstance(trace.block.mlp, MoELayer) and trace.routing is not None:
            self.parts.append(_evidence(trace, trace.block.mlp, source))

    def change(self, block: Block) -> Block:
        """Return the block with rows that lower the held-out error, or unchanged."""
        import torch

        from moe2edge.numerics import router_fit

        parts, self.parts = self.parts, []
        if not isinstance(block.mlp, MoELayer) or not parts:
            return block
        evidence = router_fit.join_evidence(parts)
        parts.clear()
        weight = block.mlp.router.weight
        stored = weight.load()
        length = len(evidence.inputs) // len(self.held_out)
        found = router_fit.fit_router(
            evidence,
            self.held_out.repeat_interleave(length),
            stored.float(),
            stored.dtype,
            damping=self.step.damping,
            ridge=self.step.ridge,
            rounds=self.step.rounds,
            margin=self.step.margin,
        )
        if found.router is None:
            self.notes.append(f"block {block.index}: router left alone, no fit was better")
            return block
        fall = 1 - (found.after / found.before if found.before else 1.0)
        self.notes.append(
            f"block {block.index}: held-out error of the stream {fall:.2%} lower, "
            f"{found.rounds} steps"
        )
        self.changed.append(f"block {block.index}: router")
        assert torch.equal(found.router.to(stored.dtype).float(), found.router)
        return self.store.put(block, {"router.weight": found.router})


def _evidence(trace: BlockTrace, layer: MoELayer, source: BlockTrace) -> RouterEvidence:
    """Evidence of one batch; errors are relative to the size of the source's hidden states."""
    import torch

    from moe2edge.calibration.evidence import compute_products
    from moe2edge.numerics.router_fit import RouterEvidence
    from moe2edge.numerics.subset_loss import RoutingRule

    routing = trace.routing
    assert routing is not None
    lacks = (source.outputs - trace.outputs).flatten(0, 1)
    gram, pull = compute_products(trace, routing.inputs, len(layer.experts), lacks)
    assert pull is not None
    weights = torch.zeros(len(lacks), len(layer.experts))
    return RouterEvidence(
        rule=RoutingRule(layer.router.top_k, layer.router.renormalize),
        inputs=routing.inputs.clone(),
        gram=gram,
        pull=pull.float(),
        missing=lacks.square().sum(1),
        weights=weights.scatter(1, routing.ids, routing.weights),
        scale=1 / source.outputs.flatten(0, 1).square().sum(1),
    )
