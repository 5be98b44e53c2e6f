"""Remove the least useful experts of every MoE layer, with their router rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Annotated, Literal

from pydantic import Field, field_validator

from moe2edge.errors import InputError
from moe2edge.model import Block, Model, MoELayer
from moe2edge.pipeline import Facts, Observer, Outcome, Trim

Choose = Callable[[Block, MoELayer], Iterable[int]]


class ExpertDrop(Trim):
    """Keep the experts of highest saliency in each layer, in their old order.

    Formulas of the criteria are in `moe2edge.saliency`. Experts and router rows go together; the
    softmax over the rows that stay renormalizes by itself.
    """

    keep: Annotated[
        int | float,
        Field(description="experts kept: a count, or a fraction of each layer, rounded up"),
    ]
    criterion: Annotated[
        Literal["routing-score", "frequency", "reap", "random"],
        Field(description="how experts are scored"),
    ] = "reap"
    clamp_top_k: Annotated[
        bool, Field(description="lower top-k where fewer experts stay than it chooses")
    ] = False
    seed: Annotated[int, Field(ge=0, le=2**32 - 1, description="for criterion random")] = 0

    @field_validator("keep", mode="before")
    @classmethod
    def _keep_is_sensible(cls, value: object) -> object:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError("a count (2) or a fraction (0.5)")
        if not value > 0:
            raise ValueError("a count of at least 1, or a fraction between 0 and 1")
        if isinstance(value, float) and value > 1:
            raise ValueError("a fraction lies between 0 and 1; write a count without a point")
        return value

    def count(self, experts: int) -> int:
        """How many of ``experts`` stay.

        >>> ExpertDrop(keep=0.75).count(6), ExpertDrop(keep=4).count(6)
        (5, 4)
        """
        if isinstance(self.keep, int):
            return self.keep
        return math.ceil(self.keep * experts - 1e-9)

    def check(self, model: Model) -> None:
        """Refuse counts that a layer does not have, or that leave fewer experts than top-k."""
        counts = [(block.index, len(layer.experts), layer) for block, layer in model.moe_blocks]
        for index, experts, layer in counts:
            kept, top_k = self.count(experts), layer.router.top_k
            if kept > experts:
                raise InputError(f"expert_drop: keep {kept} of the {experts} in block {index}")
            if kept < top_k and not self.clamp_top_k:
                raise InputError(
                    f"expert_drop: keep {self.keep} leaves {kept} experts in block {index} where "
                    f"the router chooses {top_k} per token; keep at least {top_k}, "
                    "or set clamp_top_k: true"
                )
        if all(self.count(experts) == experts for _, experts, _ in counts):
            raise InputError(f"expert_drop: keep {self.keep} keeps every expert; nothing to do")

    def plan(self, model: Model) -> Model:
        """Each layer with its first experts."""
        return self._kept(model, lambda _, layer: range(self.count(len(layer.experts))))

    def observers(self) -> tuple[type[Observer], ...]:
        """What the criterion needs to know."""
        from moe2edge.saliency import OutputObserver, RoutingObserver

        if self.criterion == "random":
            return ()
        return (OutputObserver,) if self.criterion == "reap" else (RoutingObserver,)

    def apply(self, model: Model, facts: Facts) -> Outcome:
        """Keep the best experts of each layer; ties go to the lower index."""

        def best(block: Block, layer: MoELayer) -> list[int]:
            scores = self._scores(block, layer, facts)
            order = sorted(range(len(layer.experts)), key=lambda j: (-scores[j], j))
            return sorted(order[: self.count(len(layer.experts))])

        kept = self._kept(model, best)
        dropped = [
            f"block {old.index}: experts {sorted(_origins(a) - _origins(b))}"
            for (old, a), (_, b) in zip(model.moe_blocks, kept.moe_blocks, strict=True)
            if a is not b
        ]
        return Outcome(kept, changed=tuple(dropped))

    def _kept(self, model: Model, choose: Choose) -> Model:
        for block, layer in model.moe_blocks:
            if self.count(len(layer.experts)) == len(layer.experts):
                continue
            ids = list(choose(block, layer))
            new = layer.keep(ids, clamp_top_k=self.clamp_top_k)
            model = model.replace_block(replace(block, mlp=new))
        return model

    def _scores(self, block: Block, layer: MoELayer, facts: Facts) -> list[float]:
        """Scores of the layer's experts; statistics are those of the stage's first model."""
        from moe2edge import saliency

        key = block.origin
        if self.criterion == "random":
            return saliency.random_scores(len(layer.experts), key, self.seed).tolist()
        statistics: saliency.OutputStatistics | saliency.RoutingStatistics
        if self.criterion == "reap":
            statistics = facts[saliency.OutputStatistics]
            scores = saliency.reap(statistics, key)
        else:
            statistics = facts[saliency.RoutingStatistics]
            by_name = {"frequency": saliency.frequency, "routing-score": saliency.routing_score}
            scores = by_name[self.criterion](statistics, key)
        by_origin = dict(zip(statistics.experts[key], scores.tolist(), strict=True))
        return [by_origin[expert.origin] for expert in layer.experts]


def _origins(layer: MoELayer) -> set[int]:
    return {expert.origin for expert in layer.experts}
