"""GateResult of two output folders, which run in turns on this machine."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moe2edge.evaluation.gate.comparison import GateResult, MetricResult, compare_documents
from moe2edge.evaluation.gate.rules import TIMINGS, Gate, MetricRule
from moe2edge.evaluation.profile.measure import profile_folders
from moe2edge.evaluation.profile.result import ProfileSet, list_by_round
from moe2edge.evaluation.profile.settings import ProfileSettings
from moe2edge.numerics.paired_changes import (
    estimate_change,
    judge_change,
    judge_rounds,
    measure_floor,
)
from moe2edge.progress import QUIET, Reporter

if TYPE_CHECKING:
    from moe2edge.calibration.sources import TextSource

Pairs = tuple[list[float], list[float]]


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
    Where a timing has changed, a second round has to confirm it.

    Args:
        base: the folder to compare with.
        head: the folder to judge.
        gate: the rules; its ``pairs`` are those of a round.
        text: natural text that prompts are cut from.
        settings: amount of work of one run.
        reporter: receives progress.

    Raises:
        InputError, Unsupported, Moe2EdgeError: as `profile_folders`.
    """
    first = profile_folders([base, base, head], text=text, settings=settings, reporter=reporter)
    fixed = compare_documents(
        first.profiles[1].to_json(), first.profiles[2].to_json(), gate, (str(base), str(head))
    )
    again, mine, other = (list_by_round(profile) for profile in first.profiles)
    names = [name for name in TIMINGS if name in gate.metrics]
    floors = {name: measure_floor(again[name], mine[name]) for name in names}
    rounds: dict[str, list[Pairs]] = {name: [(mine[name], other[name])] for name in names}
    changed = [
        name
        for name in names
        if judge_change(
            estimate_change(*rounds[name][0]), gate.metrics[name].tolerance, floor=floors[name]
        )
        in ("regressed", "improved")
    ]
    if changed:
        reporter.log(f"{' and '.join(changed)} changed; a second round has to confirm it")
        second = profile_folders([base, head], text=text, settings=settings, reporter=reporter)
        _add_round(rounds, second)
    rows = [row for row in fixed.rows if row.name not in names]
    rows += [_judge_timing(name, rounds[name], floors[name], gate.metrics[name]) for name in names]
    return GateResult(fixed.base, fixed.head, tuple(rows), rounds=1 + bool(changed))


def _add_round(rounds: dict[str, list[Pairs]], found: ProfileSet) -> None:
    mine, other = (list_by_round(profile) for profile in found.profiles)
    for name, pairs in rounds.items():
        pairs.append((mine[name], other[name]))


def _judge_timing(
    name: str, rounds: Sequence[Pairs], floor: float, rule: MetricRule
) -> MetricResult:
    """Judge a timing by all of its rounds."""
    base, head = ([value for one in rounds for value in one[side]] for side in (0, 1))
    found, noisy = estimate_change(base, head), floor > rule.tolerance
    return MetricResult(
        name,
        statistics.median(base),
        statistics.median(head),
        math.expm1(found.median),
        rule.tolerance,
        judge_rounds(rounds, rule.tolerance, floor=floor),
        rule.gate == "fail",
        spread=(math.expm1(found.low), math.expm1(found.high)),
        smallest_effect=found.find_smallest_effect(max(rule.tolerance, floor)),
        note=f"base differs from itself by {floor:.0%}" if noisy else "",
    )
