"""Training after trimming: against an obvious loop, in parts, killed and gone on with."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import QUIET, compute_logits, each_family, search
from moe2edge.calibration import walk
from moe2edge.errors import InputError, Moe2EdgeError
from moe2edge.model.block import is_quantizable
from moe2edge.model.family import FAMILIES
from moe2edge.model.model import Model
from moe2edge.passes import _recover_lora, _recover_parameters, _recover_teacher
from moe2edge.passes import _recover_lora as lora
from moe2edge.passes import _recover_teacher as teacher
from moe2edge.passes._recover_state import States
from moe2edge.passes._recover_teacher import Objective, Teacher, compute_distance, compute_text_loss
from moe2edge.passes._recover_trainer import choose_rows
from moe2edge.passes.expert_replace import ExpertReplace
from moe2edge.passes.recover import Recover
from moe2edge.pipeline.contract import Outcome, PassContext
from moe2edge.runtime.decoder_blocks import load_block_state
from moe2edge.runtime.load import build_transformers_model
from moe2edge.storage.checkpoint import open_checkpoint
from moe2edge.testing import QUICK_TRAINING, InMemory, Make, read_all_numbers
from moe2edge.testing import make_learnable_text as text


def trimmed(tiny: Make, family: str = "olmoe") -> Model:
    """Four of six experts in each block."""
    model = open_checkpoint(str(tiny(family))).model
    for block in model.blocks:
        model = model.replace_block(block.keep_experts((0, 2, 3, 5)))
    return model


def replaced(model: Model, keep: Sequence[int] = (5, 4)) -> Model:
    """With linear maps and then constants in the place of experts, of which so many stay."""
    kinds: tuple[dict[str, Any], ...] = (
        {"with": "linear", "rank": 3, "min_tokens": 0},
        {"with": "constant"},
    )
    for kind, count in zip(kinds, keep, strict=False):
        step = ExpertReplace.model_validate({**kind, "keep": count})
        model = search(step, model, text()).model
    return model


def recovered(model: Model, folder: Path | None = None, **options: Any) -> Outcome:
    step = Recover.model_validate({**QUICK_TRAINING, **options})
    step.check(model)
    return search(step, model, training=text(), scratch=folder)


# ---- the training --------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["text", "distill"])
def test_held_out_text_becomes_likelier(tiny: Make, loss: str) -> None:
    share = 0.5 if loss == "distill" else 0.0
    outcome = recovered(trimmed(tiny), loss=loss, text_share=share, steps=20)
    history = outcome.figures["history"]
    assert [line["step"] for line in history] == list(range(0, 21, 2))
    assert history[-1]["loss"] < 0.9 * history[1]["loss"]
    assert history[-1]["perplexity"] < 0.7 * history[0]["perplexity"]
    best = min(history, key=lambda line: line["perplexity"])
    assert outcome.figures["best_step"] == best["step"]
    assert f"{best['perplexity']:.4f} after, at step {best['step']} of 20" in outcome.notes[0]


def test_training_equals_the_obvious_loop(tiny: Make) -> None:
    """By transformers' model as it loads itself, torch's optimizer and transformers' schedule."""
    from transformers import AutoModelForCausalLM, get_cosine_schedule_with_warmup

    folder = tiny("qwen3_moe")
    outcome = recovered(
        open_checkpoint(str(folder)).model, warmup=0.4, eval_every=6, weight_decay=0.1, clip=0.5
    )
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=3e-3)
    schedule = get_cosine_schedule_with_warmup(optimizer, 2, 6)
    for step in range(6):
        ids = text()[choose_rows(step, 4, 16, 0)]
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        schedule.step()
    state = model.state_dict()
    assert outcome.figures["best_step"] == 6
    for (index, role), found in read_all_numbers(outcome.model).items():
        if index is None:
            assert (found - state[role]).abs().max() < 1e-5
        elif role.startswith(("attention", "norms")):
            kind, _, rest = role.partition(".")
            name = f"self_attn.{rest}" if kind == "attention" else rest
            assert (found - state[f"model.layers.{index}.{name}"]).abs().max() < 1e-5
        elif role == "experts.4.up":
            fused = state[f"model.layers.{index}.mlp.experts.gate_up_proj"]
            assert (found - fused[4, 32:]).abs().max() < 1e-5


def test_parts_of_a_step_add_up(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = recovered(trimmed(tiny), batch=5, steps=2)
    monkeypatch.setattr("moe2edge.passes._recover_trainer.TOKENS_AT_ONCE", 64)  # two samples
    parts = recovered(trimmed(tiny), batch=5, steps=2)
    for (key, one), other in zip(
        read_all_numbers(whole.model).items(), read_all_numbers(parts.model).values(), strict=True
    ):
        assert (one - other).abs().max() < 2e-3, key
    losses = [outcome.figures["history"][-1]["loss"] for outcome in (whole, parts)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_every_sample_has_its_turn() -> None:
    taken = [row for step in range(7) for row in choose_rows(step, 3, 7, 5)]
    for epoch in range(3):
        assert sorted(taken[7 * epoch : 7 * epoch + 7]) == list(range(7))
    assert taken[:7] != taken[7:14]
    assert taken == [row for step in range(7) for row in choose_rows(step, 3, 7, 5)]
    assert taken != [row for step in range(7) for row in choose_rows(step, 3, 7, 6)]


def test_it_stops_where_nothing_gets_better(tiny: Make) -> None:
    model = trimmed(tiny)
    outcome = recovered(model, learning_rate=30.0, steps=100, eval_every=1, patience=3)
    assert outcome.model is model
    assert not outcome.changed
    assert outcome.figures["steps"] == 3
    assert outcome.figures["best_step"] == 0
    assert "no evaluation in 3 steps beat" in outcome.notes[0]
    longer = recovered(model, learning_rate=30.0, steps=5, eval_every=1, patience=0)
    assert longer.figures["steps"] == 5


@pytest.mark.parametrize(("rate", "better"), [(1e-2, True), (1e-7, False)])
def test_weights_are_measured_as_they_are_stored(tiny: Make, rate: float, better: bool) -> None:
    """Steps that 16 bits do not see leave the model as it was."""
    model = open_checkpoint(str(tiny("olmoe", dtype="bfloat16"))).model
    outcome = recovered(model, learning_rate=rate)
    figures = outcome.figures
    best = min(line["perplexity"] for line in figures["history"])
    assert best < figures["history"][0]["perplexity"]
    loaded: Any = build_transformers_model(outcome.model, torch.float32)
    with torch.no_grad():
        actual = math.exp(float(compute_text_loss(text()[-4:], loaded(text()[-4:]).logits)))
    assert figures["perplexity"]["after"] == pytest.approx(actual, rel=1e-5)
    assert figures["perplexity"]["after"] != pytest.approx(best, rel=1e-5)
    assert bool(figures["best_step"]) == bool(outcome.changed) == better
    assert (outcome.model is model) != better
    assert ("rounded to the source's precision" in outcome.notes[0]) != better


# ---- what is trained -----------------------------------------------------------------------------


def is_selected(train: str, index: int | None, role: str) -> bool:
    kind = role.partition(".")[0]
    if train == "full":
        return True
    if train == "experts":
        return kind in ("experts", "router", "substitutes")
    if train == "router":
        return kind == "router"
    return index is not None and (is_quantizable(role) or kind == "substitutes")


@pytest.mark.parametrize("family", each_family("mixtral"))
@pytest.mark.parametrize("train", ["full", "experts", "router", "lora"])
def test_only_selected_tensors_change(tiny: Make, family: str, train: str) -> None:
    model = replaced(open_checkpoint(str(tiny(family))).model)
    outcome = recovered(model, train=train, eval_every=1, learning_rate=1e-3)
    assert outcome.figures["best_step"] > 0
    before, after = read_all_numbers(model), read_all_numbers(outcome.model)
    assert before.keys() == after.keys()
    for (index, role), old in before.items():
        changed = not torch.equal(old, after[index, role])
        # A key's bias adds the same to all scores of a query.
        if role != "attention.k_proj.bias":
            assert changed == is_selected(train, index, role), (index, role)


def test_a_dense_layer_that_was_an_expert_is_trained_as_one(tiny: Make) -> None:
    model = open_checkpoint(str(tiny("qwen2_moe"))).model
    model = model.replace_block(model.blocks[0].keep_experts((2,), clamp_top_k=True))
    after = read_all_numbers(recovered(model, train="experts", steps=2).model)
    for (index, role), old in read_all_numbers(model).items():
        kind = role.partition(".")[0]
        changed = kind in ("experts", "router") or kind == "dense"
        assert changed != torch.equal(old, after[index, role]), (index, role)


@pytest.mark.parametrize("family", each_family("qwen2_moe"))
@pytest.mark.parametrize("form", ["source", "replaced", "one expert", "no MLP"])
def test_parameters_go_back_to_where_they_are_from(tiny: Make, family: str, form: str) -> None:
    model = open_checkpoint(str(tiny(family))).model
    if form == "replaced":
        model = replaced(model)
    elif form == "one expert":
        model = model.replace_block(model.blocks[1].keep_experts((4,), clamp_top_k=True))
    elif form == "no MLP":
        model = model.replace_block(model.blocks[1].without_mlp())
    loaded = build_transformers_model(model, torch.float32)
    state = dict(loaded.named_parameters())
    _recover_parameters.check_parameters(model, state)
    with pytest.raises(Moe2EdgeError, match="more of the transformers model has no counterpart"):
        _recover_parameters.check_parameters(model, [*state, "more"])
    for block in model.blocks:
        found = _recover_parameters.split_by_role(model, block, load_block_state(model, block))
        expected = {role: weight.load() for role, weight in block.weights()}
        assert found.keys() == expected.keys()
        for role, own in expected.items():
            assert torch.equal(found[role], own.float()), role
    moved = {name: parameter.detach() + 1 for name, parameter in state.items()}
    after = read_all_numbers(_recover_parameters.attach_trained(model, moved, InMemory()))
    for key, old in read_all_numbers(model).items():
        assert torch.equal(after[key], old + 1), key


def test_tied_embeddings_stay_one_tensor(tiny: Make) -> None:
    model = open_checkpoint(str(tiny("mixtral", tie_word_embeddings=True))).model
    outcome = recovered(model, steps=2)
    assert set(outcome.model.rest) == {"model.embed_tokens.weight", "model.norm.weight"}
    ids = text()[-4:]
    logits = compute_logits(outcome.model, ids)
    told = outcome.figures["history"][-1]["perplexity"]
    assert float(compute_text_loss(ids, logits).exp()) == pytest.approx(told, rel=1e-4)


# ---- towards the source --------------------------------------------------------------------------


def test_outputs_of_the_source_are_kept_on_disk(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against transformers' own logits; pieces that are there are not computed again."""
    from transformers import AutoModelForCausalLM

    folder, ids = tiny("mixtral"), text()[:5]
    source = open_checkpoint(str(folder)).model
    monkeypatch.setattr(teacher, "PIECE_TOKENS", 64)
    asked = Teacher.ask(source, ids, 7, tmp_path, QUIET, PassContext.memory)
    pieces = sorted(tmp_path.glob("*.safetensors"))
    assert len(pieces) == 3
    size = sum(piece.stat().st_size for piece in pieces)
    assert 0 < size - _recover_teacher.estimate_teacher_bytes(5, 32, 7) < 3 * 400  # headers
    found, log_p = asked.read(torch.tensor([4, 0, 1]))
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        expected = model(input_ids=ids[[4, 0, 1]]).logits[:, :-1].log_softmax(-1).topk(7)
    assert float((found == expected.indices).float().mean()) > 0.99
    assert (log_p - expected.values).abs().max() < 2e-3 * expected.values.abs().max()
    pieces[1].unlink()
    walked: list[int] = []
    observe = walk.observe

    def watched(model: Model, tokens: Tensor, *more: Any) -> Tensor:
        walked.append(len(tokens))
        return observe(model, tokens, *more)

    monkeypatch.setattr(walk, "observe", watched)
    again = Teacher.ask(source, ids, 7, tmp_path, QUIET, PassContext.memory)
    assert walked == [2]
    assert torch.equal(again.read(torch.tensor([4, 0, 1]))[0], found)


@pytest.mark.parametrize("bucket", [False, True])
def test_the_distance_is_the_sum_that_is_documented(bucket: bool) -> None:
    draw = torch.Generator().manual_seed(1)
    source, student = (torch.randn(2, 5, 11, generator=draw) for _ in range(2))
    kept = source[:, :-1].log_softmax(-1).topk(3)
    total = 0.0
    for row in range(2):
        for at in range(4):
            p = source[row, at].double().softmax(-1)
            q = student[row, at].double().softmax(-1)
            tokens = p.argsort(descending=True)[:3].tolist()
            whole = sum(float(p[v]) for v in tokens)
            pairs = [(float(p[v]) / (1 if bucket else whole), float(q[v])) for v in tokens]
            if bucket:
                pairs.append((1 - whole, 1 - sum(float(q[v]) for v in tokens)))
            total += sum(mine * math.log(mine / other) for mine, other in pairs)
    found = compute_distance(kept.indices, kept.values, student, bucket=bucket)
    assert float(found) == pytest.approx(total / 8, rel=1e-5)


def test_a_student_that_is_the_source_has_nothing_to_learn(tiny: Make, tmp_path: Path) -> None:
    source, ids = open_checkpoint(str(tiny("olmoe"))).model, text()[:3]
    everything, few = (tmp_path / name for name in ("everything", "few"))
    everything.mkdir()
    few.mkdir()
    asked = Teacher.ask(source, ids, source.vocabulary, everything, QUIET, PassContext.memory)
    student: Any = build_transformers_model(source, torch.float32)
    rows = torch.arange(3)
    loss = Objective(asked, 0.0)(rows, ids, student(input_ids=ids).logits)
    assert 0 <= float(loss.detach()) < 1e-4
    some = Teacher.ask(source, ids, 5, few, QUIET, PassContext.memory)
    loss = Objective(some, 0.0, bucket=True)(rows, ids, student(input_ids=ids).logits)
    assert abs(float(loss.detach())) < 1e-4
    half = Objective(asked, 0.25)(rows, ids, student(input_ids=ids).logits)
    own = compute_text_loss(ids, student(input_ids=ids).logits)
    assert float(half.detach()) == pytest.approx(0.25 * float(own.detach()), rel=1e-3)


# ---- adapters ------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [5, 1])
@pytest.mark.parametrize("family", each_family("olmoe"))
def test_merged_adapters_are_the_adapters(tiny: Make, family: str, keep: int) -> None:
    model = replaced(open_checkpoint(str(tiny(family))).model, (keep,))
    names = _recover_parameters.select_parameters(
        model, lambda b, role: b is not None and is_quantizable(role)
    )
    plain: Any = build_transformers_model(model, torch.float32)
    state = torch.random.get_rng_state()
    wrapped, parameters = _recover_lora.adapt(plain, names, [], 3, 0)
    assert torch.equal(state, torch.random.get_rng_state())
    draw, ids = torch.Generator().manual_seed(2), text()[:2]
    for name, parameter in parameters.items():
        assert _recover_lora.ADAPTER in name
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=draw)
    with torch.no_grad():
        expected = wrapped(input_ids=ids).logits
    merged = dict(_recover_lora.merge(wrapped).named_parameters())
    after = _recover_parameters.attach_trained(
        model, {n: merged[n].detach() for n in names}, InMemory()
    )
    again: Any = build_transformers_model(after, torch.float32)
    before: Any = build_transformers_model(model, torch.float32)
    with torch.no_grad():
        assert (again(input_ids=ids).logits - expected).abs().max() < 1e-3
        assert (before(input_ids=ids).logits - expected).abs().max() > 0.1


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_plain_mlps_get_adapters(tiny: Make, family: str) -> None:
    """Beside experts with names that peft takes for theirs."""
    model = open_checkpoint(str(tiny(family))).model
    model = model.replace_block(model.blocks[1].keep_experts((4,), clamp_top_k=True))
    after = read_all_numbers(recovered(model, train="lora", steps=2).model)
    for (index, role), old in read_all_numbers(model).items():
        adapted = index is not None and is_quantizable(role)
        assert adapted != torch.equal(old, after[index, role]), (index, role)


@pytest.mark.filterwarnings("ignore:The following .*_pattern")
def test_adapters_elsewhere_are_seen(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model = open_checkpoint(str(tiny("olmoe"))).model
    model = model.replace_block(model.blocks[1].keep_experts((4,), clamp_top_k=True))
    monkeypatch.setattr(lora, "MLP_MATRICES", ())
    with pytest.raises(AssertionError, match=r"adapters, expected"):
        recovered(model, train="lora")


def test_missing_peft_is_reported(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    find: Callable[[str], Any] = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "peft" else find(name)
    )
    step = Recover(train="lora")
    with pytest.raises(InputError, match=r"pip install 'peft>="):
        step.check(open_checkpoint(str(tiny("olmoe"))).model)
    Recover().check(open_checkpoint(str(tiny("olmoe"))).model)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"step": "x"}', '{"step": null}', '{"history": [1]}', '{"losses": ["a"]}']
)
def test_a_damaged_state_is_reported(text: str, tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(InputError, match=r"state.json is damaged: .*--resume never"):
        States(tmp_path).load()
