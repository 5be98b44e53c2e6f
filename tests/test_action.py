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

ROOT = Path(__file__).parents[1]
# Of the built-in model, measured once.
PROFILE = ROOT / "tests" / "gate_profile.json"
SCRIPT = ROOT / "examples" / "ci" / "gate.sh"
# Stands for moe2edge: profiles are written as they are given, comparing is the real thing.
FAKE = """#!/bin/sh
echo "$@" >> "$CALLS"
case $1 in
  export) mkdir -p out ;;
  profile) cp "$HEAD_PROFILE" "$6"; echo profiled > "$8" ;;
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
    (tools / "moe2edge").write_text(FAKE.format(python=sys.executable))
    (tools / "gh").write_text('#!/bin/sh\necho "gh $@" >> "$CALLS"\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    return clone


def run_gate(place: Path, change: dict[str, Any], **more: str) -> tuple[int, str, str, str]:
    """Run the script; return its exit code, the summary, its outputs and the calls."""
    head = json.loads((PROFILE).read_text())
    head["sizes"] |= change
    files = {name: place.parent / name for name in ("head.json", "calls", "summary", "outputs")}
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
        "FOLDER": "out",
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
    code, summary, outputs, calls = run_gate(place, {}, EXPORT="builtin:tiny-moe -t onnx")
    assert code == 0, calls
    assert "**equivalent**" in summary
    assert "exit-code=0" in outputs
    assert calls.startswith("export builtin:tiny-moe -t onnx -o out --force\n")
    assert "gh" not in calls


def test_a_regression_fails_and_is_commented_on(place: Path) -> None:
    code, summary, outputs, calls = run_gate(
        place, {"weights": 10**9}, COMMENT="true", PULL_REQUEST="7"
    )
    assert code == 3
    assert "**regressed**" in summary
    assert "exit-code=3" in outputs
    assert "gh pr comment 7 --edit-last --create-if-none" in calls


def test_without_a_baseline_nothing_fails(place: Path) -> None:
    code, summary, _, _ = run_gate(place, {}, BASELINE="other.json")
    assert code == 0
    assert "has no `other.json`" in summary
