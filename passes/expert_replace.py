"""Replace the least useful experts by something smaller; routing stays as it is.

Formulas are in `moe2edge.numerics.reduced_rank` (``linear``, ``constant``) and
`moe2edge.numerics.base_sharing` (``base``, ``svd``).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from moe2edge.calibration import criteria
from moe2edge.calibration.criteria import Criterion
from moe2edge.errors import InputError
from moe2edge.model.layers import MoELayer
from moe2edge.model.model import Model
from moe2edge.model.traits import Trait
from moe2edge.numerics import selection
from moe2edge.pipeline import checks
from moe2edge.pipeline.checks import refuse_slimmed
from moe2edge.pipeline.contract import Outcome, PassContext, PlannedStep, Search, TextSizes
from moe2edge.pipeline.facts import UntiedModel
from moe2edge.runtime.memory import Estimate

if TYPE_CHECKING:
    from moe2edge.passes._replace_bases import Sharing

# Default rank: an expert's narrower side divided by this.
RANK_PART = {"linear": 16, "base": 64, "svd": 4}
# Default criterion by kind of replacement.
REPLACE_CRITERIA = {"constant": "residual", "linear": "residual", "base": "soft-frequency"}
# Options of each kind of replacement, the required one first.
OWN_OPTIONS = {
    "constant": ("keep", "criterion", "fitted_on", "seed"),
    "linear": ("keep", "budget", "rank", "criterion", "fitted_on", "ridge", "min_tokens", "seed"),
    "base": (
        "budget", "rank", "criterion", "group_size", "similarity", "factors", "depth_correction",
        "seed",
    ),
    "svd": ("budget", "rank", "criterion", "depth_correction", "seed"),
}  # fmt: skip
# Criteria whose scores cannot weight experts in a mean: errors, and negative numbers.
NO_WEIGHTS = ("residual", "aimer")


class ExpertReplace(Search):
    """Replace experts by something smaller; the router is untouched.

    The output of ``constant`` and ``linear`` is multiplied with the expert's gate weight:
    MoNE's novice (https://arxiv.org/abs/2507.00390) with the mean weighted by it, and the
    reduced-rank ridge regression of the expert's output on its input, weighted likewise. ``base``
    is LightMoE (https://arxiv.org/abs/2603.12645): groups of experts share one expert's matrices,
    and each has low-rank factors of its own. ``svd`` is its control: each expert becomes low-rank
    factors by itself.
    """

    model_config = ConfigDict(validate_by_name=True)
    writes: ClassVar[tuple[type, ...]] = (UntiedModel,)
    needs: ClassVar[tuple[Trait, ...]] = (Trait.ROUTER,)

    kind: Annotated[
        Literal["constant", "linear", "base", "svd"],
        Field(
            alias="with",
            description="the replacement: a constant vector, a linear map, a shared base plus "
            "low-rank factors, or low-rank factors alone",
        ),
    ]
    keep: Annotated[
        int | float | list[int] | None,
        Field(
            description="with constant, linear: experts that stay: a count, a fraction of each "
            "layer, rounded up, or a list with a count for each MoE layer"
        ),
    ] = None
    budget: Annotated[
        int | float | None,
        Field(
            description="with base, svd: bytes that all routed experts may take, a number or a "
            "fraction of what they take; with linear instead of keep: each layer may take its "
            "share, and experts and ranks are chosen by the error that is left"
        ),
    ] = None
    criterion: Annotated[
        Criterion | Literal["residual"] | None,
        Field(
            description="how experts are scored; the lowest are replaced; residual: by the error "
            "that a constant or linear map leaves; default: residual for these, otherwise "
            "soft-frequency"
        ),
    ] = None
    rank: Annotated[
        int | None,
        Field(
            ge=0,
            description="rank of linear maps and factors; default: the expert's narrower side "
            "divided by 16 for linear, 64 for base, 4 for svd",
        ),
    ] = None
    fitted_on: Annotated[
        Literal["changed", "intact"],
        Field(
            description="with constant, linear: inputs of later layers: from the model as changed "
            "so far, or as it was"
        ),
    ] = "changed"
    ridge: Annotated[
        float,
        Field(
            ge=0,
            description="with linear: fraction of the mean diagonal of the inputs' Gram matrix "
            "that is added to it",
        ),
    ] = 0.01
    min_tokens: Annotated[
        int | None,
        Field(
            ge=0,
            description="with linear: an expert with fewer routed tokens gets a constant; "
            "default: half as many as an expert has inputs",
        ),
    ] = None
    group_size: Annotated[
        int, Field(ge=2, description="with base: experts that share a base, on average")
    ] = 3
    similarity: Annotated[
        Literal["router", "weights", "random"],
        Field(
            description="with base: similarity that forms groups: cosines of router logits or of "
            "weights, or random, as a control"
        ),
    ] = "router"
    factors: Annotated[
        Literal["svd", "zero"],
        Field(
            description="with base: factors start as the best approximation of the difference to "
            "the base, or as zero, to be trained"
        ),
    ] = "svd"
    depth_correction: Annotated[
        float,
        Field(
            ge=0,
            description="with base, svd: strength of the correction by depth, by which shallow "
            "layers lose more experts; 0: one threshold for all layers",
        ),
    ] = 1.0
    seed: Annotated[
        int,
        Field(
            ge=0,
            le=2**32 - 1,
            description="seed of criterion random, of similarity random, and of factors: zero",
        ),
    ] = 0

    @field_validator("keep", mode="before")
    @classmethod
    def _keep_is_sensible(cls, value: object) -> object:
        return checks.check_keep(value)

    @field_validator("budget", mode="before")
    @classmethod
    def _budget_is_sensible(cls, value: object) -> object:
        return checks.check_amount(value)

    @model_validator(mode="after")
    def _options_go_together(self) -> ExpertReplace:
        own = OWN_OPTIONS[self.kind]
        needed = own[0]
        for name, field in type(self).model_fields.items():
            if name != "kind" and name not in own and getattr(self, name) != field.default:
                raise ValueError(
                    f"{name} is not an option of with: {self.kind}, whose options are "
                    f"{', '.join(own)}"
                )
        if self.kind == "linear" and (self.keep is None) == (self.budget is None):
            raise ValueError(
                "with: linear needs either keep (experts that stay) or budget (bytes that experts "
                "may take)"
            )
        if self.kind != "linear" and getattr(self, needed) is None:
            what = "experts that stay" if needed == "keep" else "bytes that experts may take"
            raise ValueError(f"with: {self.kind} needs {needed} ({what})")
        if self.shares and self.criterion in NO_WEIGHTS:
            raise ValueError(
                f"with: {self.kind} cannot use criterion {self.criterion}, whose scores are no "
                "weights; choose another one"
            )
        if self.allots and (self.rank, self.criterion) not in ((None, None), (None, "residual")):
            raise ValueError(
                "a budget chooses experts and their ranks; leave rank and criterion out"
            )
        return self

    @property
    def allots(self) -> bool:
        """True if a budget decides which experts are replaced, and by which rank."""
        return self.kind == "linear" and self.budget is not None

    @property
    def shares(self) -> bool:
        """True if experts become tied experts."""
        return self.kind in ("base", "svd")

    def list_needs(self) -> tuple[Trait, ...]:
        """List also what factors need: they stand for gate, up and down, and for no biases."""
        return (*self.needs, Trait.GATED, Trait.UNBIASED) if self.shares else self.needs

    def resolve(self, model: Model) -> ExpertReplace:
        """Fill in the default criterion."""
        chosen = self.criterion or REPLACE_CRITERIA.get(self.kind, "soft-frequency")
        return self.model_copy(update={"criterion": chosen})

    # ---- what there will be ------------------------------------------------------------------

    def _rank(self, layer: MoELayer) -> int:
        if self.kind == "constant":
            return 0
        if self.rank is not None:
            return self.rank
        return max(1, min(layer.experts[0].up.shape) // RANK_PART[self.kind])

    def _count_least(self, model: Model) -> int:
        """Return the tokens that a map needs. With fewer, a constant generalizes better."""
        if self.kind == "constant":
            return 0
        if self.min_tokens is not None:
            return self.min_tokens
        return model.moe_blocks[0][1].hidden // 2

    @property
    def _sharing(self) -> Sharing:
        from moe2edge.passes._replace_bases import Sharing

        group = self.group_size if self.kind == "base" else None
        return Sharing(self.budget or 0, self._rank, group)

    def _count_replaced(self, model: Model) -> dict[int, int]:
        """Count the experts that are replaced, by the index of their block, according to `keep`."""
        sizes = model.expert_counts
        counts = checks.count_kept_per_layer(self.keep or 0, sizes, "expert_replace")
        return {
            block.index: size - count
            for (block, _), size, count in zip(model.moe_blocks, sizes, counts, strict=True)
        }

    def check(self, model: Model) -> None:
        """Refuse what a layer cannot do without, and what is no smaller than experts."""
        if not model.moe_blocks:
            raise InputError("expert_replace: no layer has experts")
        if any(layer.is_tied for _, layer in model.moe_blocks):
            raise InputError(
                f"expert_replace: {model.tied_count} experts are already tied, and cannot be "
                "replaced; use one expert_replace in a recipe, and routing: centroids in "
                "expert_merge, which ties none"
            )
        refuse_slimmed("expert_replace", model)
        if self.shares:
            self._sharing.check(model)
        else:
            self._check_replacements(model)

    def _check_budget(self, model: Model) -> None:
        """Refuse budgets below what each layer takes with one expert and constants, or all."""
        from moe2edge.passes._replace_bases import count_expert_bytes, round_up
        from moe2edge.passes._replace_maps import estimate_size

        whole, budget = count_expert_bytes(model), self._get_budget(model)
        told = f"expert_replace: the budget is {budget:,} bytes of the {whole:,} that experts take"
        if budget >= whole:
            raise InputError(f"{told}; nothing to do, lower the budget")
        least = 0
        for _, layer in model.moe_blocks:
            size, count, old = estimate_size(layer), len(layer.experts), _count_old_bytes(layer)
            needed = size.expert + (count - 1) * size.constant
            if self._share_of(model, layer) < needed:
                # Convert to a budget of all layers, of which each gets the same fraction.
                least = max(least, -(-(needed + old) * whole // (count * size.expert + old)))
        if least:
            raise InputError(
                f"{told}, and one expert of each layer with constants for the others takes at "
                f"least {least:,} ({round_up(least, whole)}); raise the budget"
            )

    def _share_of(self, model: Model, layer: MoELayer) -> int:
        """Return the bytes for the experts of a layer: its part of the budget."""
        from moe2edge.passes._replace_bases import count_expert_bytes
        from moe2edge.passes._replace_maps import estimate_size

        old = _count_old_bytes(layer)
        whole = len(layer.experts) * estimate_size(layer).expert + old
        return self._get_budget(model) * whole // count_expert_bytes(model) - old

    def _check_replacements(self, model: Model) -> None:
        if self.allots:
            self._check_budget(model)
            return
        counts = self._count_replaced(model)
        for block, layer in model.moe_blocks:
            expert, rank = layer.experts[0], self._rank(layer)
            hidden = layer.hidden
            count = expert.gate.count + expert.up.count + expert.down.count
            # A map of rank r has hidden * (2 r + 1) numbers.
            most = min(hidden, (-(-count // hidden) - 2) // 2)
            if rank > hidden:
                raise InputError(
                    f"expert_replace: rank is {rank}; the hidden size is {hidden}: choose a rank "
                    f"of at most {most}"
                )
            if rank > most:
                raise InputError(
                    f"expert_replace: maps of rank {rank} are no smaller than the experts of block "
                    f"{block.index} ({count:,} numbers): choose a rank of at most {most}"
                )
        if not any(counts.values()):
            raise InputError(f"expert_replace: keep {self.keep} keeps every expert; nothing to do")

    def _get_budget(self, model: Model) -> int:
        """Return the budget in bytes."""
        from moe2edge.passes._replace_bases import count_expert_bytes

        return selection.resolve_number(self.budget or 0, count_expert_bytes(model))

    def plan(self, model: Model) -> Model:
        """Each layer with replacements for its last experts."""
        from moe2edge.passes._replace_maps import plan_replacements

        if self.shares:
            return self._sharing.plan(model)
        if self.allots:
            return self._plan_budget(model)
        counts = self._count_replaced(model)
        for block, layer in model.moe_blocks:
            count = len(layer.experts)
            gone = range(count - counts[block.index], count)
            if gone:
                ranks = dict.fromkeys(gone, self._rank(layer))
                model = model.replace_block(plan_replacements(block, layer, ranks))
        return model

    def _plan_budget(self, model: Model) -> Model:
        """Plan maps for half of the experts of a layer or more, with ranks that fill its budget."""
        from moe2edge.passes._replace_maps import RANK_STEP, estimate_size, plan_replacements

        before = model
        for block, layer in model.moe_blocks:
            size, budget, count = (
                estimate_size(layer),
                self._share_of(before, layer),
                len(layer.experts),
            )
            stay = max(1, min(count - 1, (budget - count * size.constant) // size.expert))
            gone = range(stay, count)
            left = budget - stay * size.expert - len(gone) * size.constant
            rank = max(0, min(size.most, left // size.rank // len(gone)))
            rank -= rank % RANK_STEP  # as they will be
            model = model.replace_block(plan_replacements(block, layer, dict.fromkeys(gone, rank)))
        return model

    def estimate(self, planned: PlannedStep, texts: TextSizes) -> Estimate:
        """Estimate sums over tokens for experts of a layer that may go, and hidden states."""
        from moe2edge.numerics import reduced_rank
        from moe2edge.passes import _replace_bases

        model = planned.before
        hidden = max(layer.hidden for _, layer in model.moe_blocks)
        every = self.shares or self.allots or self.criterion in (None, "residual")
        counts = model.expert_counts if every else tuple(self._count_replaced(model).values())
        remedy = "replace fewer experts in one pass, or use a larger machine"
        if not self.shares:
            if every:
                remedy = "set keep, and a criterion other than residual, or use a larger machine"
            sums = reduced_rank.estimate_regression_bytes(
                hidden, max(counts), maps=self.kind == "linear"
            )
        elif self.kind == "base" and self.factors == "zero":
            sums = 0
        else:
            remedy = "use a larger machine" if self.kind == "svd" else "set factors: zero"
            sums = max(
                _replace_bases.estimate_product_bytes(layer) for _, layer in model.moe_blocks
            )
        return replace(
            super().estimate(planned, texts),
            memory=sums + 4 * texts.calibration.tokens * hidden + model.block_nbytes,
            purpose=f"expert_replace keeps statistics of up to {max(counts)} experts of a layer",
            remedy=remedy,
        )

    # ---- doing it ----------------------------------------------------------------------------

    def search(self, context: PassContext) -> Outcome:
        """Score, then replace block after block."""
        step = self.resolve(context.model)
        return step._share(context) if self.shares else step._replace(context)

    def _replace(self, context: PassContext) -> Outcome:
        from moe2edge.calibration import walk
        from moe2edge.passes._replace_bases import check_budget
        from moe2edge.passes._replace_maps import Fitter

        scores: dict[int, list[float]] | None = None
        if self.criterion is not None and self.criterion != "residual":
            kinds = criteria.list_observers(self.criterion)
            facts = context.gather(kinds, "scores", context.keep_walk("scores"))
            scores = {
                block.index: criteria.score_experts(self.criterion, block, facts, self.seed)
                for block, _ in context.model.moe_blocks
            }
        kept = context.keep_walk("fitting")
        fitter = Fitter(
            context.store,
            kept,
            None if self.allots else self._count_replaced(context.model),
            self._rank,
            self.ridge,
            self._count_least(context.model),
            scores,
            (lambda layer: self._share_of(context.model, layer)) if self.allots else None,
        )
        model, _ = walk.walk(
            context.model,
            context.tokens,
            transform=fitter,
            propagate=self.fitted_on == "changed",
            advance=context.reporter.advance,
            label="expert_replace",
            memory=context.memory,
            kept=kept,
            needs_hidden=False,
        )
        if self.allots:
            check_budget(context.model, model, self._get_budget(context.model), fitter.notes)
        return Outcome(model, changed=tuple(fitter.changed), notes=tuple(fitter.notes))

    def _share(self, context: PassContext) -> Outcome:
        """Score all layers, choose, then build block after block."""
        from moe2edge.calibration import router_observers
        from moe2edge.numerics import base_sharing
        from moe2edge.passes._replace_bases import Builder, compute_similarity

        criterion: Criterion = self.criterion or "soft-frequency"  # type: ignore[assignment]
        kinds = (router_observers.RouterOutputObserver, *criteria.list_observers(criterion))
        facts = context.gather(kinds, "scores", context.keep_walk("scores"))
        seen, blocks = facts[router_observers.RouterOutputObserver], context.model.moe_blocks
        scores = [criteria.score_experts(criterion, b, facts, self.seed) for b, _ in blocks]
        if min(map(min, scores)) < 0:
            raise InputError(
                f"expert_replace: criterion {criterion} has scores below 0, which are no weights; "
                "choose another one"
            )
        norms = [seen.norm[block.origin] for block, _ in blocks]
        sharing = self._sharing
        similar = [
            compute_similarity(self.similarity, block, layer, seen.gram[block.origin], self.seed)
            for block, layer in blocks
            if sharing.group is not None
        ]
        groupings = sharing.choose_groups(
            context.model,
            scores,
            base_sharing.compute_depth_factors(norms, self.depth_correction),
            similar,
        )
        indices = [block.index for block, _ in blocks]
        builder = Builder(
            context.store,
            context.keep_walk("building"),
            sharing,
            context,
            dict(zip(indices, groupings, strict=True)),
            dict(zip(indices, scores, strict=True)),
            fitted=self.kind == "svd" or self.factors == "svd",
            seed=self.seed,
        )
        return replace(builder.run(), facts=(UntiedModel(context.model),))


def _count_old_bytes(layer: MoELayer) -> int:
    """Count the bytes of the replacements that a layer has already."""
    return sum(w.nbytes for row in layer.replaced for _, w in layer.rows[row].weights())
