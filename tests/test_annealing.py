"""Annealing: experts that share a base are trained from what they were to what is exported."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import NO_TOKENS, QUIET, each_family, make_context, search, slow_except
from moe2edge.calibration.tokens import Tokens
from moe2edge.errors import DoesNotFit, InputError
from moe2edge.model.edits import materialize
from moe2edge.model.experts import Tied
from moe2edge.model.model import Model
from moe2edge.passes._recover_teacher import Objective, compute_text_loss
from moe2edge.passes._recover_trainer import Trainer, TrainerSettings, compute_original_share
from moe2edge.passes.expert_replace import ExpertReplace
from moe2edge.passes.recover import Recover
from moe2edge.pipeline import recipe
from moe2edge.pipeline.contract import PassContext
from moe2edge.pipeline.facts import UntiedModel
from moe2edge.pipeline.runner import run_passes
from moe2edge.progress import Reporter
from moe2edge.runtime.load import build_transformers_model
from moe2edge.runtime.memory import Memory
from moe2edge.storage.checkpoint import open_checkpoint
from moe2edge.storage.work_folder import WorkFolder
from moe2edge.testing import QUICK_TRAINING, Make, add_copies, read_all_numbers
from moe2edge.testing import make_learnable_text as text


class Leaning(torch.nn.Module):
    """A model that notes how much of its originals it answered, in training and in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = torch.nn.Parameter(torch.zeros(96))
        self.original_share = 0.0
        self.forgot: list[float] = []
        self.seen: list[tuple[bool, float]] = []

    def forget_originals(self) -> None:
        self.forgot.append(self.original_share)

    def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
        self.seen.append((torch.is_grad_enabled(), self.original_share))
        return SimpleNamespace(logits=self.scores.expand(*input_ids.shape, 96))


def settings(**changes: Any) -> TrainerSettings:
    step = Recover.model_validate({**QUICK_TRAINING, **changes})
    return step._make_settings()


def test_original_weights_fade_out_step_by_step() -> None:
    given = settings(steps=10, anneal=0.5, eval_every=1)
    assert [compute_original_share(step, given) for step in range(8)] == pytest.approx(
        [1, 0.8, 0.6, 0.4, 0.2, 0, 0, 0]
    )
    model = Leaning()
    trainer = Trainer(
        model, dict(model.named_parameters()), text(), text(3), Objective(), given, None, QUIET,
        [model],
    )  # fmt: skip
    found = trainer.run()
    # The first two are thrown away, to see how long they take.
    trained_at = [share for training, share in model.seen if training]
    assert trained_at == pytest.approx([1, 1, 1, 0.8, 0.6, 0.4, 0.2, 0, 0, 0, 0, 0])
    assert {share for training, share in model.seen if not training} == {0}
    assert model.forgot == [0.0] * 5
    assert [line.step for line in found.progress.history] == [0, 5, 6, 7, 8, 9, 10]


def test_annealing_without_shared_experts_is_refused(tiny: Make) -> None:
    with pytest.raises(InputError, match="anneal is for experts that share a base"):
        Recover(anneal=0.5).check(open_checkpoint(str(tiny("olmoe"))).model)


def sharing(tiny: Make, family: str, **options: Any) -> tuple[Model, Model]:
    """Return a source, and a model some of whose experts share bases."""
    model = open_checkpoint(str(tiny(family))).model
    step = ExpertReplace.model_validate({"with": "base", "budget": 0.6, **options}).resolve(model)
    return model, search(step, model, text()).model


@pytest.mark.parametrize("family", each_family("qwen2_moe"))
@pytest.mark.parametrize("rank", [0, 3])
def test_annealing_begins_at_the_source_and_ends_at_the_exported_model(
    tiny: Make, family: str, rank: int
) -> None:
    """With a share of 1 the model is the source, with 0 what will be written."""
    source, model = sharing(tiny, family, rank=rank)
    context = make_context(model, NO_TOKENS, source, training=text())
    loaded: Any = build_transformers_model(model, torch.float32)
    ids = text(2)
    with torch.no_grad():
        plain = loaded(ids).logits
        parts = Recover(anneal=0.5)._begin_annealing(context, loaded)
        assert parts
        for share, twin in ((1.0, source), (0.0, model)):
            for part in parts:
                part.original_share = share
            expected = build_transformers_model(twin, torch.float32)(ids).logits
            assert torch.allclose(loaded(ids).logits, expected, atol=1e-4)
        for part in parts:
            part.original_share = 0.5
        between = loaded(ids).logits
        for part in parts:
            part.forget_originals()
        assert torch.allclose(loaded(ids).logits, plain, atol=1e-5)
    assert (between - plain).abs().max() > 1e-3


def test_partly_annealed_weights_are_a_weighted_mean(tiny: Make) -> None:
    """``W_eff = s W + (1 - s) (B + second @ first)``, matrix by matrix."""
    source, model = sharing(tiny, "mixtral", rank=2)
    context = make_context(model, NO_TOKENS, source, training=text())
    loaded: Any = build_transformers_model(model, torch.float32)
    parts = Recover(anneal=0.5)._begin_annealing(context, loaded)
    block, layer = next((b, m) for b, m in model.moe_blocks if m.is_tied)
    for part in parts:
        part.original_share = 0.3
    mixed = loaded.model.layers[block.index].mlp.experts
    row = next(n for n, row in enumerate(layer.rows) if isinstance(row, Tied))
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(0))
    before, whole = source.moe_blocks[block.index][1], materialize(model).moe_blocks
    after = whole[block.index][1].experts[row]
    gate, up, down = (
        0.3 * getattr(before.experts[row], part).load() + 0.7 * getattr(after, part).load()
        for part in ("gate", "up", "down")
    )
    expected = (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T
    with torch.no_grad():
        assert torch.allclose(mixed.compute_output(row, x), expected, atol=1e-5)


@pytest.mark.parametrize("anneal", slow_except([None, 0.5], 0.5))
@pytest.mark.parametrize("rank", [0, 3])
def test_tied_experts_are_trained_and_returned(tiny: Make, anneal: float | None, rank: int) -> None:
    """What is held-out perplexity in training is that of what is returned."""
    source, model = sharing(tiny, "olmoe", rank=rank)
    step = Recover.model_validate({**QUICK_TRAINING, "steps": 12, "anneal": anneal})
    step.check(model)
    context = make_context(model, NO_TOKENS, source, training=text())
    outcome = step.search(context)
    history = outcome.figures["history"]
    assert outcome.figures["best_step"] > 0
    loaded: Any = build_transformers_model(outcome.model, torch.float32)
    with torch.no_grad():
        held_out = text()[-4:]
        loss = compute_text_loss(held_out, loaded(held_out).logits)
    best = min(line["perplexity"] for line in history)
    assert math.exp(float(loss)) == pytest.approx(best, rel=1e-4)
    roles = {
        role for (_, role), now in read_all_numbers(outcome.model).items() if "members" in role
    }
    assert bool(roles) == bool(rank)
    before = read_all_numbers(model)
    assert all(
        not torch.equal(now, before[k]) for k, now in read_all_numbers(outcome.model).items()
    )


def test_resumed_annealing_ends_with_the_same_bits(tiny: Make, tmp_path: Path) -> None:
    source, model = sharing(tiny, "olmoe", rank=2)
    step = Recover.model_validate({**QUICK_TRAINING, "steps": 8, "anneal": 0.6})

    def run(folder: Path, reporter: Reporter) -> Model:
        folder.mkdir(exist_ok=True)
        return search(
            step, model, NO_TOKENS, source, reporter, training=text(), scratch=folder
        ).model

    expected = read_all_numbers(run(tmp_path / "whole", QUIET))

    def stop(label: str, done: int, *_: object) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", Reporter(lambda _: None, stop))
    found = read_all_numbers(run(tmp_path / "killed", QUIET))
    assert all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.parametrize(
    ("rank", "anneal", "adapters"), [(3, None, False), (0, None, True), (0, 0.5, False)]
)
def test_adapters_skip_matrices_that_tied_experts_share(
    tiny: Make, rank: int, anneal: float | None, adapters: bool
) -> None:
    """With factors, and while annealing; what is trained is what comes back."""
    source, model = sharing(tiny, "qwen3_moe", rank=rank)
    one = source.blocks[1].keep_experts((2,), clamp_top_k=True)
    source, model = source.replace_block(one), model.replace_block(one)
    options = {
        **QUICK_TRAINING,
        "train": "lora",
        "anneal": anneal,
        "lora_rank": 4,
        "learning_rate": 1e-2,
    }
    step = Recover.model_validate(options)
    step.check(model)
    context = make_context(model, NO_TOKENS, source, training=text())
    outcome = step.search(context)
    assert outcome.figures["best_step"] > 0
    before = read_all_numbers(model)
    changed = {
        role.partition(".")[0]
        for (index, role), now in read_all_numbers(outcome.model).items()
        if index is not None and not torch.equal(now, before[index, role])
    }
    assert changed == {"attention", "dense"} | ({"members"} if rank else set()) | (
        {"experts"} if adapters else set()
    )
    loaded: Any = build_transformers_model(outcome.model, torch.float32)
    with torch.no_grad():
        loss = compute_text_loss(text()[-4:], loaded(text()[-4:]).logits)
    best = min(line["perplexity"] for line in outcome.figures["history"])
    assert math.exp(float(loss)) == pytest.approx(best, rel=1e-4)


def test_factors_alone_are_annealed_in_every_layer(tiny: Make) -> None:
    """Also where one expert of a layer is, whose place in the layer nobody shares."""
    source, model = sharing(tiny, "olmoe", **{"with": "svd", "budget": 0.9, "rank": 4})
    context = make_context(model, NO_TOKENS, source, training=text())
    parts = Recover(anneal=0.5)._begin_annealing(
        context, build_transformers_model(model, torch.float32)
    )
    assert len(parts) == sum(layer.is_tied for _, layer in model.moe_blocks) > 0


def test_memory_is_checked_again_before_training(tiny: Make) -> None:
    source, model = sharing(tiny, "olmoe")
    context = make_context(model, NO_TOKENS, source, training=text(), memory=Memory(limit=10**8))
    with pytest.raises(DoesNotFit, match=r"recover trains, which needs .* GB"):
        Recover.model_validate({**QUICK_TRAINING, "anneal": 0.5}).search(context)


def test_adapter_rank_above_that_of_the_matrices(tiny: Make) -> None:
    with pytest.raises(InputError, match=r"lora_rank 100, but .* at most 32"):
        Recover(train="lora", lora_rank=100).check(open_checkpoint(str(tiny("olmoe"))).model)


def test_annealing_begins_with_what_was_replaced(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is not the source where experts were trained before they shared a base."""
    shown: list[tuple[PassContext, Model]] = []
    begin = Recover._begin_annealing

    def watched(step: Recover, context: PassContext, loaded: Any) -> Any:
        if step.anneal:
            shown.append((context, context.model))
        return begin(step, context, loaded)

    monkeypatch.setattr(Recover, "_begin_annealing", watched)
    model = open_checkpoint(str(tiny("olmoe"))).model
    passes = [
        {"recover": {**QUICK_TRAINING, "learning_rate": 0.01}},
        {"expert_replace": {"with": "base", "budget": 0.6}},
        {"recover": {**QUICK_TRAINING, "anneal": 0.5}},
    ]
    parsed = recipe.parse(json.dumps({"passes": passes})).resolve(model)
    tokens = Tokens(text(), "text", "none")
    run_passes(model, parsed, tokens, WorkFolder(tmp_path), QUIET, training=tokens)
    ((context, shared),) = shown
    left = context.facts.get(UntiedModel)
    assert left is not None
    assert not left.model.tied_count
    before, after = left.model.moe_blocks[0][1], model.moe_blocks[0][1]
    assert not torch.equal(before.experts[0].up.load(), after.experts[0].up.load())
    loaded: Any = build_transformers_model(shared, torch.float32)
    with torch.no_grad():
        for part in begin(Recover(anneal=0.5), context, loaded):
            part.original_share = 1.0
        expected = build_transformers_model(left.model, torch.float32)(text(2)).logits
        assert torch.allclose(loaded(text(2)).logits, expected, atol=1e-4)


def test_annealing_begins_with_the_model_before_experts_were_tied(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not with the source, nor with what a pass made of the model after that."""
    shown: list[UntiedModel | None] = []
    begin = Recover._begin_annealing

    def watched(step: Recover, context: PassContext, loaded: Any) -> Any:
        shown.append(context.facts.get(UntiedModel))
        return begin(step, context, loaded)

    monkeypatch.setattr(Recover, "_begin_annealing", watched)
    model = open_checkpoint(str(tiny("mixtral"))).model
    passes = [
        {"expert_drop": {"keep": 5}},
        {"expert_merge": {"method": "m-smoe", "keep": 2, "align": False}},
        {"block_drop": {"drop": 1}},
        {"recover": {**QUICK_TRAINING, "steps": 2, "anneal": 0.5}},
    ]
    parsed = recipe.parse(json.dumps({"passes": passes})).resolve(model)
    tokens = Tokens(text(), "text", "none")
    run_passes(model, parsed, tokens, WorkFolder(tmp_path), QUIET, training=tokens)
    (left,) = shown
    assert left is not None
    assert left.model.expert_counts == (5, 5, 5)
    assert not left.model.tied_count


@pytest.mark.parametrize("method", ["m-smoe", "ream", "hc-smoe"])
def test_annealing_follows_reordered_neurons(
    tiny: Make, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experts that are one, with neurons in any order, are that one at every share."""
    model = add_copies(open_checkpoint(str(tiny("mixtral"))).model, shuffled=True)
    shares = {1.0: 0.0, 0.5: 0.0, 0.0: 0.0}
    begin = Recover._begin_annealing

    def watched(step: Recover, context: PassContext, loaded: Any) -> Any:
        parts = begin(step, context, loaded)
        with torch.no_grad():
            expected = build_transformers_model(model, torch.float32)(text(2)).logits
            for share in shares:
                for part in parts:
                    part.original_share = share
                shares[share] = float((loaded(text(2)).logits - expected).abs().max())
        return parts

    monkeypatch.setattr(Recover, "_begin_annealing", watched)
    passes = [
        {"expert_merge": {"method": method, "keep": 2, "align": True, "routing": "members"}},
        {"recover": {**QUICK_TRAINING, "steps": 2, "anneal": 0.5}},
    ]
    parsed = recipe.parse(json.dumps({"passes": passes})).resolve(model)
    tokens = Tokens(text(), "text", "none")
    run_passes(model, parsed, tokens, WorkFolder(tmp_path), QUIET, training=tokens)
    assert max(shares.values()) < 1e-4, shares
