"""Tiny random checkpoints, and an export of the built-in model, that tests share."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

# One worker for each core: threads of torch, here and in what tests start, would only compete.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from moe2edge.storage.checkpoint import BUILTIN
from moe2edge.testing import Make, make_checkpoint, make_tokenizer

pytest.register_assert_rewrite("helpers")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--renew-goldens", action="store_true", help="write tests/golden anew")
    parser.addoption("--full-sweep", action="store_true", help="try every value of config keys")
    parser.addoption("--all-cells", action="store_true", help="try every pass on every family")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is marked as the rest, unless it is asked for."""
    if not config.getoption("--all-cells"):
        rest = [item for item in items if item.get_closest_marker("rest")]
        config.hook.pytest_deselected(items=rest)
        items[:] = [item for item in items if not item.get_closest_marker("rest")]


@pytest.fixture(autouse=True)
def _free_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let at least a terabyte be free: what a test expects must not hang on this machine's disk.

    Exports and plans of this process look at it; a test of a full disk sets its own.
    """
    usage = shutil.disk_usage

    def report(path: Any) -> Any:
        found = usage(path)
        return found._replace(free=max(found.free, 10**12))

    monkeypatch.setattr(shutil, "disk_usage", report)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Folder of a tiny checkpoint with a tokenizer; equal requests share it. Do not write there."""
    made: dict[str, Path] = {}

    def make(family: str, **changes: Any) -> Path:
        key = f"{family} {sorted(changes.items())}"
        if key not in made:
            made[key] = make_checkpoint(tmp_path_factory.mktemp(family), family, **changes)
            make_tokenizer(made[key])
        return made[key]

    return make


@pytest.fixture(scope="session")
def builtin_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the built-in model exported to onnx and gptq. Do not write there."""
    from helpers import run  # imports torch: not in the process that only hands out tests

    folder = tmp_path_factory.mktemp("builtin") / "out"
    result = run(
        "export", BUILTIN, "-t", "onnx,gptq", "-o", str(folder),
        "--set", "calibration.samples=24", "--set", "evaluation.samples=4",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    return folder
