"""Time that is left of an export: the stages that it runs are those of the plan, and they teach."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import moe2edge
from helpers import QUIET, ignore, write_text
from moe2edge.commands import time_left
from moe2edge.commands.export_stages import ExportStage, Extent
from moe2edge.commands.forecast import forecast_export
from moe2edge.commands.texts import resolve_recipe
from moe2edge.commands.time_left import GRACE, ExportClock, start_clock
from moe2edge.evaluation.machine_rates import DEFAULT_RATES, MachineRates
from moe2edge.pipeline.registry import parse_targets
from moe2edge.pipeline.stages import Plan
from moe2edge.progress import Reporter, TimeLeft
from moe2edge.runtime.memory import Memory, find_limit
from moe2edge.storage.checkpoint import open_checkpoint
from moe2edge.testing import Make

# So that amounts of work are seconds.
RATES = MachineRates(1.0, 1.0, 1.0, 1.0, 1.0)
STAGES = (
    ExportStage("trimming", 0, products=100.0, label="trimming: scoring", walk="scoring", step=0),
    ExportStage("solving", 0, products=50.0, solving=150.0, step=1, blocks=4),
    ExportStage("writing", 0, written=40.0),
)


class Time:
    """A clock that a test turns."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def hands() -> Time:
    return Time()


@pytest.fixture
def clock(hands: Time) -> ExportClock:
    return ExportClock(STAGES, RATES, hands)


def test_time_passes_as_planned(clock: ExportClock, hands: Time) -> None:
    clock.begin("trimming")
    assert clock.measure() == TimeLeft("trimming", 100.0, 340.0)
    hands.now = 60.0
    assert clock.measure() == TimeLeft("trimming", 40.0, 280.0)
    hands.now = 100.0
    clock.begin("nothing that was planned")
    clock.begin("solving")
    assert clock.measure() == TimeLeft("solving", 200.0, 240.0)


def test_a_stage_that_took_twice_scales_the_same_kind_of_work(
    clock: ExportClock, hands: Time
) -> None:
    clock.begin("trimming")
    hands.now = 200.0
    clock.begin("solving")
    slower = (200 + GRACE) / (100 + GRACE)
    left = clock.measure()
    assert left.seconds == pytest.approx(50 * slower + 150)
    assert left.whole == pytest.approx(left.seconds + 40)


def test_a_count_of_the_whole_stage_is_believed(clock: ExportClock, hands: Time) -> None:
    clock.begin("trimming")
    clock.advance("trimming: scoring", 0, 8)
    hands.now = 10.0
    clock.advance("trimming: scoring", 2, 8)
    left = clock.measure()
    # It is four times as fast as planned, and so will be other products.
    assert left.seconds == pytest.approx(30)
    faster = (10 + GRACE) / (25 + GRACE)
    assert left.whole == pytest.approx(30 + 50 * faster + 150 + 40)
    # A count of a part only says that there is at least so much left.
    clock.advance("something else", 0, 2)
    hands.now = 20.0
    clock.advance("something else", 1, 2)
    assert clock.measure().seconds == pytest.approx(80)
    hands.now = 220.0
    assert clock.measure().seconds == pytest.approx(210)


def test_a_stage_over_its_time_has_none_left(clock: ExportClock, hands: Time) -> None:
    clock.begin("writing")  # the others are left out
    hands.now = 60.0
    assert clock.measure() == TimeLeft("writing", 0.0, 0.0)
    empty = ExportClock((), RATES, hands)
    empty.begin("writing")
    empty.advance("writing", 1, 2)
    assert empty.measure() == TimeLeft("", 0.0, 0.0)


def test_what_an_earlier_run_has_done_does_not_count(
    clock: ExportClock, hands: Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert clock.describe().startswith("about 6 min in all: trimming 2 min, solving 3 min, writing")
    kept = {(0, "scoring"): 4, (1, ""): 3}
    monkeypatch.setattr(time_left, "count_kept_blocks", lambda _: kept)
    clock.resume(Path("no-such-folder"))
    assert clock.describe() == (
        "about 2 min left: solving 50 s, writing 40 s; rates measured by plan --measure"
    )
    clock.begin("trimming")
    hands.now = 1.0
    clock.begin("solving")  # nothing was learned from a stage that an earlier run had finished
    assert clock.measure() == TimeLeft("solving", 50.0, 90.0)
    # What the folder does not show, the first count does.
    clock.resume(Path("no-such-folder"))
    clock.advance("solving", 180, 200)
    assert clock.measure().seconds == pytest.approx(20.0)
    hands.now = 41.0
    clock.begin("writing")
    assert clock.measure().whole == pytest.approx(40)


def test_no_estimate_is_no_error(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(time_left, "list_export_stages", fail)
    checkpoint = open_checkpoint(tiny("olmoe"))
    said: list[str] = []
    found = start_clock(
        Plan(checkpoint.model, ()), moe2edge.parse_recipe("as-is"), (), checkpoint.model, Memory(),
        said.append, source_check=True, verify="full", leftover=None,
    )  # fmt: skip
    reporter = found.watch(Reporter(ignore, ignore, left=fail))
    reporter.begin("reading the source")
    reporter.advance("reading", 1, 2)
    assert not said


# ---- what an export runs -------------------------------------------------------------------------


def list_planned(folder: Path, recipe: Any, targets: str, verify: Extent) -> list[str]:
    """List the stages that `plan` says."""
    checkpoint, parsed = open_checkpoint(folder), moe2edge.parse_recipe(recipe)
    found = forecast_export(
        checkpoint, resolve_recipe(checkpoint, parsed, QUIET), parse_targets(targets),
        DEFAULT_RATES, Memory.from_limit(find_limit()), context=64, verify=verify,
    )  # fmt: skip
    assert found.export is not None
    return [stage.name for stage in found.export.stages]


TEXTS = {"samples": 4, "length": 32}
SELF = {"text": "self", "samples": 2, "length": 16}
RECIPES: dict[str, tuple[list[Any], dict[str, Any], str, Extent]] = {
    "several passes and targets": (
        [{"expert_drop": {"keep": 4}}, {"block_drop": {"drop": 1}}, "rtn"],
        {}, "gptq,hf:dequantize=true", "full",
    ),
    "text of the model, keys in 8 bits": (["gptq"], SELF, "onnx:kv_cache=int8", "full"),
    "nothing is changed": ([], {}, "hf", "quick"),
    "a search": ([{"expert_merge": {"method": "ream", "keep": 4}}], {}, "hf", "quick"),
}  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_stages_are_those_of_the_plan(tiny: Make, tmp_path: Path, name: str) -> None:
    passes, calibration, targets, verify = RECIPES[name]
    text = {"text": str(write_text(tmp_path / "text.txt")), **TEXTS}
    recipe = {"passes": passes, "calibration": text | calibration, "evaluation": text}
    begun: list[str] = []
    lefts: list[TimeLeft] = []
    moe2edge.export(
        tiny("olmoe"), recipe, targets, tmp_path / "out", verify=verify,
        reporter=Reporter(ignore, ignore, begun.append, lefts.append),
    )  # fmt: skip
    planned = list_planned(tiny("olmoe"), recipe, targets, verify)
    # It has begun when the first line is written.
    assert ["starting", *begun] == planned
    assert [left.stage for n, left in enumerate(lefts) if left.stage != lefts[n - 1].stage][
        :-1
    ] == planned[1:-1]


class Stop(Exception):
    """Ends an export."""


def test_a_resumed_export_says_what_is_left(tiny: Make, tmp_path: Path) -> None:
    text = {"text": str(write_text(tmp_path / "text.txt")), **TEXTS}
    recipe = {"passes": ["gptq"], "calibration": text, "evaluation": text}
    lines: list[str] = []

    def stop(stage: str) -> None:
        if stage == "recording the reference":
            raise Stop

    for begin, error in ((stop, Stop), (ignore, None)):
        lefts: list[TimeLeft] = []
        reporter = Reporter(lines.append, ignore, begin, lefts.append)
        try:
            moe2edge.export(tiny("olmoe"), recipe, "gptq", tmp_path / "out", reporter=reporter)
        except Stop:
            assert error is Stop
    told = [line for line in lines if line.startswith("about ")]
    assert [line.split(":")[0].split()[-1] for line in told] == ["all", "left"]
    stages = [left.stage for left in lefts]
    assert "source check" not in stages  # an earlier run has made it
    assert next(left for left in lefts if left.stage == "gptq").seconds == 0
