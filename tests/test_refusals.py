"""A target that cannot hold a recipe: refused before any work, with the targets that can."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from helpers import check_early, refuse
from moe2edge.errors import Unsupported
from moe2edge.pipeline.registry import list_targets
from moe2edge.testing import Make

ROUNDED = {"bits": 4, "group_size": 32}
# For each target a recipe that it does not hold.
REFUSED: dict[str, list[Any]] = {
    "compressed-tensors": [{"rtn": ROUNDED | {"head": 8}}],
    "gguf": [{"layer_drop": {"drop": 1}}],
    "gptq": [{"rtn": ROUNDED | {"bits": 3}}],
    "hf": [{"rtn": ROUNDED}],
    "mlx": [{"rtn": ROUNDED | {"symmetric": False}}],
    "onnx": [{"rtn": ROUNDED | {"bits": 3}}],
}


# Further forms of targets.
FORMS = ("gguf:dequantize=true", "hf:dequantize=true", "hf:layout=natural")


@pytest.mark.parametrize("target", list_targets())
def test_refusals_name_all_targets_that_hold_the_recipe(
    target: str, tiny: Make, tmp_path: Path
) -> None:
    source, steps = tiny("qwen3_moe", norm_topk_prob=True), REFUSED[target]
    said = str(refuse(source, tmp_path / "out", steps, target))
    others = [form for form in (*list_targets(), *FORMS) if form.partition(":")[0] != target]
    holding = [form for form in others if holds(source, tmp_path / "out", steps, form)]
    names = {form.partition(":")[0] for form in holding}
    assert names
    for name in names:
        assert re.search(rf"(?<![-\w]){name}(?![-\w])", said), said
    _, _, listed = said.partition("; targets that hold it: ")
    for form in listed.split(", ") if listed else ():
        assert holds(source, tmp_path / "out", steps, form), form


def holds(source: Path, out: Path, steps: list[Any], target: str) -> bool:
    try:
        check_early(source, out, steps, target, (), materialize=False)
    except Unsupported:
        return False
    return True
