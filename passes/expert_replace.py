"""Let something small answer in the place of the least useful experts; routing stays as it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from moe2edge import amounts, criteria
from moe2edge.criteria import Criterion
from moe2edge.errors import InputError
from moe2edge.layers import MoELayer, Substitute, Weight
from moe2edge.model import Block, Model
from moe2edge.pipeline import Lab, Outcome, Search, Store, planned

if TYPE_CHECKING:
    from moe2edge.substitution import Fit, Sums
    from moe2edge.walk import Seen

# Rank of a linear map that nobody chose: this part of an expert's narrower side.
RANK_PART = 16


class ExpertReplace(Search):
    """Replace experts by constants or by linear maps of low rank, fitted in closed form.

    The router is untouched: a token that chose a replaced expert gets the substitute's answer
    times the gate weight. ``constant`` is MoNE's novice (https://arxiv.org/abs/2507.00390) with the
    gate-weighted mean, ``linear`` the gate-weighted reduced-rank ridge regression of the expert's
    output on its input; formulas are in `moe2edge.substitution`.
    """

    model_config = ConfigDict(validate_by_name=True)

    kind: Annotated[
        Literal["constant", "linear"],
        Field(alias="with", description="what answers: a constant vector, or a linear map"),
    ]
    keep: Annotated[
        int | float,
        Field(description="experts that stay: a count, or a fraction of each layer, rounded up"),
    ]
    criterion: Annotated[
        Criterion | Literal["residual"],
        Field(
            description="how experts are scored, the lowest are replaced; residual: by the error "
            "that the substitute leaves"
        ),
    ] = "residual"
    rank: Annotated[
        int | None,
        Field(ge=1, description="of linear maps; none: a 16th of an expert's narrower side"),
    ] = None
    fitted_on: Annotated[
        Literal["changed", "intact"],
        Field(description="inputs of later layers: of the model as changed so far, or as it was"),
    ] = "changed"
    ridge: Annotated[
        float,
        Field(ge=0, description="part of the mean diagonal of the inputs' Gram matrix added to it"),
    ] = 0.01
    min_tokens: Annotated[
        int, Field(ge=0, description="an expert with fewer routed tokens gets a constant")
    ] = 16
    seed: Annotated[int, Field(ge=0, le=2**32 - 1, description="for criterion random")] = 0

    @field_validator("keep", mode="before")
    @classmethod
    def _keep_is_sensible(cls, value: object) -> object:
        return amounts.check_amount(value)

    @model_validator(mode="after")
    def _rank_goes_with_maps(self) -> ExpertReplace:
        if self.kind == "constant" and self.rank is not None:
            raise ValueError("rank goes with: linear only")
        return self

    # ---- what there will be ------------------------------------------------------------------

    def _rank(self, layer: MoELayer) -> int:
        if self.kind == "constant":
            return 0
        return self.rank or max(1, min(layer.experts[0].gate.shape) // RANK_PART)

    def _replaced(self, layer: MoELayer) -> int:
        """How many experts of a layer go."""
        return len(layer.experts) - amounts.kept(self.keep, len(layer.experts))

    def check(self, model: Model) -> None:
        """Refuse what a layer cannot do without, and maps that are no smaller than experts."""
        layers = [layer for _, layer in model.moe_blocks]
        if not layers:
            raise InputError("expert_replace: no layer has experts")
        for block, layer in model.moe_blocks:
            if self._replaced(layer) < 0:
                raise InputError(
                    f"expert_replace: keep {self.keep} of the {len(layer.experts)} experts in "
                    f"block {block.index}"
                )
            expert, rank = layer.experts[0], self._rank(layer)
            hidden = expert.gate.shape[1]
            if rank > hidden:
                raise InputError(
                    f"expert_replace: rank {rank}, but experts of block {block.index} map {hidden} "
                    f"numbers to {hidden}: at most {hidden}"
                )
            count = expert.gate.count + expert.up.count + expert.down.count
            if hidden * (2 * rank + 1) >= count:
                raise InputError(
                    f"expert_replace: maps of rank {rank} are no smaller than the experts of block "
                    f"{block.index} ({count:,} numbers): choose a rank of at most "
                    f"{(count // hidden - 2) // 2}"
                )
        if not any(self._replaced(layer) for layer in layers):
            raise InputError(f"expert_replace: keep {self.keep} keeps every expert; nothing to do")

    def plan(self, model: Model) -> Model:
        """Each layer with substitutes for its last experts."""
        for block, layer in model.moe_blocks:
            count = len(layer.experts)
            gone = range(count - self._replaced(layer), count)
            if gone:
                ranks = dict.fromkeys(gone, self._rank(layer))
                model = model.replace_block(_substituted(block, layer, ranks))
        return model

    # ---- doing it ----------------------------------------------------------------------------

    def search(self, lab: Lab) -> Outcome:
        """Score, then fit block after block.

        Raises:
            DoesNotFit: the machine lacks the memory.
        """
        from moe2edge import walk

        self._state_cost(lab)
        scores: dict[int, list[float]] = {}
        if self.criterion != "residual":
            kinds = criteria.observers(self.criterion)
            facts = walk.gather(
                lab.model, lab.tokens, kinds, lab.watcher.advance, "scores", lab.memory
            )
            for block, _ in lab.model.moe_blocks:
                scores[block.index] = criteria.scores(self.criterion, block, facts, self.seed)
        fitter = _Fitter(self, lab.store, scores)
        model = walk.rewrite(
            lab.model,
            lab.tokens,
            fitter.see,
            fitter.change,
            lab.watcher.advance,
            "expert_replace",
            lab.memory,
            propagate=self.fitted_on == "changed",
        )
        return Outcome(model, changed=tuple(fitter.changed), notes=tuple(fitter.notes))

    def _state_cost(self, lab: Lab) -> None:
        from moe2edge.memory import check as check_memory
        from moe2edge.substitution import nbytes

        hidden = lab.model.family.geometry(lab.model.config).hidden
        fitted = max(
            len(layer.experts) if self.criterion == "residual" else self._replaced(layer)
            for _, layer in lab.model.moe_blocks
        )
        streams = 4 * 2 * lab.tokens.numel() * hidden
        check_memory(
            nbytes(hidden, fitted) + streams,
            f"expert_replace sums up inputs and outputs of {fitted} experts at a time",
            "replace fewer of them in one pass, or do it on a larger one",
            lab.memory.limit,
        )


def _substituted(block: Block, layer: MoELayer, ranks: Mapping[int, int]) -> Block:
    """The block with substitutes of some ranks, by position, whose numbers are not there yet."""
    hidden = layer.router.weight.shape[1]

    def weight(name: str, *shape: int) -> Weight:
        like = layer.experts[0].down
        return planned(replace(like, name=name, shape=shape, scheme=None, load_quantized=None))

    new = {}
    for n, rank in ranks.items():
        origin = layer.experts[n].origin
        name = f"substitute of expert {origin} in block {block.origin}"
        constant = weight(f"constant of the {name}", hidden)
        if rank:
            first = weight(f"first of the {name}", rank, hidden)
            second = weight(f"second of the {name}", hidden, rank)
            new[n] = Substitute(origin, constant, first, second)
        else:
            new[n] = Substitute(origin, constant)
    return replace(block, mlp=layer.substitute(new))


@dataclass
class _Fitter:
    """Sums up what experts do, and replaces some; one layer at a time."""

    step: ExpertReplace
    store: Store
    scores: Mapping[int, list[float]]
    changed: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    sums: dict[int, Sums] = field(default_factory=dict)

    def see(self, seen: Seen) -> None:
        """Add one batch."""
        import torch

        from moe2edge.substitution import Sums

        layer, routing = seen.block.mlp, seen.routing
        if not isinstance(layer, MoELayer) or routing is None:
            return
        for n in self._candidates(seen.block, layer):
            if n not in self.sums:
                self.sums[n] = Sums(routing.inputs.shape[1], maps=self.step.kind == "linear")
            token, place = torch.where(routing.ids == n)
            if len(token):
                inputs = routing.inputs[token]
                outputs = seen.expert_output(n, inputs)
                self.sums[n].add(inputs, outputs, routing.weights[token, place])

    def _candidates(self, block: Block, layer: MoELayer) -> list[int]:
        """Experts that may go."""
        count = self.step._replaced(layer)
        if not count:
            return []
        if self.step.criterion == "residual":
            return list(range(len(layer.experts)))
        return sorted(criteria.ranking(self.scores[block.index])[-count:])

    def change(self, block: Block) -> Block:
        """The block with substitutes."""
        from moe2edge import substitution

        sums, self.sums = self.sums, {}
        layer = block.mlp
        if not isinstance(layer, MoELayer) or not sums:
            return block
        rank = self.step._rank(layer)
        fits: dict[int, Fit] = {}
        for n, own in sums.items():
            starved = own.tokens < self.step.min_tokens
            fits[n] = substitution.fit(own, 0 if starved else rank, self.step.ridge)
        count = self.step._replaced(layer)
        gone = sorted(sorted(fits, key=lambda n: (fits[n].residual, -n))[:count])
        for n in gone:
            if rank and not len(fits[n].first):
                self.notes.append(
                    f"block {block.index}: expert {layer.experts[n].origin} saw {sums[n].tokens} "
                    f"tokens, fewer than {self.step.min_tokens}: a constant"
                )
        left = sum(fits[n].residual for n in gone)
        whole = sum(sums[n].squares for n in gone)
        origins = [layer.experts[n].origin for n in gone]
        self.changed.append(f"block {block.index}: experts {origins}")
        share = left / whole if whole else 0.0
        self.notes.append(
            f"block {block.index}: of what experts {origins} put out, {share:.1%} is missed"
        )
        changed = _substituted(block, layer, {n: len(fits[n].first) for n in gone})
        numbers = {}
        for place, n in enumerate(gone):
            found = fits[n]
            numbers[f"substitutes.{place}.constant"] = found.constant.float()
            if len(found.first):
                numbers[f"substitutes.{place}.first"] = found.first.float()
                numbers[f"substitutes.{place}.second"] = found.second.float()
        return self.store.put(changed, numbers)
