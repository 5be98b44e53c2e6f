"""Shared bases with factors: selection, groups and numbers against slow loops, and as exported."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import compute_logits, each_family, export, refuse, run, search, slow_except
from moe2edge.calibration import observation, walk
from moe2edge.model.block import is_quantizable
from moe2edge.model.experts import PARTS, Full, Tied
from moe2edge.model.family import FAMILIES
from moe2edge.model.layers import MoELayer
from moe2edge.model.model import Model
from moe2edge.numerics import base_sharing, expert_groups, low_rank
from moe2edge.numerics.base_sharing import SharingCost
from moe2edge.passes._replace_bases import count_expert_bytes
from moe2edge.passes.expert_replace import ExpertReplace
from moe2edge.pipeline import recipe
from moe2edge.pipeline.contract import Outcome, Search, TextSize, TextSizes
from moe2edge.pipeline.stages import plan_passes
from moe2edge.storage.checkpoint import open_checkpoint
from moe2edge.storage.output import open_stored_model
from moe2edge.testing import Make

IDS = torch.randint(1, 96, (8, 48), generator=torch.Generator().manual_seed(9))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- selection -----------------------------------------------------------------------------------


def under(scores: list[list[float]], factors: list[float], threshold: float) -> list[list[int]]:
    """Experts under a threshold, as the paper has it."""
    found = []
    for own, factor in zip(scores, factors, strict=True):
        shares = [score / sum(own) for score in own]
        found.append([j for j, share in enumerate(shares) if share < threshold * factor])
    return found


@pytest.mark.parametrize("group", [2, 3, None])
@pytest.mark.parametrize("part", [0.95, 0.8, 0.6, 0.55])
def test_the_lowest_threshold_that_meets_the_budget(group: int | None, part: float) -> None:
    """By trying every threshold that makes a difference, from below."""
    scores = random(5, 8).tolist()
    factors = base_sharing.compute_depth_factors([1.0, 2.0, 3.0, 5.0, 9.0], 1.0)
    cost = SharingCost(expert=1000, factors=20, group=group)
    whole = 5 * 8 * 1000
    found = base_sharing.choose_replaced(
        base_sharing.order_candidates(scores, factors), [cost] * 5, whole, int(part * whole)
    )
    shares = [s / sum(own) / f for own, f in zip(scores, factors, strict=True) for s in own]

    def total_of(counts: list[int]) -> int:
        total = whole
        for count in counts:
            total -= 1000 * count - 20 * count
            total += 0 if group is None else 1000 * math.ceil(count / group)
        return total

    for threshold in sorted([0.0, *(share + 1e-12 for share in shares)]):
        chosen = []
        for own, score in zip(under(scores, factors, threshold), scores, strict=True):
            # The least important of those under it, as many as save most: the first of a new group
            # saves nothing, and alone in its layer an expert has nobody to share with.
            ranked = sorted(own, key=lambda j: score[j])
            best = min(range(len(own) + 1), key=lambda n: (total_of([n]), n))
            chosen.append(sorted(ranked[:best]))
        total = total_of([len(own) for own in chosen])
        if total <= part * whole:
            break
    assert found == chosen
    assert part * whole - 1000 <= total <= part * whole


@pytest.mark.parametrize("sizes", [[4, 4], [8, 5, 7], [3]])
@pytest.mark.parametrize("group", [2, 3, 5, None])
@pytest.mark.parametrize("factors", [1, 10, 40])
def test_every_accepted_budget_is_kept(sizes: list[int], group: int | None, factors: int) -> None:
    """Down to the smallest, where groups do not divide layers."""
    costs = [SharingCost(100, factors, group)] * len(sizes)
    whole = 100 * sum(sizes)
    least = whole - base_sharing.compute_most_saved(costs, sizes)
    scores = [random(size, seed=size).tolist() for size in sizes]
    for budget in range(least, whole):
        found = base_sharing.choose_replaced(
            base_sharing.order_candidates(scores, [1.0] * len(sizes)), costs, whole, budget
        )
        saved = sum(cost.compute_saved(len(own)) for cost, own in zip(costs, found, strict=True))
        assert whole - saved <= budget


def test_shallow_layers_lose_more() -> None:
    found = base_sharing.compute_depth_factors([1.0, 2.0, 3.0], 1.0)
    deviation = math.sqrt(2 / 3)
    expected = [math.exp(1 / deviation), 1.0, math.exp(-1 / deviation)]
    assert found == pytest.approx([min(1.2, max(0.8, value)) for value in expected])
    assert base_sharing.compute_depth_factors([1.0, 2.0, 3.0], 0.0) == [1.0, 1.0, 1.0]
    assert base_sharing.compute_depth_factors([2.0, 2.0], 1.0) == [1.0, 1.0]


def test_groups_are_those_of_a_loop() -> None:
    importance, columns = random(9, seed=1).tolist(), random(50, 9, seed=2)
    similar = expert_groups.compute_cosines(columns.T @ columns)
    candidates = [0, 1, 3, 4, 6, 7, 8]
    found = expert_groups.group_by_similarity(candidates, importance, similar, 3)
    heads = sorted(candidates, key=lambda j: -importance[j])[:3]
    expected: dict[int, list[int]] = {head: [head] for head in heads}
    for j in candidates:
        if j in heads:
            continue
        best, nearest = -2.0, -1
        for head in heads:
            a, b = columns[:, j], columns[:, head]
            cosine = float(a @ b / a.norm() / b.norm())
            if cosine > best:
                best, nearest = cosine, head
        expected[nearest].append(j)
    assert found == [expected[head] for head in heads]


# ---- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 3, 6])
@pytest.mark.parametrize("outs", [6, 8, 13])
def test_factors_minimize_the_output_error(outs: int, rank: int) -> None:
    """Against the truncation of what is put out, and against anything beside it."""
    inputs, difference = random(80, 8, seed=3) - 0.3, random(outs, 8, seed=4) - 0.5
    first, second = low_rank.factorize_low_rank(difference, inputs.T @ inputs, rank)
    assert first.shape == (rank, 8)
    assert second.shape == (outs, rank)
    ridge = (
        low_rank.RIDGE * float((inputs.T @ inputs).diagonal().mean()) + low_rank.LEAST_EIGENVALUE
    )
    longer = torch.cat([inputs, math.sqrt(ridge) * torch.eye(8, dtype=torch.float64)])

    def missed(first: Tensor, second: Tensor) -> float:
        return float((longer @ (difference - second.double() @ first.double()).T).square().sum())

    values = torch.linalg.svdvals(longer @ difference.T)
    least = float(values[rank:].square().sum())
    assert missed(first, second) == pytest.approx(least, rel=1e-4, abs=1e-8)
    for seed in range(20):
        nudge = 0.01 * (random(rank, 8, seed=seed).float() - 0.5)
        assert missed(first + nudge, second) >= least


@pytest.mark.parametrize("outs", [6, 13])
def test_factors_are_of_one_size_whatever_text_they_come_from(outs: int) -> None:
    """Training takes steps of one size for both; so neither may depend on the amount of text."""
    inputs, difference = random(80, 8, seed=3) - 0.3, random(outs, 8, seed=4) - 0.5
    gram = inputs.T @ inputs
    first, second = low_rank.factorize_low_rank(difference, gram, 3)
    assert torch.allclose(first.norm(dim=1), second.norm(dim=0), rtol=1e-5)
    for times in (0.1, 1000):  # as much text, or inputs that are larger
        again = low_rank.factorize_low_rank(difference, times * gram, 3)
        assert torch.allclose(again[0].abs(), first.abs(), rtol=1e-4, atol=1e-5)
        assert torch.allclose(again[1].abs(), second.abs(), rtol=1e-4, atol=1e-5)


def test_factors_of_a_matrix_of_lower_rank_are_it() -> None:
    """Where singular values are zero, and no inputs were seen."""
    for outs in (6, 13):
        difference = random(outs, 2, seed=1) @ random(2, 8, seed=2)
        for gram in (torch.eye(8, dtype=torch.float64), torch.zeros(8, 8, dtype=torch.float64)):
            first, second = low_rank.factorize_low_rank(difference, gram, 5)
            assert first.isfinite().all()
            assert torch.allclose(second @ first, difference.float(), atol=1e-5)


def test_without_importance_all_experts_weigh_the_same() -> None:
    matrices = [random(3, 4, seed=n).float() for n in range(3)]
    mean = (matrices[0] + matrices[1] + matrices[2]) / 3
    assert torch.allclose(base_sharing.average_matrices(matrices, [0.0, 0.0, 0.0]), mean)
    expected = (2 * matrices[0] + matrices[1] + 5 * matrices[2]) / 8
    assert torch.allclose(base_sharing.average_matrices(matrices, [2.0, 1.0, 5.0]), expected)


# ---- layers --------------------------------------------------------------------------------------


def replace_experts(model: Model, **options: Any) -> Outcome:
    step = ExpertReplace.model_validate({"with": "base", "budget": 0.6, **options})
    step = step.resolve(model)
    step.check(model)
    outcome = search(step, model, IDS)
    outcome.model.verify()
    return outcome


class Mass:
    """The weight of each expert, summed up token by token."""

    def __init__(self) -> None:
        self.found: dict[int, list[float]] = {}

    def observe(self, trace: observation.BlockTrace) -> None:
        assert trace.routing is not None
        own = self.found.setdefault(trace.block.index, [0.0] * 6)
        for ids, weights in zip(trace.routing.ids, trace.routing.weights, strict=True):
            for j, weight in zip(ids.tolist(), weights.tolist(), strict=True):
                own[j] += weight

    def result(self) -> dict[int, list[float]]:
        return self.found


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.slow
def test_a_base_is_the_mean_of_its_experts_by_router_mass(tiny: Make, family: str) -> None:
    model = open_checkpoint(str(tiny(family))).model
    result = replace_experts(model, rank=0).model
    watched = Mass()
    walk.observe(model, IDS, [watched], lambda *_: None, "")
    shared = 0
    for (block, before), (_, after) in zip(model.moe_blocks, result.moe_blocks, strict=True):
        mass = watched.found[block.index]
        for n, base in enumerate(after.experts):
            own = [j for j, b in enumerate(after.bases) if b == n]
            shared += len(own) > 1
            total = sum(mass[j] for j in own)
            for part in PARTS:
                expected = sum(
                    mass[j] / total * getattr(before.experts[j], part).load() for j in own
                )
                assert torch.allclose(getattr(base, part).load(), expected, atol=1e-6)
        assert [row.origin for row in after.rows] == list(range(6))
    assert shared


def distance(model: Model, other: Model) -> float:
    logits = [compute_logits(m, IDS) for m in (model, other)]
    return float((logits[0] - logits[1]).abs().mean())


def test_factors_come_nearer_and_zero_ones_add_nothing(tiny: Make) -> None:
    model = open_checkpoint(str(tiny("olmoe"))).model
    options = {"budget": 0.8, "group_size": 6}
    missed = [distance(model, replace_experts(model, rank=r, **options).model) for r in (0, 1, 4)]
    assert missed[0] > missed[1] > missed[2] > 0
    zero = replace_experts(model, rank=4, factors="zero", **options).model
    with_factors = zero
    for _, one in zero.moe_blocks:
        for row in one.rows:
            for own in row.factors.values() if isinstance(row, Tied) else ():
                assert own.first.load().any()
                assert not own.second.load().any()
    # Without factors that add nothing it is the same model.
    for block, layer in zero.moe_blocks:
        bases = [base for base in layer.bases if base is not None]
        rows = tuple(Full(row.origin, b) for row, b in zip(layer.rows, bases, strict=True))
        zero = zero.replace_block(replace(block, mlp=replace(layer, rows=rows)))
    assert distance(with_factors, zero) < 1e-6


@pytest.mark.parametrize("how", ["base", "svd"])
@pytest.mark.parametrize("budget", [0.9, 0.7, 0.55])
def test_a_budget_is_met_within_one_expert(tiny: Make, how: str, budget: float) -> None:
    model = open_checkpoint(str(tiny("qwen3_moe"))).model
    rank = {"rank": 1} if how == "base" else {"rank": 5}
    outcome = replace_experts(model, **{"with": how, "budget": budget, **rank})
    whole, now = count_expert_bytes(model), count_expert_bytes(outcome.model)
    one = whole // sum(model.expert_counts)
    assert budget * whole - one <= now <= budget * whole
    assert f"take {now:,} bytes" in outcome.notes[-1]


def test_a_control_groups_at_random(tiny: Make) -> None:
    model = open_checkpoint(str(tiny("olmoe"))).model
    found = {
        seed: [
            layer.bases
            for _, layer in replace_experts(
                model, similarity="random", seed=seed, budget=0.5
            ).model.moe_blocks
        ]
        for seed in range(4)
    }
    assert any(a != b for a, b in itertools.pairwise(found.values()))
    alike = replace_experts(model, similarity="weights", budget=0.5).model
    assert all(layer.is_tied for _, layer in alike.moe_blocks)


# ---- exported ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", each_family("qwen3_moe"))
@pytest.mark.parametrize("slim", slow_except(["gptq", "awq"], "gptq"))
@pytest.mark.parametrize("how", ["base", "svd"])
@pytest.mark.slow
def test_bases_are_quantized_and_factors_are_not(
    tiny: Make, tmp_path: Path, family: str, slim: str, how: str
) -> None:
    folder, out = tiny(family), tmp_path / "out"
    replaced = {"expert_replace": {"with": how, "budget": 0.7, "rank": 3}}
    code, said, report = export(
        folder, out, [{"block_drop": {"drop": 1}}, replaced, {slim: {}}], "gptq"
    )
    assert code == 0, said
    assert report["results"][0]["parity"]["exact"] < 1e-4
    model = open_stored_model(open_checkpoint(str(out)))
    assert (
        model.tied_count > 0
        if how == "base"
        else any(None in layer.bases for _, layer in model.moe_blocks)
    )
    for name, role, weight in model.tensors():
        assert (weight.scheme is not None) == is_quantizable(role), name


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"with": "base", "budget": 0.6, "rank": 33}, "rank is 33; the matrices of experts"),
        ({"with": "svd", "budget": 0.6, "rank": 0}, "at least 1 and at most 21"),
        ({"with": "base", "budget": 0.6, "group_size": 1}, "group_size is 1"),
        ({"with": "base", "budget": 0.2, "rank": 1}, "at least (38.1%)"),
        ({"with": "base", "budget": 10**9, "rank": 1}, "nothing to do"),
        ({"with": "base", "budget": 0.9, "rank": 32}, "rank of at least 0 and at most 14"),
        ({"with": "svd", "budget": 0.9, "rank": 30}, "rank of at least 1 and at most 21"),
        ({"with": "base"}, "expert_replace: with: base needs budget"),
        ({"with": "base", "keep": 4}, "expert_replace: keep is not an option of with: base"),
        (
            {"with": "svd", "budget": 0.6, "similarity": "random"},
            "similarity is not an option of with: svd",
        ),
        ({"with": "base", "budget": 0.6, "ridge": 0.1}, "ridge is not an option of with: base"),
        (
            {"with": "constant", "keep": 4, "group_size": 7},
            "group_size is not an option of with: constant",
        ),
        ({"with": "base", "budget": 0.6, "keep": 4}, "keep is not an option of with: base"),
        ({"with": "base", "budget": 0.6, "criterion": "residual"}, "cannot use criterion residual"),
        ({"with": "base", "budget": 0.6, "criterion": "aimer"}, "cannot use criterion aimer"),
        ({"with": "base", "budget": 0.6, "depth_correction": float("inf")}, "finite number"),
    ],
)
def test_unsuitable_options_are_refused(
    tiny: Make, tmp_path: Path, options: dict[str, Any], expected: str
) -> None:
    steps = [{"expert_replace": options}]
    error = refuse(tiny("olmoe"), tmp_path / "out", steps, "hf:layout=natural")
    assert error.exit_code == 2
    assert expected in str(error)


@pytest.mark.parametrize(
    "options",
    [
        {"expert_replace": {"with": "base", "budget": 0.6, "rank": 1}},
        {"expert_replace": {"with": "linear", "keep": 4}},
        {"expert_merge": {"method": "ream", "keep": 4}},
    ],
)
def test_too_little_memory_is_reported_before_any_work(
    tiny: Make, tmp_path: Path, options: dict[str, Any]
) -> None:
    """By shapes: the text, which is much too short, was not even read."""
    file, out = tmp_path / "recipe.yaml", tmp_path / "out"
    calibration = {"samples": 100_000, "length": 128}
    file.write_text(json.dumps({"passes": [options], "calibration": calibration}))
    command = ["export", tiny("olmoe"), "-r", file, "-t", "hf:layout=natural", "-o", out]
    result = run(*command, "--max-memory", "2GB", "-q")
    assert result.exit_code == 5
    assert f"{next(iter(options))} keeps statistics of" in result.stderr
    assert not out.exists()


def test_disk_space_is_estimated_before_the_run(tiny: Make) -> None:
    """Bases, factors and merged experts count like the numbers that slimming makes."""
    model = open_checkpoint(str(tiny("olmoe"))).model
    passes: list[dict[str, Any]] = [
        {"expert_replace": {"with": "base", "budget": 0.6, "rank": 1}},
        {"expert_merge": {"method": "hc-smoe", "keep": 4}},
        {"expert_replace": {"with": "linear", "keep": 3, "rank": 2}},
    ]
    for one in passes:
        parsed = recipe.parse(json.dumps({"passes": [one]})).resolve(model)
        step = parsed.passes[0]
        assert isinstance(step, Search)
        (planned,) = plan_passes(parsed.passes, model).steps
        texts = TextSizes(TextSize(*IDS.shape))
        found = search(step, model, IDS).model
        known = {weight.load for _, _, weight in model.tensors()}
        new = sum(weight.nbytes for _, _, weight in found.tensors() if weight.load not in known)
        # Which layers lose how many experts to a base is only known afterwards.
        assert new <= planned.step.estimate(planned, texts).disk <= 3.5 * new


@pytest.mark.parametrize(
    "options", [{"with": "base", "budget": 0.6}, {"with": "constant", "keep": 4}]
)
@pytest.mark.parametrize("before", [{"rtn": {}}, {"sparsify": {"method": "magnitude"}}])
def test_quantized_and_sparse_experts_cannot_be_replaced(
    tiny: Make, tmp_path: Path, options: dict[str, Any], before: dict[str, Any]
) -> None:
    steps = [before, {"expert_replace": options}]
    error = refuse(tiny("olmoe"), tmp_path / "out", steps, "gptq")
    assert error.exit_code == 2
    said = str(error)
    assert "quantized or sparse" in said
    assert "move expert_replace before the pass that quantizes or sparsifies" in said


def test_replacements_and_bases_do_not_mix(tiny: Make, tmp_path: Path) -> None:
    steps = [{"expert_replace": {"with": "constant", "keep": 4}}]
    steps.append({"expert_replace": {"with": "base", "budget": 0.6}})
    code, said, _ = export(tiny("olmoe"), tmp_path / "out", steps, "hf:layout=natural")
    assert code == 2
    assert "cannot be combined with shared bases and factors in one recipe" in said


@pytest.mark.parametrize("family", each_family("olmoe"))
@pytest.mark.parametrize(
    "step",
    [
        {"expert_replace": {"with": "base", "budget": 0.7}},
        {"expert_replace": {"with": "constant", "keep": 4}},
        {"expert_merge": {"method": "m-smoe", "keep": 4}},
    ],
)
@pytest.mark.slow
def test_one_expert_for_each_token(
    tiny: Make, tmp_path: Path, family: str, step: dict[str, Any]
) -> None:
    """Stock readers must be kept from misreading the folder in another way than by top-k 0."""
    folder, out = tiny(family, num_experts_per_tok=1), tmp_path / "out"
    code, said, report = export(folder, out, [step], "hf:layout=natural,onnx")
    assert code == 0, said
    assert all(row["parity"]["exact"] < 1e-4 for row in report["results"])
    open_stored_model(open_checkpoint(str(out / "hf")))


def test_replacing_lowers_what_a_token_uses(tiny: Make) -> None:
    """Active parameters: those of the largest that it can choose."""
    model = open_checkpoint(str(tiny("olmoe"))).model
    whole = 3 * 64 * 32
    outside = model.parameters - 3 * 6 * whole
    assert model.active_parameters == outside + 3 * 2 * whole
    based = replace_experts(model, rank=4, budget=0.7).model
    factors = 3 * 4 * (64 + 32)
    assert based.active_parameters <= outside + 3 * 2 * (whole + factors)
    assert based.active_parameters > model.active_parameters
    alone = replace_experts(model, **{"with": "svd", "budget": 0.5, "rank": 8}).model
    for block, layer in alone.moe_blocks:
        small = 3 * 8 * (64 + 32)
        sizes = [small if isinstance(row, Tied) else whole for row in layer.rows]
        assert sum(sizes) - layer.inactive_parameters == sum(sorted(sizes)[-2:]), block.index


def test_experts_that_share_cannot_be_dropped(tiny: Make, tmp_path: Path) -> None:
    steps = [{"expert_replace": {"with": "base", "budget": 0.6}}, {"expert_drop": {"keep": 3}}]
    code, said, _ = export(tiny("olmoe"), tmp_path / "out", steps, "hf:layout=natural")
    assert code == 2
    assert "put expert_replace or expert_merge after expert_drop" in said


@pytest.mark.parametrize("family", each_family("qwen2_moe"))
@pytest.mark.slow
def test_tied_experts_can_be_materialized(tiny: Make, tmp_path: Path, family: str) -> None:
    """For stock readers: refused without the flag, with what it costs; transformers loads it."""
    from transformers import AutoModelForCausalLM

    folder, out = tiny(family), tmp_path / "out"
    step = {"expert_replace": {"with": "base", "budget": 0.6, "rank": 3}}
    code, said, _ = export(folder, out, [step], "hf")
    assert code == 6
    assert "with --materialize: " in said
    assert not out.exists()
    code, said, report = export(folder, out, [step], "hf", "--materialize")
    assert code == 0, said
    assert report["results"][0]["parity"]["exact"] < 1e-4
    assert " MB in place of " in report["materialized"]
    assert "Materialized: tied experts are stored" in (out / "README.md").read_text()
    manifest = json.loads((out / "manifest.json").read_text())["model"]
    assert manifest["materialized"]
    assert not any(manifest["members"])
    model = open_stored_model(open_checkpoint(str(out)))
    assert model.nbytes == open_checkpoint(str(folder)).model.nbytes
    loaded: Any = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    expected = compute_logits(model, IDS)
    with torch.no_grad():
        assert torch.allclose(loaded(IDS).logits, expected, atol=1e-4)


def test_impossible_materializing_is_explained(tiny: Make, tmp_path: Path) -> None:
    """One target holds tied experts, another none; neither holds whole ones beside 4 bits."""
    steps = [{"expert_replace": {"with": "base", "budget": 0.6, "rank": 3}}, "rtn"]
    targets = "onnx,gptq:layout=uniform"
    error = refuse(tiny("mixtral"), tmp_path / "out", steps, targets, materialize=True)
    assert error.exit_code == 6
    said = str(error)
    assert "; with tied experts materialized: block 0: experts" in said
    assert "if only some of the targets need that, export to each separately" in said


def test_tied_experts_are_counted(tiny: Make, tmp_path: Path) -> None:
    out = tmp_path / "out"
    step = {"expert_replace": {"with": "base", "budget": 0.6, "rank": 3}}
    assert export(tiny("olmoe"), out, [step], "hf:layout=natural")[0] == 0
    manifest = json.loads((out / "manifest.json").read_text())["model"]
    assert manifest["members"] == [6, 6, 6]
    assert not manifest["materialized"]
    told = run("inspect", str(out))
    assert "tied experts per MoE layer: [6, 6, 6]" in told.output
    again = run("export", str(out), "-t", "gptq", "-o", str(tmp_path / "o"))
    assert again.exit_code == 6, again.output
    assert "or replaced experts (per_layer_config)" in again.output


def test_a_layer_of_factors_alone_keeps_one_expert(tiny: Make) -> None:
    model = open_checkpoint(str(tiny("olmoe"))).model
    result = replace_experts(model, **{"with": "svd", "budget": 0.35, "rank": 2}).model
    for _, layer in result.moe_blocks:
        assert isinstance(layer, MoELayer)
        assert len(layer.experts) >= 1
