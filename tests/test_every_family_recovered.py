"""Every MoE family of transformers: trained, in whole and in part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from every_family import keep_six, make_folder, run_stock, spread_families, walk_over
from helpers import search
from moe2edge.errors import Unsupported
from moe2edge.model.block import is_quantizable
from moe2edge.model.model import Model
from moe2edge.model.transformers_config import find_class
from moe2edge.passes._recover_parameters import (
    attach_trained,
    check_parameters,
    locate_parameters,
    select_parameters,
)
from moe2edge.passes._recover_selection import Selection
from moe2edge.passes._recover_teacher import compute_text_loss
from moe2edge.passes._recover_trainer import choose_rows
from moe2edge.passes.recover import Recover
from moe2edge.pipeline.contract import Outcome
from moe2edge.runtime.load import build_transformers_model
from moe2edge.storage.checkpoint import open_checkpoint
from moe2edge.testing import QUICK_TRAINING, InMemory, read_all_numbers
from moe2edge.testing import make_learnable_text as text

# Kinds of experts, of routers and of mixers, each once.
FAST = ("deepseek_v3", "gpt_oss", "nemotron_h", "qwen3_next")
MARKED = spread_families(FAST, 1)


def recover(model: Model, **options: Any) -> Outcome:
    step = Recover.model_validate({**QUICK_TRAINING, "steps": 2, "eval_every": 1, **options})
    step.check(model)
    return search(step, model, training=text())


@pytest.mark.parametrize("family", MARKED)
def test_every_parameter_has_its_place(family: str, tmp_path: Path) -> None:
    """What is attached by the names of transformers is what transformers' model then has."""
    make_folder(tmp_path / "source", family)
    model = keep_six(open_checkpoint(tmp_path / "source").model)
    loaded: Any = build_transformers_model(model, torch.float32)
    check_parameters(model, dict(loaded.named_parameters()))
    draw = torch.Generator().manual_seed(0)
    state = {name: torch.randn(p.shape, generator=draw) for name, p in loaded.named_parameters()}
    attached = attach_trained(model, state, InMemory())
    again: Any = build_transformers_model(attached, torch.float32)
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, state[name]), name
    for train, kinds in (("experts", {"experts", "router"}), ("router", {"router"})):
        names = select_parameters(model, Selection(train, anneals=False).takes_anywhere)
        places = locate_parameters(model)
        roles = {role for name in names for role in places[name].roles}
        assert {role.partition(".")[0] for role in roles} == kinds
        matrices = {role for _, role, _ in model.tensors() if role.startswith("experts.")}
        assert {role for role in roles if role.startswith("experts.")} == (
            matrices if train == "experts" else set()
        )


@pytest.mark.parametrize("family", MARKED)
def test_held_out_text_becomes_likelier(family: str, tmp_path: Path) -> None:
    make_folder(tmp_path / "source", family)
    model = keep_six(open_checkpoint(tmp_path / "source").model)
    outcome = recover(model, steps=6, learning_rate=3e-3)
    perplexity = outcome.figures["perplexity"]
    assert perplexity["after"] < perplexity["before"]
    loaded: Any = build_transformers_model(outcome.model, torch.float32)
    logits = loaded(text()[-4:], use_cache=False).logits.detach()
    assert float(compute_text_loss(text()[-4:], logits).exp()) == pytest.approx(
        perplexity["after"], rel=1e-4
    )
    assert (run_stock(loaded) - walk_over(outcome.model)).abs().max() <= 1e-5


@pytest.mark.parametrize("family", MARKED)
def test_adapters_are_trained_or_refused(family: str, tmp_path: Path) -> None:
    make_folder(tmp_path / "source", family)
    model = open_checkpoint(tmp_path / "source").model
    options: dict[str, Any] = {"train": "lora", "lora_rank": 2}
    if family == "nemotron_h":
        with pytest.raises(Unsupported, match=r"lora does not work on nemotron_h.*set train: exp"):
            recover(model, **options)
        return
    outcome = recover(model, steps=6, learning_rate=3e-3, **options)
    if not outcome.figures["best_step"]:  # nothing beat the random model
        assert family in ("hy_v3",)
        return
    before, after = read_all_numbers(model), read_all_numbers(outcome.model)
    changed = {role for (n, role), old in before.items() if not torch.equal(old, after[n, role])}
    assert changed
    assert all(is_quantizable(role) for role in changed)
    assert {"experts.0.up", "experts.0.down"} < changed


@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_next"])
def test_training_equals_the_obvious_loop(family: str, tmp_path: Path) -> None:
    """By transformers' model as it loads itself, and torch's optimizer."""
    make_folder(tmp_path / "source", family)
    model = open_checkpoint(tmp_path / "source").model
    outcome = recover(model, steps=3, eval_every=3, clip=1e9, learning_rate=1e-3, warmup=0.0)
    kind = find_class(model.architecture.config)
    stock: Any = kind.from_pretrained(tmp_path / "source", dtype=torch.float32).eval()
    matrices = [p for p in stock.parameters() if p.ndim > 1]
    vectors = [p for p in stock.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    for step in range(3):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * 0.5 * (1 + torch.tensor(torch.pi * step / 3).cos().item())
        ids = text()[choose_rows(step, 4, 16, 0)]
        logits = stock(ids, use_cache=False).logits
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        torch.autograd.backward(loss)
        optimizer.step()
    assert outcome.figures["best_step"] == 3
    loaded: Any = build_transformers_model(outcome.model, torch.float32)
    trained, expected = dict(loaded.named_parameters()), dict(stock.named_parameters())
    assert trained.keys() == expected.keys() == locate_parameters(model).keys()
    for name, numbers in expected.items():
        assert (trained[name] - numbers).abs().max() < 2e-5, name
