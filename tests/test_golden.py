"""Models before and after every pass, as text, against the files in tests/golden.

A change of what a pass makes, or of the words for it, shows as a difference of these files. Where
it is meant, renew them and look at the difference::

    pytest tests/test_golden.py --renew-goldens && git diff tests/golden
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from helpers import FAMILY_OF, RECIPES, list_steps, plan, run_recipe
from moe2edge.calibration.tokens import Tokens
from moe2edge.pipeline import recipe
from moe2edge.storage.checkpoint import open_checkpoint
from moe2edge.testing import Make, make_learnable_text

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_models_before_and_after(
    name: str, tiny: Make, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = tiny(FAMILY_OF[name])
    model = open_checkpoint(str(folder)).model
    steps = list_steps(name, folder, tmp_path)
    parsed = recipe.parse(json.dumps({"passes": steps})).resolve(model)
    ids = torch.randint(1, 96, (12, 48), generator=torch.Generator().manual_seed(0))
    calibration, training = Tokens(ids, "", ""), Tokens(make_learnable_text(), "", "")
    after = run_recipe(parsed, model, calibration, tmp_path, training)
    shown = json.dumps(steps).replace(str(tmp_path), "")
    parts = {
        "passes": shown,
        "before": model,
        "planned": plan(parsed.passes, model),
        "after": after,
    }
    text = "\n".join(f"---- {title}\n{part}\n" for title, part in parts.items())
    file = GOLDEN / f"{name}.txt"
    if request.config.getoption("--renew-goldens"):
        GOLDEN.mkdir(exist_ok=True)
        file.write_text(text, "utf-8")
    assert text == file.read_text("utf-8"), "meant? pytest tests/test_golden.py --renew-goldens"


def test_there_is_no_file_of_a_pass_that_is_gone() -> None:
    assert {file.stem for file in GOLDEN.iterdir()} == set(RECIPES)
