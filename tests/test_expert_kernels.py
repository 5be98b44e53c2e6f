"""Experts whose rows torch's grouped product does not take, in every place where they run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers import export
from moe2edge.runtime.expert_kernels import takes_grouped_mm
from moe2edge.runtime.load import load
from moe2edge.runtime.torch_runtime import open_source
from moe2edge.testing import Make

IDS = torch.arange(1, 25)[None]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_the_rule_is_that_of_torch(dtype: str) -> None:
    for length in range(24, 41):
        rows = torch.zeros(4, length, dtype=getattr(torch, dtype))
        matrices = torch.zeros(2, 64, length, dtype=rows.dtype).transpose(-2, -1)
        ends = torch.tensor([2, 4], dtype=torch.int32)
        try:
            torch.nn.functional.grouped_mm(rows, matrices, offs=ends)
            taken = True
        except RuntimeError:
            taken = False
        assert takes_grouped_mm((64, length), dtype) == taken, length


@pytest.mark.parametrize(
    ("width", "dtype"), [(34, "float32"), (34, "bfloat16"), (36, "bfloat16"), (32, "float64")]
)
def test_models_are_run_with_the_logits_of_stock_transformers(
    width: int, dtype: str, tiny: Make
) -> None:
    folder = tiny("qwen3_moe", moe_intermediate_size=width, dtype=dtype)
    stock = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, experts_implementation="eager"
    )
    expected = stock(IDS).logits.float()
    for found in (open_source(folder, dtype=dtype).model, load(folder)):
        assert (found(IDS).logits.float() - expected).abs().max() < 0.1 * expected.abs().max()


def test_aligned_models_keep_the_faster_product(tiny: Make) -> None:
    model = open_source(tiny("qwen3_moe"), dtype="float32").model
    assert model.config._experts_implementation == "grouped_mm"


@pytest.mark.parametrize(
    ("target", "steps"),
    [
        ("hf", []),
        ("onnx:accuracy_level=0", []),
        pytest.param("hf:dequantize=true", [{"rtn": {}}], marks=pytest.mark.slow),
        pytest.param("hf", [{"expert_drop": {"keep": 3}}], marks=pytest.mark.slow),
        pytest.param(
            "hf",
            [{"expert_drop": {"keep": 4}}, {"recover": {"steps": 2, "batch": 4, "held_out": 4}}],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_exports_of_unaligned_experts(
    target: str, steps: list[dict[str, object]], tiny: Make, tmp_path: Path
) -> None:
    source = tiny("qwen3_moe", moe_intermediate_size=34, dtype="bfloat16")
    steps = [{"rtn": {"group_size": -1}} if "rtn" in step else step for step in steps]
    training = ["--set", "training.length=32", "--set", "training.samples=16"]
    more = training if any("recover" in step for step in steps) else []
    code, said, _ = export(source, tmp_path / "out", steps, target, *more)
    assert code == 0, said


def test_the_card_says_how_stock_transformers_opens_them(tiny: Make, tmp_path: Path) -> None:
    source = tiny("qwen3_moe", moe_intermediate_size=36, dtype="bfloat16")
    code, said, _ = export(source, tmp_path / "out", [], "hf")
    assert code == 0, said
    assert "experts_implementation='eager'" in (tmp_path / "out/README.md").read_text()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", experts_implementation="eager")
    assert model(IDS).logits.isfinite().all()
