"""A pass is checked again on the model that it gets, and a text although nobody reads it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest

from helpers import QUIET, SMALL, run
from moe2edge.calibration.observation import Facts
from moe2edge.commands.preflight import describe, refuse_early
from moe2edge.commands.texts import resolve_recipe
from moe2edge.model.model import Model
from moe2edge.pipeline import recipe
from moe2edge.pipeline.contract import Outcome, Pass, Trim
from moe2edge.pipeline.facts import UntiedModel
from moe2edge.pipeline.registry import find_target
from moe2edge.pipeline.runner import run_passes
from moe2edge.runtime.memory import Memory
from moe2edge.storage.checkpoint import open_checkpoint
from moe2edge.storage.work_folder import WorkFolder
from moe2edge.testing import Make

UNPLANNED = {
    "a layer too many": (
        "[{layer_drop: {threshold: -1, most: 2}}, {layer_drop: {drop: 1, rescore: true}}]",
        "the model has 1 MoE layers, and one with experts has to stay",
    ),
    "a list for layers that are gone": (
        "[{block_drop: {threshold: -1, most: 2}}, {expert_drop: {keep: [2, 3]}}]",
        "keep lists 2 counts for 1 MoE layers",
    ),
    "more than a shared budget left": (
        "[{expert_drop: {keep: 3, scope: global}}, {expert_drop: {keep: [6, 5, 5]}}]",
        "expert_drop: keep is 6, but block 0 has 5 experts",
    ),
}


@pytest.mark.parametrize("case", sorted(UNPLANNED))
@pytest.mark.slow
def test_passes_are_checked_on_the_model_that_they_get(
    tiny: Make, tmp_path: Path, case: str
) -> None:
    """Planned is the least that a threshold drops; what it did drop may leave the next no work."""
    passes, message = UNPLANNED[case]
    file, out = tmp_path / "r.yaml", tmp_path / "out"
    file.write_text(f"passes: {passes}")
    result = run("export", tiny("mixtral"), "-o", out, "-t", "onnx", "-r", str(file), *SMALL)
    assert result.exit_code == 2, result.output
    assert message in result.stderr.splitlines()[-1]
    assert not out.exists()


@pytest.mark.parametrize("name", ["trim-w4", "lightmoe"])
def test_each_pass_is_planned_once_before_an_export(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    less = ["calibration.length=64", "evaluation.length=64"]
    more = ["training.length=64"] if name == "lightmoe" else []
    checkpoint = open_checkpoint(str(tiny("mixtral")))
    parsed = recipe.parse(recipe.find(name), [*less, *more])
    parsed = resolve_recipe(checkpoint, parsed, QUIET)
    planned: list[str] = []

    def count(kind: type[Pass]) -> None:
        plan = kind.plan

        def counted(step: Pass, model: Model) -> Model:
            planned.append(step.name)
            return plan(step, model)

        monkeypatch.setattr(kind, "plan", counted)

    for step in parsed.passes:
        count(type(step))
    out, targets = tmp_path / "out", [find_target("gptq")]
    plan, _ = refuse_early(checkpoint, parsed, targets, out, Memory(), materialize=False)
    describe(plan, QUIET)
    assert planned == [step.name for step in parsed.passes]


class Leaves(Trim):
    """Drops a block, and leaves a fact."""

    writes: ClassVar[tuple[type, ...]] = (UntiedModel,)

    def apply(self, model: Model, facts: Facts) -> Outcome:
        return Outcome(model.keep_blocks([0]), ("a block",), facts=(UntiedModel(model),))


class LeavesInSecret(Leaves):
    """Does so without a declaration."""

    writes: ClassVar[tuple[type, ...]] = ()


class Reads(Trim):
    """Takes the fact, and the model that it holds."""

    reads: ClassVar[tuple[type, ...]] = (UntiedModel,)

    def apply(self, model: Model, facts: Facts) -> Outcome:
        left = facts.get(UntiedModel)
        return Outcome(left.model if left else model.keep_blocks([0, 1]), ("all",))


class ReadsInSecret(Reads):
    """Does so without a declaration."""

    reads: ClassVar[tuple[type, ...]] = ()


def run_steps(model: Model, folder: Path, *passes: Pass) -> Model:
    parsed = replace(recipe.parse("passes: []"), passes=passes)
    return run_passes(model, parsed, None, WorkFolder(folder), QUIET)[0]


def test_what_a_pass_leaves_is_read_by_a_later_one(tiny: Make, tmp_path: Path) -> None:
    model = open_checkpoint(str(tiny("mixtral"))).model
    assert run_steps(model, tmp_path, Leaves(), Reads()) is model
    assert len(run_steps(model, tmp_path, Reads()).blocks) == 2


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        ([LeavesInSecret()], "leaves UntiedModel, which is not in its writes"),
        ([Leaves(), ReadsInSecret()], "reads UntiedModel, which is not in its reads"),
    ],
)
def test_facts_are_declared(tiny: Make, tmp_path: Path, passes: list[Pass], message: str) -> None:
    model = open_checkpoint(str(tiny("mixtral"))).model
    with pytest.raises(AssertionError, match=message):
        run_steps(model, tmp_path, *passes)


def test_a_missing_text_is_refused_even_if_it_is_unused(tiny: Make, tmp_path: Path) -> None:
    args = ["-t", "onnx", "-r", "as-is", "--calib", str(tmp_path / "none.txt"), *SMALL]
    result = run("export", tiny("mixtral"), "-o", tmp_path / "out", *args)
    assert result.exit_code == 2
    assert "does not exist" in result.stderr
