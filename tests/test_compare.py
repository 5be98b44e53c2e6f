"""GateResult of profiles and of folders: judgements, exit codes, and what is refused."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from helpers import SMALL, run
from moe2edge.errors import Inconclusive, InputError, Regressed
from moe2edge.evaluation.gate import folders
from moe2edge.evaluation.gate.comparison import compare_documents, list_values
from moe2edge.evaluation.gate.rules import METRICS, TIMINGS, Gate, read_gate
from moe2edge.evaluation.profile.settings import PRESETS
from moe2edge.progress import QUIET

GATE = read_gate()
NAMES = ("base", "head")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("compare") / "out"
    result = run(
        "export", "builtin:tiny-moe", "-t", "hf", "-o", out, "-r", "trim", *SMALL, "--eval", "none"
    )
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture(scope="module")
def measured(folder: Path) -> dict[str, Any]:
    """Return the profile of a folder, with a quality."""
    result = run("profile", folder, "--preset", "quick", "--gen-tokens", "3", "--json")
    assert result.exit_code == 0, result.output
    document: dict[str, Any] = json.loads(result.stdout)
    numbers = {"tokens": 100, "perplexity": 30.0, "kl": 0.01, "top1": 0.9}
    document["quality"] = {
        "reason": None, "origin": "report", "text": "builtin", "sha256": "0" * 64, **numbers,
    }  # fmt: skip
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
    if judgement == "regressed":
        with pytest.raises(Regressed, match=r"head is worse than base: \w+ [+-]"):
            found.check()


def test_what_one_side_lacks_is_inconclusive(measured: dict[str, Any]) -> None:
    found = compare_documents(measured, change(measured, "quality.kl", None), GATE, NAMES)
    with pytest.raises(Inconclusive, match=r"kl \(head lacks it\)"):
        found.check()
    other = change(measured, "quality.sha256", "1" * 64)
    with pytest.raises(Inconclusive, match="different texts"):
        compare_documents(measured, other, GATE, NAMES).check()


def test_timings_of_files_are_advice_of_one_machine(measured: dict[str, Any]) -> None:
    slow = change(measured, "metrics.ms_per_token.median", 1e6)
    found = compare_documents(measured, slow, GATE, NAMES)
    found.check()
    assert found.list_names("regressed", fails=False) == ["ms_per_token"]
    elsewhere = change(slow, "env.host_fingerprint", "another")
    rows = {row.name: row for row in compare_documents(measured, elsewhere, GATE, NAMES).rows}
    assert rows["ms_per_token"].judgement is None


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


def test_identical_folders_are_not_called_worse(folder: Path) -> None:
    settings = PRESETS["quick"]
    few = Gate(metrics={name: GATE.metrics[name] for name in (*TIMINGS, "weights")}, pairs=5)
    work = replace(settings, prompt_tokens=16, gen_tokens=3, repeats=5)
    found = folders.compare_folders(
        folder, folder, few, text="def f():\n    return 1\n" * 200, settings=work, reporter=QUIET
    )
    assert found.list_names("regressed") == []
    assert {row.name for row in found.rows if row.smallest_effect} == set(TIMINGS)
