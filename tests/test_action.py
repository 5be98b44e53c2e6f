"""The action: its shell part runs, tells the result and ends with the code of the gate."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from moe2edge.evaluation.gate.comparison import list_values
from moe2edge.evaluation.gate.rules import read_gate

ROOT = Path(__file__).parents[1]
# That of the built-in model, with which our own CI compares.
PROFILE = ROOT / ".ci" / "profile.json"
SCRIPT = ROOT / "examples" / "ci" / "gate.sh"
# Stands for moe2edge: profiles are written as they are given, comparing is the real thing.
FAKE = """#!/bin/sh
echo "$@" >> "$CALLS"
case $1 in
  export) [ "$2" != broken ] || exit 6; mkdir -p out ;;
  profile) cp "$HEAD_PROFILE" "$8"; echo profiled > "${10}" ;;
  *) exec {python} -m moe2edge "$@" ;;
esac
"""


def call(arguments: list[str], folder: Path) -> None:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.example"]
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Return a clone whose origin holds a profile."""
    origin, clone, tools = (tmp_path / name for name in ("origin", "clone", "bin"))
    origin.mkdir()
    call(["init", "-q", "-b", "main"], origin)
    shutil.copy(PROFILE, origin / "base.json")
    call(["add", "."], origin)
    call(["commit", "-q", "-m", "base"], origin)
    call(["clone", "-q", str(origin), str(clone)], tmp_path)
    tools.mkdir()
    (tools / "moe2edge").write_text(FAKE.replace("{python}", sys.executable))
    (tools / "gh").write_text('#!/bin/sh\necho "gh $@" >> "$CALLS"\necho "$COMMENT_ID"\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    return clone


def run_gate(place: Path, change: dict[str, Any], **more: str) -> tuple[int, str, str, str]:
    """Run the script; return its exit code, the summary, its outputs and the calls."""
    head = json.loads((PROFILE).read_text())
    head["sizes"] |= change
    files = {name: place.parent / name for name in ("head.json", "calls", "summary", "outputs")}
    for file in files.values():
        file.write_text("")
    files["head.json"].write_text(json.dumps(head))
    env = {
        **os.environ,
        "PATH": f"{place.parent / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "RUNNER_TEMP": str(place.parent),
        "CALLS": str(files["calls"]),
        "HEAD_PROFILE": str(files["head.json"]),
        "GITHUB_STEP_SUMMARY": str(files["summary"]),
        "GITHUB_OUTPUT": str(files["outputs"]),
        "GITHUB_REPOSITORY": "me/mine",
        "FOLDER": "out",
        "THREADS": "2",
        "BASELINE": "base.json",
        "BASE_REF": "main",
        **more,
    }
    done = subprocess.run([str(SCRIPT)], cwd=place, env=env, capture_output=True, text=True)
    told = [files[name].read_text() for name in ("summary", "outputs", "calls")]
    return done.returncode, told[0], told[1], told[2]


def test_the_action_passes_its_inputs_to_the_script() -> None:
    action = yaml.safe_load((ROOT / "action.yml").read_text())
    (step,) = action["runs"]["steps"]
    assert SCRIPT.relative_to(ROOT).as_posix() in step["run"]
    given = {name.upper() for name in action["inputs"]}
    assert given <= step["env"].keys()
    for name in step["env"].keys() - {"GH_TOKEN"}:
        assert name in SCRIPT.read_text()
    example = yaml.safe_load((SCRIPT.parent / "moe2edge.yml").read_text())
    used = example["jobs"]["gate"]["steps"][-1]["with"]
    assert used.keys() <= action["inputs"].keys()


def test_what_did_not_change_passes(place: Path) -> None:
    code, summary, outputs, calls = run_gate(
        place, {}, EXPORT="builtin:tiny-moe\n-t onnx --set 'a=b c'"
    )
    assert code == 0, calls
    assert "**equivalent**" in summary
    assert "exit-code=0" in outputs
    export, profile, compare = calls.splitlines()
    assert export == "export builtin:tiny-moe -t onnx --set a=b c -o out --force"
    assert profile.startswith("profile out --preset ci --threads 2 -o ")
    assert compare.startswith("compare ")


@pytest.mark.parametrize(("earlier", "call"), [("", "issues/7/comments"), ("42", "comments/42")])
def test_a_regression_fails_and_its_one_comment_is_renewed(
    earlier: str, call: str, place: Path
) -> None:
    code, summary, outputs, calls = run_gate(
        place, {"weights": 10**9}, COMMENT="true", PULL_REQUEST="7", COMMENT_ID=earlier
    )
    assert code == 3
    assert summary.startswith("<!-- moe2edge gate: base.json -->\n")
    assert "**regressed**" in summary
    assert "exit-code=3" in outputs
    look, write = (line for line in calls.splitlines() if line.startswith("gh"))
    assert 'startswith("<!-- moe2edge gate: base.json -->")' in look
    assert f"repos/me/mine/issues/{call.removeprefix('issues/')} -F body=@" in write
    assert ("-X PATCH" in write) == bool(earlier)


def test_the_base_branch_is_fetched_or_what_is_checked_out_is_the_base(place: Path) -> None:
    # As a checkout of depth 1 leaves it.
    call(["update-ref", "-d", "refs/remotes/origin/main"], place)
    (place / "base.json").write_text("{}")
    assert run_gate(place, {})[0] == 0
    assert run_gate(place, {}, BASE_REF="")[0] == 2
    shutil.copy(PROFILE, place / "base.json")
    assert run_gate(place, {"weights": 10**9}, BASE_REF="")[0] == 3


def test_without_a_baseline_nothing_fails_and_it_is_said(place: Path) -> None:
    code, summary, _, _ = run_gate(place, {}, BASELINE="other.json")
    assert code == 0
    assert "There is no `other.json` to compare with" in summary
    code, summary, _, _ = run_gate(place, {}, BASE_REF="nowhere")
    assert code != 0
    assert "exit code 128; see the log" in summary


def test_a_failed_export_is_told(place: Path) -> None:
    code, summary, outputs, _ = run_gate(place, {}, EXPORT="broken")
    assert code == 6
    assert "moe2edge ended with exit code 6" in summary
    assert "exit-code=6" in outputs


def test_our_own_ci_runs_the_script_with_its_profile() -> None:
    own = (ROOT / ".ci" / "gate").read_text()
    assert ".ci/gate\n" in (ROOT / ".ci" / "run").read_text()
    assert "examples/ci/gate.sh" in own
    assert f"BASELINE={PROFILE.relative_to(ROOT).as_posix()}" in own
    profile = json.loads(PROFILE.read_text())
    named = ("host_fingerprint", "cpu", "ram_bytes", "load_avg", "os")
    assert [profile["env"][name] for name in named] == [None] * 5
    assert profile["env"]["threads"] == {"asked": 2, "runtime": 2}
    values = list_values(profile)
    assert [name for name in read_gate().metrics if values[name] is None] == []
