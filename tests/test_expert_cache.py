"""Caches of experts: hit rates, and bytes that tokens read."""

from __future__ import annotations

import json
from collections import Counter, OrderedDict
from dataclasses import replace
from typing import Any

import pytest
import torch

from helpers import run
from moe2edge.calibration import walk
from moe2edge.evaluation.cache_simulation import UseObserver, simulate_caches
from moe2edge.model.experts import Constant
from moe2edge.model.layers import MoELayer
from moe2edge.model.model import Model
from moe2edge.numerics.expert_cache import count_fixed_hits, count_recent_hits
from moe2edge.storage.checkpoint import open_checkpoint
from moe2edge.testing import Make

EXPERTS = 8
USES = (
    torch.randint(0, EXPERTS, (2, 300), generator=torch.Generator().manual_seed(1)).amin(0).tolist()
)
IDS = torch.randint(1, 96, (3, 20), generator=torch.Generator().manual_seed(2))


def count_hits(uses: list[int], size: int) -> int:
    """Count the hits of one cache, use by use."""
    held: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for expert in uses:
        hits += expert in held
        held[expert] = None
        held.move_to_end(expert)
        if len(held) > size:
            held.popitem(last=False)
    return hits


def test_hits_of_all_sizes_are_those_of_caches_one_by_one() -> None:
    found = count_recent_hits(USES, EXPERTS)
    assert found == [count_hits(USES, size) for size in range(EXPERTS + 1)]
    assert found[EXPERTS] == len(USES) - len(set(USES))


def test_experts_that_are_held_were_chosen_on_the_other_half() -> None:
    halves = USES[:100], USES[100:]
    found = count_fixed_hits(halves, EXPERTS)
    for size in range(EXPERTS + 1):
        hits = 0
        for own, other in (halves, halves[::-1]):
            ranking = Counter({e: 0 for e in range(EXPERTS)})
            ranking.update(other)
            held = {expert for expert, _ in ranking.most_common(size)}
            hits += sum(expert in held for expert in own)
        assert found[size] == hits


def observe(model: Model) -> dict[int, torch.Tensor]:
    observer = UseObserver()
    walk.observe(model, IDS, [observer], lambda *_: None, "")
    return observer.result()


def test_bytes_are_those_of_the_misses(tiny: Make) -> None:
    model = open_checkpoint(tiny("mixtral")).model
    uses = observe(model)
    found = simulate_caches(model, uses, IDS.numel())
    each = {
        block.origin: sum(w.nbytes for w in (expert.gate, expert.up, expert.down))
        for block, layer in model.moe_blocks
        for expert in layer.experts[:1]
    }
    counts = [len(layer.experts) for _, layer in model.moe_blocks]
    assert found.nbytes == sum(n * size for n, size in zip(counts, each.values(), strict=True))
    assert found.bytes_per_token == sum(2 * size for size in each.values())
    assert [cache.experts for cache in found.caches] == [
        (size,) * len(counts) for size in (2, 3, 5)
    ]
    for cache in found.caches:
        missed = sum(
            (uses[origin].numel() - count_hits(uses[origin].flatten().tolist(), cache.experts[0]))
            * size
            for origin, size in each.items()
        )
        assert cache.recent_bytes == pytest.approx(missed / IDS.numel())
        assert 0 <= cache.fixed <= 1


def test_replaced_experts_and_skipped_choices_use_none(tiny: Make) -> None:
    model = open_checkpoint(tiny("mixtral")).model
    block, layer = model.moe_blocks[0]
    before = observe(model)[block.origin]
    constant = Constant(2, next(iter(block.norms.values())))
    changes: tuple[MoELayer, ...] = (
        layer.replace_experts({2: constant}),
        replace(layer, router=replace(layer.router, skip_below=(2.0,))),
    )
    replaced, skipping = (
        observe(model.replace_block(replace(block, mlp=changed)))[block.origin]
        for changed in changes
    )
    others = before.where(before < 2, before - 1)  # those behind it move up
    assert torch.equal(replaced, others.where(before != 2, -1))
    assert (before == 2).any()
    assert torch.equal(skipping[:, 0], before[:, 0])
    assert (skipping[:, 1] == -1).all()


def test_the_document_and_the_table_say_it() -> None:
    arguments = [
        "inspect",
        "builtin:tiny-moe",
        "--routing",
        "--samples",
        "2",
        "--length",
        "32",
        "-q",
    ]
    document: dict[str, Any] = json.loads(run(*arguments, "--json").stdout)["expert_cache"]
    assert document["bytes_per_token"] < document["bytes"]
    rates = [cache["lru_hit_rate"] for cache in document["caches"]]
    assert rates == sorted(rates)
    shown = run(*arguments).stdout
    for cache in document["caches"]:
        assert f"{cache['lru_hit_rate']:.1%}" in shown
        assert f"{cache['lru_bytes_per_token'] / 1e6:,.2f}" in shown
