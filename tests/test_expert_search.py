"""Expert search: the loss, what each search finds, and its cost, against slow loops over tokens."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import helpers
from helpers import each_family, ignore, make_context, plan, run
from moe2edge.calibration import evidence as gathering
from moe2edge.calibration import walk
from moe2edge.calibration.block_runner import BlockRunner
from moe2edge.errors import DoesNotFit, InputError
from moe2edge.model.experts import Dense
from moe2edge.model.layers import MoELayer, UnroutedMLP
from moe2edge.model.model import Model
from moe2edge.numerics import subset_loss
from moe2edge.numerics.subset_loss import RoutingRule, SubsetEvidence
from moe2edge.passes.expert_search import ExpertSearch
from moe2edge.pipeline.contract import Outcome, PlannedStep, TextSize, TextSizes
from moe2edge.progress import Reporter
from moe2edge.runtime.memory import IMPORTED, Estimate
from moe2edge.storage.checkpoint import open_checkpoint
from moe2edge.testing import Make

IDS = torch.randint(1, 96, (3, 40), generator=torch.Generator().manual_seed(0))
Set = tuple[int, ...]


def options(**given: Any) -> ExpertSearch:
    return ExpertSearch.model_validate(given)


def search(step: ExpertSearch, model: Model, source: Model | None = None) -> Outcome:
    plan([step], model)
    return helpers.search(step, model, IDS, source)


def kept(model: Model) -> list[Set]:
    return [block.expert_origins for block in model.blocks]


def error(outcome: Outcome, index: int) -> float:
    found = re.search(r"error ([\d.]+)", outcome.notes[index])
    assert found
    return float(found[1])


# ---- the slow twin: stock transformers, one token at a time ------------------------------------


class Slow:
    """A model of transformers whose routers can be masked, and what its MoE layers see."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        config = self.model.config
        self.renormalize = bool(getattr(config, "norm_topk_prob", config.model_type == "mixtral"))
        self.top_k = config.num_experts_per_tok
        self.layers = self.model.model.layers

    def keep(self, layer: int, ids: Set) -> None:
        """Mask the router of a layer with minus infinity."""
        gate = self.layers[layer].mlp.gate

        def forward(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            logits = x.reshape(-1, x.shape[-1]) @ gate.weight.T
            routed = [route(row, ids, self.top_k, self.renormalize) for row in logits]
            weights = torch.stack([torch.tensor(list(w.values())) for w in routed])
            return logits, weights.float(), torch.tensor([list(w) for w in routed])

        gate.forward = forward

    @torch.no_grad()
    def seen(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return inputs and outputs [T, hidden] of an MoE layer."""
        found: list[Tensor] = []

        def hook(_: Any, args: tuple[Tensor, ...], out: Tensor) -> None:
            found.extend((args[0].flatten(0, 1), out.flatten(0, 1)))

        handle = self.layers[layer].mlp.register_forward_hook(hook)
        self.model(IDS, use_cache=False)
        handle.remove()
        return found[0], found[1]

    @torch.no_grad()
    def losses(
        self, layer: int, sets: Sequence[Set], target: Tensor, tokens: Sequence[int]
    ) -> dict[Set, float]:
        """``||Z - Z'||^2`` of every set, by evaluating each of them token by token."""
        mlp, inputs = self.layers[layer].mlp, self.seen(layer)[0]
        total = dict.fromkeys(sets, 0.0)
        for t in tokens:
            x = inputs[t]
            outputs = [self._expert(mlp.experts, j, x).double() for j in range(6)]
            rest = target[t].double()
            if hasattr(mlp, "shared_expert"):
                gate = torch.sigmoid(mlp.shared_expert_gate(x[None])[0])
                rest = rest - (gate * mlp.shared_expert(x[None])[0]).double()
            logits = mlp.gate.weight @ x
            for ids in sets:
                weights = route(logits, ids, self.top_k, self.renormalize)
                routed = sum(w * outputs[j] for j, w in weights.items())
                total[ids] += float((rest - routed).square().sum())
        return total

    @staticmethod
    def _expert(experts: Any, j: int, x: Tensor) -> Tensor:
        gate, up = (experts.gate_up_proj[j] @ x).chunk(2)
        out: Tensor = experts.down_proj[j] @ (torch.nn.functional.silu(gate) * up)
        return out


def route(logits: Tensor, ids: Set, top_k: int, renormalize: bool) -> dict[int, float]:
    """Weights of the chosen among ``ids``, of one token."""
    masked = torch.full_like(logits, -torch.inf)
    masked[list(ids)] = logits[list(ids)]
    p = masked.double().softmax(0)
    best = sorted(ids, key=lambda j: -float(p[j]))[: min(top_k, len(ids))]
    total = float(p[best].sum()) if renormalize else 1.0
    return {j: float(p[j]) / total for j in best}


def combinations(count: int) -> list[Set]:
    return list(itertools.combinations(range(6), count))


def least(losses: Mapping[Set, float]) -> Set:
    return min(losses, key=lambda ids: (losses[ids], ids))


# ---- search equals the slow twin ---------------------------------------------------------------


@pytest.mark.parametrize("keep", [5, 3, 2, 1])  # one less, some, top-k, fewer than top-k
@pytest.mark.parametrize("family", each_family("qwen2_moe"))
@pytest.mark.slow
def test_exhaustive_search_equals_brute_force(tiny: Make, family: str, keep: int) -> None:
    folder = tiny(family)
    slow = Slow(folder)
    outcome = search(options(keep=keep, clamp_top_k=keep < 2), open_checkpoint(str(folder)).model)
    for layer in range(3):
        target = slow.seen(layer)[1]
        losses = slow.losses(layer, combinations(keep), target, range(120))
        best = least(losses)
        assert kept(outcome.model)[layer] == best
        relative = math.sqrt(losses[best] / float(target.double().square().sum()))
        assert error(outcome, layer) == pytest.approx(relative, abs=1e-4)
        assert f"{math.comb(6, keep)} sets tried" in outcome.notes[layer]
        gone = sorted(set(range(6)) - set(best))
        assert outcome.changed[layer] == f"block {layer}: experts {gone}"
    mlp = outcome.model.blocks[0].mlp
    if keep == 1:
        assert isinstance(mlp, UnroutedMLP if family == "qwen2_moe" else Dense)
    else:
        assert isinstance(mlp, MoELayer)
        assert mlp.router.top_k == 2


@pytest.mark.parametrize("family", each_family("qwen3_moe"))
def test_progressive_search_equals_brute_force(tiny: Make, family: str) -> None:
    folder = tiny(family)
    intact, trimmed = Slow(folder), Slow(folder)
    model = open_checkpoint(str(folder)).model
    outcome = search(options(keep=3, progressive=True), model)
    for layer in range(3):
        target = intact.seen(layer)[1]
        losses = trimmed.losses(layer, combinations(3), target, range(120))
        best = least(losses)
        assert kept(outcome.model)[layer] == best
        relative = math.sqrt(losses[best] / float(target.double().square().sum()))
        assert error(outcome, layer) == pytest.approx(relative, abs=1e-4)
        trimmed.keep(layer, best)
    # Or this test could not tell it from the layer-wise search.
    apart = search(options(keep=3), model)
    assert [error(apart, n) for n in (1, 2)] != [error(outcome, n) for n in (1, 2)]
    assert error(apart, 0) == error(outcome, 0)


def test_progressive_search_aims_at_the_source(tiny: Make) -> None:
    """Earlier passes have removed experts, and a block."""
    folder = tiny("qwen2_moe")
    source = open_checkpoint(str(folder)).model
    intact, trimmed = Slow(folder), Slow(folder)
    first = (0, 2, 3, 4, 5)
    trimmed.keep(0, first)
    trimmed.layers[1].forward = lambda hidden_states, **_: hidden_states
    model = source.replace_block(source.blocks[0].keep_experts(first)).keep_blocks([0, 2])
    outcome = search(options(keep=3, progressive=True), model, source)
    for place, layer in ((0, 0), (1, 2)):
        sets = [s for s in combinations(3) if layer or 1 not in s]
        best = least(trimmed.losses(layer, sets, intact.seen(layer)[1], range(120)))
        assert kept(outcome.model)[place] == best
        trimmed.keep(layer, best)


@pytest.mark.parametrize("family", each_family("olmoe"))
def test_greedy_search_equals_brute_force(tiny: Make, family: str) -> None:
    folder = tiny(family)
    slow = Slow(folder)
    step = options(keep=1, method="greedy", clamp_top_k=True)
    outcome = search(step, open_checkpoint(str(folder)).model)
    for layer in range(3):
        target, left = slow.seen(layer)[1], tuple(range(6))
        while len(left) > 1:
            smaller = list(itertools.combinations(left, len(left) - 1))
            left = least(slow.losses(layer, smaller, target, range(120)))
        assert kept(outcome.model)[layer] == left
        assert f"{6 + 5 + 4 + 3 + 2} sets tried" in outcome.notes[layer]


def test_only_the_tokens_asked_for_are_looked_at(
    tiny: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny("olmoe")
    monkeypatch.setattr(walk, "BATCH_TOKENS", 40)  # one sample: places cross batches
    slow = Slow(folder)
    outcome = search(options(keep=3, tokens=7), open_checkpoint(str(folder)).model)
    places = [0, 17, 34, 51, 68, 85, 102]
    for layer in range(3):
        target = slow.seen(layer)[1]
        losses = slow.losses(layer, combinations(3), target, places)
        best = least(losses)
        assert kept(outcome.model)[layer] == best
        relative = math.sqrt(losses[best] / float(target[places].double().square().sum()))
        assert error(outcome, layer) == pytest.approx(relative, abs=1e-4)


# ---- losses of subsets -------------------------------------------------------------------------


def evidence(
    rule: RoutingRule, *, pull: bool, experts: int = 8, tokens: int = 60
) -> SubsetEvidence:
    """Random experts, two parts of unequal size; and whatever shall be put out."""
    generator = torch.Generator().manual_seed(1)
    parts, missing, wanted = [], 0.0, 0.0
    for count in (tokens, tokens // 3):
        logits = torch.randn(count, experts, generator=generator) * 2
        outputs = torch.randn(count, experts, 5, generator=generator)
        gap = torch.randn(count, 5, generator=generator)
        gram = outputs @ outputs.mT
        along = torch.einsum("teh,th->te", outputs, gap).double()
        parts.append(subset_loss.make_part(gram, along if pull else None, logits, rule))
        missing += float(gap.square().sum()) if pull else 0.0
        wanted += float(outputs.square().sum())
    return SubsetEvidence(rule, experts, tuple(parts), missing, wanted)


@pytest.mark.parametrize("pull", [False, True])
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("top_k", [1, 3])
def test_all_removal_losses_at_once_equal_one_loss_each(
    top_k: int, renormalize: bool, pull: bool
) -> None:
    found = evidence(RoutingRule(top_k, renormalize), pull=pull)
    for ids in [tuple(range(8)), (0, 1, 2, 5, 7), (1, 3, 4, 6), (2, 5, 6), (0, 7)]:
        each = [
            subset_loss.compute_subset_loss(found, [*ids[:n], *ids[n + 1 :]])
            for n in range(len(ids))
        ]
        assert subset_loss.compute_removal_losses(found, ids) == pytest.approx(each, rel=1e-9)


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("keep", [1, 2, 4, 7])
def test_a_wide_beam_equals_exhaustive_search(keep: int, renormalize: bool) -> None:
    found = evidence(RoutingRule(2, renormalize), pull=True)
    every = subset_loss.search_exhaustively(found, keep, lambda *_: None)
    wide = subset_loss.search_beam(found, keep, 1000, lambda *_: None)
    assert wide.kept == every.kept
    assert wide.loss == pytest.approx(every.loss, rel=1e-9)
    assert wide.tried == subset_loss.count_beam_tries(8, keep, 1000)
    one = subset_loss.search_beam(found, keep, 1, lambda *_: None)
    assert one.loss >= every.loss * (1 - 1e-9)


def test_a_beam_can_beat_greedy_search() -> None:
    """Two large experts cancel each other, so that greedy search never breaks up the pair."""
    rule = RoutingRule(5, renormalize=True)
    outputs = torch.tensor([[[10.0], [-10.0], [1.0], [1.3], [1.0]]]).repeat(20, 1, 1)
    part = subset_loss.make_part(outputs @ outputs.mT, None, torch.zeros(20, 5), rule)
    found = SubsetEvidence(rule, 5, (part,), 0.0, 1.0)
    greedy = subset_loss.search_beam(found, 2, 1, lambda *_: None)
    every = subset_loss.search_exhaustively(found, 2, lambda *_: None)
    # The mean of all is 0.66; that of the pair is 0, that of two small ones 1.
    assert greedy.kept == (0, 1)
    assert greedy.loss == pytest.approx(20 * 0.66**2, rel=1e-4)
    assert every.kept == subset_loss.search_beam(found, 2, 10, lambda *_: None).kept == (2, 4)
    assert every.loss == pytest.approx(20 * 0.34**2, rel=1e-4)


def test_removing_an_expert_that_is_never_chosen_costs_exactly_zero() -> None:
    generator = torch.Generator().manual_seed(2)
    outputs = torch.randn(50, 6, 5, generator=generator) * 1000
    logits = torch.randn(50, 6, generator=generator)
    logits[:, [1, 4]] -= 30  # never among the best two
    rule = RoutingRule(2, renormalize=True)
    part = subset_loss.make_part(outputs @ outputs.mT, None, logits, rule)
    found = SubsetEvidence(rule, 6, (part,), 0.0, 1.0)
    assert subset_loss.compute_subset_loss(found, (0, 2, 3, 5)) == 0.0
    assert subset_loss.compute_removal_losses(found, (0, 1, 2, 3, 5))[1] == 0.0
    assert subset_loss.search_beam(found, 4, 1, lambda *_: None) == subset_loss.SearchResult(
        (0, 2, 3, 5), 0.0, 6 + 5
    )


def test_ties_are_broken_by_order() -> None:
    rule = RoutingRule(2, renormalize=False)
    part = subset_loss.make_part(torch.zeros(9, 6, 6), None, torch.zeros(9, 6), rule)
    found = SubsetEvidence(rule, 6, (part,), 0.0, 0.0)
    for method in (subset_loss.search_exhaustively(found, 3, lambda *_: None), *beams(found)):
        assert method.kept == (0, 1, 2)
    assert found.compute_relative_error(0.0) == 0.0


def beams(found: SubsetEvidence) -> list[subset_loss.SearchResult]:
    return [subset_loss.search_beam(found, 3, width, lambda *_: None) for width in (1, 3, 100)]


def test_logits_far_apart_stay_finite() -> None:
    for renormalize in (False, True):
        rule = RoutingRule(1, renormalize)
        logits = torch.tensor([[5000.0, 0.0, -5000.0, -9000.0]])
        gram = torch.ones(1, 4, 4)
        found = SubsetEvidence(
            rule, 4, (subset_loss.make_part(gram, None, logits, rule),), 0.0, 1.0
        )
        losses = subset_loss.compute_removal_losses(found, (0, 1, 2, 3))
        assert all(map(math.isfinite, losses))
        assert math.isfinite(subset_loss.compute_subset_loss(found, (2, 3)))


# ---- cost --------------------------------------------------------------------------------------


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("method", ["exhaustive", "greedy", "beam"])
@pytest.mark.parametrize("tokens", [None, 50])
def test_each_expert_runs_once_per_token(
    tiny: Make,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    tokens: int | None,
    progressive: bool,
) -> None:
    rows: dict[tuple[int, int], list[Tensor]] = {}
    inner: Callable[..., Tensor] = BlockRunner._expert_output

    def count(runner: BlockRunner, expert: int, inputs: Tensor) -> Tensor:
        rows.setdefault((runner.block.index, expert), []).append(inputs)
        return inner(runner, expert, inputs)

    monkeypatch.setattr(BlockRunner, "_expert_output", count)
    monkeypatch.setattr(walk, "BATCH_TOKENS", 80)
    monkeypatch.setattr(gathering, "LEAST_ROWS", 7)
    monkeypatch.setattr(gathering, "OUTPUT_BYTES", 0)
    model = open_checkpoint(str(tiny("qwen3_moe"))).model
    step = options(keep=3, method=method, tokens=tokens, progressive=progressive)
    search(step, model)
    assert sorted(rows) == [(block, expert) for block in range(3) for expert in range(6)]
    for parts in rows.values():
        every = torch.cat(parts)
        # Inputs of different tokens differ, save by chance: positions and histories do.
        assert len(every) == len(torch.unique(every, dim=0)) == (tokens or 120)


def test_cost_is_stated_before_the_search(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model = open_checkpoint(str(tiny("mixtral"))).model
    lines: list[str] = []

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(walk, "walk", stop)
    context = make_context(model, IDS, reporter=Reporter(lines.append, ignore))
    with pytest.raises(KeyboardInterrupt):
        options(keep=3).search(context)
    assert lines == [
        "expert_search: 3 MoE layers, exhaustive, at most 20 sets per layer; 120 tokens, 2,160 "
        "expert evaluations in all (each expert once per token); 0 MB of Gram matrices at a time"
    ]
    with pytest.raises(KeyboardInterrupt):
        options(keep=3, limit=19).search(context)
    assert "beam of 4, at most 42 sets per layer" in lines[1]
    with pytest.raises(KeyboardInterrupt):
        options(keep=3, method="greedy").search(context)
    assert "greedy, at most 15 sets per layer" in lines[2]


def test_too_little_memory(tiny: Make) -> None:
    model = open_checkpoint(str(tiny("mixtral"))).model
    texts = TextSizes(TextSize(*IDS.shape))

    def estimate(**more: Any) -> Estimate:
        step = options(keep=3, **more)
        return step.estimate(PlannedStep(step, model, step.plan(model)), texts)

    found = estimate()
    with pytest.raises(DoesNotFit, match=r"outputs of 6 experts for 120 tokens.*set tokens"):
        found.check(found.memory - 1 + IMPORTED)
    found.check(found.memory + IMPORTED)
    row = subset_loss.estimate_subset_evidence_bytes(1, 6)
    assert estimate(tokens=119).memory == found.memory - row
    # The source is walked beside the model.
    assert estimate(progressive=True).memory == found.memory + 4 * 120 * 64 + model.block_nbytes


# ---- as a pass ---------------------------------------------------------------------------------


def test_layers_that_keep_all_are_left_alone(tiny: Make) -> None:
    model = open_checkpoint(str(tiny("olmoe"))).model
    model = model.replace_block(model.blocks[1].keep_experts((1, 2, 5)))
    for progressive in (False, True):
        outcome = search(options(keep=3, progressive=progressive), model)
        assert outcome.model.blocks[1] is model.blocks[1]
        assert [line.split(":")[0] for line in outcome.changed] == ["block 0", "block 2"]
        assert outcome.model.expert_counts == (3, 3, 3)


def test_dense_layers_are_passed_over(tiny: Make) -> None:
    model = open_checkpoint(str(tiny("qwen3_moe", mlp_only_layers=[1]))).model
    for progressive in (False, True):
        outcome = search(options(keep=0.5, progressive=progressive), model)
        assert outcome.model.expert_counts == (3, 3)


def test_export(tiny: Make, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "calibration: {samples: 4, length: 32}\n"
        "evaluation: {samples: 2, length: 32}\n"
        "passes: [expert_search: {keep: 4, method: beam, progressive: true}]\n"
    )
    out = tmp_path / "out"
    result = run("export", str(tiny("mixtral")), "-r", str(recipe), "-t", "hf", "-o", str(out))
    assert result.exit_code == 0, result.output
    assert "expert_search: 3 MoE layers, beam of 4" in result.output
    assert open_checkpoint(str(out)).model.expert_counts == (4, 4, 4)
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert loaded.config.num_local_experts == 4


BAD: list[tuple[dict[str, Any], str]] = [
    ({"keep": 7}, "keep is 7, but block 0 has 6 experts"),
    ({"keep": 1}, "keep 1 leaves 1 experts in block 0 where the router chooses 2"),
    ({"keep": 0.1}, "keep 0.1 leaves 1 experts in block 0"),
    ({"keep": 6}, "keeps every expert"),
    ({"keep": 3, "method": "exhaustive", "limit": 19}, "tries 20 sets, more than limit 19"),
]


@pytest.mark.parametrize(("given", "message"), BAD, ids=[m for _, m in BAD])
def test_refusals(tiny: Make, given: dict[str, Any], message: str) -> None:
    model = open_checkpoint(str(tiny("mixtral"))).model
    with pytest.raises(InputError, match=re.escape(message)):
        options(**given).check(model)


def test_dynamic_skipping_comes_later(tiny: Make) -> None:
    from moe2edge.passes.expert_skip import ExpertSkip

    model = ExpertSkip().plan(open_checkpoint(str(tiny("mixtral"))).model)
    with pytest.raises(InputError, match="put expert_skip after expert_search"):
        options(keep=3).check(model)


@pytest.mark.parametrize("keep", [0, -1, 1.0, True, "half", [3, 3, 3]])
def test_invalid_amounts(keep: Any) -> None:
    with pytest.raises(ValueError, match=r"a count|a fraction"):
        options(keep=keep)
