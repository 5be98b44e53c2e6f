"""Threads that wait for each other spin for a moment only, wherever processes are started."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from helpers import run
from moe2edge.cli import main
from moe2edge.evaluation.profile.process import run_child
from moe2edge.evaluation.profile.settings import ProfileSettings
from moe2edge.runtime.waiting import choose_waiting
from moe2edge.targets import _child_process

MOMENT = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "300"}


@pytest.fixture
def unset(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in MOMENT:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize("given", [{"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "7"}])
def test_what_the_user_set_stays(given: dict[str, str]) -> None:
    assert choose_waiting(given) == {}


@pytest.mark.parametrize(
    ("command", "expected"),
    [(["export", "x", "-t", "y", "-o", "z"], {"OMP_WAIT_POLICY": "passive"}),
     (["generate", "x", "y"], MOMENT), (["profile", "x"], MOMENT), (["compare", "x", "y"], MOMENT)],
)  # fmt: skip
def test_commands_choose_by_what_they_do(
    command: list[str], expected: dict[str, str], unset: pytest.MonkeyPatch
) -> None:
    environ: dict[str, str] = dict(os.environ)
    unset.setattr(main, "os", SimpleNamespace(environ=environ))
    run(*command)
    assert {name: environ[name] for name in MOMENT if name in environ} == expected


TELL = """
import json, os, sys
found = {n: os.environ[n] for n in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT") if n in os.environ}
print(json.dumps({"vocabulary": 1, "bytes": 0, "found": found}))
"""


def test_a_process_that_holds_a_model_gets_it_without_the_command_line(
    unset: pytest.MonkeyPatch,
) -> None:
    process = _child_process.ModelProcess("p", [sys.executable, "-c", TELL], Path("x"), {})
    assert process.opened["found"] == MOMENT
    process.close()


def test_a_process_that_measures_gets_it_without_the_command_line(
    unset: pytest.MonkeyPatch,
) -> None:
    seen = {}

    def start(*_: Any, env: dict[str, str], **__: Any) -> Any:
        seen.update(env)
        return SimpleNamespace(returncode=0, stdout="{}")

    unset.setattr(subprocess, "run", start)
    run_child({"folder": "x"}, ProfileSettings())
    assert {name: seen.get(name) for name in MOMENT} == MOMENT
