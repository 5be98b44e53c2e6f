"""Choose how many experts each MoE layer keeps, when all layers share one budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, field_validator

from moe2edge.calibration.criteria import Criterion
from moe2edge.errors import InputError
from moe2edge.model.model import Model
from moe2edge.numerics import selection
from moe2edge.pipeline import checks
from moe2edge.pipeline.checks import refuse_replaced
from moe2edge.pipeline.contract import Outcome, PassContext, Search

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.numerics.allocation import Counts
    from moe2edge.numerics.metrics import SampleSums
    from moe2edge.passes._allocation_trials import Ranker, Trial

# Parts of the way from uniform to what the sensitivities say; these are the candidates.
WAY = {"uniform": 0.0, "a quarter of the way": 0.25, "half way": 0.5,
       "three quarters of the way": 0.75, "least sum of sensitivities": 1.0}  # fmt: skip


class ExpertBudget(Search):
    """Keep as many experts in all as `keep` per layer would, more in layers that need more.

    Layers are trimmed one at a time to find out how sensitive each is to every count; dynamic
    programming gives the allocation with the least sum of sensitivities. Those of several layers
    do not simply add up, so that allocation is only a suggestion: it, the uniform one and some on
    the way between them are tried on the whole model, and the one with the least KL to the
    source's predictions is taken, uniform where they are equal.

    A part of the calibration samples is held out of all of this. What the choice gains over
    uniform there is reported with a bootstrap interval.

    Which experts stay in a layer of n: the n best by `criterion`.
    """

    keep: Annotated[
        int | float,
        Field(
            description="experts kept per layer, on average: a count, or a fraction of each layer, "
            "rounded up"
        ),
    ]
    criterion: Annotated[
        Criterion, Field(description="how experts are scored: it decides which stay in a layer")
    ] = "mone"
    sensitivity: Annotated[
        Literal["error", "kl"],
        Field(
            description="error: change of a layer's own output when it is trimmed, for every count "
            "in one walk; kl: change of the model's predictions, which is a little more accurate "
            "and costs a run from that layer on for each count"
        ),
    ] = "error"
    floor: Annotated[
        int | None,
        Field(ge=1, description="experts that each layer keeps at least; none: its top-k"),
    ] = None
    tokens: Annotated[
        int | None,
        Field(
            ge=1,
            description="calibration tokens that sensitivity is measured on, of kl whole samples; "
            "none: all that are not held out",
        ),
    ] = 16384
    points: Annotated[
        int,
        Field(
            ge=2,
            description="with sensitivity kl, counts tried per layer; others are interpolated",
        ),
    ] = 8
    samples: Annotated[
        int | None,
        Field(
            ge=1,
            description="calibration samples that candidates are compared on; none: all that are "
            "not held out",
        ),
    ] = None
    held_out: Annotated[
        float,
        Field(
            gt=0, lt=1, description="fraction of the calibration samples that only the report uses"
        ),
    ] = 0.25
    clamp_top_k: Annotated[
        bool, Field(description="lower top-k where fewer experts stay than it chooses")
    ] = False
    seed: Annotated[
        int, Field(ge=0, le=2**32 - 1, description="of the bootstrap, and for criterion random")
    ] = 0

    @field_validator("keep", mode="before")
    @classmethod
    def _amount(cls, value: object) -> object:
        return checks.check_amount(value)

    # ---- shapes --------------------------------------------------------------------------------

    def uniform(self, model: Model) -> Counts:
        """Experts per MoE layer if each keeps the same part."""
        return tuple(selection.count_kept(self.keep, experts) for experts in model.expert_counts)

    def floors(self, model: Model) -> Counts:
        """Experts that each MoE layer keeps at least."""
        return tuple(
            self.floor or (1 if self.clamp_top_k else layer.router.top_k)
            for _, layer in model.moe_blocks
        )

    def check(self, model: Model) -> None:
        """Refuse budgets that layers cannot hold, or that leave nothing to choose."""
        refuse_replaced("expert_budget", model)
        kept, floors, full = self.uniform(model), self.floors(model), model.expert_counts
        for (block, layer), count, floor in zip(model.moe_blocks, kept, floors, strict=True):
            experts, top_k, where = len(layer.experts), layer.router.top_k, f"block {block.index}"
            if layer.router.skip_below:
                raise InputError(
                    f"expert_budget: {where} skips experts dynamically, by thresholds that belong "
                    "to the set it has; put expert_skip after expert_budget"
                )
            if count > experts:
                raise InputError(f"expert_budget: keep {count} of the {experts} in {where}")
            if min(count, floor) < top_k and not self.clamp_top_k:
                option = f"keep {self.keep}" if count <= floor else f"floor {floor}"
                raise InputError(
                    f"expert_budget: {option} may leave {min(count, floor)} experts in {where} "
                    f"where the router chooses {top_k} per token; keep at least {top_k}, or set "
                    "clamp_top_k: true"
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
            raise InputError(
                f"expert_budget: keep {self.keep} leaves no choice: {kept} is the only allocation "
                f"of {sum(kept)} experts with floors {floors}; use expert_drop, or lower floor"
            )

    def plan(self, model: Model) -> Model:
        """Plan the least even allocation: floors, and the first layers take the rest."""
        total = sum(self.uniform(model))
        counts = selection.allocate_least_even(self.floors(model), model.expert_counts, total)
        for (block, layer), count in zip(model.moe_blocks, counts, strict=True):
            if count < len(layer.experts):
                first = range(count)
                model = model.replace_block(block.keep_experts(first, clamp_top_k=self.clamp_top_k))
        return model

    # ---- search --------------------------------------------------------------------------------

    def search(self, context: PassContext) -> Outcome:
        """Measure sensitivities, try the candidates, and report on what was held out.

        Raises:
            InputError: there are too few calibration samples.
            DoesNotFit: the machine lacks the memory.
        """
        from moe2edge.calibration import walk
        from moe2edge.numerics import bootstrap
        from moe2edge.passes import _allocation_trials

        choosing, held_out = bootstrap.split_samples(len(context.tokens), self.held_out)
        self._state_cost(context, len(choosing), len(held_out))
        advance = context.reporter.advance
        trial, ranker = self._ranked(context, context.tokens[choosing])
        costs = self._sensitivities(context, trial, ranker)
        candidates = self._candidates(context.model, costs)
        tried = list(dict.fromkeys(candidates.values()))
        compared = trial.first(self._compared(len(choosing)))
        judged = dict(zip(tried, compared.judge(tried, _told(context, "candidates")), strict=True))
        chosen = min(tried, key=lambda counts: bootstrap.compute_mean_kl(judged[counts]))
        notes = self._notes(candidates, judged, chosen)
        uniform = candidates["uniform"]
        if chosen != uniform:
            rest = context.tokens[held_out]
            hidden = walk.observe(context.source, rest, (), advance, "expert_budget: held-out text")
            last = _allocation_trials.Trial(trial.trimmer, context.source, hidden, rest)
            mine, even = last.judge([chosen, uniform], _told(context, "held-out text"))
            notes.append(self._gain(mine, even))
        return _outcome(context.model, trial.trimmer.trim(chosen), notes)

    def _compared(self, choosing: int) -> int:
        """Count the samples that candidates are compared on."""
        return min(choosing, self.samples or choosing)

    def _measured(self, choosing: int, length: int) -> int:
        """Count the samples that sensitivity kl is measured on."""
        wanted = choosing if self.tokens is None else self.tokens // length
        return min(choosing, max(1, wanted))

    def _tried(self, model: Model) -> list[Counts]:
        """List the allocations of sensitivity kl: none trimmed, then one layer at a time."""
        from moe2edge.numerics import allocation

        full = model.expert_counts
        counts = [
            allocation.spread_counts(floor, experts, self.points)
            for floor, experts in zip(self.floors(model), full, strict=True)
        ]
        return [full, *allocation.list_single_layer_allocations(full, counts)]

    def _state_cost(self, context: PassContext, choosing: int, held_out: int) -> None:
        """Report the cost of the search before it starts."""
        from moe2edge.numerics import subset_loss
        from moe2edge.passes import _allocation_trials
        from moe2edge.runtime.memory import check_memory as check_memory

        model, (samples, length) = context.model, context.tokens.shape
        blocks, kept, full = len(model.blocks), self.uniform(model), model.expert_counts
        hidden = model.rest["model.embed_tokens.weight"].shape[1]
        compared, measured = self._compared(choosing), self._measured(choosing, length)
        numbers = length * hidden
        if self.sensitivity == "kl":
            tried = self._tried(model)
            together = _allocation_trials.count_at_once(measured * numbers)
            runs = _allocation_trials.count_block_runs(model, tried, together)
            what = (
                f"{len(tried)} allocations that trim one layer or none, {runs:,} block runs over "
                f"{measured} samples"
            )
            work = runs * measured
            needed = 8 * measured * numbers * min(together, len(tried))
        else:
            tokens = len(subset_loss.spread(choosing * length, self.tokens))
            what = (
                f"{tokens * sum(full):,} expert evaluations (each expert once on {tokens:,} tokens)"
            )
            work, needed = (
                0,
                max(subset_loss.estimate_subset_evidence_bytes(tokens, n) for n in full),
            )
        together = min(len(WAY), _allocation_trials.count_at_once(compared * numbers))
        needed = max(needed, 8 * compared * numbers * together) + 4 * samples * numbers
        # One walk over the choosing part ranks the experts, or shows what the source predicts.
        work += blocks * (choosing * (1 + (context.source is not model)) + 3 * held_out)
        work += len(WAY) * blocks * compared
        context.reporter.log(
            f"expert_budget: {sum(kept)} of {sum(full)} experts in {len(full)} MoE layers; a walk "
            f"over {choosing} samples; sensitivity by {self.sensitivity}: {what}; then at most "
            f"{len(WAY)} candidates on {compared} samples and 3 walks over {held_out} held-out "
            f"ones; in all as many block runs as {work / (blocks * samples):.1f} walks over the "
            f"calibration text, {needed / 1e6:,.0f} MB at most"
        )
        check_memory(
            needed,
            "expert_budget",
            "set tokens or calibration.samples to fewer",
            within=context.memory.limit,
        )

    def _ranked(self, context: PassContext, tokens: Tensor) -> tuple[Trial, Ranker]:
        """Rank all experts, with sensitivity error measured on the way."""
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
            hidden = walk.observe(model, tokens, [ranker], advance, "expert_budget: scoring")
        if hidden is None or context.source is not model:
            hidden = walk.observe(context.source, tokens, (), advance, "expert_budget: source")
        rankings = tuple(ranker.ranking(block) for block, _ in model.moe_blocks)
        trimmer = _allocation_trials.Trimmer(model, rankings, self.clamp_top_k)
        return _allocation_trials.Trial(trimmer, context.source, hidden, tokens), ranker

    def _sensitivities(
        self, context: PassContext, trial: Trial, ranker: Ranker
    ) -> list[list[float]]:
        """Per MoE layer, the cost of keeping its floor, one more, ... all of its experts."""
        from moe2edge.numerics import allocation, bootstrap

        model = context.model
        if self.sensitivity == "error":
            return [ranker.errors[block.index] for block, _ in model.moe_blocks]
        tried = self._tried(model)
        measured = trial.first(self._measured(*trial.tokens.shape))
        found = measured.judge(tried, _told(context, "sensitivity"))
        kl = {
            counts: bootstrap.compute_mean_kl(sums)
            for counts, sums in zip(tried, found, strict=True)
        }
        full = model.expert_counts
        rows = []
        for n, (floor, experts) in enumerate(zip(self.floors(model), full, strict=True)):
            own = {counts[n]: kl[counts] for counts in tried if counts[n] < experts}
            rows.append(allocation.interpolate_costs(own | {experts: kl[full]}, floor, experts))
        return rows

    def _candidates(self, model: Model, costs: Sequence[Sequence[float]]) -> Mapping[str, Counts]:
        """List the allocations to try, by name; uniform comes first."""
        from moe2edge.numerics import allocation

        even = self.uniform(model)
        best = allocation.allocate(costs, self.floors(model), sum(even))
        return {name: allocation.interpolate_counts(even, best, part) for name, part in WAY.items()}

    # ---- report --------------------------------------------------------------------------------

    def _notes(
        self,
        candidates: Mapping[str, Counts],
        judged: Mapping[Counts, list[SampleSums]],
        chosen: Counts,
    ) -> list[str]:
        """Describe the candidates and their results."""
        from moe2edge.numerics import bootstrap

        notes = []
        for counts, sums in judged.items():
            names = ", ".join(name for name, own in candidates.items() if own == counts)
            taken = " (taken)" if counts == chosen else ""
            notes.append(
                f"{names}{taken}: experts per MoE layer {' '.join(map(str, counts))}; KL to the "
                f"source {bootstrap.compute_mean_kl(sums):.4f}, loss "
                f"{bootstrap.compute_mean_loss(sums):.4f} nats per token on {len(sums)} "
                "calibration samples"
            )
        return notes

    def _gain(self, mine: Sequence[SampleSums], even: Sequence[SampleSums]) -> str:
        """Describe the difference to uniform on held-out samples, with intervals."""
        from moe2edge.numerics import bootstrap

        loss, kl = bootstrap.compare_paired(mine, even, self.seed)
        return (
            f"held out: taken minus uniform, nats per token, over {loss.samples} calibration "
            f"samples that nothing was chosen by: loss {loss}, KL {kl}"
        )


def _told(context: PassContext, what: str) -> Callable[[int, int], None]:
    """Report progress under a label, in block runs."""
    return lambda done, total: context.reporter.advance(f"expert_budget: {what}", done, total)


def _outcome(before: Model, after: Model, notes: Sequence[str]) -> Outcome:
    """Report by layers; experts by their position in the source."""
    changed = [
        f"block {old.index}: experts {gone}"
        for old, new in zip(before.blocks, after.blocks, strict=True)
        if (gone := sorted(set(old.expert_origins) - set(new.expert_origins)))
    ]
    return Outcome(after, changed=tuple(changed), notes=tuple(notes))
