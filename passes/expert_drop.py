"""Drop the experts of lowest saliency from MoE layers, with their router rows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator

from moe2edge.calibration import criteria
from moe2edge.calibration.criteria import Criterion
from moe2edge.calibration.observation import Facts, ObserverFactory
from moe2edge.errors import InputError
from moe2edge.model.block import Block
from moe2edge.model.layers import MoELayer
from moe2edge.model.model import Model
from moe2edge.model.traits import Trait
from moe2edge.numerics import selection
from moe2edge.pipeline.checks import (
    advise_top_k,
    refuse_replaced,
    refuse_too_many,
    refuse_uneven_groups,
)
from moe2edge.pipeline.contract import Outcome, Trim

# Super experts, as in REAP's code: searched in this fraction of the blocks, from the first; their
# largest output is above this quantile of all experts, and above this fraction of the maximum.
GUARDED_PART, GUARDED_QUANTILE, GUARDED_RATIO = 0.75, 0.995, 0.1

Ids = Mapping[int, list[int]]


class ExpertDrop(Trim):
    """Drop the experts of lowest saliency, with their router rows (Expert Drop).

    The remaining experts stay in order, and the softmax over the remaining router rows renormalizes
    by itself. A layer with one expert left becomes a plain MLP; a layer with none left is removed,
    except for its shared expert. Expert Drop and its routing scores:
    https://arxiv.org/abs/2406.02500; criterion reap: https://arxiv.org/abs/2510.13999.
    """

    needs: ClassVar[tuple[Trait, ...]] = ()
    keep: Annotated[
        int | float | list[int],
        Field(
            description="experts to keep: a count, a fraction of each layer, rounded up, or a list "
            "with a count for each MoE layer, where 0 removes the layer"
        ),
    ]
    criterion: Annotated[
        Criterion, Field(description="score by which experts are ranked; see docs/trimming.md")
    ] = "mone"
    scope: Annotated[
        Literal["layer", "global"],
        Field(
            description="layer: each layer keeps this many; global: the layers share one budget, "
            "and the best experts of the model stay"
        ),
    ] = "layer"
    floor: Annotated[
        int | None,
        Field(
            ge=1,
            description="with scope global: fewest experts that each layer keeps; default: its "
            "top-k, or 1 with clamp_top_k",
        ),
    ] = None
    protect_super_experts: Annotated[
        bool, Field(description="keep experts with extreme outputs, whatever their score")
    ] = False
    reverse: Annotated[bool, Field(description="drop the best experts instead, as an ablation")] = (
        False
    )
    clamp_top_k: Annotated[
        bool,
        Field(
            description="lower top-k where fewer experts than top-k stay; otherwise that is an "
            "error"
        ),
    ] = False
    seed: Annotated[int, Field(ge=0, le=2**32 - 1, description="seed of the criterion random")] = 0

    @field_validator("keep", mode="before")
    @classmethod
    def _check_keep(cls, value: object) -> object:
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
        """Return how many of ``experts`` stay in the MoE layer at ``position``.

        >>> ExpertDrop(keep=0.75).count(6), ExpertDrop(keep=4).count(6)
        (5, 4)
        """
        if isinstance(self.keep, list):
            return self.keep[position]
        return selection.count_kept(self.keep, experts)

    def _count_kept(self, model: Model) -> dict[int, int]:
        """Count the experts that stay with scope layer, by block."""
        return {
            block.index: self.count(len(layer.experts), n)
            for n, (block, layer) in enumerate(model.moe_blocks)
        }

    def _list_floors(self, model: Model) -> dict[int, int]:
        """List the fewest experts that each layer keeps with scope global, by block."""
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
                "expert_drop: the thresholds of expert_skip would no longer fit the experts; put "
                "expert_skip after it"
            )
        self._check_groups(model)
        counts, floors = self._count_kept(model), self._list_floors(model)
        places = [f"block {index}" for index in counts]
        kept, sizes = list(counts.values()), model.expert_counts
        refuse_too_many("expert_drop", self.keep, kept, sizes, places)
        for block, layer in model.moe_blocks:
            experts, top_k = len(layer.experts), layer.router.top_k
            least = floors[block.index] if self.scope == "global" else counts[block.index]
            if least > experts:
                raise InputError(
                    f"expert_drop: floor is {least}, but block {block.index} has {experts} "
                    f"experts; choose at most {min(kept)}"
                )
            if 0 < least < top_k and not self.clamp_top_k:
                of_all = self.scope == "global"
                what = f"floor {self.floor} may leave" if of_all else f"keep {self.keep} leaves"
                option = "set floor to" if of_all else "keep"
                raise InputError(
                    f"expert_drop: {what} {least} experts in block {block.index} where the router "
                    f"chooses {top_k} per token; "
                    f"{advise_top_k(top_k, experts, 'set clamp_top_k: true', option)}"
                )
        if self.scope == "global" and sum(kept) < sum(floors.values()):
            tops = [layer.router.top_k for _, layer in model.moe_blocks]
            lower = "lower floor" if self.floor else "set clamp_top_k: true"
            if self.floor and not self.clamp_top_k and self.floor <= max(tops):
                lower = "lower floor with clamp_top_k: true"
            raise InputError(
                f"expert_drop: keep {self.keep} is {sum(kept)} experts in all, but the floors of "
                f"the layers add up to {sum(floors.values())}; raise keep, or {lower}"
            )
        if sum(kept) == sum(sizes):
            raise InputError(f"expert_drop: keep {self.keep} keeps every expert; nothing to do")

    def _check_groups(self, model: Model) -> None:
        """Refuse numbers that leave groups of a router with different numbers of experts."""
        for _, layer in model.moe_blocks:
            if self.scope == "global" and (groups := layer.router.groups) > 1:
                raise InputError(
                    "expert_drop: scope global does not keep the same number of experts in each "
                    f"of the {groups} groups of a router; choose scope: layer"
                )
        counts = list(self._count_kept(model).values())
        refuse_uneven_groups("expert_drop", "keep", self.keep, counts, model)

    def _check_options(self, model: Model) -> None:
        """Refuse options that contradict each other, or a list for another number of layers."""
        if self.floor is not None and self.scope == "layer":
            raise InputError("expert_drop: floor needs scope: global; set it, or leave floor out")
        if not isinstance(self.keep, list):
            return
        if self.scope == "global":
            raise InputError("expert_drop: keep lists a count per layer, which needs scope: layer")
        if len(self.keep) != len(model.moe_blocks):
            raise InputError(
                f"expert_drop: keep lists {len(self.keep)} counts for "
                f"{len(model.moe_blocks)} MoE layers"
            )

    def plan(self, model: Model) -> Model:
        """Return each layer with its first experts; with scope global, the most uneven result."""
        counts = self._count_kept(model)
        if self.scope == "global":
            floors, full = list(self._list_floors(model).values()), model.expert_counts
            planned = selection.allocate_least_even(floors, full, sum(counts.values()))
            counts = dict(zip(counts, planned, strict=True))
        chosen = {}
        for block, layer in model.moe_blocks:
            falling = [-float(n) for n in range(len(layer.experts))]
            groups = layer.router.groups
            chosen[block.index] = selection.choose_best(falling, counts[block.index], groups)
        return self._keep_experts(model, chosen)

    def observers(self) -> tuple[ObserverFactory, ...]:
        """Return the observers that the criterion and the protection of super experts need."""
        from moe2edge.calibration.router_observers import OutputObserver

        kinds = criteria.list_observers(self.criterion)
        if self.protect_super_experts and OutputObserver not in kinds:
            kinds = (*kinds, OutputObserver)
        return kinds

    def apply(self, model: Model, facts: Facts) -> Outcome:
        """Keep the best experts; among equal scores, the lower index and the earlier block."""
        sign = -1 if self.reverse else 1
        scores = {
            block.index: [
                sign * s for s in criteria.score_experts(self.criterion, block, facts, self.seed)
            ]
            for block, _ in model.moe_blocks
        }
        protected = _find_super_experts(model, facts) if self.protect_super_experts else []
        for index, expert in protected:
            scores[index][expert] = math.inf
        chosen = self._choose(model, scores)
        notes: list[str] = []
        for index, expert in protected:
            if expert not in chosen[index]:
                raise InputError(
                    f"expert_drop: keeping {len(chosen[index])} experts in block {index} would "
                    "drop a protected super expert; keep more experts there, or set "
                    "protect_super_experts: false"
                )
            origin = model.blocks[index].expert_origins[expert]
            notes.append(f"block {index}: expert {origin} is a super expert, and stays")
        pruned = self._keep_experts(model, chosen)
        dropped = []
        for old, new in zip(model.blocks, pruned.blocks, strict=True):
            if experts := sorted(set(old.expert_origins) - set(new.expert_origins)):
                dropped.append(f"block {old.index}: experts {experts}")
        return Outcome(pruned, changed=tuple(dropped), notes=tuple(notes))

    def _choose(self, model: Model, scores: Mapping[int, list[float]]) -> Ids:
        """Choose the best of each layer; with scope global, its floor, then the best of all."""
        counts = self._count_kept(model)
        minimum = counts if self.scope == "layer" else self._list_floors(model)
        ids = {
            index: selection.choose_best(row, minimum[index], _get_groups(model.blocks[index]))
            for index, row in scores.items()
        }
        remaining = sum(counts.values()) - sum(minimum.values())
        others = [
            (-score, index, expert)
            for index, row in scores.items()
            for expert, score in enumerate(row)
            if expert not in ids[index]
        ]
        for _, index, expert in sorted(others)[:remaining]:
            ids[index] = sorted([*ids[index], expert])
        return ids

    def _keep_experts(self, model: Model, ids: Ids) -> Model:
        """Return the model with the experts ``ids`` of each MoE layer."""
        for block, layer in model.moe_blocks:
            chosen = ids[block.index]
            if len(chosen) < len(layer.experts):
                kept = block.keep_experts(chosen, clamp_top_k=self.clamp_top_k)
                model = model.replace_block(kept)
        return model


def _get_groups(block: Block) -> int:
    """Return the number of groups of a block's router."""
    return block.mlp.router.groups if isinstance(block.mlp, MoELayer) else 1


def _find_super_experts(model: Model, facts: Facts) -> list[tuple[int, int]]:
    """Find block and position of experts whose largest output far exceeds that of others.

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
