"""Time that is left of an export, from its planned stages and from what finished ones really took.

Each stage is planned as seconds of some kinds of work: matrix products, solving, moving bytes. What
a finished stage took is divided among its kinds as planned; a kind of work that took twice as long
as planned will take twice as long in the stages that are still to come.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from moe2edge.commands.export_stages import ExportStage, Extent, list_export_stages
from moe2edge.commands.preflight import estimate_passes, measure_texts
from moe2edge.evaluation.machine_rates import DEFAULT_RATES, MachineRates, find_rates
from moe2edge.model.model import Model
from moe2edge.pipeline.recipe import Recipe
from moe2edge.pipeline.stages import Plan
from moe2edge.pipeline.target import Target
from moe2edge.progress import Log, Reporter, TimeLeft, format_time
from moe2edge.runtime.memory import Memory
from moe2edge.storage.work_folder import count_kept_blocks, has_results

# Stages whose results are kept before there is a work folder to count blocks in.
EARLY = ("source check", "writing the text")
# Seconds that count as planned and taken of each kind of work, so that small stages, whose time is
# that of small things beside the work, teach little.
GRACE = 5.0
# Stages below this share of the whole are told together.
LEAST_TOLD = 0.05


@dataclass
class _Count:
    """Count of progress: its label, when and where it began, and where it is."""

    label: str
    since: float
    first: int
    done: int
    total: int

    def find_share(self) -> float:
        """Return the part of what was to be counted that is done."""
        return (self.done - self.first) / max(1, self.total - self.first)


class ExportClock:
    """Follows an export through its stages, and says how long it still takes."""

    def __init__(
        self,
        stages: Sequence[ExportStage],
        rates: MachineRates,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Begin before the first stage.

        Args:
            stages: those of the export, in order.
            rates: those of the machine.
            now: returns the time in seconds.
        """
        self._stages, self._rates, self._now = stages, rates, now
        self._planned = [stage.list_seconds(rates) for stage in stages]
        # The part of each stage that an earlier run has done.
        self._kept = [0.0] * len(stages)
        self._at, self._begun = -1, now()
        self._count: _Count | None = None
        # Seconds of finished stages by the kind of work: as planned, and as they were.
        self._expected: dict[str, float] = defaultdict(float)
        self._took: dict[str, float] = defaultdict(float)

    def resume(self, work: Path) -> None:
        """Take out what an earlier run has left in its work folder, which need not be there."""
        found, early = count_kept_blocks(work), float(has_results(work))
        last = max((step for step, _ in found), default=-1)
        for n, stage in enumerate(self._stages):
            if stage.name in EARLY:
                self._kept[n] = early
            elif stage.step is not None:
                own = found.get((stage.step, stage.walk), 0) / max(1, stage.blocks)
                self._kept[n] = 1.0 if stage.step < last else min(1.0, own)

    def describe(self) -> str:
        """Describe the time of all stages in a line."""
        each = [self._plan_rest(n) for n in range(len(self._stages))]
        whole, resumed = sum(each), any(self._kept)
        told = zip(self._stages, each, strict=True)
        large = [(stage.name, own) for stage, own in told if own > LEAST_TOLD * whole]
        parts = [f"{name} {format_time(seconds)}" for name, seconds in large]
        if (rest := whole - sum(seconds for _, seconds in large)) >= 1:
            parts.append(f"the rest {format_time(rest)}")
        source = "measured by plan --measure"
        if self._rates.source != "measured":
            source = "assumed, slower than most machines (moe2edge plan --measure measures them)"
        return (
            f"about {format_time(whole)} {'left' if resumed else 'in all'}: {', '.join(parts)}; "
            f"rates {source}"
        )

    def begin(self, name: str) -> None:
        """Begin the next stage of a name; one that was not planned is part of the present one."""
        names = [stage.name for stage in self._stages[self._at + 1 :]]
        if name not in names:
            return
        self._learn()
        self._at += 1 + names.index(name)
        self._begun, self._count = self._now(), None

    def advance(self, label: str, done: int, total: int) -> None:
        """Take in a count of progress."""
        if self._count is None or self._count.label != label or done < self._count.done:
            self._count = _Count(label, self._now(), done, done, total)
            if self._counts_all():
                # The rest is what is counted, whatever an earlier run has done.
                self._kept[self._at] = max(self._kept[self._at], done / max(1, total))
        self._count.done, self._count.total = done, total

    def measure(self) -> TimeLeft:
        """Return the time that is left."""
        behind = sum(self._plan_rest(n) for n in range(self._at + 1, len(self._stages)))
        if self._at < 0:
            return TimeLeft("", 0.0, behind)
        own = max(0.0, self._plan_rest(self._at) - (self._now() - self._begun))
        count = self._count
        if count is not None and (share := count.find_share()) > 0:
            counted = (self._now() - count.since) * (1 - share) / share
            own = counted if self._counts_all() else max(own, counted)
        return TimeLeft(self._stages[self._at].name, own, own + behind)

    def watch(self, reporter: Reporter) -> Reporter:
        """Return a reporter that is told the time that is left as well, where stages are known."""

        def tell() -> None:
            if self._stages:
                reporter.left(self.measure())

        def begin(name: str) -> None:
            self.begin(name)
            tell()
            reporter.begin(name)

        def advance(label: str, done: int, total: int, detail: str = "", /) -> None:
            self.advance(label, done, total)
            tell()
            reporter.advance(label, done, total, detail)

        return replace(reporter, begin=begin, advance=advance)

    def _counts_all(self) -> bool:
        """Return whether the count of progress is one of the whole stage."""
        if self._at < 0 or self._count is None:
            return False
        stage = self._stages[self._at]
        return self._count.label == (stage.label or stage.name)

    def _plan_rest(self, n: int) -> float:
        """Return the seconds of what is left of a stage when it begins, by what was learned."""
        present = self._weigh_present() if n > self._at else {}
        seconds = 0.0
        for kind, planned in self._planned[n].items():
            more = present.get(kind, (0.0, 0.0))
            expected, took = self._expected[kind] + more[0], self._took[kind] + more[1]
            seconds += planned * (took + GRACE) / (expected + GRACE)
        return seconds * (1 - self._kept[n])

    def _weigh_present(self) -> Mapping[str, tuple[float, float]]:
        """Return seconds of the present stage by the kind of work: as planned, and as they are."""
        count = self._count
        if count is None or not self._counts_all() or not (share := count.find_share()) > 0:
            return {}
        return self._divide(share * (1 - self._kept[self._at]), self._now() - count.since)

    def _learn(self) -> None:
        """Learn from the present stage, which ends."""
        if self._at < 0:
            return
        # Only what was counted is known to be new, where an earlier run has begun the stage.
        resumed = self._kept[self._at] > 0
        found = self._weigh_present() if resumed else self._divide(1.0, self._now() - self._begun)
        for kind, (planned, took) in found.items():
            self._expected[kind] += planned
            self._took[kind] += took

    def _divide(self, share: float, took: float) -> Mapping[str, tuple[float, float]]:
        """Divide seconds that a share of the present stage took among its kinds of work."""
        planned = self._planned[self._at]
        whole = sum(planned.values())
        if not whole:
            return {}
        return {kind: (own * share, took * own / whole) for kind, own in planned.items()}


def start_clock(
    plan: Plan,
    recipe: Recipe,
    targets: Sequence[Target],
    held: Model,
    budget: Memory,
    log: Log,
    *,
    source_check: bool,
    verify: Extent,
    leftover: Path | None,
) -> ExportClock:
    """Start the clock of an export, and say how long it will take.

    Args:
        plan: the passes.
        recipe: the recipe, with every choice made.
        targets: the targets.
        held: the result of the passes in the form that all of them hold.
        budget: memory that may be used.
        log: receives the line.
        source_check: whether the source is compared with stock transformers first.
        verify: how much of each output is compared.
        leftover: work folder that an earlier run may have left; None: none is looked at.

    Returns:
        The clock; one that knows no stage if the time cannot be estimated.
    """
    try:
        costs = estimate_passes(plan, measure_texts(recipe))
        outputs = [(target, held, target.estimate(held)) for target in targets]
        stages = list_export_stages(
            plan, costs, recipe, outputs, budget, source_check=source_check, verify=verify
        )
        clock = ExportClock(stages, find_rates())
        if leftover is not None:
            clock.resume(leftover)
        line = clock.describe()
    # Whatever it is: an export does not fail for want of an estimate.
    except Exception:
        return ExportClock((), DEFAULT_RATES)
    log(line)
    clock.begin(stages[0].name)
    return clock
