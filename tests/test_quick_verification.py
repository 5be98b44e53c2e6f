"""`export --verify quick`: fewer prompts, the same faults found, and told apart."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helpers import NO_CHECK, run, write_text
from moe2edge.evaluation import verify
from moe2edge.model.model import Model
from moe2edge.targets.onnx import Onnx
from moe2edge.testing import Make
from test_written_files import NOT_WRITTEN, flip


def export(folder: Path, out: Path, *more: object) -> tuple[int, str, Any]:
    """Export quickly; return exit code, what was printed, and the report of the folder."""
    text = write_text(out.with_suffix(".txt"))
    sizes = ("--set", "evaluation.samples=3", "--set", "evaluation.length=64")
    done = run(
        "export", folder, "-t", "onnx", "-o", out, "-r", "w4-rtn", "--eval", text, *sizes, NO_CHECK,
        *more,
    )  # fmt: skip
    report = json.loads((out / "report.json").read_text()) if done.exit_code == 0 else None
    return done.exit_code, done.output, report


@pytest.fixture
def prompts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the prompts of each run of recorded tokens."""
    found: list[int] = []
    whole: Callable[..., Any] = verify.run_recorded_tokens

    def count(reference: Any, runtime: Any) -> Any:
        found.append(len(reference.ids))
        return whole(reference, runtime)

    monkeypatch.setattr(verify, "run_recorded_tokens", count)
    return found


def test_a_quick_one_runs_one_prompt_and_says_so(
    tiny: Make, tmp_path: Path, prompts: list[int]
) -> None:
    out = tmp_path / "out"
    code, printed, report = export(tiny("olmoe"), out, "--verify", "quick")
    assert code == 0, printed
    assert prompts == [1, 1]  # with float32 activations, and as shipped
    assert "checking the tensors" not in printed
    assert "onnx: quick verification (every file, and logits of one prompt" in printed
    assert report["verification"] == "quick"
    (row,) = report["results"]
    assert row["quality"] is None
    assert row["parity"]["positions"] == 33
    card = (out / "README.md").read_text()
    assert "Quick verification (every file, and logits of one prompt in its runtime" in card
    # Behind it, verify is as it always is.
    prompts.clear()
    done = run("verify", out, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["parity"]["positions"] == 66
    assert found["parity"]["far"] is not None
    assert prompts == [2, 2]


def test_a_full_one_says_so(builtin_out: Path) -> None:
    assert json.loads((builtin_out / "onnx" / "report.json").read_text())["verification"] == "full"
    card = (builtin_out / "gptq" / "README.md").read_text()
    assert "Full verification (every file, every tensor, and logits in its runtime)" in card


def swap_experts(model: Model) -> Model:
    """Return the model with the experts of a block in another order."""
    block, layer = model.moe_blocks[-1]
    return model.replace_block(replace(block, mlp=replace(layer, experts=layer.experts[::-1])))


def test_a_quick_one_finds_faults(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that the disk changed, and one that was written wrong, with the digest to match."""
    write: Callable[..., Any] = Onnx.write

    def write_then_flip(target: Onnx, model: Model, folder: Path) -> Any:
        digests = write(target, model, folder)
        flip(folder / "model.onnx.data")
        return digests

    def write_wrongly(target: Onnx, model: Model, folder: Path) -> Any:
        return write(target, swap_experts(model), folder)

    monkeypatch.setattr("moe2edge.commands.export.try_outputs", lambda *_: {})
    for hook, expected, message in (
        (write_then_flip, 1, f"model.onnx.data {NOT_WRITTEN}"),
        (write_wrongly, 7, "logits of the output differ from the reference by"),
    ):
        monkeypatch.setattr(Onnx, "write", hook)
        code, printed, _ = export(tiny("olmoe"), tmp_path / "out", "--verify", "quick")
        assert (code, message in printed) == (expected, True), printed
        assert not (tmp_path / "out").exists()


def test_plan_knows_it() -> None:
    found = {}
    for extent in ("full", "quick"):
        done = run("plan", "builtin:tiny-moe", "-t", "onnx", "--verify", extent, "--json")
        (plan,) = json.loads(done.stdout)["plans"]
        found[extent] = {stage["name"]: stage["seconds"] for stage in plan["export"]["stages"]}
    assert found["full"].keys() - found["quick"].keys() == {"checking onnx"}
    assert found["quick"]["running onnx"] < found["full"]["running onnx"] / 2
