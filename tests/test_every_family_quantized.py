"""Every MoE family of transformers: rounded, written as GPTQ, and loaded again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import moe2edge
from every_family import GENERIC, make_folder
from moe2edge.evaluation import verify
from moe2edge.model.model import Model
from moe2edge.numerics.rounding import round_to_nearest
from moe2edge.passes.rtn import Rtn
from moe2edge.pipeline.stages import plan_passes
from moe2edge.storage.checkpoint import open_checkpoint
from moe2edge.storage.solved_blocks import attach_numbers
from moe2edge.targets.gptq import Gptq
from test_every_family import IDS, run_stock, walk_over


def quantize(model: Model, step: Rtn) -> Model:
    """Round as the pass does, in memory."""
    step = step.resolve(model)
    plan_passes([step], model)
    schemes = step.schemes(model)
    for block in model.blocks:
        numbers = {
            role: round_to_nearest(weight.load().float(), scheme)
            for role, weight in block.weights()
            if (scheme := schemes.get(model.disk_name(block, role)))
        }
        model = model.replace_block(attach_numbers(block, numbers))
    return model


def write(model: Model, folder: Path) -> Gptq:
    folder.mkdir()
    target = Gptq()
    target.accepts(model)
    target.write(model, folder)
    return target


@pytest.mark.parametrize("family", GENERIC)
def test_a_family_is_rounded_written_and_loaded(family: str, tmp_path: Path) -> None:
    make_folder(tmp_path / "source", family)
    model = quantize(open_checkpoint(tmp_path / "source").model, Rtn(group_size=-1))
    target = write(model, tmp_path / "out")
    verify.audit(target, tmp_path / "out", target.stored(model))
    target.check_derived(tmp_path / "out")
    loaded = moe2edge.load(tmp_path / "out", dtype=torch.float32)
    expected = walk_over(model)
    assert (run_stock(loaded) - expected).abs().max() <= 1e-5
