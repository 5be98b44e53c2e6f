"""The built-in model: a real language model, and the main job on it."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers import run
from moe2edge.model.block import is_quantizable
from moe2edge.numerics.grid import Quantized
from moe2edge.pipeline import registry
from moe2edge.storage.checkpoint import BUILTIN, BUILTIN_FOLDER, open_checkpoint


def test_it_has_the_promised_shape() -> None:
    model = open_checkpoint(BUILTIN).model
    assert model.family.model_type == "olmoe"
    assert len(model.moe_blocks) >= 6
    assert all(n >= 16 for n in model.expert_counts)
    assert all(m.router.top_k >= 2 and not m.router.renormalize for _, m in model.moe_blocks)
    assert (BUILTIN_FOLDER / "model.safetensors").stat().st_size <= 28_000_000


def test_stock_transformers_loads_all_of_it() -> None:
    model, info = AutoModelForCausalLM.from_pretrained(BUILTIN_FOLDER, output_loading_info=True)
    assert not any(info.values())
    assert model.dtype == torch.bfloat16


@pytest.mark.slow
def test_every_selected_tensor_has_four_bits_and_the_same_integers(builtin_out: Path) -> None:
    onnx, gptq = (dict(registry.find_target(t).tensors(builtin_out / t)) for t in ("onnx", "gptq"))
    expected = list(open_checkpoint(BUILTIN).model.tensors())
    assert {name for name, _, _ in expected} == set(onnx) == set(gptq)
    for name, role, _ in expected:
        a, b = onnx[name], gptq[name]
        assert isinstance(a, Quantized) == isinstance(b, Quantized) == is_quantizable(role)
        if isinstance(a, Quantized) and isinstance(b, Quantized):
            assert a.scheme.name == "w4a16"
            assert torch.equal(a.q, b.q)
            assert torch.equal(a.scales, b.scales)


@pytest.mark.slow
def test_quantization_costs_little(builtin_out: Path) -> None:
    report = json.loads((builtin_out / "onnx" / "report.json").read_text())
    source = report["before"]["quality"]["perplexity"]
    for row in (report["after"], *report["results"]):
        assert row["quality"]["perplexity"] < 1.02 * source
        assert row["quality"]["kl"] < 0.03
    # Code that it never saw; a trigram model of the same training text has 261 on all of it.
    assert source < 40


@pytest.mark.slow
def test_the_runtime_agrees_with_pytorch_over_32_cached_steps(builtin_out: Path) -> None:
    report = json.loads((builtin_out / "onnx" / "report.json").read_text())
    for row in report["results"]:
        assert row["parity"]["positions"] == 2 * 33
        assert row["parity"]["exact"] < 1e-4


@pytest.mark.slow
def test_it_continues_python(builtin_out: Path) -> None:
    result = run("generate", str(builtin_out / "onnx"), "def read_json(path):")
    assert result.exit_code == 0, result.output
    # Greedy, so the same every time; how good it is, the model's card says.
    first_line, rest = result.stdout.split("\n", 1)
    assert first_line.startswith("def read_json(path):")
    assert ast.parse(first_line if first_line.endswith("pass") else f"{first_line}\n    pass")
    assert len(rest) > 40


@pytest.mark.slow
@pytest.mark.parametrize("how", ["gptq", "awq"])
@pytest.mark.parametrize(
    ("name", "experts"), [("e", [12] * 6), ("l", [16] * 5), ("b", [16] * 5)], ids=["e", "l", "b"]
)
def test_recipes_of_the_first_paper(
    tmp_path: Path, name: str, how: str, experts: list[int]
) -> None:
    """Expert, Layer and Block Drop, each with GPTQ and AWQ (arXiv 2406.02500, table 3)."""
    out = tmp_path / "out"
    result = run(
        "export", BUILTIN, "-t", "gptq", "-o", str(out), "-r", f"{name}-{how}", "--json",
        "--set", "calibration.samples=12", "--set", "calibration.length=128",
        "--set", "evaluation.samples=2", "-q",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert [step["name"] for step in report["steps"]][1:] == [how]
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["model"]["expert_counts"] == experts
    assert report["results"][0]["parity"]["exact"] < 1e-4
