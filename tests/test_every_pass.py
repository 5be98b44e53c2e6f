"""Every pass on every family: exported, verified in its runtime, and accounted for."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers import FAMILY_OF, RECIPES, export, list_steps
from moe2edge.model.family import FAMILIES
from moe2edge.pipeline import registry
from moe2edge.testing import Make

TRAINING = ["--set", "training.samples=12", "--set", "training.length=48"]
# A pass that drops, one that replaces and one that quantizes, on one family each; the others are
# slow. Each pass is tried on every second family, and with --all-cells on all of them. Quicker
# tests of all passes: test_golden.py, and the files of their own.
QUICK = ("expert_drop", "expert_replace", "gptq")
CASES = [
    pytest.param(
        name,
        family,
        marks=[]
        if name in QUICK and FAMILY_OF[name] == family
        else [pytest.mark.slow] + [pytest.mark.rest] * ((n + m) % 2),
    )
    for n, name in enumerate(sorted(RECIPES))
    for m, family in enumerate(sorted(FAMILIES))
]


def test_no_pass_is_forgotten() -> None:
    assert set(RECIPES) == set(registry.list_passes())


@pytest.mark.parametrize(("name", "family"), CASES)
def test_export(tiny: Make, family: str, name: str, tmp_path: Path) -> None:
    folder = tiny(family)
    steps = list_steps(name, folder, tmp_path)
    if name not in ("awq", "gptq", "rtn"):
        steps.append({"rtn": {}})
    targets = "gptq" if name == "expert_replace" else "gptq,onnx"
    training = TRAINING if name == "recover" else []
    code, stderr, report = export(folder, tmp_path / "out", steps, targets, *training)
    assert code == 0, stderr
    assert [step["name"] for step in report["steps"]] == [next(iter(step)) for step in steps]
    for row in report["results"]:
        assert row["parity"]["exact"] < 1e-4
    for step in report["steps"]:
        assert step["changed"] or step["name"] == "routing"
