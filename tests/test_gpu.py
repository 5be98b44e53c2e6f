"""What runs on a GPU, against the same on the processor; skipped where torch finds no GPU."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from helpers import ignore, run, search
from moe2edge.calibration import walk
from moe2edge.model.family import FAMILIES
from moe2edge.model.model import Model
from moe2edge.numerics import metrics
from moe2edge.numerics.grid import Quantized
from moe2edge.numerics.rounding import round_to_nearest
from moe2edge.numerics.scheme import Scheme
from moe2edge.passes._recover_state import Saved, States
from moe2edge.passes.expert_replace import ExpertReplace
from moe2edge.passes.gptq import Gptq
from moe2edge.passes.recover import Recover
from moe2edge.pipeline import blockwise
from moe2edge.pipeline.registry import find_target
from moe2edge.runtime.int4 import PackedLinear
from moe2edge.runtime.load import build_transformers_model, load
from moe2edge.storage.checkpoint import BUILTIN, open_checkpoint
from moe2edge.testing import QUICK_TRAINING, InMemory, Make, make_learnable_text, quantize

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")

BFLOAT16 = torch.bfloat16
CALM: dict[str, Any] = {"dtype": "bfloat16", "initializer_range": 0.06}


def tokens(vocabulary: int, samples: int = 12, length: int = 48) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(1, vocabulary, (samples, length), generator=generator)


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.cpu().float() - wanted.float()).norm() / wanted.float().norm())


# ---- solving -----------------------------------------------------------------------------------


def solved(model: Model, ids: torch.Tensor, **options: Any) -> Model:
    step = Gptq.model_validate({"group_size": 32, **options}).resolve(model)
    after, changed, _ = blockwise.solve_blocks(
        model, ids, step.solver(model), InMemory(), ignore, "test"
    )
    assert sorted(changed) == sorted(step.schemes(model))
    step.check_result(model, after)
    return after


def integers(model: Model) -> dict[str, Quantized]:
    return {name: weight.quantized() for name, _, weight in model.tensors() if weight.scheme}


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("bits", [4, 3])
def test_integers_equal_those_of_the_cpu(tiny: Make, family: str, bits: int) -> None:
    """But for a few, as sums are rounded in another order and one rounding moves the next."""
    model = open_checkpoint(str(tiny(family))).model
    ids = tokens(model.vocabulary)
    there, here = (
        integers(solved(model, ids, bits=bits, compute="float32", device=device))
        for device in ("cuda", "cpu")
    )
    assert there.keys() == here.keys()
    same = []
    for name, found in there.items():
        assert found.q.device.type == "cpu"
        same.append(float((found.q == here[name].q).float().mean()))
    assert statistics.mean(same) > 0.9


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_gptq_on_the_gpu_is_as_near_to_the_source(compute: str) -> None:
    model = open_checkpoint(BUILTIN).model
    ids = tokens(model.vocabulary, 8, 128)

    def logits(of: Model) -> Any:
        return walk.compute_logits(of, walk.observe(of, ids, (), ignore, "test"))

    source = list(logits(model))
    kls = [
        metrics.measure(ids, logits(solved(model, ids, device=d, compute=compute)), source).kl
        for d in ("cuda", "cpu")
    ]
    assert kls[0] == pytest.approx(kls[1], rel=0.1)


def test_export_takes_the_gpu_and_repeats_itself(tmp_path: Path) -> None:
    files = []
    for name in ("a", "b"):
        out = tmp_path / name
        command = ["export", BUILTIN, "-t", "gptq", "-o", str(out), "--set"]
        result = run(*command, "calibration.samples=8", "--set", "calibration.length=128")
        assert result.exit_code == 0, result.stderr
        files.append((out / "model.safetensors").read_bytes())
        assert json.loads((out / "report.json").read_text())
    assert files[0] == files[1]
    assert torch.cuda.max_memory_allocated() > 0


# ---- running in 4 bits -------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 5, 33, 200])
@pytest.mark.parametrize(
    ("outs", "ins", "group"),
    [(16, 32, 32), (48, 128, 64), (64, 256, 128), (176, 96, 32), (32, 384, -1), (80, 512, -1)],
)
@torch.no_grad()
def test_linear(outs: int, ins: int, group: int, rows: int) -> None:
    weight = torch.randn(outs, ins, generator=torch.Generator().manual_seed(0))
    q = round_to_nearest(weight, Scheme(group_size=group))
    bias = torch.randn(outs).to(BFLOAT16)
    linear = PackedLinear([q], nn.Parameter(bias)).to("cuda")
    x = torch.randn(3, rows, ins).to(BFLOAT16)[::2]
    wanted = nn.functional.linear(x.float(), q.dequantize(), bias.float())
    found = linear(x.to("cuda"))
    assert found.dtype == BFLOAT16
    assert distance(found, wanted) < 1e-2


@pytest.mark.parametrize("family", sorted(FAMILIES))
@torch.no_grad()
def test_a_folder_runs_packed(tiny: Make, tmp_path: Path, family: str) -> None:
    model = quantize(open_checkpoint(str(tiny(family, **CALM))).model, Scheme(group_size=32))
    folder = tmp_path / "out"
    folder.mkdir()
    gptq = find_target("gptq")
    gptq.accepts(model)
    gptq.write(model, folder)
    before = torch.cuda.memory_allocated()
    loaded: Any = load(folder).to("cuda")
    assert str(loaded.moe2edge_packed).startswith("66 of 66") or family == "qwen2_moe"
    used = torch.cuda.memory_allocated() - before
    sizes = [t.nbytes for t in (*loaded.parameters(), *loaded.buffers())]
    assert used < 1.5 * sum(sizes) + 512 * len(sizes)
    exact: Any = build_transformers_model(model, torch.float32)
    ids = tokens(model.vocabulary, 2, 60)
    wanted = exact(ids, use_cache=False).logits
    found = loaded(ids.to("cuda"), use_cache=False).logits
    of_tokens = (found.cpu().float() - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    assert of_tokens.median() < 0.02
    greedy = loaded.generate(ids[:1, :8].to("cuda"), max_new_tokens=8, do_sample=False)
    assert greedy.shape == (1, 16)
    begun = loaded(ids[:, :50].to("cuda"), use_cache=True)
    step = loaded(ids[:, 50:51].to("cuda"), past_key_values=begun.past_key_values).logits
    assert distance(step[:, 0], wanted[:, 50]) < 0.03


# ---- training ----------------------------------------------------------------------------------


@pytest.mark.parametrize("train", ["full", "lora"])
def test_a_killed_training_resumes(tiny: Make, tmp_path: Path, train: str) -> None:
    """The optimizer is fused there, and keeps its count of steps beside the parameters."""
    model = open_checkpoint(str(tiny("olmoe", **CALM))).model
    step = Recover.model_validate({**QUICK_TRAINING, "train": train, "device": "cuda"})
    text = make_learnable_text()
    save, saves = States.save, []

    def killed(self: States, saved: Saved) -> None:
        save(self, saved)
        saves.append(saved.progress.step)
        if len(saves) == 2:
            raise RuntimeError("killed")

    def train_in(folder: Path) -> list[float]:
        folder.mkdir(exist_ok=True)
        outcome = search(step, model, training=text, scratch=folder)
        return [line["perplexity"] for line in outcome.figures["history"]]

    expected = train_in(tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(States, "save", killed)
        with pytest.raises(RuntimeError, match="killed"):
            train_in(tmp_path / "killed")
    assert train_in(tmp_path / "killed") == pytest.approx(expected, rel=1e-2)


def test_tied_experts_anneal(tiny: Make, tmp_path: Path) -> None:
    source = open_checkpoint(str(tiny("mixtral", **CALM))).model
    ids = tokens(source.vocabulary)
    share = ExpertReplace.model_validate({"with": "base", "budget": 0.8, "rank": 2})
    shared = search(share, source, ids).model
    found = []
    for device in ("cpu", "cuda"):
        options = {**QUICK_TRAINING, "anneal": 0.5, "device": device}
        step, folder = Recover.model_validate(options), tmp_path / device
        folder.mkdir()
        text = make_learnable_text()
        outcome = search(step, shared, ids, source, training=text, scratch=folder)
        found.append([line["perplexity"] for line in outcome.figures["history"]])
    assert found[1] == pytest.approx(found[0], rel=1e-2)
