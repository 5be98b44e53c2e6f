"""Remove the least useful experts of MoE layers, with their router rows.

Formulas of the criteria are in `moe2edge.numerics.saliency`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, field_validator

from moe2edge.calibration import criteria
from moe2edge.calibration.criteria import Criterion
from moe2edge.calibration.observation import Facts, ObserverFactory
from moe2edge.errors import InputError
from moe2edge.model.model import Model
from moe2edge.numerics import selection
from moe2edge.pipeline.checks import refuse_replaced
from moe2edge.pipeline.contract import Outcome, Trim

# Super experts are looked for in this part of the blocks, from the first (REAP's code).
GUARDED_PART, GUARDED_QUANTILE, GUARDED_RATIO = 0.75, 0.995, 0.1

Ids = Mapping[int, list[int]]


class ExpertDrop(Trim):
    """Keep the experts of highest saliency, in their old order.

    Experts and router rows go together; the softmax over the rows that stay renormalizes by
    itself. A layer with one expert left becomes a plain MLP, one with none left is gone (a shared
    expert stays).
    """

    keep: Annotated[
        int | float | list[int],
        Field(
            description="experts kept: a count, a fraction of each layer, rounded up, or a list "
            "with a count for each MoE layer, where 0 removes the layer"
        ),
    ]
    criterion: Annotated[Criterion, Field(description="how experts are scored")] = "reap"
    scope: Annotated[
        Literal["layer", "global"],
        Field(
            description="layer: each layer keeps this many; global: the layers share one budget, "
            "and the best experts of all layers stay"
        ),
    ] = "layer"
    floor: Annotated[
        int | None,
        Field(
            ge=1, description="with scope global, experts that each layer keeps; none: its top-k"
        ),
    ] = None
    protect_super_experts: Annotated[
        bool, Field(description="keep experts with extreme outputs, regardless of their score")
    ] = False
    reverse: Annotated[bool, Field(description="drop the best: an ablation")] = False
    clamp_top_k: Annotated[
        bool, Field(description="lower top-k where fewer experts stay than it chooses")
    ] = False
    seed: Annotated[int, Field(ge=0, le=2**32 - 1, description="for criterion random")] = 0

    @field_validator("keep", mode="before")
    @classmethod
    def _keep_is_sensible(cls, value: object) -> object:
        if isinstance(value, list):
            if not value or not all(type(count) is int and count >= 0 for count in value):
                raise ValueError("a list of counts, one for each MoE layer")
            return value
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError("a count (2), a fraction (0.5), or a list of counts")
        if not value > 0:
            raise ValueError("a count of at least 1, or a fraction between 0 and 1")
        if isinstance(value, float) and value > 1:
            raise ValueError("a fraction lies between 0 and 1; write a count without a point")
        return value

    def count(self, experts: int, position: int = 0) -> int:
        """Count how many of ``experts`` stay in the MoE layer at ``position``.

        >>> ExpertDrop(keep=0.75).count(6), ExpertDrop(keep=4).count(6)
        (5, 4)
        """
        if isinstance(self.keep, list):
            return self.keep[position]
        return selection.count_kept(self.keep, experts)

    def _counts(self, model: Model) -> dict[int, int]:
        """Experts that stay under scope layer, by block."""
        return {
            block.index: self.count(len(layer.experts), n)
            for n, (block, layer) in enumerate(model.moe_blocks)
        }

    def _floors(self, model: Model) -> dict[int, int]:
        """Experts that a layer keeps at least under scope global, by block."""
        return {
            block.index: self.floor or (1 if self.clamp_top_k else layer.router.top_k)
            for block, layer in model.moe_blocks
        }

    def check(self, model: Model) -> None:
        """Refuse counts that a layer does not have, or that leave fewer experts than top-k."""
        refuse_replaced("expert_drop", model)
        self._check_options(model)
        if model.skips:
            raise InputError(
                "expert_drop: thresholds of expert_skip belong to the experts that were there; put "
                "expert_skip after it"
            )
        counts, floors = self._counts(model), self._floors(model)
        for block, layer in model.moe_blocks:
            experts, kept, top_k = len(layer.experts), counts[block.index], layer.router.top_k
            if kept > experts:
                raise InputError(
                    f"expert_drop: keep {kept} of the {experts} in block {block.index}"
                )
            least = floors[block.index] if self.scope == "global" else kept
            if least > experts:
                raise InputError(f"expert_drop: floor {least} of the {experts} experts")
            if 0 < least < top_k and not self.clamp_top_k:
                raise InputError(
                    f"expert_drop: keep {self.keep} leaves {least} experts in block {block.index} "
                    f"where the router chooses {top_k} per token; keep at least {top_k}, "
                    "or set clamp_top_k: true"
                )
        if self.scope == "global" and sum(counts.values()) < sum(floors.values()):
            raise InputError(
                f"expert_drop: keep {self.keep} is {sum(counts.values())} experts in all, but the "
                f"floors of the layers add up to {sum(floors.values())}"
            )
        if sum(counts.values()) == sum(model.expert_counts):
            raise InputError(f"expert_drop: keep {self.keep} keeps every expert; nothing to do")

    def _check_options(self, model: Model) -> None:
        """Refuse options that contradict each other, or a list for another number of layers."""
        if self.floor is not None and self.scope == "layer":
            raise InputError("expert_drop: floor goes with scope global")
        if not isinstance(self.keep, list):
            return
        if self.scope == "global":
            raise InputError("expert_drop: keep lists a count per layer; scope is layer then")
        if len(self.keep) != len(model.moe_blocks):
            raise InputError(
                f"expert_drop: keep lists {len(self.keep)} counts for "
                f"{len(model.moe_blocks)} MoE layers"
            )

    def plan(self, model: Model) -> Model:
        """Each layer with its first experts; with scope global, as uneven as it may become."""
        counts = self._counts(model)
        if self.scope == "global":
            floors, full = list(self._floors(model).values()), model.expert_counts
            planned = selection.allocate_least_even(floors, full, sum(counts.values()))
            counts = dict(zip(counts, planned, strict=True))
        return self._kept(model, {index: list(range(n)) for index, n in counts.items()})

    def observers(self) -> tuple[ObserverFactory, ...]:
        """Return the observers that the criterion and the guard need."""
        from moe2edge.calibration.router_observers import OutputObserver

        kinds = criteria.list_observers(self.criterion)
        if self.protect_super_experts and OutputObserver not in kinds:
            kinds = (*kinds, OutputObserver)
        return kinds

    def apply(self, model: Model, facts: Facts) -> Outcome:
        """Keep the best experts; ties go to the lower index, and to the earlier block."""
        sign = -1 if self.reverse else 1
        scores = {
            block.index: [
                sign * s for s in criteria.score_experts(self.criterion, block, facts, self.seed)
            ]
            for block, _ in model.moe_blocks
        }
        guarded = _super_experts(model, facts) if self.protect_super_experts else []
        for index, expert in guarded:
            scores[index][expert] = math.inf
        chosen = self._chosen(model, scores)
        notes: list[str] = []
        for index, expert in guarded:
            if expert not in chosen[index]:
                raise InputError(
                    f"expert_drop: {len(chosen[index])} experts of block {index} would stay, and a "
                    "super expert would not; keep more of them there"
                )
            origin = model.blocks[index].expert_origins[expert]
            notes.append(f"block {index}: expert {origin} is protected")
        kept = self._kept(model, chosen)
        dropped = []
        for old, new in zip(model.blocks, kept.blocks, strict=True):
            if gone := sorted(set(old.expert_origins) - set(new.expert_origins)):
                dropped.append(f"block {old.index}: experts {gone}")
        return Outcome(kept, changed=tuple(dropped), notes=tuple(notes))

    def _chosen(self, model: Model, scores: Mapping[int, list[float]]) -> Ids:
        """Choose the best of each layer; with scope global the floors, then the best of all."""
        counts = self._counts(model)
        sure = counts if self.scope == "layer" else self._floors(model)
        ids = {
            index: sorted(selection.rank_by_score(row)[: sure[index]])
            for index, row in scores.items()
        }
        left = sum(counts.values()) - sum(sure.values())
        others = [
            (-score, index, expert)
            for index, row in scores.items()
            for expert, score in enumerate(row)
            if expert not in ids[index]
        ]
        for _, index, expert in sorted(others)[:left]:
            ids[index] = sorted([*ids[index], expert])
        return ids

    def _kept(self, model: Model, ids: Ids) -> Model:
        for block, layer in model.moe_blocks:
            chosen = ids[block.index]
            if len(chosen) < len(layer.experts):
                kept = block.keep_experts(chosen, clamp_top_k=self.clamp_top_k)
                model = model.replace_block(kept)
        return model


def _super_experts(model: Model, facts: Facts) -> list[tuple[int, int]]:
    """Block and position of experts whose largest output is beyond that of all others.

    Removing a few of them ruins a model (https://arxiv.org/abs/2507.23279). The rule is that of
    REAP's code: in the first three quarters of the blocks, above the 99.5th percentile and above
    a tenth of the largest.
    """
    import torch

    from moe2edge.calibration.router_observers import OutputObserver

    layers = facts[OutputObserver].layers
    last = GUARDED_PART * len(model.blocks)
    largest = {
        (block.index, n): float(layers[block.origin].largest[place[expert.origin]])
        for block, layer in model.moe_blocks
        if block.index < last
        for place in [{o: p for p, o in enumerate(layers[block.origin].experts)}]
        for n, expert in enumerate(layer.experts)
    }
    if not largest:
        return []
    values = torch.tensor(list(largest.values()), dtype=torch.float64)
    limit = max(float(values.quantile(GUARDED_QUANTILE)), float(values.max()) * GUARDED_RATIO)
    return [where for where, value in largest.items() if value > limit]
