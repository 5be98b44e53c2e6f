"""Exports that are killed and gone on with: the same bytes, and no block is solved twice."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers import run, slow_except, write_text
from killing import run_child
from moe2edge.storage.journal import JOURNAL
from moe2edge.storage.records import read_records, write_records
from moe2edge.testing import Make

RECIPE: dict[str, Any] = {
    "passes": [
        {"expert_drop": {"keep": 5}},
        {"sparsify": {"method": "wanda", "pattern": "2:4"}},
        {"gptq": {"group_size": 32, "min_tokens": 5}},
    ]
}
# It tells of the run itself, such as how long it took; the manifest has its digest.
OF_THE_RUN = {"report.json", "manifest.json"}
# Ten of them, and all with --all-cells.
SEEDS = [pytest.param(seed, marks=[pytest.mark.rest] * (seed >= 10)) for seed in range(30)]
# Where an export is killed, and how often it comes by there: 8 blocks are solved, with two renames
# each but for the last of a pass.
PLACES = {"write": 240, "rename": 14, "journal": 8, "between": 8, "shard": 300, "end": 1}


def command(model: Path, folder: Path, *more: str) -> list[str]:
    """To be run in ``folder``, so that recipes name the same files wherever that is."""
    return [
        "export", str(model), "-t", "gptq", "-o", str(folder / "out"), "--threads", "1",
        "-r", "recipe.yaml", "--calib", "text.txt", "--eval", "none",
        "--set", "calibration.samples=6", "--set", "calibration.length=32", *more,
    ]  # fmt: skip


def inputs(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    write_text(folder / "text.txt")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    return folder


def export(model: Path, folder: Path, *more: str) -> Any:
    with contextlib.chdir(folder):
        return run(*command(model, folder, *more))


def child(model: Path, folder: Path, kind: str = "", count: int = 0, solved: str = "") -> int:
    """Run tests/killed_export.py; its exit code, or minus the signal that it died of."""
    given = {"KIND": kind, "COUNT": count, "SOLVED": solved, "FOLDER": str(folder)}
    given["ARGUMENTS"] = command(model, folder)
    return run_child(given)


@pytest.fixture(scope="module")
def model(tiny: Make) -> Path:
    return tiny("qwen3_moe", num_hidden_layers=4)


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an export that nothing interrupted."""
    folder = inputs(tmp_path_factory.mktemp("whole"))
    assert child(model, folder) == 0
    return folder / "out"


def assert_same(found: Path, expected: Path) -> None:
    names = {path.name for path in expected.iterdir()}
    assert {path.name for path in found.iterdir()} == names
    for name in names - OF_THE_RUN:
        assert (found / name).read_bytes() == (expected / name).read_bytes(), name
    manifests = [json.loads((folder / "manifest.json").read_text()) for folder in (found, expected)]
    for manifest in manifests:
        del manifest["files"]["report.json"]
    assert manifests[0] == manifests[1]
    reports = [json.loads((folder / "report.json").read_text()) for folder in (found, expected)]
    for report in reports:
        for step in report["steps"]:
            del step["seconds"]
    for key in ("recipe", "steps", "results", "calibration"):
        assert reports[0][key] == reports[1][key], key


def finished(folder: Path) -> list[tuple[int, int]]:
    """Step and block of each whole line of the journal of an unfinished export."""
    path = folder / "out.partial" / "work" / JOURNAL
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    whole = [json.loads(line) for line in lines if line.endswith(b"\n")]
    return [(line["step"], line["block"]) for line in whole]


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_a_killed_export_resumes_with_the_same_bytes(
    model: Path, whole: Path, tmp_path: Path, seed: int
) -> None:
    rng = random.Random(seed)
    kind = list(PLACES)[seed % len(PLACES)]
    count = rng.randrange(PLACES[kind])
    folder = inputs(tmp_path / "w")
    assert child(model, folder, kind, count) == -signal.SIGKILL
    assert not (folder / "out").exists()
    before = finished(folder)
    if kind in ("journal", "between"):
        assert len(before) == count
    journal = folder / "journal.jsonl"
    assert child(model, folder, solved=str(journal)) == 0
    assert_same(folder / "out", whole)
    assert not (folder / "out.partial").exists()
    # What the first run had finished is not solved again, and all the rest is.
    solved = [tuple(json.loads(line)) for line in journal.read_text().splitlines()]
    everything = [(step, block) for step in (1, 2) for block in range(4)]
    assert sorted(before + solved) == everything


@pytest.fixture
def half(model: Path, tmp_path: Path) -> Path:
    """Folder of an export that was killed after three blocks."""
    folder = inputs(tmp_path / "half")
    assert child(model, folder, "between", 3) == -signal.SIGKILL
    assert len(finished(folder)) == 3
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    slow_except(
        [
            ("recipe", "begun with another recipe: then pattern: '2:4', now pattern: '4:8'"),
            ("text", "begun with another calibration: then "),
            ("model", "begun with another model: then "),
        ],
        ("text", "begun with another calibration: then "),
    ),
)
@pytest.mark.slow
def test_resuming_with_other_inputs_is_refused(
    tiny: Make, model: Path, half: Path, change: str, message: str
) -> None:
    other = model
    if change == "recipe":
        (half / "recipe.yaml").write_text(yaml.safe_dump(RECIPE).replace("2:4", "4:8"))
    elif change == "text":
        (half / "text.txt").write_text((half / "text.txt").read_text()[7:])
    else:
        other = tiny("qwen3_moe", num_hidden_layers=4, rms_norm_eps=1e-5)
    result = export(other, half)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "--resume never" in result.stderr
    assert len(finished(half)) == 3  # nothing was lost
    again = export(other, half, "--resume", "never")
    assert again.exit_code == 0, again.output
    assert "resuming" not in again.stderr


@pytest.mark.slow
def test_another_target_or_evaluation_does_not_matter(model: Path, half: Path) -> None:
    arguments = [a if a != "gptq" else "onnx" for a in command(model, half)]
    with contextlib.chdir(half):
        # The head of both; by default the graph has it in 8 bits, which is other work.
        result = run(*arguments, "--set", "gptq.head=16", "--resume", "require")
    assert result.exit_code == 0, result.output
    assert "resuming after 3 finished blocks of an earlier run" in result.stderr


def test_require_fails_without_an_unfinished_export(model: Path, tmp_path: Path) -> None:
    result = export(model, inputs(tmp_path / "new"), "--resume", "require")
    assert result.exit_code == 2
    assert "no finished block to resume from" in result.stderr
    assert not (tmp_path / "new" / "out.partial").exists()


def test_an_interrupt_keeps_finished_blocks(
    model: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moe2edge.storage import journal

    folder, added, left = inputs(tmp_path / "w"), journal.Journal.add, [5]

    def adding(self: journal.Journal, unit: journal.JournalEntry) -> None:
        added(self, unit)
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    monkeypatch.setattr(journal.Journal, "add", adding)
    said: list[str] = []

    def leave(message: str, as_json: bool) -> None:
        said.append(message)
        raise SystemExit(130)

    monkeypatch.setattr("moe2edge.cli.main._exit_interrupted", leave)
    assert export(model, folder).exit_code == 130
    assert said == [
        f"interrupted; 5 finished blocks are kept in {folder / 'out.partial'}, and the same "
        "command resumes from there"
    ]
    assert child(model, folder) == 0
    assert_same(folder / "out", whole)


@pytest.mark.slow
def test_a_failure_keeps_finished_blocks_and_says_so(
    model: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moe2edge.errors import VerificationFailed

    def fail(*_: Any) -> None:
        raise VerificationFailed("no")

    folder = inputs(tmp_path / "w")
    with monkeypatch.context() as inner:
        inner.setattr("moe2edge.evaluation.verify.audit", fail)
        failed = export(model, folder)
    assert failed.exit_code == 7
    assert "error: no; 8 finished blocks are kept in" in failed.stderr
    assert not (folder / "out").exists()
    assert child(model, folder) == 0
    assert_same(folder / "out", whole)


@pytest.mark.slow
def test_a_kill_before_the_marker_or_between_the_last_renames(
    model: Path, whole: Path, half: Path
) -> None:
    """What is left of a folder that was just made, and an old output that was moved aside."""
    partial = half / "out.partial"
    (partial / ".moe2edge-partial.tmp").write_text('{"inp')
    whole_copy = partial / "old"
    shutil.copytree(whole, whole_copy)
    assert export(model, half).exit_code == 2  # the old output is there again
    assert_same(half / "out", whole)
    assert export(model, half, "--force").exit_code == 0
    assert_same(half / "out", whole)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    (partial / ".moe2edge-partial.tmp").write_text('{"inp')
    assert export(model, half, "--force").exit_code == 0


@pytest.mark.slow
def test_other_experts_than_before_are_refused(model: Path, half: Path) -> None:
    journal = half / "out.partial" / "work" / JOURNAL
    lines = read_records(journal)[0]
    lines[1]["origins"][2] += 1
    write_records(journal, lines)
    result = export(model, half)
    assert result.exit_code == 2
    assert "block 1 of the unfinished export had other experts" in result.stderr
    assert len(finished(half)) == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["block-1-00001", "stream-1-00002", JOURNAL])
def test_damaged_work_is_computed_again_and_said(
    model: Path, whole: Path, half: Path, name: str
) -> None:
    path = next((half / "out.partial" / "work").glob(f"{name}*"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    result = export(model, half)
    assert result.exit_code == 0, result.output
    assert f"{path.name} in {path.parent} is not what was written: it is computed" in result.stderr
    assert_same(half / "out", whole)


@pytest.mark.slow
def test_nothing_is_left_to_resume_if_all_is_damaged(model: Path, whole: Path, half: Path) -> None:
    for path in (half / "out.partial" / "work").glob("*-*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    result = export(model, half, "--resume", "require")
    assert result.exit_code == 2
    assert "block-1-00000.safetensors is not what was written" in result.stderr
    assert "no finished block to resume from" in result.stderr


@pytest.mark.slow
def test_a_source_that_is_away_for_a_moment_costs_no_block(
    tiny: Make, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moe2edge.storage import journal

    model = tmp_path / "model"
    shutil.copytree(tiny("qwen3_moe", num_hidden_layers=4), model)
    folder, added = inputs(tmp_path / "w"), journal.Journal.add

    def adding(self: journal.Journal, unit: journal.JournalEntry) -> None:
        added(self, unit)
        if len(self.units) == 3:
            model.rename(tmp_path / "away")

    with monkeypatch.context() as inner:
        inner.setattr(journal.Journal, "add", adding)
        failed = export(model, folder)
    assert failed.exit_code == 2
    assert "3 finished blocks are kept in" in failed.stderr
    (tmp_path / "away").rename(model)
    again = export(model, folder, "--resume", "require")
    assert again.exit_code == 0, again.output
    # The reference has the path of the model, which is another one here.
    weights = "model.safetensors"
    assert (folder / "out" / weights).read_bytes() == (whole / weights).read_bytes()
