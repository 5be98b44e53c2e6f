"""Expert budget: what is chosen, that it is never worse than uniform, and what is refused."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import helpers
from helpers import QUIET, each_family, ignore, make_context, plan, run, slow_except
from moe2edge.calibration import walk
from moe2edge.calibration.block_runner import BlockRunner
from moe2edge.errors import DoesNotFit, InputError
from moe2edge.model.model import Model
from moe2edge.model.weights import Weight
from moe2edge.numerics import allocation, bootstrap, metrics
from moe2edge.numerics.allocation import Counts
from moe2edge.passes._allocation_trials import Ranker, Trimmer
from moe2edge.passes.expert_budget import ExpertBudget
from moe2edge.pipeline.contract import Outcome, PlannedStep, TextSize, TextSizes
from moe2edge.progress import Reporter
from moe2edge.runtime.memory import IMPORTED
from moe2edge.storage.checkpoint import open_checkpoint
from moe2edge.testing import Make

IDS = torch.randint(1, 96, (8, 24), generator=torch.Generator().manual_seed(0))


def options(**given: Any) -> ExpertBudget:
    return ExpertBudget.model_validate(given)


def search(
    step: ExpertBudget, model: Model, source: Model | None = None, reporter: Reporter = QUIET
) -> Outcome:
    plan([step], model)
    outcome = helpers.search(step, model, IDS, source, reporter)
    outcome.model.verify()
    return outcome


def counts_of(model: Model) -> Counts:
    return tuple(len(block.expert_origins) for block in model.blocks)


def idle_in(model: Model, index: int) -> Model:
    """Return the model with experts in one block that put out next to nothing."""
    block = model.blocks[index]

    def faint(weight: Weight) -> Weight:
        return replace(weight, load=lambda: weight.load() * 1e-3)

    new = {
        role: faint(weight)
        for role, weight in block.weights()
        if role.startswith("experts.") and role.endswith(".down")
    }
    return model.replace_block(block.with_weights(new))


# ---- the pass ----------------------------------------------------------------------------------


def trimmer_of(model: Model, tokens: Tensor) -> Trimmer:
    """Rankings by ``mone`` on some tokens."""
    ranker = Ranker("mone", 0, {}, tokens.numel(), None)
    walk.observe(model, tokens, [ranker], ignore, "")
    rankings = tuple(ranker.ranking(block) for block, _ in model.moe_blocks)
    return Trimmer(model, rankings, clamp_top_k=False)


def kl_on(model: Model, source: Model, tokens: Tensor) -> list[float]:
    """KL of each sample, nats per token."""
    theirs = walk.compute_logits(source, walk.observe(source, tokens, (), ignore, ""))
    mine = walk.compute_logits(model, walk.observe(model, tokens, (), ignore, ""))
    return [one.kl / one.tokens for one in metrics.measure_per_sample(tokens, mine, theirs)]


@pytest.mark.parametrize("sensitivity", ["kl", "error"])
@pytest.mark.parametrize("family", each_family("olmoe"))
@pytest.mark.slow
def test_never_worse_than_uniform_where_it_is_chosen(
    tiny: Make, family: str, sensitivity: str
) -> None:
    model = open_checkpoint(str(tiny(family))).model
    outcome = search(options(keep=4, sensitivity=sensitivity), model)
    assert sum(counts_of(outcome.model)) == 12
    assert min(counts_of(outcome.model)) >= 2
    choosing, _ = bootstrap.split_samples(8, 0.25)
    tokens = IDS[choosing]
    uniform = trimmer_of(model, tokens).trim((4, 4, 4))
    mine, even = (sum(kl_on(m, model, tokens)) for m in (outcome.model, uniform))
    assert mine <= even * (1 + 1e-6)
    assert sum("(chosen)" in note for note in outcome.notes) == 1
    assert search(options(keep=4, sensitivity=sensitivity), model) == outcome


@pytest.mark.parametrize("sensitivity", ["kl", "error"])
@pytest.mark.parametrize("idle", slow_except([0, 1, 2], 1))
def test_a_layer_that_does_little_keeps_little(tiny: Make, idle: int, sensitivity: str) -> None:
    model = idle_in(open_checkpoint(str(tiny("mixtral"))).model, idle)
    outcome = search(options(keep=4, sensitivity=sensitivity), model)
    assert counts_of(outcome.model)[idle] == 2
    assert sum(counts_of(outcome.model)) == 12
    # The report, recomputed.
    choosing, held_out = bootstrap.split_samples(8, 0.25)
    trimmer = trimmer_of(model, IDS[choosing])
    uniform = trimmer.trim((4, 4, 4))
    mine, even = (kl_on(m, model, IDS[held_out]) for m in (outcome.model, uniform))
    found = bootstrap.compute_interval([a - b for a, b in zip(mine, even, strict=True)], 0)
    assert "on 2 calibration samples that were not used to choose" in outcome.notes[-1]
    assert outcome.notes[-1].endswith(f"KL {found}")
    assert found.mean < 0
    (taken,) = (note for note in outcome.notes if "(chosen)" in note)
    shown = " ".join(map(str, counts_of(outcome.model)))
    kl = sum(kl_on(outcome.model, model, IDS[choosing])) / 6
    assert f"per MoE layer {shown}; KL to the source {kl:.4f}" in taken
    gone = sorted(set(range(6)) - set(outcome.model.blocks[idle].expert_origins))
    assert f"block {idle}: experts {gone}" in outcome.changed


def test_uniform_is_taken_where_sensitivities_mislead(
    tiny: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = idle_in(open_checkpoint(str(tiny("olmoe"))).model, 1)
    # As wrong as can be: everything to the layer that does nothing.
    monkeypatch.setattr(allocation, "allocate", lambda *_: (2, 6, 2))
    outcome = search(options(keep=4, sensitivity="error", criterion="reap"), model)
    assert counts_of(outcome.model) == (4, 4, 4)
    assert outcome.notes[0].startswith("uniform (chosen): experts per MoE layer 4 4 4")
    assert len(outcome.notes) > 1
    assert not any("held out" in note for note in outcome.notes)


def test_source_and_model_may_differ(tiny: Make) -> None:
    """After a pass that removed a block and an expert, KL is to the source."""
    source = open_checkpoint(str(tiny("qwen2_moe"))).model
    model = source.replace_block(source.blocks[0].keep_experts((0, 2, 3, 4, 5)))
    model = model.keep_blocks([0, 2])
    outcome = search(options(keep=3, sensitivity="kl"), model, source)
    choosing, _ = bootstrap.split_samples(8, 0.25)
    (taken,) = (note for note in outcome.notes if "(chosen)" in note)
    kl = sum(kl_on(outcome.model, source, IDS[choosing])) / 6
    assert f"KL to the source {kl:.4f}" in taken
    assert sum(counts_of(outcome.model)) == 6


def test_fewer_samples_and_counts_are_tried_on_request(tiny: Make) -> None:
    model = open_checkpoint(str(tiny("mixtral"))).model
    lines: list[str] = []
    reporter = Reporter(lines.append, lambda *_: None)
    step = options(keep=4, sensitivity="kl", points=2, tokens=50, samples=3)
    outcome = search(step, model, reporter=reporter)
    # Each layer to 2 and to 5, and nothing: 7 allocations. Block 0 in 3 forms, 1 in 5, 2 in 7.
    assert "7 allocations that prune one layer or none, 15 block runs over 2 samples" in lines[0]
    assert "at most 5 candidates on 3 samples and 3 walks over 2 held-out" in lines[0]
    assert all("on 3 calibration samples" in note for note in outcome.notes[:1])


def test_cost_is_stated_before_any_work(tiny: Make) -> None:
    model = open_checkpoint(str(tiny("mixtral"))).model
    events: list[str] = []
    reporter = Reporter(events.append, lambda label, *_: events.append(label))
    search(options(keep=4, sensitivity="kl"), model, reporter=reporter)
    assert events[0].startswith("expert_budget: 12 of 18 experts in 3 MoE layers")
    # Nothing trimmed, and each layer to 2, 3, 4 and 5.
    assert "13 allocations that prune one layer or none, 27 block runs over 6 samples" in events[0]
    events.clear()
    search(options(keep=4, sensitivity="error", tokens=100), model, reporter=reporter)
    assert "1,800 expert evaluations (each expert once on 100 tokens)" in events[0]
    assert {"expert_budget: scoring", "expert_budget: candidates"} < set(events)


def test_each_expert_is_evaluated_once_per_token(
    tiny: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = open_checkpoint(str(tiny("mixtral"))).model
    rows: list[int] = []
    inner = BlockRunner._expert_output

    def counted(runner: BlockRunner, expert: int, inputs: Tensor) -> Tensor:
        rows.append(len(inputs))
        return inner(runner, expert, inputs)

    monkeypatch.setattr(BlockRunner, "_expert_output", counted)
    # A criterion that looks at no outputs: what is counted is the sensitivity's.
    search(options(keep=4, sensitivity="error", criterion="frequency"), model)
    assert sum(rows) == 3 * 6 * (6 * 24)


@pytest.mark.parametrize("sensitivity", ["kl", "error"])
def test_too_little_memory_is_refused(tiny: Make, sensitivity: str) -> None:
    model = open_checkpoint(str(tiny("mixtral"))).model
    step, texts = options(keep=4, sensitivity=sensitivity), TextSizes(TextSize(*IDS.shape))
    found = step.estimate(PlannedStep(step, model, step.plan(model)), texts)
    assert found.memory > model.block_nbytes + 4 * IDS.numel() * 64
    with pytest.raises(DoesNotFit, match="expert_budget compares allocations of experts, which"):
        found.check(found.memory - 1 + IMPORTED)
    found.check(found.memory + IMPORTED)


# ---- shapes and refusals -----------------------------------------------------------------------


def test_plan_is_as_uneven_as_it_may_become(tiny: Make) -> None:
    model = open_checkpoint(str(tiny("qwen3_moe"))).model
    assert plan([options(keep=4)], model).expert_counts == (6, 4, 2)
    assert plan([options(keep=0.5)], model).expert_counts == (5, 2, 2)
    assert plan([options(keep=4, floor=3)], model).expert_counts == (6, 3, 3)
    low = plan([options(keep=2, clamp_top_k=True)], model)
    assert counts_of(low) == (4, 1, 1)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"keep": 7}, "keep is 7, but block 0 has 6 experts"),
    ({"keep": 6}, "keeps every expert"),
    ({"keep": 1}, "keep 1 may leave 1 experts in block 0 where the router chooses 2"),
    ({"keep": 4, "floor": 1}, "floor 1 may leave 1 experts in block 0"),
    ({"keep": 3, "floor": 4}, "floor 4, but keep 3 leaves 3 of the 6 experts in block 0"),
    ({"keep": 2}, "is the only allocation of 6 experts with floors (2, 2, 2); use expert_drop"),
    ({"keep": 3, "floor": 3}, "is the only allocation of 9 experts"),
]


@pytest.mark.parametrize(("given", "message"), BAD, ids=[m for _, m in BAD])
def test_refusals(tiny: Make, given: dict[str, Any], message: str) -> None:
    model = open_checkpoint(str(tiny("mixtral"))).model
    with pytest.raises(InputError, match=re.escape(message)):
        plan([options(**given)], model)


def test_one_moe_layer_and_skipping_layers_are_refused(tiny: Make) -> None:
    model = open_checkpoint(str(tiny("mixtral"))).model
    with pytest.raises(InputError, match="is the only allocation of 4 experts"):
        plan([options(keep=4)], model.keep_blocks([0]))
    layer = model.moe_blocks[1][1]
    skipping = replace(layer, router=replace(layer.router, skip_below=(0.5,)))
    with pytest.raises(InputError, match="put expert_skip after expert_budget"):
        plan([options(keep=4)], model.replace_block(replace(model.blocks[1], mlp=skipping)))


@pytest.mark.parametrize("keep", [0, -1, 1.5, True, "half", [4, 4, 4]])
def test_invalid_amounts(keep: Any) -> None:
    with pytest.raises(ValueError, match="count"):
        options(keep=keep)


def test_too_few_samples_are_refused(tiny: Make) -> None:
    model = open_checkpoint(str(tiny("mixtral"))).model
    context = make_context(model, IDS[:3])
    with pytest.raises(InputError, match="3 calibration samples are too few"):
        options(keep=4).search(context)


# ---- through the command line ------------------------------------------------------------------


def write_recipe(folder: Path, text: Path, *, quantized: bool) -> Path:
    recipe = folder / "recipe.yaml"
    section = {"text": str(text), "samples": 6, "length": 16}
    steps = [{"expert_budget": {"keep": 3}}, *([{"gptq": {}}] if quantized else [])]
    content = {"calibration": section, "evaluation": section | {"samples": 2}, "passes": steps}
    recipe.write_text(json.dumps(content))
    return recipe


def test_gptq_and_onnx_hold_what_it_chooses(tiny: Make, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog, again and again. " * 12)
    recipe = write_recipe(tmp_path, text, quantized=True)
    folder, out = tiny("qwen3_moe"), tmp_path / "out"
    given = ["export", str(folder), "-t", "gptq,onnx", "-r", str(recipe), "-o", str(out)]
    result = run(*given)
    assert result.exit_code == 0, result.output
    assert "expert_budget: 9 of 18 experts in 3 MoE layers" in result.output
    report = (out / "onnx" / "report.json").read_text()
    assert "(chosen)" in report


def test_hf_refuses_before_calibration(tiny: Make, tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.touch()
    recipe = write_recipe(tmp_path, empty, quantized=False)
    given = ["export", str(tiny("mixtral")), "-t", "hf", "-r", str(recipe)]
    result = run(*given, "-o", str(tmp_path / "out"))
    # Not 2, as it would be once the text is read.
    assert result.exit_code == 6, result.output
    assert not (tmp_path / "out").exists()
