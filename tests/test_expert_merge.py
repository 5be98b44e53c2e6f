"""Merging of experts: every grouping and every order of neurons against slow loops."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import compute_logits, each_family, plan, search
from moe2edge.calibration import observation, walk
from moe2edge.calibration.block_runner import BlockRunner
from moe2edge.errors import DoesNotFit
from moe2edge.model.experts import PARTS, Dense
from moe2edge.model.layers import MoELayer
from moe2edge.model.model import Model
from moe2edge.numerics import expert_groups
from moe2edge.numerics import expert_groups as merging
from moe2edge.numerics.expert_groups import ExpertGroup, ExpertSums, Matrices
from moe2edge.passes.expert_merge import ExpertMerge
from moe2edge.pipeline.contract import Outcome, PlannedStep, TextSize, TextSizes
from moe2edge.storage.checkpoint import open_checkpoint
from moe2edge.testing import Make, TraceRecorder, add_copies, make_checkpoint

METHODS = ("hc-smoe", "m-smoe", "ream")
WIDTH, HIDDEN = 20, 12
IDS = torch.randint(1, 96, (6, 40), generator=torch.Generator().manual_seed(9))


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def expert(seed: int) -> Matrices:
    return Matrices(
        draw(WIDTH, HIDDEN, seed=seed),
        draw(WIDTH, HIDDEN, seed=seed + 100),
        draw(HIDDEN, WIDTH, seed=seed + 200),
    )


def equal(one: Matrices, other: Matrices) -> bool:
    return all(torch.equal(getattr(one, part), getattr(other, part)) for part in PARTS)


# ---- groups ------------------------------------------------------------------------------------


def slow_clusters(means: Tensor, keep: int) -> set[frozenset[int]]:
    """By the mean distance of all pairs, again for every merge."""
    groups = [[n] for n in range(len(means))]
    while len(groups) > keep:
        found = []
        for a, one in enumerate(groups):
            for b, other in enumerate(groups[:a]):
                distances = [float((means[i] - means[j]).norm()) for i in one for j in other]
                found.append((sum(distances) / len(distances), a, b))
        _, a, b = min(found)
        groups[b] += groups.pop(a)
    return {frozenset(group) for group in groups}


@pytest.mark.parametrize("keep", [1, 3, 7, 11])
def test_clusters_equal_those_of_a_loop(keep: int) -> None:
    means = draw(12, 5, seed=keep).double()
    scores = draw(12, seed=keep + 1).tolist()
    groups = expert_groups.cluster_experts(means, keep, scores)
    assert {frozenset(group) for group in groups} == slow_clusters(means, keep)
    for centroid, *others in groups:
        assert all(scores[centroid] > scores[n] for n in others)


@pytest.mark.parametrize("keep", range(1, 9))
def test_ties_leave_as_many_clusters_as_asked_for(keep: int) -> None:
    """Corners of a cube, and experts that are all equal."""
    corners = torch.tensor([[n >> bit & 1 for bit in range(3)] for n in range(8)]).double()
    for means in (corners, torch.ones(8, 3, dtype=torch.float64)):
        groups = expert_groups.cluster_experts(means, keep, [1.0] * 8)
        assert len(groups) == keep
        assert sorted(n for group in groups for n in group) == list(range(8))
        # Of equal scores the first.
        assert [group[0] for group in groups] == sorted(min(group) for group in groups)


def slow_join(similarity: Tensor, keep: int, scores: list[float]) -> set[ExpertGroup]:
    centroids = sorted(range(len(scores)), key=lambda n: -scores[n])[:keep]
    groups = {centroid: [centroid] for centroid in centroids}
    for n in range(len(scores)):
        if n not in centroids:
            nearest = max(centroids, key=lambda c: float(similarity[n, c]))
            groups[nearest].append(n)
    return {tuple(group) for group in groups.values()}


def slow_absorb(similarity: Tensor, keep: int, scores: list[float], limit: int) -> set[ExpertGroup]:
    ranked = sorted(range(len(scores)), key=lambda n: -scores[n])
    free, groups = ranked[keep:], set()
    for centroid in ranked[:keep]:
        own: list[int] = []
        while free and len(own) < limit:
            own.append(max(free, key=lambda n: float(similarity[centroid, n])))
            free.remove(own[-1])
        groups.add((centroid, *sorted(own)))
    assert not free
    return groups


@pytest.mark.parametrize("keep", [1, 4, 11])
def test_centroids_gather_as_in_a_loop(keep: int) -> None:
    similarity = draw(12, 12, seed=keep)
    similarity, scores = similarity + similarity.T, draw(12, seed=keep + 1).tolist()
    joined = expert_groups.join_nearest(similarity, keep, scores)
    assert set(joined) == slow_join(similarity, keep, scores)
    assert [group[0] for group in joined] == sorted(group[0] for group in joined)
    least = -(-(12 - keep) // keep)
    for limit in (least, least + 1, 16):
        found = expert_groups.absorb_nearest(similarity, keep, scores, limit)
        assert set(found) == slow_absorb(similarity, keep, scores, limit)
        assert max(len(group) for group in found) <= limit + 1
        assert sorted(n for group in found for n in group) == list(range(12))


@pytest.mark.parametrize("together", [1, 4 * 5 * HIDDEN * 7, 1 << 20])
def test_sums_are_those_of_loops_over_tokens(
    together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merging, "CHUNK_BYTES", together)
    inputs, logits, maps = draw(30, HIDDEN), draw(30, 5, seed=1), draw(5, HIDDEN, HIDDEN, seed=2)
    outputs = torch.stack([torch.tanh(inputs @ one) for one in maps]).double()
    sums = ExpertSums(5, HIDDEN)
    for part in torch.split(torch.arange(30), 11):
        sums.add_logits(logits[part])
        for cosines in (False, True):
            sums.add_outputs(inputs[part], lambda n, x: torch.tanh(x @ maps[n]), cosines=cosines)
    assert torch.allclose(sums.outputs / sums.tokens, outputs.mean(1), atol=1e-6)
    found = expert_groups.compute_ream_similarity(sums)
    columns = torch.nn.functional.normalize(logits.double(), dim=0).T
    farthest = max(float((a - b).norm()) for a in columns for b in columns)
    for i in range(5):
        for j in range(5):
            cosine = torch.cosine_similarity(logits[:, i].double(), logits[:, j].double(), dim=0)
            assert abs(float(expert_groups.compute_cosines(sums.logits)[i, j] - cosine)) < 1e-6
            shared = 0.0
            for a, b, gate in zip(outputs[i], outputs[j], logits.softmax(1), strict=True):
                # The paper's outputs are gated, which changes nothing here.
                gated = torch.cosine_similarity(gate[i] * a, gate[j] * b, dim=0)
                shared += float((gated + 1) / 2) / 30
            routing = 1 - float((columns[i] - columns[j]).norm()) / farthest
            assert abs(float(found[i, j]) - (shared + routing) / 2) < 1e-5


# ---- orders ------------------------------------------------------------------------------------


def test_the_order_of_neurons_changes_no_expert() -> None:
    one, x = expert(0), draw(9, HIDDEN, seed=5)
    other = one.permute(torch.randperm(WIDTH, generator=torch.Generator().manual_seed(1)))
    assert not equal(one, other)
    before, after = (
        (one.down @ one.compute_intermediate(x)).T,
        (other.down @ other.compute_intermediate(x)).T,
    )
    assert torch.allclose(before, after, atol=1e-4)
    for token, row in zip(x, before, strict=True):
        gate, up = one.gate @ token, one.up @ token
        assert torch.allclose(one.down @ (gate * gate.sigmoid() * up), row, atol=1e-4)


@pytest.mark.parametrize("by_answers", [False, True])
def test_alignment_undoes_a_permutation(by_answers: bool) -> None:
    experts = [expert(n) for n in range(4)]
    shuffle = torch.randperm(WIDTH, generator=torch.Generator().manual_seed(1))
    experts[2] = experts[0].permute(shuffle)
    axes = expert_groups.compute_layer_axes(lambda: iter(experts), 0) if by_answers else None
    found = expert_groups.align_neurons(experts[0], experts[2], draw(50, HIDDEN, seed=3), axes)
    assert torch.equal(found, shuffle.argsort())
    assert equal(experts[2].permute(found), experts[0])


def test_an_order_is_the_cheapest_of_all() -> None:
    """By distances of weights, which `weight_cost` only takes the products of."""
    one, other = draw(5, 7), draw(5, 7, seed=1)
    found = expert_groups.match_neurons(expert_groups.compute_weight_cost(one, other))
    costs = {p: float((one - other[list(p)]).square().sum()) for p in permutations(range(5))}
    assert tuple(found.tolist()) == min(costs, key=costs.__getitem__)
    answers = draw(5, 9, seed=2), draw(5, 9, seed=3)
    cost = expert_groups.compute_ream_cost((answers[0], one), (answers[1], other))
    for i in range(5):
        for j in range(5):
            expected = 0.0
            for a, b in ((answers[0][i], answers[1][j]), (one[i], other[j])):
                expected += float((a / a.norm() - b / b.norm()).norm())
            assert abs(float(cost[i, j]) - expected) < 1e-5


def test_principal_axes_are_those_of_singular_vectors() -> None:
    """Of rows whose numbers fall off, up to signs, which no distance depends on."""
    falling = 0.4 ** torch.arange(10)
    rows = draw(60, 10) * falling @ torch.linalg.qr(draw(10, 10, seed=1)).Q + 3

    def parts() -> Iterator[Tensor]:
        yield from torch.split(rows, 17)

    mean, axes = expert_groups.compute_principal_axes(parts, 4, 0)
    assert torch.allclose(mean, rows.mean(0), atol=1e-5)
    _, values, vectors = torch.linalg.svd(rows - rows.mean(0))
    expected = vectors[:4].T * values[:4]
    assert torch.allclose(axes.abs(), expected.abs(), rtol=1e-2, atol=1e-2)
    again = expert_groups.compute_principal_axes(parts, 4, 0)[1]
    assert torch.equal(axes, again)
    assert expert_groups.compute_principal_axes(parts, 64, 0)[1].shape == (10, 10)


def test_the_mean_equals_that_of_a_loop() -> None:
    experts, shares = [expert(n) for n in range(3)], expert_groups.normalize_shares([2.0, 1.0, 5.0])
    assert shares == (0.25, 0.125, 0.625)
    before = [one.gate.clone() for one in experts]
    found = expert_groups.average_experts(zip(shares, experts, strict=True))
    for part in PARTS:
        expected = sum(s * getattr(one, part) for s, one in zip(shares, experts, strict=True))
        assert torch.allclose(getattr(found, part), expected, atol=1e-6)
    assert all(torch.equal(a, b.gate) for a, b in zip(before, experts, strict=True))
    assert expert_groups.normalize_shares([0.0, 0.0]) is None


# ---- layers ------------------------------------------------------------------------------------


def options(**given: Any) -> ExpertMerge:
    return ExpertMerge.model_validate(given)


def merge(model: Model, step: ExpertMerge, ids: Tensor = IDS) -> Outcome:
    planned = plan([step], model)
    outcome = search(step, model, ids)
    outcome.model.verify()
    shapes = [[(n, w.shape, w.dtype) for n, _, w in m.tensors()] for m in (planned, outcome.model)]
    assert shapes[0] == shapes[1]
    return outcome


def logits(model: Model, ids: Tensor = IDS) -> Tensor:
    return compute_logits(model, ids)


def slow_groups(
    method: str, trace: observation.BlockTrace, keep: int
) -> tuple[set[frozenset[int]], list[float]]:
    """Return groups of a layer of six, and what experts are weighted by."""
    routing = trace.routing
    assert routing is not None
    outputs = [trace.expert_output(n, routing.inputs).double() for n in range(6)]
    counts = [float((routing.ids == n).sum()) for n in range(6)]
    columns = torch.nn.functional.normalize(routing.logits.double(), dim=0).T
    if method == "hc-smoe":
        return slow_clusters(torch.stack([y.mean(0) for y in outputs]), keep), counts
    if method == "m-smoe":
        joined = slow_join(columns @ columns.T, keep, counts)
        return {frozenset(group) for group in joined}, counts
    reap = []
    for n in range(6):
        token, place = torch.where(routing.ids == n)
        salient = routing.weights[token, place] * outputs[n][token].norm(dim=1)
        reap.append(float(salient.mean()))
    distance = torch.cdist(columns, columns, compute_mode="donot_use_mm_for_euclid_dist")
    routed = 1 - distance / distance.max()
    shared = torch.tensor(
        [[float(torch.cosine_similarity(a, b).mean()) for b in outputs] for a in outputs]
    )
    absorbed = slow_absorb((routed + (shared + 1) / 2) / 2, keep, reap, 16)
    return {frozenset(group) for group in absorbed}, reap


@pytest.mark.parametrize("family", each_family("qwen2_moe"))
@pytest.mark.parametrize("method", METHODS)
def test_a_layer_is_merged_as_in_a_loop(tiny: Make, family: str, method: str) -> None:
    """On the intact model, without alignment: groups, members, numbers and the told error."""
    model = open_checkpoint(str(tiny(family))).model
    step = options(method=method, keep=3, routing="members", align=False, fitted_on="intact")
    outcome = merge(model, step)
    watched = TraceRecorder()
    walk.observe(model, IDS, [watched], lambda *_: None, "test")
    for seen, block, note in zip(watched.seen, outcome.model.blocks, outcome.notes, strict=True):
        expected, scores = slow_groups(method, seen, 3)
        layer, before = block.mlp, seen.block.mlp
        assert isinstance(layer, MoELayer)
        assert isinstance(before, MoELayer)
        found: dict[int, list[int]] = {}
        for n, base in enumerate(layer.bases):
            assert base is not None
            found.setdefault(base, []).append(n)
        assert {frozenset(group) for group in found.values()} == expected
        assert layer.router == before.router
        for base, group in found.items():
            own, whole = layer.experts[base], sum(scores[n] for n in group)
            assert own.origin == max(group, key=scores.__getitem__)
            for part in PARTS:
                mean = sum(
                    scores[n] / whole * getattr(before.experts[n], part).load() for n in group
                )
                assert torch.allclose(getattr(own, part).load(), mean, atol=1e-5)
        assert seen.routing is not None
        after = BlockRunner(outcome.model, block).run_mlp(seen.routing.inputs, seen.routing.logits)
        whole_layer = seen.mlp_outputs.flatten(0, 1)
        error = float((after - whole_layer).norm() / whole_layer.norm())
        assert abs(float(note.rpartition(" ")[2]) - error) < 1e-3


@pytest.mark.parametrize("family", each_family("qwen3_moe"))
@pytest.mark.parametrize(
    ("method", "align"), [("hc-smoe", False), ("hc-smoe", True), ("m-smoe", True), ("ream", True)]
)
def test_copies_merge_into_what_they_were(
    tiny: Make, family: str, method: str, align: bool
) -> None:
    """Equal ones as they are, and with their neurons in any order once they are aligned."""
    model = add_copies(open_checkpoint(str(tiny(family))).model, shuffled=align)
    for keep in (1, 4):
        step = options(method=method, keep=keep, routing="members", align=align)
        merged = merge(model, step).model
        assert merged.expert_counts == (keep,) * 3
        assert torch.allclose(logits(merged), logits(model), atol=1e-4)


def test_experts_without_tokens_are_merged_with_equal_weights(tiny: Make) -> None:
    """Of one token's idle experts one is all but a copy of another: they are the nearest."""
    model = open_checkpoint(str(tiny("olmoe"))).model
    ids, watched = IDS[:1, :1], TraceRecorder()
    walk.observe(model, ids, [watched], lambda *_: None, "test")
    pairs = []
    for seen, (block, layer) in zip(watched.seen, model.moe_blocks, strict=True):
        assert seen.routing is not None
        one, other = [n for n in range(6) if n not in seen.routing.ids][:2]
        pairs.append((one, other))
        own = layer.experts[one]
        near = {part: getattr(own, part).load() + 1e-4 for part in PARTS}
        weights = {
            part: replace(getattr(own, part), load=lambda near=near, part=part: near[part])
            for part in PARTS
        }
        experts = list(layer.experts)
        experts[other] = replace(experts[other], **weights)
        model = model.replace_block(replace(block, mlp=replace(layer, experts=tuple(experts))))
    outcome = merge(model, options(method="hc-smoe", keep=5), ids)
    for n, (one, other) in enumerate(pairs):
        assert outcome.changed[n] == f"block {n}: experts [{other}] into {one}"
        said = f"block {n}: experts [{one}, {other}] saw no tokens: merged in equal parts"
        assert said in outcome.notes
        before, after = model.moe_blocks[n][1], outcome.model.moe_blocks[n][1]
        mean = (before.experts[one].up.load() + before.experts[other].up.load()) / 2
        assert torch.allclose(after.experts[one].up.load(), mean, atol=1e-6)


def test_an_expert_in_no_group_is_unchanged(tiny: Make) -> None:
    model = open_checkpoint(str(tiny("mixtral"))).model
    merged = merge(model, options(method="ream", keep=4)).model
    for (_, before), (_, after) in zip(model.moe_blocks, merged.moe_blocks, strict=True):
        same = [one for one in after.experts if one == before.experts[one.origin]]
        loaded = [torch.equal(o.up.load(), before.experts[o.origin].up.load()) for o in same]
        assert sum(loaded) == 3  # the most salient centroid absorbs both that go
        assert not after.is_tied
        rows = [one.origin for one in after.experts]
        assert torch.equal(after.router.weight.load(), before.router.weight.load()[rows])


def test_one_expert_of_top_1_is_a_plain_mlp(tiny: Make) -> None:
    model = open_checkpoint(str(tiny("olmoe", num_experts_per_tok=1))).model
    merged = merge(model, options(method="m-smoe", keep=1, routing="centroids")).model
    assert all(isinstance(block.mlp, Dense) for block in merged.blocks)
    assert torch.isfinite(logits(merged)).all()


def test_layers_that_are_small_enough_are_left_alone(tiny: Make) -> None:
    model = open_checkpoint(str(tiny("qwen3_moe"))).model
    block = model.blocks[1].keep_experts([0, 2, 5])
    model = model.replace_block(block)
    outcome = merge(model, options(method="m-smoe", keep=3))
    assert outcome.model.expert_counts == (3, 3, 3)
    assert outcome.model.blocks[1] == block
    assert len(outcome.changed) == 2


@pytest.mark.parametrize("method", METHODS)
def test_too_little_memory_is_reported_before_any_work(tiny: Make, method: str) -> None:
    model = open_checkpoint(str(tiny("olmoe"))).model
    step, texts = options(method=method, keep=3), TextSizes(TextSize(*IDS.shape))
    with pytest.raises(DoesNotFit, match="expert_merge keeps statistics of 6 experts"):
        step.estimate(PlannedStep(step, model, step.plan(model)), texts).check(700 << 20)


@pytest.mark.parametrize("method", METHODS)
def test_no_more_experts_share_matrices_than_was_planned(tiny: Make, method: str) -> None:
    """`recover` with annealing takes memory for each."""
    model = open_checkpoint(str(tiny("olmoe"))).model
    limit = {"group_limit": 2} if method == "ream" else {}
    for keep in (2, 4):
        step = options(method=method, keep=keep, routing="members", **limit)
        planned, found = step.plan(model), merge(model, step).model
        pairs = zip(planned.moe_blocks, found.moe_blocks, strict=True)
        assert all(len(b.sharing) <= len(a.sharing) for (_, a), (_, b) in pairs)


def test_dense_layers_stay(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "dense", "qwen2_moe", mlp_only_layers=[1])
    model = open_checkpoint(str(folder)).model
    merged = merge(model, options(method="ream", keep=2)).model
    assert merged.expert_counts == (2, 2)
    assert merged.blocks[1] == model.blocks[1]


def test_equal_input_gives_equal_numbers(tiny: Make) -> None:
    model = open_checkpoint(str(tiny("olmoe"))).model
    step = options(method="ream", keep=3)
    one, other = merge(model, step), merge(model, step)
    assert one.notes == other.notes
    for (_, _, a), (_, _, b) in zip(one.model.tensors(), other.model.tensors(), strict=True):
        assert torch.equal(a.load(), b.load())
