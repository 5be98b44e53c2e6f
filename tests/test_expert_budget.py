"""Budgets: allocations, what they are chosen by, and that uniform is never beaten by worse."""

from __future__ import annotations

import itertools
import json
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor
from transformers import AutoModelForCausalLM

from moe2edge import budgets, quality, walk
from moe2edge.budgets import Counts, Ranker, Trial, Trimmer
from moe2edge.checkpoint import open_checkpoint
from moe2edge.cli import main
from moe2edge.errors import DoesNotFit, InputError
from moe2edge.families import FAMILIES
from moe2edge.model import Model, Weight
from moe2edge.passes.expert_budget import ExpertBudget
from moe2edge.passes.expert_drop import ExpertDrop
from moe2edge.pipeline import Facts, Lab, Outcome, plan
from moe2edge.progress import Watcher
from moe2edge.testing import Make
from moe2edge.workfolder import WorkFolder

IDS = torch.randint(1, 96, (8, 24), generator=torch.Generator().manual_seed(0))
QUIET = Watcher(lambda _: None, lambda *_: None)


def quiet(*_: object) -> None:
    pass


def options(**given: Any) -> ExpertBudget:
    return ExpertBudget.model_validate(given)


def search(
    step: ExpertBudget, model: Model, source: Model | None = None, watcher: Watcher = QUIET
) -> Outcome:
    plan([step], model)
    outcome = step.search(Lab(source or model, model, IDS, WorkFolder(Path()), watcher))
    outcome.model.verify()
    return outcome


def counts_of(model: Model) -> Counts:
    return tuple(len(block.expert_origins) for block in model.blocks)


def idle_in(model: Model, index: int) -> Model:
    """The model with experts in one block that put out next to nothing."""
    block = model.blocks[index]

    def faint(weight: Weight) -> Weight:
        return replace(weight, load=lambda: weight.load() * 1e-3)

    new = {
        role: faint(weight)
        for role, weight in block.weights()
        if role.startswith("experts.") and role.endswith(".down")
    }
    return model.replace_block(block.with_weights(new))


# ---- allocating --------------------------------------------------------------------------------


def every(floors: Counts, full: Counts, total: int) -> list[Counts]:
    ranges = [range(a, b + 1) for a, b in zip(floors, full, strict=True)]
    return [counts for counts in itertools.product(*ranges) if sum(counts) == total]


@pytest.mark.parametrize("seed", range(20))
def test_allocation_equals_brute_force(seed: int) -> None:
    draw = random.Random(seed)
    full = tuple(draw.randint(2, 6) for _ in range(draw.randint(1, 4)))
    floors = tuple(draw.randint(1, n) for n in full)
    # Whole numbers, so that sums are often equal and the order decides.
    costs = [[draw.randint(-2, 5) for _ in range(a, b + 1)] for a, b in zip(floors, full)]  # noqa: B905
    for total in range(sum(floors), sum(full) + 1):

        def cost(counts: Counts) -> float:
            return sum(row[n - a] for row, n, a in zip(costs, counts, floors, strict=True))

        best = min(every(floors, full, total), key=lambda counts: (cost(counts), counts))
        assert budgets.allocate(costs, floors, total) == best
    for total in (sum(floors) - 1, sum(full) + 1):
        with pytest.raises(InputError, match=f"keeps {total} experts: the floors add up to"):
            budgets.allocate(costs, floors, total)


def test_steps_on_the_way_keep_total_and_bounds() -> None:
    draw = random.Random(0)
    for _ in range(300):
        full = tuple(draw.randint(2, 9) for _ in range(5))
        floors = tuple(draw.randint(1, n) for n in full)
        total = draw.randint(sum(floors), sum(full))
        first, second = (draw.choice(every(floors, full, total)) for _ in range(2))
        assert budgets.between(first, second, 0.0) == first
        assert budgets.between(first, second, 1.0) == second
        for part in (0.25, 0.5, 0.75):
            found = budgets.between(first, second, part)
            assert sum(found) == total
            for n, a, b in zip(found, first, second, strict=True):
                assert abs(n - (a + part * (b - a))) < 1
                assert min(a, b) <= n <= max(a, b)


@pytest.mark.parametrize("points", [2, 3, 5, 8, 50])
def test_a_grid_has_both_ends(points: int) -> None:
    for floor, experts in [(1, 2), (2, 8), (8, 64), (8, 128)]:
        found = budgets.grid(floor, experts, points)
        assert found == tuple(sorted(set(found)))
        assert (found[0], found[-1]) == (floor, experts - 1)
        assert len(found) == min(points, experts - floor)
        # Straight lines are met by straight lines.
        known = {n: float(3 * n) for n in (*found, experts)}
        expected = [3.0 * n for n in range(floor, experts + 1)]
        assert budgets.interpolated(known, floor, experts) == pytest.approx(expected)


# ---- samples -----------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["take turns", "follow one another"])
def test_parts_of_a_mix_are_in_both_parts_of_the_split(order: str) -> None:
    choosing, held_out = budgets.split(128, 0.25)
    assert sorted(choosing + held_out) == list(range(128))
    assert len(held_out) == 32
    for places in (held_out, choosing, choosing[:32]):
        parts = [n % 4 if order == "take turns" else n // 32 for n in places]
        assert all(abs(parts.count(k) - len(places) / 4) <= 3 for k in range(4))


def test_a_split_needs_samples() -> None:
    assert [len(part) for part in budgets.split(4, 0.01)] == [2, 2]
    for samples, held_out in ((3, 0.25), (4, 0.9), (1, 0.5)):
        with pytest.raises(InputError, match=f"{samples} calibration samples do not suffice"):
            budgets.split(samples, held_out)


@pytest.mark.parametrize("seed", [0, 7])
def test_interval_equals_a_direct_bootstrap(seed: int) -> None:
    values = [random.Random(seed).gauss(0.1, 1.0) for _ in range(9)]
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(9, (budgets.DRAWS, 9), generator=generator).tolist()
    means = sorted(sum(values[n] for n in row) / 9 for row in drawn)

    def quantile(q: float) -> float:
        low, rest = divmod(q * (len(means) - 1), 1)
        below, above = means[int(low) : int(low) + 2]
        return float(below + rest * (above - below))

    found = budgets.interval(values, seed)
    assert found.samples == 9
    expected = [sum(values) / 9, quantile(0.025), quantile(0.975)]
    assert [found.mean, found.low, found.high] == pytest.approx(expected, abs=1e-12)


# ---- the slow twin: stock transformers, routers masked -----------------------------------------


def mask(layer: Any, ids: tuple[int, ...], *, renormalize: bool) -> None:
    """Let the router of a decoder layer choose among ``ids`` only."""
    gate = layer.mlp.gate

    def forward(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = x.reshape(-1, x.shape[-1]) @ gate.weight.T
        masked = torch.full_like(logits, -torch.inf)
        masked[:, list(ids)] = logits[:, list(ids)]
        top, chosen = masked.softmax(-1).topk(min(2, len(ids)))
        return logits, top / top.sum(-1, keepdim=True) if renormalize else top, chosen

    gate.forward = forward


def renormalizes(model: Any) -> bool:
    return bool(getattr(model.config, "norm_topk_prob", model.config.model_type == "mixtral"))


def slow_error(folder: Path, index: int, ids: tuple[int, ...], tokens: Tensor) -> Tensor:
    """``||Z_t - Z'_t||^2 / ||x_t||^2`` of each token, one by one."""
    slow = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    layer, seen = slow.model.layers[index], dict[str, Tensor]()
    layer.mlp.register_forward_hook(lambda _, args, out: seen.update(h=args[0], z=out))
    layer.register_forward_hook(lambda _, args, out: seen.update(x=out))
    with torch.no_grad():
        slow(tokens, use_cache=False)
        h, z, x = (seen[key].flatten(0, 1) for key in "hzx")
        mask(layer, ids, renormalize=renormalizes(slow))
        found = []
        for t in range(len(h)):
            gap = (z[t] - layer.mlp(h[None, t : t + 1])[0, 0]).double()
            found.append(gap.square().sum() / x[t].double().square().sum())
    return torch.stack(found)


def ranked(model: Model, tokens: Tensor, criterion: Any = "mone", **more: Any) -> Ranker:
    ranker = Ranker(criterion, 0, more.get("floors", {}), tokens.numel(), more.get("most"))
    walk.observe(model, tokens, [ranker], quiet, "")
    return ranker


def trial_of(model: Model, tokens: Tensor, *, clamp: bool = False) -> Trial:
    ranker = ranked(model, tokens)
    rankings = tuple(ranker.ranking(block) for block, _ in model.moe_blocks)
    hidden = walk.observe(model, tokens, (), quiet, "")
    return Trial(Trimmer(model, rankings, clamp), model, hidden, tokens)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_errors_equal_a_slow_loop(tiny: Make, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walk, "BATCH_TOKENS", 48)  # several batches
    folder, tokens = tiny(family), IDS[:3]
    model = open_checkpoint(str(folder)).model
    ranker = ranked(model, tokens, floors={0: 1, 1: 2, 2: 4})
    assert {index: len(row) for index, row in ranker.errors.items()} == {0: 6, 1: 5, 2: 3}
    for index, floor in ((0, 1), (1, 2), (2, 4)):
        order = ranker.ranking(model.blocks[index])
        for count, found in enumerate(ranker.errors[index], start=floor):
            slow = slow_error(folder, index, order[:count], tokens)
            assert found == pytest.approx(float(slow.mean()), rel=1e-3, abs=1e-9)
        assert ranker.errors[index][-1] == 0.0


def test_errors_of_some_tokens_only(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walk, "BATCH_TOKENS", 24)
    folder, tokens = tiny("olmoe"), IDS[:3]
    model = open_checkpoint(str(folder)).model
    ranker = ranked(model, tokens, floors={0: 3, 1: 3, 2: 3}, most=5)
    places = [0, 14, 28, 43, 57]
    for index in range(3):
        order = ranker.ranking(model.blocks[index])
        slow = slow_error(folder, index, order[:3], tokens)[places]
        assert ranker.errors[index][0] == pytest.approx(float(slow.mean()), rel=1e-3)


@pytest.mark.parametrize("criterion", ["mone", "frequency", "magnitude", "random"])
def test_the_best_of_a_ranking_are_those_of_expert_drop(tiny: Make, criterion: str) -> None:
    model = open_checkpoint(str(tiny("qwen2_moe"))).model
    ranker = ranked(model, IDS, criterion)
    rankings = tuple(ranker.ranking(block) for block, _ in model.moe_blocks)
    for count in range(2, 6):
        mine = Trimmer(model, rankings, clamp_top_k=False).trimmed((count,) * 3)
        drop = ExpertDrop(keep=count, criterion=criterion)  # type: ignore[arg-type]
        seeing = {kind: kind() for kind in drop.observers()}
        walk.observe(model, IDS, list(seeing.values()), quiet, "")
        dropped = drop.apply(model, Facts({kind: seen.fact() for kind, seen in seeing.items()}))
        for a, b in zip(mine.blocks, dropped.model.blocks, strict=True):
            assert a.expert_origins == b.expert_origins


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_kl_equals_masking_in_transformers(tiny: Make, family: str) -> None:
    """Of one layer trimmed at a time, and of several."""
    folder, tokens = tiny(family), IDS[:3]
    model = open_checkpoint(str(folder)).model
    trial = trial_of(model, tokens, clamp=True)
    tried = [*budgets.one_layer_each((6, 6, 6), [(1, 3), (2, 5), (4,)]), (6, 6, 6), (2, 6, 3)]
    assert len(tried) == 7
    with torch.no_grad():
        intact = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        p = intact(tokens).logits[:, :-1].double().log_softmax(-1)
        for counts, sums in zip(tried, trial.judge(tried, quiet), strict=True):
            slow = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
            for n, count in enumerate(counts):
                if count < 6:
                    ids = trial.trimmer.rankings[n][:count]
                    mask(slow.model.layers[n], ids, renormalize=renormalizes(slow))
            q = slow(tokens).logits[:, :-1].double().log_softmax(-1)
            kl = (p.exp() * (p - q)).sum((1, 2))
            nll = -q.gather(2, tokens[:, 1:, None]).sum((1, 2))
            assert [one.kl for one in sums] == pytest.approx(kl.tolist(), rel=1e-3, abs=1e-5)
            assert [one.nll for one in sums] == pytest.approx(nll.tolist(), rel=1e-4)
            assert [one.tokens for one in sums] == [23] * 3


# ---- trying allocations ------------------------------------------------------------------------


@pytest.mark.parametrize("together", [1, 2, 100])
def test_shared_runs_equal_a_walk_for_each(
    tiny: Make, monkeypatch: pytest.MonkeyPatch, together: int
) -> None:
    """Also of a model with a block without experts in the middle."""
    source = open_checkpoint(str(tiny("qwen3_moe"))).model
    model = source.replace_block(source.blocks[1].without_mlp())
    trial = replace(trial_of(model, IDS), source=source)
    trial = replace(trial, source_hidden=walk.observe(source, IDS, (), quiet, ""))
    numbers = trial.source_hidden.numel()
    monkeypatch.setattr(budgets, "STREAM_BYTES", 8 * numbers * together)
    ran: list[int] = []
    run = budgets._through

    def counted(runner: walk.BlockRunner, hidden: Tensor, tokens: Tensor) -> Tensor:
        ran.append(runner.block.index)
        return run(runner, hidden, tokens)

    monkeypatch.setattr(budgets, "_through", counted)
    tried = [(3, 6), (3, 2), (6, 6), (6, 4), (3, 4)]
    told: list[tuple[int, int]] = []
    judged = trial.judge(tried, lambda done, total: told.append((done, total)))
    # One at a time: 5 walks over 3 blocks. In pairs: the first two pairs share 2 blocks. All at
    # once: 2 streams up to block 1.
    assert len(ran) == {1: 15, 2: 4 + 4 + 3, 100: 2 + 2 + 5}[together]
    assert budgets.block_runs(model, tried, together) == len(ran)
    assert told == [(n, len(ran)) for n in range(len(ran) + 1)]
    for counts, sums in zip(tried, judged, strict=True):
        trimmed = trial.trimmer.trimmed(counts)
        assert (counts_of(trimmed)[0], counts_of(trimmed)[2]) == counts
        hidden = walk.observe(trimmed, IDS, (), quiet, "")
        theirs = walk.head_logits(source, trial.source_hidden)
        expected = quality.measure(IDS, walk.head_logits(trimmed, hidden), theirs)
        assert budgets.mean_kl(sums) == pytest.approx(expected.kl, rel=1e-5)
        loss = torch.tensor(budgets.mean_loss(sums)).exp()
        assert float(loss) == pytest.approx(expected.perplexity, rel=1e-4)


# ---- the pass ----------------------------------------------------------------------------------


def kl_on(model: Model, source: Model, tokens: Tensor) -> list[float]:
    """KL of each sample, nats per token."""
    theirs = walk.head_logits(source, walk.observe(source, tokens, (), quiet, ""))
    mine = walk.head_logits(model, walk.observe(model, tokens, (), quiet, ""))
    return [one.kl / one.tokens for one in quality.per_sample(tokens, mine, theirs)]


@pytest.mark.parametrize("sensitivity", ["kl", "error"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_never_worse_than_uniform_where_it_is_chosen(
    tiny: Make, family: str, sensitivity: str
) -> None:
    model = open_checkpoint(str(tiny(family))).model
    outcome = search(options(keep=4, sensitivity=sensitivity), model)
    assert sum(counts_of(outcome.model)) == 12
    assert min(counts_of(outcome.model)) >= 2
    choosing, _ = budgets.split(8, 0.25)
    tokens = IDS[choosing]
    uniform = trial_of(model, tokens).trimmer.trimmed((4, 4, 4))
    mine, even = (sum(kl_on(m, model, tokens)) for m in (outcome.model, uniform))
    assert mine <= even * (1 + 1e-6)
    assert sum("(taken)" in note for note in outcome.notes) == 1
    assert search(options(keep=4, sensitivity=sensitivity), model) == outcome


@pytest.mark.parametrize("sensitivity", ["kl", "error"])
@pytest.mark.parametrize("idle", [0, 1, 2])
def test_a_layer_that_does_little_keeps_little(tiny: Make, idle: int, sensitivity: str) -> None:
    model = idle_in(open_checkpoint(str(tiny("mixtral"))).model, idle)
    outcome = search(options(keep=4, sensitivity=sensitivity), model)
    assert counts_of(outcome.model)[idle] == 2
    assert sum(counts_of(outcome.model)) == 12
    # The report, recomputed.
    choosing, held_out = budgets.split(8, 0.25)
    trimmer = trial_of(model, IDS[choosing]).trimmer
    uniform = trimmer.trimmed((4, 4, 4))
    mine, even = (kl_on(m, model, IDS[held_out]) for m in (outcome.model, uniform))
    found = budgets.interval([a - b for a, b in zip(mine, even, strict=True)], 0)
    assert "over 2 calibration samples that nothing was chosen by" in outcome.notes[-1]
    assert outcome.notes[-1].endswith(f"KL {found}")
    assert found.mean < 0
    (taken,) = (note for note in outcome.notes if "(taken)" in note)
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
    monkeypatch.setattr(budgets, "allocate", lambda *_: (2, 6, 2))
    outcome = search(options(keep=4, sensitivity="error", criterion="reap"), model)
    assert counts_of(outcome.model) == (4, 4, 4)
    assert outcome.notes[0].startswith("uniform (taken): experts per MoE layer 4 4 4")
    assert len(outcome.notes) > 1
    assert not any("held out" in note for note in outcome.notes)


def test_source_and_model_may_differ(tiny: Make) -> None:
    """After a pass that removed a block and an expert, KL is to the source."""
    source = open_checkpoint(str(tiny("qwen2_moe"))).model
    model = source.replace_block(source.blocks[0].keep_experts((0, 2, 3, 4, 5)))
    model = model.keep_blocks([0, 2])
    outcome = search(options(keep=3, sensitivity="kl"), model, source)
    choosing, _ = budgets.split(8, 0.25)
    (taken,) = (note for note in outcome.notes if "(taken)" in note)
    kl = sum(kl_on(outcome.model, source, IDS[choosing])) / 6
    assert f"KL to the source {kl:.4f}" in taken
    assert sum(counts_of(outcome.model)) == 6


def test_fewer_samples_and_counts_are_tried_on_request(tiny: Make) -> None:
    model = open_checkpoint(str(tiny("mixtral"))).model
    lines: list[str] = []
    watcher = Watcher(lines.append, lambda *_: None)
    step = options(keep=4, sensitivity="kl", points=2, tokens=50, samples=3)
    outcome = search(step, model, watcher=watcher)
    # Each layer to 2 and to 5, and nothing: 7 allocations. Block 0 in 3 forms, 1 in 5, 2 in 7.
    assert "7 allocations that trim one layer or none, 15 block runs over 2 samples" in lines[0]
    assert "at most 5 candidates on 3 samples and 3 walks over 2 held-out" in lines[0]
    assert all("on 3 calibration samples" in note for note in outcome.notes[:1])


def test_cost_is_stated_before_any_work(tiny: Make) -> None:
    model = open_checkpoint(str(tiny("mixtral"))).model
    events: list[str] = []
    watcher = Watcher(events.append, lambda label, *_: events.append(label))
    search(options(keep=4, sensitivity="kl"), model, watcher=watcher)
    assert events[0].startswith("expert_budget: 12 of 18 experts in 3 MoE layers")
    # Nothing trimmed, and each layer to 2, 3, 4 and 5.
    assert "13 allocations that trim one layer or none, 27 block runs over 6 samples" in events[0]
    events.clear()
    search(options(keep=4, sensitivity="error", tokens=100), model, watcher=watcher)
    assert "1,800 expert evaluations (each expert once on 100 tokens)" in events[0]
    assert {"expert_budget: scoring", "expert_budget: candidates"} < set(events)


def test_each_expert_is_evaluated_once_per_token(
    tiny: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = open_checkpoint(str(tiny("mixtral"))).model
    rows: list[int] = []
    inner = walk.BlockRunner._expert_output

    def counted(runner: walk.BlockRunner, expert: int, inputs: Tensor) -> Tensor:
        rows.append(len(inputs))
        return inner(runner, expert, inputs)

    monkeypatch.setattr(walk.BlockRunner, "_expert_output", counted)
    # A criterion that looks at no outputs: what is counted is the sensitivity's.
    search(options(keep=4, sensitivity="error", criterion="frequency"), model)
    assert sum(rows) == 3 * 6 * (6 * 24)


def test_too_little_memory_is_refused(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model = open_checkpoint(str(tiny("mixtral"))).model
    small = psutil.virtual_memory()._replace(total=1000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: small)
    for sensitivity in ("kl", "error"):
        with pytest.raises(DoesNotFit, match="expert_budget"):
            search(options(keep=4, sensitivity=sensitivity), model)


# ---- shapes and refusals -----------------------------------------------------------------------


def test_plan_is_as_uneven_as_it_may_become(tiny: Make) -> None:
    model = open_checkpoint(str(tiny("qwen3_moe"))).model
    assert plan([options(keep=4)], model).expert_counts == (6, 4, 2)
    assert plan([options(keep=0.5)], model).expert_counts == (5, 2, 2)
    assert plan([options(keep=4, floor=3)], model).expert_counts == (6, 3, 3)
    low = plan([options(keep=2, clamp_top_k=True)], model)
    assert counts_of(low) == (4, 1, 1)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"keep": 7}, "keep 7 of the 6 in block 0"),
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
def test_amounts_that_are_none(keep: Any) -> None:
    with pytest.raises(ValueError, match="count"):
        options(keep=keep)


def test_too_few_samples_are_refused(tiny: Make) -> None:
    model = open_checkpoint(str(tiny("mixtral"))).model
    lab = Lab(model, model, IDS[:3], WorkFolder(Path()), QUIET)
    with pytest.raises(InputError, match="3 calibration samples do not suffice"):
        options(keep=4).search(lab)


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
    result = CliRunner().invoke(main, given)
    assert result.exit_code == 0, result.output
    assert "expert_budget: 9 of 18 experts in 3 MoE layers" in result.output
    report = (out / "onnx" / "report.json").read_text()
    assert "(taken)" in report


def test_hf_refuses_before_calibration(tiny: Make, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, tmp_path / "missing.txt", quantized=False)
    given = ["export", str(tiny("mixtral")), "-t", "hf", "-r", str(recipe)]
    result = CliRunner().invoke(main, [*given, "-o", str(tmp_path / "out")])
    # Not 2, as it would be once the text is looked for.
    assert result.exit_code == 6, result.output
    assert not (tmp_path / "out").exists()
