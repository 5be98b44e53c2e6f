"""Choose the number of experts that each MoE layer keeps, out of one budget for all layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, field_validator

from moe2edge.calibration.criteria import Criterion
from moe2edge.errors import InputError
from moe2edge.model.layers import FEWEST_IN_GROUP
from moe2edge.model.model import Model
from moe2edge.model.traits import Trait
from moe2edge.numerics import selection
from moe2edge.pipeline import checks
from moe2edge.pipeline.checks import refuse_replaced
from moe2edge.pipeline.contract import Outcome, PassContext, PlannedStep, Search, TextSizes
from moe2edge.runtime.memory import Estimate

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.numerics.allocation import Counts
    from moe2edge.numerics.metrics import SampleSums
    from moe2edge.passes._allocation_trials import Ranker, Trial
    from moe2edge.storage.kept_walk import KeptWalk

# The candidates: fractions of the way from uniform to the allocation by sensitivities.
WAY = {"uniform": 0.0, "a quarter of the way": 0.25, "half way": 0.5,
       "three quarters of the way": 0.75, "least sum of sensitivities": 1.0}  # fmt: skip


class ExpertBudget(Search):
    """Spread one budget of experts over all MoE layers: more experts in more sensitive layers.

    In all, as many experts stay as with `keep` in every layer. Layers are pruned one at a time to
    measure how sensitive each is to every number of experts; dynamic programming finds the
    allocation with the least sum of sensitivities. Sensitivities of several layers do not simply
    add up, so this allocation, the uniform one and some between them are tried on the whole model.
    The one with the least KL divergence from the source's predictions is chosen; among equals, the
    uniform one. A layer of n experts keeps the n best by `criterion`. Where routers choose among
    groups of experts, all counts are multiples of the number of groups, and each group keeps its
    best.

    A part of the calibration samples is held out of the choice. The gain over the uniform
    allocation on it is reported with a bootstrap interval.
    """

    needs: ClassVar[tuple[Trait, ...]] = (Trait.ROUTER,)

    keep: Annotated[
        int | float,
        Field(
            description="experts to keep per layer, on average: a count, or a fraction of each "
            "layer, rounded up"
        ),
    ]
    criterion: Annotated[
        Criterion, Field(description="score that ranks the experts of a layer; the best stay")
    ] = "mone"
    sensitivity: Annotated[
        Literal["error", "kl"],
        Field(
            description="how the sensitivity of a layer is measured; error: by the effect of "
            "pruning it on its own output, for every count in one walk; kl: by the effect on the "
            "model's predictions, slightly more accurate, but each count costs a run through all "
            "later layers"
        ),
    ] = "error"
    floor: Annotated[
        int | None,
        Field(
            ge=1,
            description="fewest experts that each layer keeps; default: its top-k, or 1 with "
            "clamp_top_k",
        ),
    ] = None
    tokens: Annotated[
        int | None,
        Field(
            ge=1,
            description="calibration tokens to measure sensitivity on, with kl in whole samples; "
            "null: all that are not held out",
        ),
    ] = 16384
    points: Annotated[
        int,
        Field(
            ge=2,
            description="with sensitivity kl: counts to try per layer; others are interpolated",
        ),
    ] = 8
    samples: Annotated[
        int | None,
        Field(
            ge=1,
            description="calibration samples to compare candidates on; default: all that are not "
            "held out",
        ),
    ] = None
    held_out: Annotated[
        float,
        Field(
            gt=0, lt=1, description="fraction of the calibration samples that only the report uses"
        ),
    ] = 0.25
    clamp_top_k: Annotated[
        bool,
        Field(
            description="lower top-k where fewer experts than top-k stay; otherwise that is an "
            "error"
        ),
    ] = False
    seed: Annotated[
        int,
        Field(ge=0, le=2**32 - 1, description="seed of the bootstrap and of the criterion random"),
    ] = 0

    @field_validator("keep", mode="before")
    @classmethod
    def _amount(cls, value: object) -> object:
        return checks.check_amount(value)

    def estimate(self, planned: PlannedStep, texts: TextSizes) -> Estimate:
        """Estimate hidden states of candidates, and what sensitivities are measured on.

        Raises:
            InputError: there are too few samples to hold some of them out.
        """
        from moe2edge.numerics import bootstrap

        model, size = planned.before, texts.calibration
        choosing = len(bootstrap.split_samples(size.samples, self.held_out)[0])
        hidden = 4 * size.tokens * model.family.geometry(model.config).hidden
        needed = self._estimate_search_bytes(model, choosing, size.length) + hidden
        own = super().estimate(planned, texts)
        return replace(
            own,
            memory=needed + model.block_nbytes,
            # Hidden states are kept behind a block, and in front of it until then.
            disk=own.disk + self._estimate_streams(model, choosing, size.length),
            purpose="expert_budget compares allocations of experts",
            remedy="set tokens or calibration.samples to fewer",
        )

    def _estimate_search_bytes(self, model: Model, choosing: int, length: int) -> int:
        """Estimate the bytes of what is measured at once, beside hidden states of the text."""
        from moe2edge.numerics import subset_loss

        streams = self._estimate_streams(model, choosing, length)
        if self.sensitivity == "kl":
            return streams
        tokens = subset_loss.count_spread(choosing * length, self.tokens)
        evidence = [
            subset_loss.estimate_subset_evidence_bytes(tokens, n) for n in model.expert_counts
        ]
        return max(streams, *evidence)

    def _estimate_streams(self, model: Model, choosing: int, length: int) -> int:
        """Estimate the bytes of hidden states in and out of a block, of allocations at once."""
        from moe2edge.passes import _allocation_trials

        numbers = length * model.family.geometry(model.config).hidden
        trials = [(self._count_compared(choosing), len(WAY))]
        if self.sensitivity == "kl":
            tried = len(self._list_tried(model))
            trials.append((self._count_measured(choosing, length), tried))
        return max(
            8 * samples * numbers * min(count, _allocation_trials.count_at_once(samples * numbers))
            for samples, count in trials
        )

    # ---- shapes --------------------------------------------------------------------------------

    def uniform(self, model: Model) -> Counts:
        """Return the number of experts per MoE layer if each keeps the same fraction."""
        return tuple(selection.count_kept(self.keep, experts) for experts in model.expert_counts)

    def floors(self, model: Model) -> Counts:
        """Return the fewest experts that each MoE layer keeps."""
        unit, floors = _get_unit(model), []
        for _, layer in model.moe_blocks:
            # Only families of the table can make a plain MLP of a single expert.
            fewest = 2 if model.family.generic else 1
            least = fewest if self.clamp_top_k else layer.router.top_k
            even = _round_up(max(least, FEWEST_IN_GROUP * unit), unit) if unit > 1 else least
            floors.append(self.floor or even)
        return tuple(floors)

    def _in_units(self, model: Model, counts: Counts) -> Counts:
        """Return counts in the units in which experts can go."""
        unit = _get_unit(model)
        return tuple(count // unit for count in counts)

    def check(self, model: Model) -> None:
        """Refuse budgets that layers cannot keep, or that leave nothing to choose."""
        refuse_replaced("expert_budget", model)
        kept, floors, full = self.uniform(model), self.floors(model), model.expert_counts
        places = [f"block {block.index}" for block, _ in model.moe_blocks]
        checks.refuse_too_many("expert_budget", self.keep, kept, full, places)
        checks.refuse_uneven_groups("expert_budget", "keep", self.keep, kept, model)
        if self.floor:
            checks.refuse_uneven_groups("expert_budget", "floor", self.floor, floors, model)
        for (block, layer), count, floor in zip(model.moe_blocks, kept, floors, strict=True):
            experts, top_k, where = len(layer.experts), layer.router.top_k, f"block {block.index}"
            if layer.router.skip_below:
                raise InputError(
                    f"expert_budget: {where} has thresholds of expert_skip, which would no longer "
                    "fit its experts; put expert_skip after expert_budget"
                )
            if min(count, floor) < top_k and not self.clamp_top_k:
                small = f"keep {self.keep}" if count <= floor else f"floor {floor}"
                # To keep no more than the floors would leave no choice.
                option, least = ("keep", top_k + 1) if count <= floor else ("set floor to", top_k)
                least = _round_up(least, _get_unit(model))
                advice = checks.advise_top_k(least, experts, "set clamp_top_k: true", option)
                raise InputError(
                    f"expert_budget: {small} may leave {min(count, floor)} experts in {where} "
                    f"where the router chooses {top_k} per token; {advice}"
                )
            if floor > count:
                raise InputError(
                    f"expert_budget: floor {floor}, but keep {self.keep} leaves {count} of the "
                    f"{experts} experts in {where} when layers share evenly; lower floor"
                )
        if kept == full:
            raise InputError(f"expert_budget: keep {self.keep} keeps every expert; nothing to do")
        free = sum(floor < experts for floor, experts in zip(floors, full, strict=True))
        if kept == floors or free < 2:
            tops = [layer.router.top_k for _, layer in model.moe_blocks]
            lowest = 1 if self.clamp_top_k else max(tops)
            lower = ", or lower floor" if len(tops) > 1 and (self.floor or 0) > lowest else ""
            raise InputError(
                f"expert_budget: keep {self.keep} leaves no choice: {kept} is the only allocation "
                f"of {sum(kept)} experts with floors {floors}; use expert_drop{lower}"
            )

    def plan(self, model: Model) -> Model:
        """Return the most uneven result: floors, and all other experts in the first layers."""
        unit, total = _get_unit(model), sum(self._in_units(model, self.uniform(model)))
        floors, full = (
            self._in_units(model, counts) for counts in (self.floors(model), model.expert_counts)
        )
        counts = selection.allocate_least_even(floors, full, total)
        for (block, layer), units in zip(model.moe_blocks, counts, strict=True):
            if (count := units * unit) < len(layer.experts):
                first = selection.choose_best(
                    [0.0] * len(layer.experts), count, layer.router.groups
                )
                model = model.replace_block(block.keep_experts(first, clamp_top_k=self.clamp_top_k))
        return model

    # ---- search --------------------------------------------------------------------------------

    def search(self, context: PassContext) -> Outcome:
        """Measure sensitivities, try the candidates, and report the gain on held-out samples.

        Raises:
            InputError: there are too few calibration samples.
        """
        from moe2edge.calibration import walk
        from moe2edge.numerics import bootstrap
        from moe2edge.passes import _allocation_trials

        choosing, held_out = bootstrap.split_samples(len(context.tokens), self.held_out)
        self._report_cost(context, len(choosing), len(held_out))
        advance = context.reporter.advance
        trial, ranker = self._rank(context, context.tokens[choosing])
        costs = self._measure_sensitivities(context, trial, ranker)
        candidates = self._list_candidates(context.model, costs)
        tried = list(dict.fromkeys(candidates.values()))
        compared = trial.first(self._count_compared(len(choosing)))
        results = compared.judge(tried, *_follow(context, "candidates"))
        judged = dict(zip(tried, results, strict=True))
        chosen = min(tried, key=lambda counts: bootstrap.compute_mean_kl(judged[counts]))
        notes = self._describe_candidates(candidates, judged, chosen)
        uniform = candidates["uniform"]
        if chosen != uniform:
            rest = context.tokens[held_out]
            kept = context.keep_walk("held-out")
            label = "expert_budget: held-out text"
            hidden = walk.observe(context.source, rest, (), advance, label, kept=kept)
            last = _allocation_trials.Trial(trial.trimmer, context.source, hidden, rest)
            mine, even = last.judge([chosen, uniform], *_follow(context, "held-out text"))
            notes.append(self._describe_gain(mine, even))
        return _make_outcome(context.model, trial.trimmer.trim(chosen), notes)

    def _count_compared(self, choosing: int) -> int:
        """Count the samples on which candidates are compared."""
        return min(choosing, self.samples or choosing)

    def _count_measured(self, choosing: int, length: int) -> int:
        """Count the samples on which sensitivity kl is measured."""
        samples = choosing if self.tokens is None else self.tokens // length
        return min(choosing, max(1, samples))

    def _list_tried(self, model: Model) -> list[Counts]:
        """List the allocations that sensitivity kl tries: all experts, then one pruned layer."""
        from moe2edge.numerics import allocation

        full, unit = model.expert_counts, _get_unit(model)
        counts = [
            tuple(unit * n for n in allocation.spread_counts(floor, experts, self.points))
            for floor, experts in zip(
                self._in_units(model, self.floors(model)), self._in_units(model, full), strict=True
            )
        ]
        return [full, *allocation.list_single_layer_allocations(full, counts)]

    def _report_cost(self, context: PassContext, choosing: int, held_out: int) -> None:
        """Report the cost of the search before it starts."""
        from moe2edge.numerics import subset_loss
        from moe2edge.passes import _allocation_trials

        model, (samples, length) = context.model, context.tokens.shape
        blocks, kept, full = len(model.blocks), self.uniform(model), model.expert_counts
        hidden = model.family.geometry(model.config).hidden
        compared, measured = self._count_compared(choosing), self._count_measured(choosing, length)
        numbers = length * hidden
        if self.sensitivity == "kl":
            tried = self._list_tried(model)
            together = _allocation_trials.count_at_once(measured * numbers)
            runs = _allocation_trials.count_block_runs(model, tried, together)
            what = (
                f"{len(tried)} allocations that prune one layer or none, {runs:,} block runs over "
                f"{measured} samples"
            )
            work = runs * measured
        else:
            tokens = subset_loss.count_spread(choosing * length, self.tokens)
            what = (
                f"{tokens * sum(full):,} expert evaluations (each expert once on {tokens:,} tokens)"
            )
            work = 0
        needed = self._estimate_search_bytes(model, choosing, length) + 4 * samples * numbers
        # One walk over the choosing part ranks the experts; the model's last hidden states serve as
        # those of the source if it is the same model.
        work += blocks * (choosing * (1 + (context.source is not model)) + 3 * held_out)
        work += len(WAY) * blocks * compared
        context.reporter.log(
            f"expert_budget: {sum(kept)} of {sum(full)} experts in {len(full)} MoE layers; a walk "
            f"over {choosing} samples; sensitivity by {self.sensitivity}: {what}; then at most "
            f"{len(WAY)} candidates on {compared} samples and 3 walks over {held_out} held-out "
            f"ones; in all as many block runs as {work / (blocks * samples):.1f} walks over the "
            f"calibration text, {needed / 1e6:,.0f} MB at most"
        )

    def _rank(self, context: PassContext, tokens: Tensor) -> tuple[Trial, Ranker]:
        """Rank all experts, and measure sensitivity error in the same walk."""
        from moe2edge.calibration import walk
        from moe2edge.passes import _allocation_trials

        model, advance = context.model, context.reporter.advance
        floors: dict[int, int] = {}
        if self.sensitivity == "error":
            least = zip(model.moe_blocks, self.floors(model), strict=True)
            floors = {block.index: floor for (block, _), floor in least}
        ranker = _allocation_trials.Ranker(
            self.criterion, self.seed, floors, tokens.numel(), self.tokens
        )
        hidden = None
        if ranker.needs_walk:
            kept = context.keep_walk("scoring")
            label = "expert_budget: scoring"
            hidden = walk.observe(model, tokens, [ranker], advance, label, kept=kept)
        if hidden is None or context.source is not model:
            kept = context.keep_walk("source")
            label = "expert_budget: source"
            hidden = walk.observe(context.source, tokens, (), advance, label, kept=kept)
        rankings = tuple(ranker.ranking(block) for block, _ in model.moe_blocks)
        trimmer = _allocation_trials.Trimmer(model, rankings, self.clamp_top_k)
        return _allocation_trials.Trial(trimmer, context.source, hidden, tokens), ranker

    def _measure_sensitivities(
        self, context: PassContext, trial: Trial, ranker: Ranker
    ) -> list[list[float]]:
        """Measure, per MoE layer, the cost of keeping its floor, a unit more, ... all experts."""
        from moe2edge.numerics import allocation, bootstrap

        model = context.model
        if self.sensitivity == "error":
            return [ranker.errors[block.index] for block, _ in model.moe_blocks]
        tried = self._list_tried(model)
        measured = trial.first(self._count_measured(*trial.tokens.shape))
        results = measured.judge(tried, *_follow(context, "sensitivity"))
        kl = {
            counts: bootstrap.compute_mean_kl(sums)
            for counts, sums in zip(tried, results, strict=True)
        }
        full, unit = model.expert_counts, _get_unit(model)
        rows = []
        for n, (floor, experts) in enumerate(zip(self.floors(model), full, strict=True)):
            known = {counts[n] // unit: kl[counts] for counts in tried if counts[n] < experts}
            known |= {experts // unit: kl[full]}
            rows.append(allocation.interpolate_costs(known, floor // unit, experts // unit))
        return rows

    def _list_candidates(
        self, model: Model, costs: Sequence[Sequence[float]]
    ) -> Mapping[str, Counts]:
        """List the allocations to try, by name; uniform comes first."""
        from moe2edge.numerics import allocation

        even, unit = self._in_units(model, self.uniform(model)), _get_unit(model)
        best = allocation.allocate(costs, self._in_units(model, self.floors(model)), sum(even))
        found = {name: allocation.interpolate_counts(even, best, w) for name, w in WAY.items()}
        return {name: tuple(unit * n for n in units) for name, units in found.items()}

    # ---- report --------------------------------------------------------------------------------

    def _describe_candidates(
        self,
        candidates: Mapping[str, Counts],
        judged: Mapping[Counts, list[SampleSums]],
        chosen: Counts,
    ) -> list[str]:
        """Describe each allocation that was tried, and its results."""
        from moe2edge.numerics import bootstrap

        notes = []
        for counts, sums in judged.items():
            names = ", ".join(name for name, these in candidates.items() if these == counts)
            mark = " (chosen)" if counts == chosen else ""
            kl, loss = bootstrap.compute_mean_kl(sums), bootstrap.compute_mean_loss(sums)
            notes.append(
                f"{names}{mark}: experts per MoE layer {' '.join(map(str, counts))}; KL to the "
                f"source {kl:.4f}, loss {loss:.4f} nats per token on {len(sums)} calibration "
                "samples"
            )
        return notes

    def _describe_gain(self, mine: Sequence[SampleSums], even: Sequence[SampleSums]) -> str:
        """Describe the difference to uniform on held-out samples, with bootstrap intervals."""
        from moe2edge.numerics import bootstrap

        loss, kl = bootstrap.compare_paired(mine, even, self.seed)
        return (
            f"held out: chosen allocation minus uniform, in nats per token, on {loss.samples} "
            f"calibration samples that were not used to choose: loss {loss}, KL {kl}"
        )


def _get_unit(model: Model) -> int:
    """Return the number of experts that go at once: one of each group of a router."""
    return math.lcm(*(layer.router.groups for _, layer in model.moe_blocks))


def _round_up(count: int, unit: int) -> int:
    return -(-count // unit) * unit


def _follow(
    context: PassContext, what: str
) -> tuple[Callable[[int, int], None], Callable[[str], KeptWalk | None]]:
    """Return what reports the block runs of a comparison, and what keeps its walks."""

    def advance(done: int, total: int) -> None:
        context.reporter.advance(f"expert_budget: {what}", done, total)

    stem = what.replace(" ", "-")
    return advance, lambda name: context.keep_walk(f"{stem}-{name}")


def _make_outcome(before: Model, after: Model, notes: Sequence[str]) -> Outcome:
    """Make the outcome, with the dropped experts of each layer by their index in the source."""
    changed = [
        f"block {old.index}: experts {dropped}"
        for old, new in zip(before.blocks, after.blocks, strict=True)
        if (dropped := sorted(set(old.expert_origins) - set(new.expert_origins)))
    ]
    return Outcome(after, changed=tuple(changed), notes=tuple(notes))
