"""GateResult of profiles and of folders: judgements, exit codes, and what is refused."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor

from benchmarks.gate.real_runs import compare_once, slow_folder
from helpers import run
from moe2edge.errors import Inconclusive, InputError, Regressed
from moe2edge.evaluation.gate import folders
from moe2edge.evaluation.gate.comparison import GateResult, compare_documents, list_values
from moe2edge.evaluation.gate.rules import METRICS, read_gate
from moe2edge.evaluation.profile import child, measure
from moe2edge.evaluation.profile.memory import Meter
from moe2edge.evaluation.profile.settings import PRESETS, ProfileSettings
from moe2edge.progress import QUIET, Reporter
from moe2edge.storage.manifest import write_manifest
from moe2edge.testing import make_checkpoint, make_tokenizer

PROFILE = Path(__file__).parents[1] / ".ci" / "profile.json"

GATE = read_gate()
NAMES = ("base", "head")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = make_checkpoint(tmp_path_factory.mktemp("compare") / "out", "olmoe")
    make_tokenizer(made)
    return made


@pytest.fixture
def measured() -> dict[str, Any]:
    """Return the profile with which our own CI compares, as if it were of this machine."""
    document: dict[str, Any] = json.loads(PROFILE.read_text())
    document["env"]["host_fingerprint"] = "0" * 16
    return document


def change(document: dict[str, Any], place: str, value: Any) -> dict[str, Any]:
    """Return a copy with another value at a place such as ``sizes.weights``."""
    copied = copy.deepcopy(document)
    *parents, last = place.split(".")
    part: Any = copied
    for name in parents:
        part = part[int(name)] if isinstance(part, list) else part[name]
    part[last] = value
    return copied


def test_every_rule_has_a_value(measured: dict[str, Any]) -> None:
    assert set(METRICS) <= list_values(measured).keys()
    assert GATE.metrics.keys() <= set(METRICS)


def test_a_profile_is_equivalent_to_itself(measured: dict[str, Any]) -> None:
    found = compare_documents(measured, measured, GATE, NAMES)
    found.check()
    assert {row.judgement for row in found.rows} == {"equivalent"}


@pytest.mark.parametrize(
    ("place", "factor", "judgement"),
    [
        ("sizes.weights", 1.0001, "regressed"),
        ("sizes.weights", 0.9, "improved"),
        ("quality.kl", 1.1, "regressed"),
        ("quality.kl", 1.01, "equivalent"),
        ("quality.top1", 0.98, "regressed"),
        ("quality.top1", 1.02, "improved"),
        ("memory.phases.3.peak_rss", 1.2, "regressed"),
        ("memory.phases.3.peak_rss", 1.01, "equivalent"),
        ("memory.phases.3.above_floor.peak_rss", 2, "regressed"),
    ],
)
def test_what_is_worse_than_its_tolerance_fails(
    place: str, factor: float, judgement: str, measured: dict[str, Any]
) -> None:
    part: Any = measured
    for name in place.split("."):
        part = part[int(name)] if isinstance(part, list) else part[name]
    found = compare_documents(measured, change(measured, place, part * factor), GATE, NAMES)
    assert found.judgement == judgement
    row = next(r for r in found.rows if r.judgement != "equivalent" or r.change)
    assert row.smallest_effect == row.tolerance
    assert (abs(row.change or 0) > row.tolerance) == (judgement != "equivalent")
    if judgement == "regressed":
        with pytest.raises(Regressed, match=r"head is worse than base: \w+ [+-]"):
            found.check()


def test_what_one_side_lacks_is_inconclusive(measured: dict[str, Any]) -> None:
    found = compare_documents(measured, change(measured, "quality.kl", None), GATE, NAMES)
    with pytest.raises(Inconclusive, match=r"kl \(head lacks it\); measure both sides alike"):
        found.check()
    other = change(measured, "quality.sha256", "1" * 64)
    with pytest.raises(Inconclusive, match="different texts"):
        compare_documents(measured, other, GATE, NAMES).check()


def test_timings_of_files_are_advice_of_one_machine(measured: dict[str, Any]) -> None:
    slow = change(measured, "metrics.ms_per_token.median", 1e6)
    found = compare_documents(measured, slow, GATE, NAMES)
    found.check()
    assert found.list_names("regressed", fails=False) == ["ms_per_token"]
    others = (
        ("env.host_fingerprint", "another", "measured on different machines"),
        ("env.host_fingerprint", None, "measured on different machines"),
        ("env.threads.runtime", 7, "measured with 2 and 7 threads"),
    )
    for place, value, said in others:
        other = change(slow, place, value)
        rows = {row.name: row for row in compare_documents(measured, other, GATE, NAMES).rows}
        assert (rows["ms_per_token"].judgement, rows["ms_per_token"].note) == (None, said)


def test_on_another_machine_memory_is_judged_above_the_libraries(measured: dict[str, Any]) -> None:
    other = change(measured, "env.host_fingerprint", "another")
    other["memory"]["phases"][3]["peak_rss"] *= 2
    found = compare_documents(measured, other, GATE, NAMES)
    found.check()
    assert found.list_names("regressed", fails=False) == ["peak_rss_decode"]
    other["memory"]["phases"][3]["above_floor"]["peak_rss"] += 50_000_000
    assert compare_documents(measured, other, GATE, NAMES).list_names("regressed") == [
        "above_floor_decode"
    ]


def test_the_command_ends_with_codes_and_writes_views(
    measured: dict[str, Any], tmp_path: Path
) -> None:
    base, head = tmp_path / "base.json", tmp_path / "head.json"
    base.write_text(json.dumps(measured))
    head.write_text(json.dumps(change(measured, "sizes.weights", 10**9)))
    views = ("--markdown", tmp_path / "c.md", "--junit", tmp_path / "c.xml", "--json")
    assert run("compare", base, base).exit_code == 0
    result = run("compare", base, head, *views)
    assert result.exit_code == 3
    assert json.loads(result.stdout)["judgement"] == "regressed"
    assert "| weights |" in (tmp_path / "c.md").read_text()
    suite = ElementTree.parse(tmp_path / "c.xml").getroot()
    assert (suite.get("failures"), len(suite)) == ("1", len(GATE.metrics))
    head.write_text(json.dumps(change(measured, "quality.kl", None)))
    assert run("compare", base, head).exit_code == 4


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        ("schema_version", 1, "measure it again: moe2edge profile"),
        ("kind", "other", "is not the profile of one folder"),
        ("workload.gen_tokens", 99, "with the same options of moe2edge profile"),
        ("workload.prompts_sha256", "0", "with the same options of moe2edge profile"),
    ],
)
def test_other_versions_and_other_work_are_refused(
    place: str, value: Any, said: str, measured: dict[str, Any], tmp_path: Path
) -> None:
    base, head = tmp_path / "base.json", tmp_path / "head.json"
    base.write_text(json.dumps(measured))
    head.write_text(json.dumps(change(measured, place, value)))
    result = run("compare", base, head)
    assert result.exit_code == 2
    assert said in result.stderr


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("metrics: {wieghts: {}}", "weights"),
        ("metrics: {weights: {tolerance: -1}}", "metrics.weights.tolerance"),
        ("metrics: {weights: {gate: stop}}", "fail"),
        ("[]", "holds no rules"),
        ("pairs: 2\nmetrics: {}", "pairs"),
    ],
)
def test_a_wrong_gate_is_refused_by_the_place(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "gate.yaml"
    file.write_text(text)
    with pytest.raises(InputError, match=r"gate\.yaml") as caught:
        read_gate(file)
    assert said in str(caught.value)


@pytest.fixture
def in_process(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Measure in this process, by its own time, a runtime that computes for nothing.

    Returns:
        A copy of the folder, whose runs take 15 % longer and hold 50 MB more.
    """
    slowed = tmp_path / "slowed"
    shutil.copytree(folder, slowed)

    class Busy:
        dtype, threads, note = "float32", 1, ""

        def __init__(self, is_slow: bool) -> None:
            self.seconds = 0.003 * (1.15 if is_slow else 1)
            self.buffer = b"\x01" * (50_000_000 if is_slow else 0)

        def start(self, _: Sequence[int]) -> Tensor:
            return self.step(0)

        def step(self, _: int) -> Tensor:
            end = time.thread_time() + self.seconds
            while time.thread_time() < end:
                pass
            return torch.arange(90.0)

    def measure_here(request: dict[str, Any], _: ProfileSettings) -> dict[str, Any]:
        bandwidth = {"bytes_per_s": 1e9, "samples": [1e9], "threads": 1, "array_bytes": 1}
        return child.measure_once(
            request,
            import_libraries=lambda: None,
            open_runtime=lambda: Busy(request["folder"].endswith("slowed")),  # type: ignore
            phases=child.Phases(Meter()),
            clock=time.thread_time,
            look_after=lambda _: {"cache_bytes": 1, "bandwidth": bandwidth},
        )

    monkeypatch.setattr(measure, "run_child", measure_here)
    return slowed


def compare_here(base: Path, head: Path, reporter: Reporter = QUIET, **work: Any) -> GateResult:
    """Compare two folders by a part of the rules, with little work."""
    names = ("weights", "peak_rss_decode", "above_floor_decode", "ms_per_token", "ttft_ms")
    rules = GATE.model_copy(update={"metrics": {name: GATE.metrics[name] for name in names}})
    sizes = {"prompt_tokens": 8, "gen_tokens": 6, "repeats": 5, **work}
    return folders.compare_folders(
        base, head, rules, text="return 1" * 20, settings=replace(PRESETS["quick"], **sizes),
        reporter=reporter,
    )  # fmt: skip


def test_a_slow_down_and_a_buffer_are_caught(folder: Path, in_process: Path) -> None:
    found = compare_here(folder, in_process)
    worse = found.list_names("regressed")
    assert worse == ["peak_rss_decode", "above_floor_decode", "ttft_ms", "ms_per_token"]
    rows = {row.name: row for row in found.rows}
    assert rows["ms_per_token"].change == pytest.approx(0.15, abs=0.05)
    spread, effect = rows["ms_per_token"].spread, rows["ms_per_token"].smallest_effect
    assert spread is not None
    assert spread[0] < 0.15 < spread[1] or spread == pytest.approx((0.15, 0.15), abs=0.05)
    assert effect is not None
    assert 0.03 <= effect < 0.15
    assert (found.rounds, found.pairs) == (2, 10)


def test_identical_folders_are_not_called_worse(folder: Path, in_process: Path) -> None:
    found = compare_here(folder, folder)
    assert found.list_names("regressed") == []
    assert found.list_names("improved") == []
    # One token leaves no time between two.
    rows = {row.name: row for row in compare_here(folder, folder, gen_tokens=1).rows}
    assert (rows["ms_per_token"].judgement, rows["ms_per_token"].note) == (
        None, "neither side has it",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("first", "more", "judgement", "rounds", "pairs", "said"),
    [
        # Times of head in turns of the first round, and in what follows, where base takes 1.
        ([1.0] * 5, [], "equivalent", 1, 5, []),
        ([0.95, 1.06, 1.0, 1.0, 1.0], [1.0] * 5, "equivalent", 1, 10, ["say too little"]),
        ([0.9, 1.1, 1.0, 0.8, 1.2], [1.1] * 15, "inconclusive", 1, 10, ["say too little"]),
        ([1.2] * 5, [1.2] * 5, "regressed", 2, 10, ["second round"]),
        ([1.2] * 5, [1.0] * 5, "inconclusive", 2, 10, ["second round"]),
        ([0.8] * 5, [0.8] * 5, "improved", 2, 10, ["second round"]),
    ],
)
def test_rounds_are_extended_and_confirmed(
    first: list[float], more: list[float], judgement: str, rounds: int, pairs: int,
    said: list[str], folder: Path, in_process: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    times, here = iter([*first, *more]), vars(measure)["run_child"]

    def measure_told(request: dict[str, Any], settings: ProfileSettings) -> dict[str, Any]:
        reply: dict[str, Any] = here({**request, "gen_tokens": 1, "folder": ""}, settings)
        took = next(times) if request["folder"].endswith("slowed") else 1.0
        for run_ in reply["runs"]:
            run_ |= {"ttft_s": took, "gaps_s": [took] * 3}
        return reply

    monkeypatch.setattr(measure, "run_child", measure_told)
    lines: list[str] = []
    found = compare_here(folder, in_process, Reporter(lines.append, lambda *_: None))
    rows = {row.name: row for row in found.rows}
    assert rows["ms_per_token"].judgement == rows["ttft_ms"].judgement == judgement
    assert (found.rounds, found.pairs) == (rounds, pairs)
    assert all(any(part in line for line in lines) for part in said)
    assert bool(lines) == bool(said)


def test_a_missing_runtime_ends_with_6(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "weights.data").write_bytes(b"0")
    write_manifest(tmp_path, "onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    result = run("compare", tmp_path, tmp_path)
    assert result.exit_code == 6
    assert "pip install 'onnxruntime" in result.stderr


def test_two_files_are_compared_without_torch() -> None:
    code = "import sys; from moe2edge.cli.main import main; main(standalone_mode=False)"
    command = [sys.executable, "-c", f"{code}; print('torch' in sys.modules)"]
    done = subprocess.run(
        [*command, "compare", PROFILE, PROFILE], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "False"


@pytest.mark.rest
def test_a_slow_down_and_a_buffer_in_the_process_of_a_folder_are_caught(tmp_path: Path) -> None:
    base, head = tmp_path / "base", tmp_path / "head"
    result = run("export", "builtin:tiny-moe", "-t", "onnx", "-r", "as-is", "-o", base,
                 "--eval", "none")  # fmt: skip
    assert result.exit_code == 0, result.output
    shutil.copytree(base, head)
    found = compare_once(base, head, slow_folder(head), 10)
    rows = {row["name"]: row["judgement"] for row in found["metrics"]}
    assert found["exit_code"] == 3
    assert rows["above_floor_decode"] == rows["peak_rss_decode"] == "regressed"
    # Of a machine that is busy, nothing may be said.
    assert rows["ms_per_token"] in ("regressed", "inconclusive")
