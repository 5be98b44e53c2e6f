"""Every pass on every family: exported, verified in its runtime, and accounted for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from helpers import LESS, TEXT, run
from moe2edge.model.family import FAMILIES
from moe2edge.pipeline import registry
from moe2edge.testing import Make

# The passes of a recipe; what is not quantized yet is rounded at the end.
RECIPES: dict[str, list[dict[str, Any]]] = {
    "apply_decisions": [],  # needs a file: see below
    "awq": [{"awq": {"steps": 4}}],
    "block_drop": [{"block_drop": {"drop": 1}}],
    "expert_budget": [{"expert_budget": {"keep": 4}}],
    "expert_drop": [{"expert_drop": {"keep": [6, 3, 0]}}],
    "expert_merge": [{"expert_merge": {"method": "ream", "keep": 4}}],
    "expert_replace": [{"expert_replace": {"with": "linear", "keep": 4}}],
    "expert_search": [{"expert_search": {"keep": 4, "progressive": True}}],
    "expert_skip": [{"expert_skip": {}}],
    "gptq": [{"gptq": {}}],
    "layer_drop": [{"layer_drop": {"drop": 1, "norm": False}}],
    "recover": [
        {"expert_drop": {"keep": 4}},
        {"recover": {"steps": 4, "batch": 4, "held_out": 4, "eval_every": 2}},
    ],
    "routing": [{"expert_drop": {"keep": 3}}, {"routing": {}}],
    "rtn": [],
    "sparsify": [{"sparsify": {"method": "sparsegpt", "pattern": "2:4"}}],
}
TRAINING = ["--set", "training.samples=12", "--set", "training.length=48"]


def test_no_pass_is_forgotten() -> None:
    assert set(RECIPES) == set(registry.list_passes())


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("name", sorted(RECIPES))
def test_export(tiny: Make, family: str, name: str, tmp_path: Path) -> None:
    folder, steps = tiny(family), list(RECIPES[name])
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
    if name == "apply_decisions":
        recipe.write_text(json.dumps({"passes": [{"expert_drop": {"keep": 5}}]}))
        sets = tmp_path / "sets.json"
        decide = ["decide", str(folder), "-r", str(recipe), "-o", str(sets), *TEXT]
        assert run(*decide).exit_code == 0
        steps.append({"apply_decisions": {"file": str(sets)}})
    if name not in ("awq", "gptq"):
        steps.append({"rtn": {}})
    recipe.write_text(json.dumps({"passes": steps}))
    training = TRAINING if name == "recover" else []
    targets = "gptq" if name == "expert_replace" else "gptq,onnx"
    command = ["export", str(folder), "-t", targets, "-o", str(out), "-r", str(recipe)]
    done = run(*command, *TEXT, *LESS, *training)
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert [step["name"] for step in report["steps"]] == [next(iter(step)) for step in steps]
    for row in report["results"]:
        assert row["parity"]["exact"] < 1e-4
    for step in report["steps"]:
        assert step["changed"] or step["name"] == "routing"
