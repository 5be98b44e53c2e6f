"""What passes need of blocks, and how a model that lacks it is refused."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest

from every_family import make_folder
from helpers import run
from moe2edge.errors import Unsupported
from moe2edge.model.model import Model
from moe2edge.model.traits import Trait, find_missing
from moe2edge.pipeline.contract import Pass
from moe2edge.pipeline.registry import find_pass, list_passes
from moe2edge.pipeline.stages import plan_passes
from moe2edge.storage.checkpoint import open_checkpoint
from moe2edge.testing import make_tokenizer

# By transformers' code of each family.
FOUND = {
    "deepseek_v3": {Trait.GATED, Trait.SILU, Trait.UNBIASED},
    "gemma4_text": {Trait.GATED, Trait.UNBIASED},  # gelu
    "gpt_oss": {Trait.GATED},  # biases, a limit, and up + 1
    "minimax_m3_vl_text": {Trait.GATED, Trait.UNBIASED},  # a limit
    "nemotron_h": {Trait.UNBIASED},  # no gate
    "qwen3_moe": {Trait.TABLE, Trait.GATED, Trait.SILU, Trait.UNBIASED},
}


class NeedsSilu(Pass):
    needs: ClassVar[tuple[Trait, ...]] = (Trait.GATED, Trait.SILU)

    def plan(self, model: Model) -> Model:
        return model


class Undeclared(Pass):
    def plan(self, model: Model) -> Model:
        return model


@pytest.mark.parametrize("family", FOUND)
def test_traits_are_found_by_looking(family: str, tmp_path: Path) -> None:
    make_folder(tmp_path, family)
    model = open_checkpoint(tmp_path).model
    basic = (Trait.TABLE, Trait.GATED, Trait.SILU, Trait.UNBIASED)
    assert {
        trait for trait in basic if not find_missing(model.family, model.architecture, [trait])
    } == FOUND[family]


def test_a_pass_is_refused_by_the_first_trait_that_is_missing(tmp_path: Path) -> None:
    make_folder(tmp_path, "gpt_oss")
    model = open_checkpoint(tmp_path).model
    able = ", ".join(
        name
        for name in list_passes()
        if not find_missing(model.family, model.architecture, find_pass(name).needs)
    )
    assert "expert_drop" in able
    with pytest.raises(Unsupported) as caught:
        plan_passes([NeedsSilu()], model)
    assert str(caught.value) == (
        f"{NeedsSilu.name} does not work on gpt_oss: it needs experts that compute "
        f"silu(gate) * up, which block 0 does not have; passes that work on it: {able}"
    )
    with pytest.raises(Unsupported, match="it needs a family of the table, which gpt_oss is not"):
        plan_passes([Undeclared()], model)


def test_a_missing_trait_is_exit_code_6_before_any_work(tmp_path: Path) -> None:
    source = tmp_path / "source"
    make_folder(source, "nemotron_h")
    make_tokenizer(source)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("passes:\n  - expert_replace: {with: base, budget: 0.8}\n")
    found = run("export", source, "-t", "hf", "-o", tmp_path / "out", "-r", recipe)
    assert found.exit_code == 6, found.output
    assert (
        "expert_replace does not work on nemotron_h: it needs experts with a gate" in found.output
    )
    assert not (tmp_path / "out").exists()
