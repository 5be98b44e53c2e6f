"""Constants and linear maps in the place of experts, against slow loops, and as exported."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import each_family, export, refuse, search
from moe2edge.calibration import walk
from moe2edge.calibration.block_runner import BlockRunner
from moe2edge.model.block import is_quantizable
from moe2edge.model.experts import Linear, Replacement
from moe2edge.model.layers import MoELayer
from moe2edge.model.model import Model
from moe2edge.numerics import reduced_rank
from moe2edge.numerics.reduced_rank import RegressionSums
from moe2edge.passes._replace_bases import count_expert_bytes
from moe2edge.passes.expert_replace import ExpertReplace
from moe2edge.runtime.load import load
from moe2edge.storage.checkpoint import open_checkpoint
from moe2edge.storage.output import open_stored_model
from moe2edge.testing import Make, TraceRecorder, assert_cache_changes_nothing

HIDDEN = 12


# ---- the fit -----------------------------------------------------------------------------------


def seen(tokens: int = 200) -> tuple[Tensor, Tensor, Tensor]:
    """Return inputs, outputs that depend on them and not only linearly, and gate weights."""
    draw = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, HIDDEN, generator=draw, dtype=torch.float64) + 0.7
    matrix = torch.randn(HIDDEN, HIDDEN, generator=draw, dtype=torch.float64)
    y = torch.tanh(x @ matrix) + 0.3 * x.square() + 2
    return x, y, torch.rand(tokens, generator=draw, dtype=torch.float64)


def summed(x: Tensor, y: Tensor, g: Tensor) -> RegressionSums:
    sums = RegressionSums(HIDDEN)
    for part in torch.split(torch.arange(len(x)), 37):
        sums.add(x[part], y[part], g[part])
    return sums


def replacements(layer: MoELayer) -> list[Replacement]:
    return [row for row in layer.rows if isinstance(row, Replacement)]


def missed(found: reduced_rank.ReducedRankFit, x: Tensor, y: Tensor, g: Tensor) -> float:
    """Return the loss, token by token."""
    total = 0.0
    for h, f, weight in zip(x, y, g, strict=True):
        answer = found.constant + found.second @ (found.first @ h)
        total += float(weight) ** 2 * float((f - answer).square().sum())
    return total


@pytest.mark.parametrize("rank", [0, 1, 3, HIDDEN])
@pytest.mark.parametrize("ridge", [0.0, 0.01])
def test_the_fit_is_that_of_whole_matrices(rank: int, ridge: float) -> None:
    """By singular values of weighted and centred inputs and outputs, all tokens in memory."""
    x, y, g = seen()
    found = reduced_rank.fit_reduced_rank(summed(x, y, g), rank, ridge)
    share = g.square() / g.square().sum()
    mean_x, mean_y = share @ x, share @ y
    inputs, outputs = (x - mean_x) * g[:, None], (y - mean_y) * g[:, None]
    gram = inputs.T @ inputs
    part = max(ridge, reduced_rank.LEAST_PART)
    extra = part * float(gram.diagonal().mean()) + reduced_rank.LEAST_WEIGHT
    # A ridge is a few more tokens whose outputs are zero.
    longer = torch.cat([inputs, extra**0.5 * torch.eye(HIDDEN, dtype=x.dtype)])
    targets = torch.cat([outputs, torch.zeros(HIDDEN, HIDDEN, dtype=x.dtype)])
    whole = torch.linalg.lstsq(longer, targets).solution
    _, _, vectors = torch.linalg.svd(longer @ whole, full_matrices=False)
    expected = whole @ vectors[:rank].T @ vectors[:rank]
    assert found.first.shape == (rank, HIDDEN)
    assert torch.allclose((found.second @ found.first).T, expected, atol=1e-8)
    assert torch.allclose(found.constant, mean_y - mean_x @ expected, atol=1e-8)
    assert found.residual == pytest.approx(missed(found, x, y, g), rel=1e-8)


def test_massive_inputs_have_a_fit_without_a_ridge() -> None:
    """Fewer tokens than inputs, and one input that is far larger than the others."""
    draw = torch.Generator().manual_seed(3)
    x, y = (torch.randn(300, 512, generator=draw) for _ in range(2))
    x[:, 0] += 1e4
    x[:, 1] *= 1e4
    sums = RegressionSums(512)
    sums.add(x, y, torch.ones(300))
    fit = reduced_rank.fit_reduced_rank(sums, 4, 0.0)
    assert all(torch.isfinite(t).all() for t in (fit.constant, fit.first, fit.second))
    assert 0 <= fit.residual < float((y - y.mean(0)).square().sum())


def test_a_higher_rank_misses_less_and_nothing_else_misses_less() -> None:
    x, y, g = seen()
    sums = summed(x, y, g)
    fits = [reduced_rank.fit_reduced_rank(sums, rank, 0.0) for rank in range(HIDDEN + 1)]
    losses = [fit.residual for fit in fits]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.9 * losses[4] < 0.9 * losses[0]
    draw = torch.Generator().manual_seed(1)
    for fit in fits[:4]:
        for _ in range(20):
            nudged = reduced_rank.ReducedRankFit(
                fit.constant + 0.01 * torch.randn(HIDDEN, generator=draw),
                fit.first + 0.01 * torch.randn(fit.first.shape, generator=draw),
                fit.second + 0.01 * torch.randn(fit.second.shape, generator=draw),
                0.0,
            )
            assert missed(nudged, x, y, g) > fit.residual


def test_an_allocation_misses_little_more_than_the_best_of_all() -> None:
    """Against every way to spend a budget; the difference is what one expert's bytes would buy."""
    size = reduced_rank.Size(expert=90, constant=10, rank=20)
    assert size.most == 3
    draw = torch.Generator().manual_seed(4)
    for _ in range(30):
        falls = [
            torch.rand(6, generator=draw, dtype=torch.float64).sort(descending=True).values
            for _ in range(4)
        ]
        spreads = [float(own.sum()) + float(torch.rand(1, generator=draw)) for own in falls]
        ways = []
        for ranks in itertools.product([None, 0, 1, 2, 3], repeat=4):
            if None not in ranks:
                continue
            total = sum(90 if r is None else 10 + 20 * r for r in ranks)
            left = sum(
                0.0 if r is None else spreads[j] - float(falls[j][:r].sum())
                for j, r in enumerate(ranks)
            )
            ways.append((total, left))
        for budget in (130, 180, 240, 300, 359):
            found = reduced_rank.allocate_ranks(spreads, falls, size, budget)
            assert None in found
            total = sum(90 if r is None else 10 + 20 * r for r in found)
            assert total <= budget
            left = sum(
                0.0 if r is None else spreads[j] - float(falls[j][:r].sum())
                for j, r in enumerate(found)
            )
            fewer = [missing for bytes_, missing in ways if bytes_ <= max(120, budget - 90)]
            assert min(m for b, m in ways if b <= budget) <= left + 1e-9
            assert left <= min(fewer) + 1e-9


def test_experts_that_are_alike_do_not_go_together() -> None:
    """At one price all of them would; those that fit stay."""
    size = reduced_rank.Size(1000, 10, 20)
    fall = torch.tensor([2.0, 1.0, 0.5], dtype=torch.float64)
    for budget in (2500, 5000, 7500):
        found = reduced_rank.allocate_ranks([5.0] * 8, [fall] * 8, size, budget)
        stay = found.count(None)
        assert stay * 1000 + (8 - stay) * 10 <= budget < (stay + 1) * 1000 + (7 - stay) * 70


def test_a_map_needs_half_as_many_tokens_as_inputs(tiny: Make) -> None:
    model = open_checkpoint(str(tiny("olmoe"))).model
    for options, least in (({}, 32), ({"min_tokens": 3}, 3)):
        step = ExpertReplace.model_validate({"with": "linear", "keep": 3, **options})
        assert step._count_least(model) == least


def test_ranks_in_steps() -> None:
    """As an allocation whose ranks are worth as much as four."""
    size, coarse = reduced_rank.Size(900, 20, 10), reduced_rank.Size(900, 20, 40)
    draw = torch.Generator().manual_seed(5)
    falls = [
        torch.rand(n, generator=draw, dtype=torch.float64).sort(descending=True).values
        for n in (90, 90, 90, 6, 0)
    ]
    sums = [own[: len(own) // 4 * 4].reshape(-1 if len(own) else 0, 4).sum(1) for own in falls]
    spreads = [float(own.sum()) + 0.1 for own in falls]
    for budget in (1300, 1700, 2500):
        found = reduced_rank.allocate_ranks(spreads, falls, size, budget, 4)
        expected = reduced_rank.allocate_ranks(spreads, sums, coarse, budget)
        assert found == [None if rank is None else 4 * rank for rank in expected]
        assert any(found)


def test_gains_are_what_fits_gain() -> None:
    """Without a ridge, the residual at a rank is what a constant misses less the gains so far."""
    x, y, g = seen()
    sums = summed(x, y, g)
    spread, falls = reduced_rank.compute_gains(sums, 0.0)
    for rank in range(HIDDEN + 1):
        found = reduced_rank.fit_reduced_rank(sums, rank, 0.0)
        assert found.residual == pytest.approx(spread - float(falls[:rank].sum()), rel=1e-4)


@pytest.mark.parametrize("budget", [0.45, 0.6, 0.7])
def test_a_budget_counts_replacements_that_are_there(tiny: Make, budget: float) -> None:
    model = open_checkpoint(str(tiny("olmoe"))).model
    ids = torch.randint(1, 96, (8, 48), generator=torch.Generator().manual_seed(9))
    for options in ({"keep": 0.75, "rank": 8}, {"budget": budget}):
        step = ExpertReplace.model_validate({"with": "linear", "min_tokens": 0, **options})
        before, step = model, step.resolve(model)
        step.check(before)
        model = search(step, before, ids).model
    assert 0.9 * budget < count_expert_bytes(model) / count_expert_bytes(before) <= budget


@pytest.mark.parametrize("family", each_family("mixtral"))
def test_a_budget_of_bytes_is_kept(tiny: Make, tmp_path: Path, family: str) -> None:
    """In every layer, and filled up to the last ranks, which come by four."""
    options = {"keep": None, "rank": None, "budget": 0.6, "min_tokens": 0}
    source, model = exported(tiny, family, tmp_path / "out", **options)
    for (_, before), (_, after) in zip(source.moe_blocks, model.moe_blocks, strict=True):
        whole = sum(4 * expert.count for expert in before.experts)
        now = sum(4 * expert.count for expert in after.experts)
        now += sum(w.nbytes for row in replacements(after) for _, w in row.weights())
        assert 0.6 * whole - 4 * 2 * 4 * 64 < now <= 0.6 * whole
        assert not any(row.rank % 4 for row in replacements(after))
    layers = [layer for _, layer in model.moe_blocks]
    assert any(len({row.rank for row in replacements(layer)}) > 1 for layer in layers)


def test_an_expert_without_tokens_outputs_zero() -> None:
    found = reduced_rank.fit_reduced_rank(RegressionSums(HIDDEN), 3, 0.01)
    assert found.residual == 0
    assert not found.constant.any()
    assert not (found.second @ found.first).any()


# ---- layers ------------------------------------------------------------------------------------


def exported(tiny: Make, family: str, out: Path, **options: Any) -> tuple[Model, Model]:
    """Source and result of one pass."""
    folder = tiny(family)
    step = {"expert_replace": {"with": "linear", "keep": 4, "rank": 3, **options}}
    code, said, report = export(folder, out, [step], "hf:layout=natural")
    assert code == 0, said
    assert report["results"][0]["parity"]["exact"] < 1e-4
    assert report["steps"][0]["options"]["with"] == step["expert_replace"]["with"]
    return open_checkpoint(str(folder)).model, open_stored_model(open_checkpoint(str(out)))


@pytest.mark.parametrize("family", each_family("qwen2_moe"))
def test_a_layer_adds_the_outputs_of_its_replacements(
    tiny: Make, tmp_path: Path, family: str
) -> None:
    """Token by token: the source's routing, and for experts that are gone their replacements."""
    source, model = exported(tiny, family, tmp_path / "out", min_tokens=0)
    assert model.expert_counts == (4, 4, 4)
    assert model.replaced_count == 6
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(2, 20, 64, generator=generator)
    changed = json.loads((tmp_path / "out" / "report.json").read_text())["steps"][0]["changed"]
    for block, after, told in zip(source.blocks, model.blocks, changed, strict=True):
        layer = after.mlp
        assert isinstance(layer, MoELayer)
        gone = json.loads(told.partition("experts ")[2])
        assert len(gone) == 2
        before = BlockRunner(source, block).watch(hidden)
        found = BlockRunner(model, after).watch(hidden)
        assert before.routing is not None
        answers = dict(zip(gone, replacements(layer), strict=True))
        expected = before.mlp_outputs.flatten(0, 1).clone()
        for token, (x, ids, weights) in enumerate(
            zip(before.routing.inputs, before.routing.ids, before.routing.weights, strict=True)
        ):
            for expert, weight in zip(ids.tolist(), weights, strict=True):
                if (own := answers.get(expert)) is not None:
                    assert isinstance(own, Linear)
                    answer = own.constant.load() + own.second.load() @ (own.first.load() @ x)
                    instead_of = before.expert_output(expert, x[None])[0]
                    expected[token] += weight * (answer - instead_of)
        assert (found.mlp_outputs.flatten(0, 1) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("family", each_family("qwen3_moe"))
@pytest.mark.slow
def test_the_folder_generates(tiny: Make, tmp_path: Path, family: str) -> None:
    exported(tiny, family, tmp_path / "out", **{"with": "constant", "rank": None})
    loaded: Any = load(tmp_path / "out", dtype=torch.float32)
    ids = torch.randint(1, 96, (2, 20), generator=torch.Generator().manual_seed(5))
    assert_cache_changes_nothing(loaded, ids)
    size = sum(parameter.nbytes for parameter in loaded.parameters())
    source: Any = load(tiny(family), dtype=torch.float32)
    whole = sum(parameter.nbytes for parameter in source.parameters())
    gone, vectors = 3 * 2 * 3 * 64 * 32 * 4, 3 * 2 * 64 * 4
    assert size == whole - gone + vectors


@pytest.mark.parametrize("family", each_family("olmoe"))
@pytest.mark.parametrize("slim", ["gptq", "awq", "rtn"])
@pytest.mark.slow
def test_experts_that_stay_are_quantized(
    tiny: Make, tmp_path: Path, family: str, slim: str
) -> None:
    folder, out = tiny(family), tmp_path / "out"
    replaced = {"expert_replace": {"with": "linear", "keep": 0.5, "rank": 2}}
    code, said, report = export(folder, out, [replaced, {slim: {}}], "gptq")
    assert code == 0, said
    assert report["results"][0]["parity"]["exact"] < 1e-4
    model = open_stored_model(open_checkpoint(str(out)))
    assert model.expert_counts == (3, 3, 3)
    for name, role, weight in model.tensors():
        assert (weight.scheme is not None) == is_quantizable(role), name


@pytest.mark.parametrize("rank", [None, 4])
def test_experts_with_the_closest_replacements_are_replaced(tiny: Make, rank: int | None) -> None:
    """On the intact model, by a fit of every expert with all its tokens at once."""
    model = open_checkpoint(str(tiny("olmoe"))).model
    ids = torch.randint(1, 96, (24, 40), generator=torch.Generator().manual_seed(9))
    options = {"with": "linear" if rank else "constant", "keep": 4, "rank": rank}
    options |= {"min_tokens": 0} if rank else {}
    fit = {"ridge": 0.0} if rank else {}
    step = ExpertReplace.model_validate(
        {**options, "criterion": "residual", "fitted_on": "intact", **fit}
    )
    outcome = search(step, model, ids)
    watched = TraceRecorder()
    walk.observe(model, ids, [watched], lambda *_: None, "test")
    for seen, block in zip(watched.seen, outcome.model.blocks, strict=True):
        routing = seen.routing
        assert routing is not None
        losses = []
        for n in range(6):
            token, place = torch.where(routing.ids == n)
            x, g = routing.inputs[token].double(), routing.weights[token, place].double()
            y = seen.expert_output(n, routing.inputs[token]).double()
            sums = RegressionSums(64)
            sums.add(x, y, g)
            found = reduced_rank.fit_reduced_rank(sums, rank or 0, 0.0)
            losses.append(missed(found, x, y, g))
        assert isinstance(block.mlp, MoELayer)
        gone = {row.origin for row in replacements(block.mlp)}
        assert gone == set(sorted(range(6), key=losses.__getitem__)[:2])


def test_each_layer_can_keep_its_own_number(tiny: Make, tmp_path: Path) -> None:
    _, model = exported(tiny, "qwen2_moe", tmp_path / "out", keep=[6, 3, 5])
    assert model.expert_counts == (6, 3, 5)


def test_few_tokens_get_a_constant(tiny: Make, tmp_path: Path) -> None:
    _, model = exported(tiny, "olmoe", tmp_path / "out", min_tokens=10**6)
    ranks = {row.rank for _, layer in model.moe_blocks for row in replacements(layer)}
    assert ranks == {0}
    notes = json.loads((tmp_path / "out" / "report.json").read_text())["steps"][0]["notes"]
    assert sum("fewer than 1000000: replaced by a constant" in note for note in notes) == 6


@pytest.mark.parametrize(
    ("steps", "target", "expected"),
    [
        ([{"expert_replace": {"with": "constant", "keep": 4}}], "hf", "tied or replaced experts"),
        ([{"expert_replace": {"with": "linear", "keep": 4, "rank": 65}}], "hf", "rank is 65; the"),
        ([{"expert_replace": {"with": "linear", "keep": 4, "rank": 60}}], "hf", "at most 47"),
        (
            [{"expert_replace": {"with": "constant", "keep": 4, "rank": 2}}],
            "hf",
            "rank is not an option of with",
        ),
        ([{"expert_replace": {"with": "constant"}}], "hf", "with: constant needs keep"),
        (
            [{"expert_replace": {"with": "linear", "keep": 4, "budget": 0.5}}],
            "hf",
            "either keep (experts that stay) or budget",
        ),
        ([{"expert_replace": {"with": "linear", "budget": 0.1}}], "hf", "raise the budget"),
        ([{"expert_replace": {"with": "linear", "budget": 10**9}}], "hf", "lower the budget"),
        (
            [{"expert_replace": {"with": "linear", "budget": 0.5, "rank": 2}}],
            "hf",
            "leave rank and",
        ),
        ([{"expert_replace": {"with": "constant", "keep": 6}}], "hf", "keeps every expert"),
        (
            [{"expert_replace": {"with": "constant", "keep": 7}}],
            "hf",
            "keep is 7, but MoE layer 0 has 6",
        ),
        ([{"expert_replace": {"with": "constant", "keep": [4, 4]}}], "hf", "2 counts for 3 MoE"),
        ([{"expert_replace": {"keep": 4}}], "hf", "expert_replace.with is missing"),
        ([{"expert_replace": {"whit": "constant"}}], "hf", "with"),
        (
            [
                {"expert_replace": {"with": "constant", "keep": 4}},
                {"expert_drop": {"keep": 3}},
            ],
            "hf",
            "put expert_replace or expert_merge after expert_drop",
        ),
    ],
)
def test_unsuitable_recipes_are_refused(
    tiny: Make, tmp_path: Path, steps: list[Any], target: str, expected: str
) -> None:
    error = refuse(tiny("olmoe"), tmp_path / "out", steps, target)
    assert error.exit_code in (2, 6)
    assert expected in str(error)


def test_options_have_defaults_that_fit(tiny: Make) -> None:
    layer = open_checkpoint(str(tiny("olmoe"))).model.moe_blocks[0][1]
    step = ExpertReplace.model_validate({"with": "linear", "keep": 0.5})
    assert step.model_dump(by_alias=True)["with"] == "linear"
    assert step._rank(layer) == 2
