"""Exports that train: killed and gone on with, refused, reported, and quantized afterwards."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import Result
from safetensors.torch import load_file, save_file

from helpers import refuse, run
from moe2edge.errors import Diverged
from moe2edge.passes import _recover_teacher
from moe2edge.passes._recover_state import Saved, States
from moe2edge.passes.recover import Recover
from moe2edge.pipeline import recipe
from moe2edge.pipeline.contract import PlannedStep, TextSize, TextSizes
from moe2edge.runtime.memory import Estimate
from moe2edge.storage.checkpoint import open_checkpoint
from moe2edge.testing import QUICK_TRAINING, Make

TRAINING = ["training.samples=10", "training.length=32"]
LESS = ["calibration.samples=6", "calibration.length=32"]
STEPS: list[Any] = [
    {"expert_drop": {"keep": 4}},
    {"recover": {**QUICK_TRAINING, "batch": 2, "held_out": 3}},
]


def export(
    folder: Path, out: Path, *settings: str, steps: list[Any] | None = None, more: Any = ()
) -> Result:
    file = out.parent / "recipe.yaml"
    file.write_text(yaml.safe_dump({"passes": STEPS if steps is None else steps}))
    given = [part for setting in (*LESS, *TRAINING, *settings) for part in ("--set", setting)]
    command = ["export", str(folder), "-o", str(out), "-r", str(file), "--eval", "none"]
    return run(*command, "--threads", "1", *given, *more)


HF, GPTQ = ("-t", "hf"), ("-t", "gptq")


@contextlib.contextmanager
def killed(count: int) -> Iterator[None]:
    """In which an export fails behind so many checkpoints."""
    save, left = States.save, [count]

    def saving(self: States, saved: Saved) -> None:
        save(self, saved)
        left[0] -= 1
        if not left[0]:
            raise RuntimeError("killed")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(States, "save", saving)
        yield


def assert_same(found: Path, expected: Path) -> None:
    for path in expected.glob("*.safetensors"):
        assert (found / path.name).read_bytes() == path.read_bytes(), path.name
    reports = [json.loads((f / "report.json").read_text())["steps"] for f in (found, expected)]
    for one, other in zip(*reports, strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "counts"),  # of four checkpoints, the last is behind the end
    [({}, (2, 4)), ({"loss": "distill"}, (1,)), ({"train": "lora"}, (3,))],
)
def test_a_killed_training_resumes_with_the_same_bytes(
    tiny: Make, tmp_path: Path, options: dict[str, Any], counts: tuple[int, ...]
) -> None:
    folder = tiny("qwen3_moe")
    steps = [STEPS[0], {"recover": {**STEPS[1]["recover"], **options}}]
    (tmp_path / "a").mkdir()
    whole = tmp_path / "a" / "out"
    assert export(folder, whole, steps=steps, more=HF).exit_code == 0
    for count in counts:
        (tmp_path / f"{count}").mkdir()
        out = tmp_path / f"{count}" / "out"
        with killed(count):
            failed = export(folder, out, steps=steps, more=HF)
        assert failed.exit_code == 1
        assert "the saved work of recover is kept in" in failed.stderr
        assert not out.exists()
        again = export(folder, out, steps=steps, more=HF)
        assert again.exit_code == 0, again.output
        assert "resuming after the saved work of recover of an earlier run" in again.stderr
        made = [f"recover: step {step} of 6:" in again.stderr for step in range(0, 7, 2)]
        assert made == [step > 2 * count for step in range(0, 7, 2)]
        assert_same(out, whole)
        assert not out.with_name("out.partial").exists()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


def without_one(path: Path) -> None:
    tensors = load_file(path)
    tensors.pop(min(tensors))
    save_file(tensors, path)


@pytest.mark.slow
@pytest.mark.parametrize("damage", [cut, Path.unlink, without_one])
def test_a_damaged_checkpoint_is_said_and_the_training_begins_again(
    tiny: Make, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    folder, whole, out = tiny("olmoe"), tmp_path / "whole", tmp_path / "out"
    assert export(folder, whole, more=HF).exit_code == 0
    work = tmp_path / "out.partial" / "work" / "pass-1-recover"
    with killed(2):
        assert export(folder, out, more=HF).exit_code == 1
    damage(now := next(work.glob("now-*")))
    again = export(folder, out, more=HF)
    assert again.exit_code == 0, again.output
    assert f"pass-1-recover/{now.name} in {work.parent} is not what was written" in again.stderr
    assert "recover: step 0 of 6:" in again.stderr
    assert_same(out, whole)


@pytest.mark.slow
def test_a_truncated_piece_of_the_source_is_computed_again(tiny: Make, tmp_path: Path) -> None:
    folder = tiny("qwen3_moe")
    steps = [STEPS[0], {"recover": {**STEPS[1]["recover"], "loss": "distill"}}]
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert export(folder, whole, steps=steps, more=HF).exit_code == 0
    with killed(1):
        assert export(folder, out, steps=steps, more=HF).exit_code == 1
    cut(next((tmp_path / "out.partial" / "work" / "pass-1-recover").glob("source-*.safetensors")))
    again = export(folder, out, steps=steps, more=HF)
    assert again.exit_code == 0, again.output
    assert "recover: resuming after step" in again.stderr
    assert "source-00000.safetensors is not what was written" in again.stderr
    assert_same(out, whole)


@pytest.mark.slow
def test_resuming_with_another_training_text_is_refused(tiny: Make, tmp_path: Path) -> None:
    with killed(1):
        assert export(tiny("olmoe"), tmp_path / "out", more=HF).exit_code == 1
    other = export(tiny("olmoe"), tmp_path / "out", "training.seed=1", more=HF)
    assert other.exit_code == 2
    assert "begun with another training: then " in other.stderr
    again = export(tiny("olmoe"), tmp_path / "out", "training.seed=1", more=[*HF, "--resume=never"])
    assert again.exit_code == 0


@pytest.mark.slow
def test_trim_train_quantize(tiny: Make, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = export(tiny("mixtral"), out, steps=[*STEPS, {"gptq": {}}], more=[*GPTQ, "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["results"][0]["parity"]["exact"] < 1e-4
    step = report["steps"][1]
    rest = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    assert step["changed"] == [*rest, "block 0", "block 1", "block 2"]
    history = step["figures"]["history"]
    assert history[-1]["perplexity"] < history[0]["perplexity"]
    assert report["training"]["samples"] == 10
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["texts"]["training"]["sha256"] == report["training"]["sha256"]
    resolved = recipe.parse((out / "recipe.resolved.yaml").read_text())
    assert resolved.training is not None
    assert resolved.training.samples == 10
    verified = run("verify", str(out))
    assert verified.exit_code == 0, verified.output


def test_a_diverged_training_ends_with_its_exit_code(tiny: Make, tmp_path: Path) -> None:
    steps = [{"recover": {**STEPS[1]["recover"], "learning_rate": 1e30, "steps": 20}}]
    result = export(tiny("olmoe"), tmp_path / "out", steps=steps, more=[*HF, "-q"])
    assert result.exit_code == Diverged.exit_code == 8
    assert "became" in result.stderr
    assert "lower learning_rate (now 1e+30)" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


RECOVER: Any = STEPS[1]


@pytest.mark.parametrize(
    ("steps", "settings", "message"),
    [
        ([RECOVER], ["training.samples=4"], "--set training.samples=5, or lower held_out"),
        ([RECOVER], ["training.length=129"], "training.length 129 is longer than the 128"),
        ([RECOVER], ["training.text=nowhere.txt"], "training text nowhere.txt does not exist"),
        ([{"rtn": {}}, RECOVER], [], "put recover before gptq, awq, rtn and sparsify"),
        (
            [{"sparsify": {"method": "magnitude", "pattern": "2:4"}}, RECOVER],
            [],
            "put recover before gptq",
        ),
        ([{"expert_drop": {"keep": 4}}], [], "training is given, but no pass of the recipe trains"),
        ([RECOVER], ["recover.anneal=0.5"], "anneal is for experts that share a base"),
        (
            [RECOVER],
            ["recover.text_share=0.5"],
            "recover: text_share is for loss: distill; set that",
        ),
        ([RECOVER], ["recover.top_logits=8"], "recover: top_logits is for loss: distill; set that"),
        ([RECOVER], ["recover.tail=renormalize"], "recover: tail is for loss: distill; set that"),
        ([RECOVER], ["recover.lora_rank=4"], "recover: lora_rank is for train: lora; set that"),
        ([RECOVER], ["recover.steps=true"], "a number or a word, not true or false"),
        (
            [RECOVER],
            ["recover.loss=distill", "recover.top_logits=97"],
            "top_logits 97, but the vocabulary has 96 entries",
        ),
    ],
)
def test_unsuitable_recipes_are_refused(
    tiny: Make, tmp_path: Path, steps: list[Any], settings: list[str], message: str
) -> None:
    error = refuse(tiny("olmoe"), tmp_path / "out", steps, "hf", *LESS, *TRAINING, *settings)
    assert error.exit_code == 2
    assert message in str(error)
    assert not list(tmp_path.iterdir())


def test_memory_is_counted_before_any_work(tiny: Make, tmp_path: Path) -> None:
    step = Recover.model_validate({**QUICK_TRAINING, "device": "cpu"})
    model = open_checkpoint(str(tiny("olmoe"))).model
    texts = TextSizes(TextSize(0, 0), TextSize(20, 32))

    def estimate(**options: str) -> Estimate:
        changed = step.model_copy(update=options)
        return changed.estimate(PlannedStep(changed, model, model), texts)

    full = estimate()
    assert full.memory > 20 * model.parameters
    router = estimate(train="router")
    assert full.memory - router.memory > 15 * 0.9 * model.parameters
    asked = estimate(loss="distill")
    assert asked.disk - full.disk == _recover_teacher.estimate_teacher_bytes(16, 32, 32)
    large = tiny("olmoe", hidden_size=512, intermediate_size=512)
    result = export(large, tmp_path / "out", more=[*HF, "-q", "--max-memory", "700MB"])
    assert result.exit_code == 5
    assert "recover trains, which needs" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_texts_are_in_recipes_that_train() -> None:
    assert "training" not in recipe.parse("passes: [rtn]").render()
    parsed = recipe.parse("passes: [recover]", ["training.samples=40"])
    assert parsed.training is not None
    assert (parsed.training.samples, parsed.training.length) == (40, 512)
    assert recipe.parse(parsed.render()) == parsed
