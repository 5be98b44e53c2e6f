"""GateResult of two output folders, which run in turns on this machine."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from moe2edge.evaluation.gate.comparison import (
    GateResult,
    MetricResult,
    compare_fixed,
    compare_value,
    list_values,
)
from moe2edge.evaluation.gate.rules import TIMINGS, Gate, MetricRule
from moe2edge.evaluation.profile.measure import profile_folders
from moe2edge.evaluation.profile.result import ProfileSet, list_by_round
from moe2edge.evaluation.profile.settings import ProfileSettings
from moe2edge.numerics.paired_changes import PairedRuns, choose_step, estimate_change
from moe2edge.progress import QUIET, Reporter

if TYPE_CHECKING:
    from moe2edge.calibration.sources import TextSource


def compare_folders(
    base: Path,
    head: Path,
    gate: Gate,
    *,
    text: str | TextSource = "",
    settings: ProfileSettings,
    reporter: Reporter = QUIET,
) -> GateResult:
    """Run two folders in turns, in fresh processes, and compare them.

    Base runs twice in each turn of the first round, which gives the noise floor of this machine.
    Where nothing can be said of a timing that fails the gate, the round gets as many turns again;
    where one has changed, a second round of as many turns has to confirm it.

    Args:
        base: the folder to compare with.
        head: the folder to judge.
        gate: the rules.
        text: natural text that prompts are cut from.
        settings: amount of work of one run; ``repeats`` is the number of turns.
        reporter: receives progress.

    Raises:
        InputError, Unsupported, Moe2EdgeError: as `profile_folders`.
    """

    def measure(folders: Sequence[Path], turns: int) -> ProfileSet:
        work = replace(settings, repeats=turns)
        return profile_folders(folders, text=text, settings=work, reporter=reporter)

    first = measure([base, base, head], settings.repeats)
    trials = _start_trials(first, gate)
    turns, rounds = settings.repeats, 1
    if _choose(trials, gate, extended=False) == "extend":
        reporter.log(f"{turns} pairs say too little; as many again")
        more = [list_by_round(p) for p in measure([base, base, head], turns).profiles]
        trials = {n: t.extend(*(side[n] for side in more)) for n, t in trials.items()}
        turns *= 2
    if _choose(trials, gate, extended=True) == "confirm":
        changed = [n for n, t in trials.items() if t.judge_first() in ("regressed", "improved")]
        reporter.log(f"{' and '.join(changed)} changed; a second round has to confirm it")
        more = [list_by_round(p) for p in measure([base, head], turns).profiles]
        trials = {n: t.confirm(*(side[n] for side in more)) for n, t in trials.items()}
        rounds = 2
    mine, other = (profile.to_json() for profile in first.profiles[1:])
    rows = list(compare_fixed(mine, other, gate))
    for name in (name for name in TIMINGS if name in gate.metrics):
        rule = gate.metrics[name]
        if name in trials:
            rows.append(_judge_timing(name, trials[name], rule))
        else:  # no second token, no time between two
            values = list_values(mine)[name], list_values(other)[name]
            rows.append(compare_value(name, *values, rule))
    return GateResult(str(base), str(head), tuple(rows), rounds=rounds, pairs=turns * rounds)


def _start_trials(found: ProfileSet, gate: Gate) -> dict[str, PairedRuns]:
    """Return the first round of each timing that the gate names and that all runs have."""
    again, base, head = (list_by_round(profile) for profile in found.profiles)
    return {
        name: PairedRuns(gate.metrics[name].tolerance, again[name], (base[name], head[name]))
        for name in TIMINGS
        if name in gate.metrics and all(name in side for side in (again, base, head))
    }


def _choose(trials: Mapping[str, PairedRuns], gate: Gate, *, extended: bool) -> str:
    """Choose the next step; what is advice alone is not worth more turns, but a second round."""
    first = {name: trial.judge_first() for name, trial in trials.items()}
    counted = [
        judgement
        for name, judgement in first.items()
        if gate.metrics[name].gate == "fail" or judgement != "inconclusive"
    ]
    return choose_step(counted, extended=extended)


def _judge_timing(name: str, trial: PairedRuns, rule: MetricRule) -> MetricResult:
    """Judge a timing by all of its rounds."""
    base, head = trial.pooled
    found, floor = estimate_change(base, head), trial.floor
    return MetricResult(
        name,
        statistics.median(base),
        statistics.median(head),
        math.expm1(found.median),
        rule.tolerance,
        trial.judge(),
        rule.gate == "fail",
        spread=(math.expm1(found.low), math.expm1(found.high)),
        smallest_effect=found.find_smallest_effect(max(rule.tolerance, floor)),
        note=f"base differs from itself by {floor:.0%}" if floor > rule.tolerance else "",
    )
