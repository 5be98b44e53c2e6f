"""Dynamic skipping: leave out routed experts of low weight, token by token, at run time."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, ClassVar

from pydantic import Field

from moe2edge.calibration.observation import Facts, ObserverFactory
from moe2edge.errors import InputError
from moe2edge.model.layers import MoELayer
from moe2edge.model.model import Model
from moe2edge.model.traits import Trait
from moe2edge.pipeline.checks import refuse_replaced
from moe2edge.pipeline.contract import Outcome, Trim


class ExpertSkip(Trim):
    """Skip chosen experts of low weight, token by token, at run time (dynamic skipping).

    Every router gets thresholds. With two experts per token this is the rule of
    https://arxiv.org/abs/2402.14800: the second expert is skipped where its weight is below beta
    times that of the first, with beta the median of this ratio over the calibration tokens. With
    more experts per token, each one after the first has a threshold of its own, by the same rule.
    The remaining weights are scaled to the sum that the weights had, if the router scales them to
    the same sum for each token. All experts stay in the model.
    """

    needs: ClassVar[tuple[Trait, ...]] = (Trait.ROUTER,)

    rescore: Annotated[
        bool,
        Field(
            description="begin a new stage, so that thresholds are those of the experts that stay; "
            "on by default here, unlike in other passes"
        ),
    ] = True
    quantile: Annotated[
        float,
        Field(
            gt=0, lt=1, description="quantile of the ratio of an expert's weight to the first "
            "one's that is its threshold: about the fraction of tokens that skip it; 0.5 is the "
            "paper's median"
        ),
    ] = 0.5  # fmt: skip

    def check(self, model: Model) -> None:
        """Refuse models without a second expert to skip, and models that skip already."""
        refuse_replaced("expert_skip", model)
        if all(layer.router.top_k < 2 for _, layer in model.moe_blocks):
            raise InputError("expert_skip: no layer chooses two experts or more; nothing to skip")
        if any(layer.router.skip_below for _, layer in model.moe_blocks):
            raise InputError("expert_skip: the recipe has it twice; keep one")

    def plan(self, model: Model) -> Model:
        """Return the model with thresholds that skip nothing."""
        return self._set_thresholds(
            model, {b.origin: (0.0,) * (m.router.top_k - 1) for b, m in model.moe_blocks}
        )

    def observers(self) -> tuple[ObserverFactory, ...]:
        """Return the observer of the ratios of the weights of chosen experts."""
        from moe2edge.calibration.router_observers import RatioObserver

        return (RatioObserver,)

    def apply(self, model: Model, facts: Facts) -> Outcome:
        """Set thresholds, computed from the routers as they were when the stage began."""
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
        pruned = self._set_thresholds(model, below)
        return Outcome(pruned, changed=tuple(changed), notes=tuple(notes))

    def _set_thresholds(self, model: Model, below: dict[int, tuple[float, ...]]) -> Model:
        """Return the model with thresholds ``below``, by the origin of the block."""
        for block, layer in model.moe_blocks:
            router = replace(layer.router, skip_below=below[block.origin])
            mlp: MoELayer = replace(layer, router=router)
            model = model.replace_block(replace(block, mlp=mlp))
        return model
