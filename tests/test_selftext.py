"""Calibration text that the model writes itself."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from helpers import QUIET, run
from moe2edge.calibration import self_sampling
from moe2edge.calibration.sources import TextSource
from moe2edge.commands.run_inputs import open_kept_results
from moe2edge.runtime.memory import IMPORTED
from moe2edge.runtime.torch_runtime import open_source
from moe2edge.storage.checkpoint import open_checkpoint
from moe2edge.storage.export_folder import Resume
from moe2edge.testing import Make


def written(folder: Path, seed: int, samples: int = 6, length: int = 24) -> torch.Tensor:
    runtime: Any = open_source(folder, dtype="float32")
    model = open_checkpoint(str(folder)).model
    return self_sampling.write_text(runtime.model, model, 0, (samples, length), seed, QUIET)


def test_the_text_is_sampled_from_the_model_and_fixed_by_the_seed(tiny: Make) -> None:
    ids = written(tiny("olmoe"), 3)
    assert ids.shape == (6, 24)
    assert (ids[:, 0] == 0).all()
    assert torch.equal(ids, written(tiny("olmoe"), 3))
    assert not torch.equal(ids, written(tiny("olmoe"), 4))
    # More likely to the model than other tokens are, though sampled at a higher temperature.
    model: Any = open_source(tiny("olmoe"), dtype="float32").model
    other = torch.randint(0, 96, ids.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        losses = [float(model(tokens, labels=tokens).loss) for tokens in (ids, other)]
    assert losses[0] < losses[1] - 0.3


def test_the_choice_is_more_even_than_chance() -> None:
    use = torch.rand(40, 8, generator=torch.Generator().manual_seed(2)).pow(4)
    chosen = self_sampling.choose_balanced(use, 10)
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    best = float(use[chosen].sum(0).var())
    for seed in range(20):
        order = torch.randperm(40, generator=torch.Generator().manual_seed(seed))[:10]
        assert best < float(use[order].sum(0).var())


def test_the_choice_grows_by_the_least_squares_each_time() -> None:
    use = torch.rand(7, 3, generator=torch.Generator().manual_seed(5))
    chosen: list[int] = []
    for _ in range(3):
        rest = (n for n in range(7) if n not in chosen)
        chosen.append(min(rest, key=lambda n: float(use[[*chosen, n]].sum(0).square().sum())))
    assert self_sampling.choose_balanced(use, 3).tolist() == sorted(chosen)
    # With all of them there is nothing to choose.
    assert self_sampling.choose_balanced(use, 7).tolist() == list(range(7))
    assert len(list(itertools.combinations(range(7), 3))) == 35


@pytest.mark.parametrize("family", ["olmoe", "mixtral"])
@pytest.mark.slow
def test_export_without_a_text(tiny: Make, tmp_path: Path, family: str) -> None:
    out = tmp_path / "out"
    result = run(
        "export", str(tiny(family)), "-t", "gptq", "-o", str(out), "--calib", "self",
        "--eval", "none", "--set", "calibration.samples=4", "--set", "calibration.length=32",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    report = json.loads((out / "report.json").read_text())
    assert report["calibration"]["text"] == "self"
    assert report["calibration"]["samples"] == 4
    assert report["before"]["quality"] is None


def test_a_text_is_kept_for_the_same_source_and_options(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, written = open_checkpoint(str(tiny("olmoe"))), list[int]()
    original = self_sampling.write_text

    def write(*given: Any) -> torch.Tensor:
        written.append(given[4])
        return original(*given)

    monkeypatch.setattr(self_sampling, "write_text", write)

    def sample(seed: int, resume: Resume = "auto") -> torch.Tensor:
        kept = open_kept_results(checkpoint, tmp_path, resume)
        source = TextSource(text="self", samples=3, length=16, seed=seed)
        ids = self_sampling.sample_tokens(checkpoint, source, QUIET, kept).ids
        kept.save(tmp_path)
        return ids

    first = sample(1)
    assert torch.equal(sample(1), first)
    assert written == [1]
    other = sample(2)
    assert not torch.equal(other, first)
    assert torch.equal(sample(2), other)
    assert torch.equal(sample(1), first)
    assert written == [1, 2]
    sample(1, "never")
    assert written == [1, 2, 1]


def test_texts_that_cannot_be_sampled_are_refused(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["export", str(tiny("olmoe")), "-t", "gptq", "-o", str(tmp_path / "o")]
    command += ["--calib", "self", "--eval", "none"]
    result = run(*command, "--set", "calibration.length=400")
    assert result.exit_code == 2
    assert "longer than the 128 positions" in result.stderr
    small = type("memory", (), {"total": IMPORTED + 300_000})
    monkeypatch.setattr(psutil, "virtual_memory", lambda: small)
    result = run(*command, "--set", "calibration.length=32")
    assert result.exit_code == 5
    assert "runs the source" in result.stderr
    assert not (tmp_path / "o").exists()
