"""Dynamic skipping: leave out routed experts of low weight, token by token, at run time.

The rule for more than two experts per token is in `moe2edge.calibration.router_observers`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

from pydantic import Field

from moe2edge.calibration.observation import Facts, ObserverFactory
from moe2edge.errors import InputError
from moe2edge.model.layers import MoELayer
from moe2edge.model.model import Model
from moe2edge.pipeline.checks import refuse_replaced
from moe2edge.pipeline.contract import Outcome, Trim


class ExpertSkip(Trim):
    """Give every router thresholds below which a chosen expert is not run for a token.

    With two experts per token this is the rule of https://arxiv.org/abs/2402.14800: the second is
    left out where its weight is below beta times the first's, beta being the median of that ratio
    over calibration tokens; for more experts each has its own ratio. The weights that stay are
    scaled to sum to one where the router does so. All experts stay in the model.
    """

    rescore: Annotated[
        bool,
        Field(
            description="begin a new stage: score on the model as trimmed so far; on by default, "
            "as thresholds belong to the experts that remain"
        ),
    ] = True
    quantile: Annotated[
        float,
        Field(
            gt=0,
            lt=1,
            description="quantile of the ratio of an expert's weight to the first's: about the "
            "fraction of tokens that skip it; 0.5 is the median of the paper",
        ),
    ] = 0.5

    def check(self, model: Model) -> None:
        """Refuse a model without a second expert to skip, or one that skips already."""
        refuse_replaced("expert_skip", model)
        if all(layer.router.top_k < 2 for _, layer in model.moe_blocks):
            raise InputError("expert_skip: no layer chooses two experts or more; nothing to skip")
        if any(layer.router.skip_below for _, layer in model.moe_blocks):
            raise InputError("expert_skip: the recipe has it twice; keep one")

    def plan(self, model: Model) -> Model:
        """Return the model with thresholds that skip nothing."""
        return self._with(
            model, {b.origin: (0.0,) * (m.router.top_k - 1) for b, m in model.moe_blocks}
        )

    def observers(self) -> tuple[ObserverFactory, ...]:
        """Ratios of the weights of chosen experts."""
        from moe2edge.calibration.router_observers import RatioObserver

        return (RatioObserver,)

    def apply(self, model: Model, facts: Facts) -> Outcome:
        """Thresholds from the routers as they were when the stage began."""
        from moe2edge.calibration import router_observers
        from moe2edge.numerics import skipping

        ratios = facts[router_observers.RatioObserver].ratios
        below = {
            block.origin: skipping.compute_thresholds(
                ratios[block.origin][:, : layer.router.top_k - 1], self.quantile
            )
            for block, layer in model.moe_blocks
        }
        changed, notes = [], []
        for block, layer in model.moe_blocks:
            if layer.router.top_k > 1:
                shown = ", ".join(f"{value:.4f}" for value in below[block.origin])
                changed.append(f"block {block.index}: thresholds {shown}")
            else:
                notes.append(f"block {block.index}: one expert per token, nothing to skip")
        return Outcome(self._with(model, below), changed=tuple(changed), notes=tuple(notes))

    def _with(self, model: Model, below: dict[int, tuple[float, ...]]) -> Model:
        for block, layer in model.moe_blocks:
            router = replace(layer.router, skip_below=below[block.origin])
            mlp: MoELayer = replace(layer, router=router)
            model = model.replace_block(replace(block, mlp=mlp))
        return model
