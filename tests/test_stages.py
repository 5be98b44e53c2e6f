"""A pass is checked again on the model that it gets, and a text although nobody reads it."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers import SMALL, run
from moe2edge.testing import Make

UNPLANNED = {
    "a layer too many": (
        "[{layer_drop: {threshold: -1, most: 2}}, {layer_drop: {drop: 1, rescore: true}}]",
        "drop is 1 of 1 MoE layers",
    ),
    "a list for layers that are gone": (
        "[{block_drop: {threshold: -1, most: 2}}, {expert_drop: {keep: [2, 3]}}]",
        "keep lists 2 counts for 1 MoE layers",
    ),
    "more than a shared budget left": (
        "[{expert_drop: {keep: 3, scope: global}}, {expert_drop: {keep: [6, 5, 5]}}]",
        "of the",
    ),
}


@pytest.mark.parametrize("case", sorted(UNPLANNED))
def test_passes_are_checked_on_the_model_that_they_get(
    tiny: Make, tmp_path: Path, case: str
) -> None:
    """Planned is the least that a threshold drops; what it did drop may leave the next no work."""
    passes, message = UNPLANNED[case]
    recipe, out = tmp_path / "r.yaml", tmp_path / "out"
    recipe.write_text(f"passes: {passes}")
    result = run("export", tiny("mixtral"), "-o", out, "-t", "onnx", "-r", str(recipe), *SMALL)
    assert result.exit_code == 2, result.output
    assert message in result.stderr.splitlines()[-1]
    assert not out.exists()


def test_a_missing_text_is_refused_even_if_it_is_unused(tiny: Make, tmp_path: Path) -> None:
    args = ["-t", "onnx", "-r", "as-is", "--calib", str(tmp_path / "none.txt"), *SMALL]
    result = run("export", tiny("mixtral"), "-o", tmp_path / "out", *args)
    assert result.exit_code == 2
    assert "does not exist" in result.stderr
