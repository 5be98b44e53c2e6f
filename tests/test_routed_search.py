"""Routers of any rule, and the search that asks them, against layers without the experts."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import helpers
from every_family import GENERIC, IDS, KEPT, keep_six, make_folder
from helpers import ignore, plan
from moe2edge.calibration.block_runner import BlockRunner
from moe2edge.calibration.evidence import EvidenceObserver
from moe2edge.calibration.observation import BlockTrace
from moe2edge.calibration.walk import embed
from moe2edge.errors import InputError
from moe2edge.model.block import Block
from moe2edge.model.layers import MoELayer
from moe2edge.model.model import Model
from moe2edge.numerics.routed_loss import RoutedEvidence, RoutedPart
from moe2edge.numerics.subset_loss import (
    Evidence,
    SubsetEvidence,
    search_beam,
    search_exhaustively,
)
from moe2edge.passes.expert_search import ExpertSearch
from moe2edge.storage.checkpoint import open_checkpoint

# Of each kind of router, experts and layer one.
FAMILIES = (
    "gpt_oss", "deepseek_v2", "deepseek_v3", "qwen3_next", "granitemoe", "phimoe", "nemotron_h",
    "lfm2_moe", "glm4_moe", "ernie4_5_moe", "hunyuan_v1_moe", "minimax_m2", "gemma4_text",
)  # fmt: skip
Set = Sequence[int]


def open_family(folder: Path, family: str, **changes: Any) -> Model:
    make_folder(folder, family, **changes)
    return open_checkpoint(folder).model


def watch_layers(model: Model) -> Iterator[tuple[Block, Tensor, BlockTrace]]:
    """Yield each block with experts, its input, and what happens in it."""
    hidden = embed(model, IDS)
    for block in model.blocks:
        trace = BlockRunner(model, block).watch(hidden)
        if trace.routing is not None:
            yield block, hidden, trace
        hidden = trace.outputs


def spread(trace: BlockTrace, experts: Sequence[int], count: int) -> Tensor:
    """Return the weight of each of so many experts, [tokens, count]; ``experts`` names the rows."""
    routing = trace.routing
    assert routing is not None
    found = torch.zeros(len(routing.inputs), count)
    return found.scatter_add(1, torch.tensor(experts)[routing.ids], routing.weights)


def sum_experts(trace: BlockTrace) -> Tensor:
    """Sum the outputs of a layer's experts, one expert after another."""
    routing = trace.routing
    assert routing is not None
    out = torch.zeros(routing.inputs.shape, dtype=torch.float64)
    for n in sorted(set(routing.ids.flatten().tolist())):
        weight = (routing.weights * (routing.ids == n)).sum(1, keepdim=True).double()
        out += weight * trace.expert_output(n, routing.inputs).double()
    return out


@pytest.mark.parametrize("family", GENERIC)
def test_a_router_is_asked_what_it_does_without_some_experts(family: str, tmp_path: Path) -> None:
    model = open_family(tmp_path, family)
    block, hidden, trace = list(watch_layers(model))[-1]
    assert trace.router is not None
    assert trace.routing is not None
    router, scores = trace.router(), trace.routing.logits
    for kept in ((0, 1, 2, 3, 4, 5, 6, 7), KEPT, (1, 2, 4, 7)):
        ids, weights = router.choose(scores, torch.isin(torch.arange(8), torch.tensor(kept)))
        found = weights.new_zeros(len(scores), 8).scatter_add(1, ids, weights)
        small = BlockRunner(model, block.keep_experts(kept)).watch(hidden)
        assert (found - spread(small, kept, 8)).abs().max() <= 1e-6
    assert router.top_k == trace.routing.ids.shape[1]


@pytest.mark.parametrize(
    ("family", "factor"),
    [("beam", 1.5), ("cohere2_moe", 0.5), ("axk1", None), ("gemma4_text", 1.0), ("gpt_oss", 1.0)],
)
def test_what_follows_the_experts_is_known(
    family: str, factor: float | None, tmp_path: Path
) -> None:
    """Beam scales their sum, Cohere takes the mean with the shared expert, A.X-K1 has a norm."""
    _, _, trace = next(watch_layers(open_family(tmp_path, family)))
    assert trace.router is not None
    assert trace.router().factor == factor


def gather(model: Model) -> Iterator[tuple[Block, Tensor, BlockTrace, Evidence]]:
    observer = EvidenceObserver(IDS.numel())
    for block, hidden, trace in watch_layers(model):
        observer.observe(trace)
        assert isinstance(block.mlp, MoELayer)
        yield block, hidden, trace, observer.take(block.mlp)


def measure_slowly(model: Model, block: Block, hidden: Tensor, trace: BlockTrace, s: Set) -> float:
    """Return the loss of keeping a set: of transformers' layer with the other experts removed."""
    small = BlockRunner(model, block.keep_experts(s)).watch(hidden)
    return float((sum_experts(small) - sum_experts(trace)).square().sum())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_of_a_set_is_that_of_the_layer_without_the_others(
    family: str, tmp_path: Path
) -> None:
    model = open_family(tmp_path, family)
    block, hidden, trace, found = list(gather(model))[-1]
    whole = float(sum_experts(trace).square().sum())
    assert found.target_square == pytest.approx(whole, rel=1e-4)
    for kept in (KEPT, (0, 2, 5, 6), (1, 3, 4, 5)):
        slow = measure_slowly(model, block, hidden, trace, kept)
        assert found.compute_loss(kept) == pytest.approx(slow, rel=1e-3, abs=1e-6 * whole)
    assert found.compute_loss(range(8)) == 0.0


@pytest.mark.parametrize("family", [*FAMILIES, "flex_olmo", "jamba"])
def test_removals_are_sets_with_one_expert_less(family: str, tmp_path: Path) -> None:
    for *_, found in gather(open_family(tmp_path, family)):
        for kept in ((0, 1, 2, 3, 4, 5, 6, 7), (0, 2, 3, 4, 5, 7)):
            each = [found.compute_loss([n for n in kept if n != one]) for one in kept]
            assert found.compute_removals(kept, kept) == pytest.approx(each, rel=1e-6, abs=1e-9)


def test_groups_lose_experts_in_turns(tmp_path: Path) -> None:
    for *_, found in gather(open_family(tmp_path, "deepseek_v3")):
        assert found.groups == 2
        every = search_exhaustively(found, 4, ignore)
        sets = [
            (*one, *(n + 4 for n in other))
            for one, other in itertools.product(itertools.combinations(range(4), 2), repeat=2)
        ]
        assert every.tried == len(sets)
        assert min((found.compute_loss(kept), kept) for kept in sets) == (every.loss, every.kept)
        beam = search_beam(found, 4, 1000, ignore)
        assert beam.kept == every.kept
        assert beam.loss == pytest.approx(every.loss, rel=1e-9)
        greedy = search_beam(found, 4, 1, ignore)
        assert sum(n < 4 for n in greedy.kept) == 2
        assert greedy.loss >= every.loss * (1 - 1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_best_set_of_each_layer_is_kept(family: str, tmp_path: Path) -> None:
    model = open_family(tmp_path, family)
    step = ExpertSearch.model_validate({"keep": 4})
    found = helpers.search(step, model, IDS)
    for block, hidden, trace, _ in gather(model):
        sets = itertools.combinations(range(8), 4)
        groups = model.blocks[block.index].mlp.router.groups  # type: ignore[union-attr]
        even = [s for s in sets if groups == 1 or sum(n < 4 for n in s) == 2]
        kept = found.model.blocks[block.index].expert_origins
        assert kept in even
        mine = measure_slowly(model, block, hidden, trace, kept)
        for other in even[::5]:
            assert mine <= measure_slowly(model, block, hidden, trace, other) * 1.0001


@pytest.mark.parametrize("family", ["deepseek_v3", "axk1", "gemma4_text"])
def test_a_progressive_search_makes_up_for_earlier_layers(family: str, tmp_path: Path) -> None:
    """The loss with all experts is what earlier layers changed, so it is not zero."""
    model = open_family(tmp_path, family)
    step = ExpertSearch.model_validate({"keep": 4, "progressive": True, "method": "greedy"})
    found = helpers.search(step, model, IDS)
    assert found.model.expert_counts == (4,) * len(model.moe_blocks)
    first = helpers.search(step.model_copy(update={"progressive": False}), model, IDS)
    origins = [[b.expert_origins for b, _ in one.model.moe_blocks] for one in (found, first)]
    assert origins[0][0] == origins[1][0]
    assert found.notes != first.notes


@pytest.mark.parametrize("keep", [2, 5, 0.6])
def test_numbers_that_groups_cannot_share_are_refused(keep: float, tmp_path: Path) -> None:
    model = open_family(tmp_path, "deepseek_v3")
    with pytest.raises(InputError, match=r"expert_search: keep .* the nearest are 4 and 6"):
        plan([ExpertSearch.model_validate({"keep": keep})], model)


@pytest.mark.parametrize("family", ["deepseek_v3", "gemma4_text"])
def test_a_layer_that_lost_experts_is_searched_as_it_is(family: str, tmp_path: Path) -> None:
    model = keep_six(open_family(tmp_path, family))
    found = helpers.search(ExpertSearch.model_validate({"keep": 4}), model, IDS).model
    for block, hidden, trace, evidence in gather(model):
        kept = found.blocks[block.index].expert_origins
        assert set(kept) < set(KEPT)
        places = [KEPT.index(n) for n in kept]
        slow = measure_slowly(model, block, hidden, trace, places)
        assert evidence.compute_loss(places) == pytest.approx(slow, rel=1e-3)
        if evidence.groups > 1:
            assert sum(n < 4 for n in kept) == 2


@pytest.mark.parametrize("family", ["qwen3_next", "jamba"])
def test_a_softmax_is_found_and_agrees_with_the_router_asked(family: str, tmp_path: Path) -> None:
    """The known rule measures all removals at once; only Qwen's scales weights to one."""
    for _, _, trace, found in gather(open_family(tmp_path, family)):
        assert isinstance(found, SubsetEvidence)
        assert trace.router is not None
        assert trace.routing is not None
        router, scores = trace.router(), trace.routing.logits
        assert router.is_local == (family == "qwen3_next")
        ids, weights = router.choose(scores, torch.ones(8, dtype=torch.bool))
        part = RoutedPart(found.parts[0].gram, None, ids, weights, scores)
        asked = RoutedEvidence(
            router.choose, router.is_local, 8, 1, (part,), 0.0, found.target_square
        )
        for kept in (range(8), (0, 2, 3, 4, 5, 7)):
            known = found.compute_removals(tuple(kept), tuple(kept))
            assert asked.compute_removals(kept, kept) == pytest.approx(known, rel=1e-5, abs=1e-6)
