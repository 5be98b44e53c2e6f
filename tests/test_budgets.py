"""Allocations, intervals, and what layers lose, against brute force and slow loops over tokens."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from helpers import each_family, ignore
from moe2edge.calibration import walk
from moe2edge.calibration.block_runner import BlockRunner
from moe2edge.calibration.observation import Facts
from moe2edge.errors import InputError
from moe2edge.model.model import Model
from moe2edge.numerics import allocation, bootstrap, metrics
from moe2edge.numerics.allocation import Counts
from moe2edge.passes import _allocation_trials
from moe2edge.passes import _allocation_trials as budgets
from moe2edge.passes._allocation_trials import Ranker, Trial, Trimmer
from moe2edge.passes.expert_drop import ExpertDrop
from moe2edge.storage.checkpoint import open_checkpoint
from moe2edge.testing import Make

IDS = torch.randint(1, 96, (8, 24), generator=torch.Generator().manual_seed(0))


def counts_of(model: Model) -> Counts:
    return tuple(len(block.expert_origins) for block in model.blocks)


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
        assert allocation.allocate(costs, floors, total) == best
    for total in (sum(floors) - 1, sum(full) + 1):
        with pytest.raises(InputError, match=f"keeps {total} experts: the floors add up to"):
            allocation.allocate(costs, floors, total)


def test_steps_on_the_way_keep_total_and_bounds() -> None:
    draw = random.Random(0)
    for _ in range(300):
        full = tuple(draw.randint(2, 9) for _ in range(5))
        floors = tuple(draw.randint(1, n) for n in full)
        total = draw.randint(sum(floors), sum(full))
        first, second = (draw.choice(every(floors, full, total)) for _ in range(2))
        assert allocation.interpolate_counts(first, second, 0.0) == first
        assert allocation.interpolate_counts(first, second, 1.0) == second
        for part in (0.25, 0.5, 0.75):
            found = allocation.interpolate_counts(first, second, part)
            assert sum(found) == total
            for n, a, b in zip(found, first, second, strict=True):
                assert abs(n - (a + part * (b - a))) < 1
                assert min(a, b) <= n <= max(a, b)


@pytest.mark.parametrize("points", [2, 3, 5, 8, 50])
def test_a_grid_has_both_ends(points: int) -> None:
    for floor, experts in [(1, 2), (2, 8), (8, 64), (8, 128)]:
        found = allocation.spread_counts(floor, experts, points)
        assert found == tuple(sorted(set(found)))
        assert (found[0], found[-1]) == (floor, experts - 1)
        assert len(found) == min(points, experts - floor)
        # Straight lines are met by straight lines.
        known = {n: float(3 * n) for n in (*found, experts)}
        expected = [3.0 * n for n in range(floor, experts + 1)]
        assert allocation.interpolate_costs(known, floor, experts) == pytest.approx(expected)


# ---- samples -----------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["take turns", "follow one another"])
def test_parts_of_a_mix_are_in_both_parts_of_the_split(order: str) -> None:
    choosing, held_out = bootstrap.split_samples(128, 0.25)
    assert sorted(choosing + held_out) == list(range(128))
    assert len(held_out) == 32
    for places in (held_out, choosing, choosing[:32]):
        parts = [n % 4 if order == "take turns" else n // 32 for n in places]
        assert all(abs(parts.count(k) - len(places) / 4) <= 3 for k in range(4))


def test_a_split_needs_samples() -> None:
    assert [len(part) for part in bootstrap.split_samples(4, 0.01)] == [2, 2]
    for samples, held_out in ((3, 0.25), (4, 0.9), (1, 0.5)):
        with pytest.raises(InputError, match=f"{samples} calibration samples are too few"):
            bootstrap.split_samples(samples, held_out)


@pytest.mark.parametrize("seed", [0, 7])
def test_interval_equals_a_direct_bootstrap(seed: int) -> None:
    values = [random.Random(seed).gauss(0.1, 1.0) for _ in range(9)]
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(9, (bootstrap.DRAWS, 9), generator=generator).tolist()
    means = sorted(sum(values[n] for n in row) / 9 for row in drawn)

    def quantile(q: float) -> float:
        low, rest = divmod(q * (len(means) - 1), 1)
        below, above = means[int(low) : int(low) + 2]
        return float(below + rest * (above - below))

    found = bootstrap.compute_interval(values, seed)
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
    walk.observe(model, tokens, [ranker], ignore, "")
    return ranker


def trial_of(model: Model, tokens: Tensor, *, clamp: bool = False) -> Trial:
    ranker = ranked(model, tokens)
    rankings = tuple(ranker.ranking(block) for block, _ in model.moe_blocks)
    hidden = walk.observe(model, tokens, (), ignore, "")
    return Trial(Trimmer(model, rankings, clamp), model, hidden, tokens)


@pytest.mark.parametrize("family", each_family("olmoe"))
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
        mine = Trimmer(model, rankings, clamp_top_k=False).trim((count,) * 3)
        drop = ExpertDrop(keep=count, criterion=criterion)  # type: ignore[arg-type]
        seeing = {kind: kind() for kind in drop.observers()}
        walk.observe(model, IDS, list(seeing.values()), ignore, "")
        dropped = drop.apply(model, Facts({kind: seen.result() for kind, seen in seeing.items()}))
        for a, b in zip(mine.blocks, dropped.model.blocks, strict=True):
            assert a.expert_origins == b.expert_origins


@pytest.mark.parametrize("family", each_family("mixtral"))
def test_kl_equals_masking_in_transformers(tiny: Make, family: str) -> None:
    """Of one layer trimmed at a time, and of several."""
    folder, tokens = tiny(family), IDS[:3]
    model = open_checkpoint(str(folder)).model
    trial = trial_of(model, tokens, clamp=True)
    tried = [
        *allocation.list_single_layer_allocations((6, 6, 6), [(1, 3), (2, 5), (4,)]),
        (6, 6, 6),
        (2, 6, 3),
    ]
    assert len(tried) == 7
    with torch.no_grad():
        intact = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        p = intact(tokens).logits[:, :-1].double().log_softmax(-1)
        for counts, sums in zip(tried, trial.judge(tried, ignore), strict=True):
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
    trial = replace(trial, source_hidden=walk.observe(source, IDS, (), ignore, ""))
    numbers = trial.source_hidden.numel()
    monkeypatch.setattr(budgets, "STREAM_BYTES", 8 * numbers * together)
    ran: list[int] = []
    run = _allocation_trials._run_block

    def counted(runner: BlockRunner, hidden: Tensor, tokens: Tensor) -> Tensor:
        ran.append(runner.block.index)
        return run(runner, hidden, tokens)

    monkeypatch.setattr(budgets, "_run_block", counted)
    tried = [(3, 6), (3, 2), (6, 6), (6, 4), (3, 4)]
    told: list[tuple[int, int]] = []
    judged = trial.judge(tried, lambda done, total: told.append((done, total)))
    # One at a time: 5 walks over 3 blocks. In pairs: the first two pairs share 2 blocks. All at
    # once: 2 streams up to block 1.
    assert len(ran) == {1: 15, 2: 4 + 4 + 3, 100: 2 + 2 + 5}[together]
    assert _allocation_trials.count_block_runs(model, tried, together) == len(ran)
    assert told == [(n, len(ran)) for n in range(len(ran) + 1)]
    for counts, sums in zip(tried, judged, strict=True):
        trimmed = trial.trimmer.trim(counts)
        assert (counts_of(trimmed)[0], counts_of(trimmed)[2]) == counts
        hidden = walk.observe(trimmed, IDS, (), ignore, "")
        theirs = walk.compute_logits(source, trial.source_hidden)
        expected = metrics.measure(IDS, walk.compute_logits(trimmed, hidden), theirs)
        assert bootstrap.compute_mean_kl(sums) == pytest.approx(expected.kl, rel=1e-5)
        loss = torch.tensor(bootstrap.compute_mean_loss(sums)).exp()
        assert float(loss) == pytest.approx(expected.perplexity, rel=1e-4)
