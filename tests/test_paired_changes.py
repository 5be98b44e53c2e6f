"""Judgements of paired timings: intervals, rounds, and how often they are wrong."""

from __future__ import annotations

import math

import pytest

from benchmarks.gate.simulate import count_judgements
from moe2edge.errors import InputError
from moe2edge.numerics.paired_changes import (
    Change,
    Judgement,
    PairedRuns,
    choose_step,
    estimate_change,
    judge_change,
    judge_rounds,
    measure_floor,
)

BASE = [100.0, 101, 99, 100, 102, 98, 100, 101, 99, 100]


def scale(by: float, values: list[float] = BASE) -> list[float]:
    """Return times that are this factor longer, with the noise of other runs."""
    return [by * value for value in values[1:] + values[:1]]


def test_a_change_is_the_median_of_ratios() -> None:
    found = estimate_change([1, 2, 4], [2, 4, 8])
    assert (found.median, found.low, found.high) == pytest.approx([math.log(2)] * 3)
    assert str(found) == "+100.0 % (95 % +100.0 to +100.0)"


def test_one_spike_changes_nothing() -> None:
    spiked = [*scale(1.0)[:-1], 1000.0]
    assert judge_change(estimate_change(BASE, spiked), 0.03) == "equivalent"


@pytest.mark.parametrize(
    ("factor", "better", "expected"),
    [
        (1.1, "lower", "regressed"),
        (1.1, "higher", "improved"),
        (0.9, "lower", "improved"),
        (0.9, "higher", "regressed"),
        (1.0, "lower", "equivalent"),
    ],
)
def test_a_round_is_judged_by_interval_and_tolerance(
    factor: float, better: str, expected: str
) -> None:
    found = estimate_change(BASE, scale(factor))
    assert judge_change(found, 0.03, better) == expected  # type: ignore[arg-type]


def test_an_interval_beyond_the_tolerance_says_nothing() -> None:
    assert judge_change(Change(0.02, 0.01, 0.04, 10), 0.03) == "inconclusive"
    assert judge_change(Change(0.04, -0.01, 0.06, 10), 0.03) == "inconclusive"


def test_what_the_noise_explains_is_no_change_and_not_the_same() -> None:
    slow = estimate_change(BASE, scale(1.1))
    assert judge_change(slow, 0.03, floor=0.05) == "regressed"
    assert judge_change(slow, 0.03, floor=0.2) == "inconclusive"
    assert judge_change(estimate_change(BASE, scale(1.0)), 0.03, floor=0.2) == "equivalent"


def test_a_change_needs_a_second_round() -> None:
    slow, same = (BASE, scale(1.1)), (BASE, scale(1.0))
    assert judge_rounds([slow], 0.03) == "inconclusive"
    assert judge_rounds([slow, slow], 0.03) == "regressed"
    assert judge_rounds([slow, same], 0.03) in ("inconclusive", "equivalent")
    assert judge_rounds([slow, (BASE, scale(0.9))], 0.03) in ("inconclusive", "equivalent")
    assert judge_rounds([same], 0.03) == "equivalent"


@pytest.mark.parametrize(
    ("judgements", "extended", "step"),
    [
        (["equivalent"], False, "stop"),
        (["inconclusive", "regressed"], False, "extend"),
        (["inconclusive", "regressed"], True, "confirm"),
        (["improved", "equivalent"], False, "confirm"),
        (["inconclusive"], True, "stop"),
        ([], False, "stop"),
    ],
)
def test_what_is_not_known_is_extended_and_what_changed_is_confirmed(
    judgements: list[Judgement], extended: bool, step: str
) -> None:
    assert choose_step(judgements, extended=extended) == step


def test_a_trial_is_judged_by_all_of_its_runs() -> None:
    wild = [value * (0.7 if n % 2 else 1.3) for n, value in enumerate(BASE)]
    trial = PairedRuns(0.03, BASE, (BASE, wild))
    assert trial.judge_first() == trial.judge() == "inconclusive"
    more = trial.extend(BASE * 3, BASE * 3, scale(1.1) * 3)
    assert more.judge_first() == "regressed"
    # It is none before a second round finds it.
    assert more.judge() == "inconclusive"
    assert more.confirm(BASE, scale(1.1)).judge() == "regressed"
    assert more.confirm(BASE, scale(1.0)).judge() == "inconclusive"
    assert len(more.confirm(BASE, BASE).pooled[0]) == 50


def test_the_smallest_effect_grows_with_the_spread() -> None:
    narrow, wide = Change(0, -0.01, 0.01, 10), Change(0, -0.1, 0.1, 10)
    assert 0.03 < narrow.find_smallest_effect(0.03) < 0.04 < wide.find_smallest_effect(0.03)


def test_the_floor_is_what_a_side_differs_from_itself() -> None:
    assert measure_floor(BASE, BASE) == 0
    assert 0 < measure_floor(BASE, scale(1.0)) < 0.03


@pytest.mark.parametrize(("base", "head"), [([], []), ([1], [1, 2]), ([1], [0]), ([1], [math.nan])])
def test_what_cannot_be_paired_is_refused(base: list[float], head: list[float]) -> None:
    with pytest.raises(InputError, match="pairs"):
        estimate_change(base, head)


@pytest.mark.slow
def test_false_alarms_are_rare_and_slow_downs_are_found() -> None:
    for machine in ("quiet", "hosted", "noisy"):
        assert count_judgements(machine, 100, 10, 0).get("regressed", 0) == 0
    assert count_judgements("hosted", 100, 10, 0.05)["regressed"] >= 75
    assert count_judgements("hosted", 100, 20, 0.05)["regressed"] >= 95
