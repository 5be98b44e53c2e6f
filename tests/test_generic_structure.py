"""Budgets and merging on families without a row, against slow loops over transformers' layers."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor

import helpers
from every_family import IDS, make_folder, run_stock, walk_over, write_and_load
from helpers import ignore, plan
from moe2edge.calibration import walk
from moe2edge.calibration.block_runner import BlockRunner
from moe2edge.calibration.walk import embed
from moe2edge.errors import InputError, Unsupported
from moe2edge.model.layers import MoELayer
from moe2edge.model.model import Model
from moe2edge.numerics import expert_groups
from moe2edge.numerics.router_fit import compute_router_loss
from moe2edge.passes._allocation_trials import Ranker
from moe2edge.passes._merge_experts import load_matrices
from moe2edge.passes.expert_budget import ExpertBudget
from moe2edge.passes.expert_merge import ExpertMerge
from moe2edge.passes.expert_skip import ExpertSkip
from moe2edge.passes.routing import Routing, find_rules, gather_evidence
from moe2edge.pipeline.registry import find_pass
from moe2edge.pipeline.stages import plan_passes
from moe2edge.runtime.decoder_blocks import find_activation
from moe2edge.storage.checkpoint import open_checkpoint
from moe2edge.storage.work_folder import WorkFolder
from moe2edge.targets.hf import Hf
from test_routed_search import FAMILIES, sum_experts, watch_layers

TEXT = torch.randint(1, 96, (8, 12), generator=torch.Generator().manual_seed(3))


def open_family(folder: Path, family: str, **changes: Any) -> Model:
    make_folder(folder, family, **changes)
    return open_checkpoint(folder).model


# ---- expert_budget -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss", "gemma4_text", "nemotron_h"])
def test_the_cost_of_a_count_is_the_error_of_the_layer_without_the_rest(
    family: str, tmp_path: Path
) -> None:
    model = open_family(tmp_path, family)
    groups = model.moe_blocks[0][1].router.groups
    floors = {block.index: 4 for block, _ in model.moe_blocks}
    ranker = Ranker("mone", 0, floors, IDS.numel(), None)
    walk.observe(model, IDS, [ranker], ignore, "")
    for block, hidden, trace in watch_layers(model):
        order, norms = ranker.ranking(block), trace.outputs.flatten(0, 1).double().square().sum(1)
        counts = range(4, 9, groups)
        assert len(ranker.errors[block.index]) == len(counts)
        for count, found in zip(counts, ranker.errors[block.index], strict=True):
            small = BlockRunner(model, block.keep_experts(sorted(order[:count]))).watch(hidden)
            each = (sum_experts(small) - sum_experts(trace)).square().sum(1) / norms
            assert found == pytest.approx(float(each.mean()), rel=1e-3, abs=1e-9)


@pytest.mark.parametrize(
    ("family", "sensitivity"),
    [
        ("deepseek_v3", "error"),
        ("gpt_oss", "kl"),
        ("nemotron_h", "kl"),
        ("gemma4_text", "error"),
        ("phimoe", "error"),
    ],
)
def test_one_budget_is_shared_by_all_layers(family: str, sensitivity: str, tmp_path: Path) -> None:
    model = open_family(tmp_path, family)
    options = {"keep": 6, "sensitivity": sensitivity, "points": 3}
    step = ExpertBudget.model_validate(options)
    plan([step], model)
    found = helpers.search(step, model, TEXT).model
    found.verify()
    counts = found.expert_counts
    assert sum(counts) == 6 * len(counts)
    for (block, layer), (old, _) in zip(found.moe_blocks, model.moe_blocks, strict=True):
        assert len(layer.experts) >= layer.router.top_k
        if layer.router.groups > 1:
            kept = block.expert_origins
            assert sum(n < 4 for n in kept) == sum(n >= 4 for n in kept) >= 2
        assert set(block.expert_origins) <= set(old.expert_origins)
    assert helpers.search(step, model, TEXT).model.expert_counts == counts


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 5}, "expert_budget: keep 5 is 5 experts .* the nearest are 4 and 6"),
        ({"keep": 6, "floor": 3}, "expert_budget: floor 3 is 3 .* the nearest are 4 and 6"),
        ({"keep": 4}, r"keep 4 leaves no choice: \(4, 4, 4\) is the only allocation"),
        ({"keep": 2}, "the nearest are 4 and 6"),
    ],
)
def test_budgets_that_groups_cannot_share_are_refused(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = open_family(tmp_path, "deepseek_v3")
    with pytest.raises(InputError, match=message):
        plan([ExpertBudget.model_validate(options)], model)


@pytest.mark.parametrize("name", ["expert_drop", "expert_search", "expert_budget"])
def test_groups_that_can_lose_no_expert_are_said_so(name: str, tmp_path: Path) -> None:
    model = open_family(tmp_path, "deepseek_v3", n_group=4)
    step = find_pass(name).model_validate({"keep": 6})
    with pytest.raises(InputError, match=f"there is no such number below 8, so leave {name} out"):
        plan([step], model)


# ---- expert_merge --------------------------------------------------------------------------------


def merge(model: Model, **options: Any) -> Any:
    step = ExpertMerge.model_validate(options)
    plan([step], model)
    return helpers.search(step, model, TEXT)


def run_expert(layer: MoELayer, n: int, x: Tensor, activate: Any) -> Tensor:
    """Run one expert by the formula of all of them."""
    own = load_matrices(layer, n)
    down = own.down @ own.compute_intermediate(x, activate)
    bias = own.biases.get("down")
    return (down if bias is None else down + bias[:, None]).T


@pytest.mark.parametrize("family", FAMILIES)
def test_neurons_may_be_put_in_another_order(family: str, tmp_path: Path) -> None:
    """What is merged is what transformers' experts compute, and its neurons are interchangeable."""
    model = open_family(tmp_path, family)
    block, _, trace = next(watch_layers(model))
    layer = block.mlp
    assert isinstance(layer, MoELayer)
    assert trace.routing is not None
    x, activate = trace.routing.inputs, find_activation(model, block)
    expected = trace.expert_output(3, x)
    assert torch.allclose(run_expert(layer, 3, x, activate), expected, atol=1e-4, rtol=1e-4)
    own = load_matrices(layer, 3)
    order = torch.randperm(len(own.up), generator=torch.Generator().manual_seed(0))
    other = own.permute(order)
    inside = own.compute_intermediate(x, activate)
    assert torch.allclose(other.compute_intermediate(x, activate), inside[order], atol=1e-4)
    assert torch.equal(
        expert_groups.match_neurons(-own.neurons() @ other.neurons().T), order.argsort()
    )


@pytest.mark.parametrize("method", ["hc-smoe", "m-smoe", "ream"])
@pytest.mark.parametrize("family", ["gpt_oss", "nemotron_h", "deepseek_v3", "gemma4_text"])
def test_equal_experts_are_merged_into_themselves(family: str, method: str, tmp_path: Path) -> None:
    """A mean of equal experts is that expert, biases included; others are left alone."""
    model = open_family(tmp_path, family)
    for block, _ in model.moe_blocks:
        roles = {role for role, _ in block.weights() if role.startswith("experts.1.")}
        weights = dict(block.weights())
        model = model.replace_block(
            block.with_weights({r: weights[r.replace("1.", "0.", 1)] for r in roles})
        )
    keep = 6 if model.moe_blocks[0][1].router.groups > 1 else 7
    found = merge(model, method=method, keep=keep, fitted_on="intact", group_limit=None)
    for (old, before), (new, after) in zip(model.moe_blocks, found.model.moe_blocks, strict=True):
        assert after.is_plain
        assert len(after.experts) == after.router_rows == keep
        kept = set(new.expert_origins)
        if method == "hc-smoe":  # by outputs, and theirs are equal
            assert len(kept & {0, 1}) == 1
            place = new.expert_origins.index(min(kept & {0, 1}))
            one, other = load_matrices(before, 0), load_matrices(after, place)
            for (name, mine), (same, theirs) in zip(one.parts(), other.parts(), strict=True):
                assert name == same
                assert torch.allclose(mine, theirs, atol=1e-6)
        if before.router.groups > 1:
            assert sum(n < 4 for n in kept) == 3
        assert f"block {old.index}" in " ".join(found.changed)


@pytest.mark.parametrize("method", ["hc-smoe", "ream"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_model_is_a_smaller_one_of_its_family(
    family: str, method: str, tmp_path: Path
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    stock = make_folder(source, family)
    model = open_checkpoint(source).model
    merged = merge(model, method=method, keep=4).model
    again = write_and_load(stock, merged, out)
    assert torch.equal(run_stock(again), walk_over(merged))


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3"])
def test_a_merged_expert_is_the_mean_of_its_group(family: str, tmp_path: Path) -> None:
    model = open_family(tmp_path, family)
    found = merge(model, method="hc-smoe", keep=4)
    block, layer = model.moe_blocks[0]
    new, after = found.model.moe_blocks[0]
    counts = torch.zeros(8)
    trace = BlockRunner(model, block).watch(_enter(model, block.index))
    assert trace.routing is not None
    counts.index_add_(0, trace.routing.ids.flatten(), torch.ones(trace.routing.ids.numel()))
    told = found.changed[0]
    for place, centroid in enumerate(new.expert_origins):
        others = [
            [int(n) for n in part.strip("[]").split(",")]
            for part, into in _read_groups(told)
            if into == centroid
        ]
        group = [centroid, *(others[0] if others else [])]
        shares = counts[group] / counts[group].sum() if counts[group].sum() else None
        if shares is None:
            shares = torch.full((len(group),), 1 / len(group))
        for name, numbers in load_matrices(after, place).parts():
            mean = sum(
                share * dict(load_matrices(layer, n).parts())[name]
                for n, share in zip(group, shares, strict=True)
            )
            assert torch.allclose(numbers, torch.as_tensor(mean), atol=1e-5)


def _enter(model: Model, index: int) -> Tensor:
    hidden = embed(model, TEXT)
    for block in model.blocks[:index]:
        hidden = BlockRunner(model, block).run(hidden)
    return hidden


def _read_groups(told: str) -> list[tuple[str, int]]:
    return [(part, int(into)) for part, into in re.findall(r"(\[[\d, ]+\]) into (\d+)", told)]


def test_counts_that_groups_cannot_share_are_refused_by_name(tmp_path: Path) -> None:
    model = open_family(tmp_path, "deepseek_v3")
    with pytest.raises(InputError, match=r"keep 5 is 5 experts .* the nearest are 4 and 6"):
        merge(model, method="ream", keep=5)


# ---- routing -------------------------------------------------------------------------------------


def disturb(model: Model, size: float) -> Model:
    """Return the model with noise in its routers: something to win."""
    for block, layer in model.moe_blocks:
        weight = layer.router.weight
        noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(block.index))
        numbers = weight.load() + size * noise

        def load(numbers: Tensor = numbers) -> Tensor:
            return numbers

        new = replace(weight, load=load)
        model = model.replace_block(block.with_weights({"router.weight": new}))
    return model


@pytest.mark.parametrize(
    "family", ["aria_text", "cohere2_moe", "granitemoe", "hunyuan_v1_moe", "jamba", "qwen3_next"]
)
def test_the_loss_of_a_router_is_that_of_the_block_with_it(family: str, tmp_path: Path) -> None:
    """Granite scales what a layer adds, Cohere takes a mean: both count as transformers does it."""
    source = open_family(tmp_path, family)
    model = disturb(source, 0.1)
    rules = find_rules(model)
    other = disturb(model, 0.05)
    for (block, hidden, trace), changed in zip(watch_layers(model), other.moe_blocks, strict=True):
        twin = BlockRunner(source, source.blocks[block.index]).watch(hidden)
        assert isinstance(block.mlp, MoELayer)
        evidence = gather_evidence(trace, block.mlp, twin, *rules[block.index])
        for tried, own in ((model, block), (other, changed[0])):
            out = BlockRunner(tried, own).run(hidden).double()
            each = (twin.outputs - out).square().sum(-1) / twin.outputs.double().square().sum(-1)
            rows = dict(own.weights())["router.weight"].load().float()
            found = compute_router_loss(evidence, rows)
            assert found == pytest.approx(float(each.sum()), rel=2e-3, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["granitemoe", "qwen3_next"])
def test_disturbed_routers_get_better(family: str, tmp_path: Path) -> None:
    source = open_family(tmp_path / "source", family)
    draw = torch.Generator().manual_seed(1)
    model, text = disturb(source, 0.2), torch.randint(1, 96, (16, 24), generator=draw)
    step = Routing(ridge=0.001, damping=0.1)
    plan([step], model)
    store = WorkFolder(tmp_path)
    found = step.search(helpers.make_context(model, text, source, store=store))
    notes = " ".join(found.notes)
    assert re.search(r"held-out error of the residual stream [1-9][\d.]*% lower", notes)
    if found.changed:
        assert not torch.equal(walk_over(found.model), walk_over(model))


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("flex_olmo", "what its experts put out is not just scaled and added"),
        ("deepseek_v3", "needs a router without biases and groups that takes the softmax"),
        ("gpt_oss", "needs a router without biases and groups"),
        ("phimoe", "needs a router without biases and groups"),
        ("gemma4_text", "needs a router without biases and groups"),
    ],
)
def test_routers_of_other_rules_are_refused_by_name(
    family: str, message: str, tmp_path: Path
) -> None:
    model = open_family(tmp_path, family)
    with pytest.raises(Unsupported, match=f"routing does not work on {family}: .*{message}"):
        plan([Routing()], model)


# ---- expert_skip ---------------------------------------------------------------------------------

# Routers that do not scale the weights of chosen experts to one sum, by transformers' code.
UNSCALED = ("deepseek_v2", "phimoe")


@pytest.mark.parametrize("family", FAMILIES)
def test_chosen_experts_of_low_weight_are_left_out(family: str, tmp_path: Path) -> None:
    """One token after another: the second expert goes where its weight is low."""
    plain = open_family(tmp_path, family)
    step = ExpertSkip(quantile=0.5)
    plan([step], plain)
    facts = walk.gather(plain, IDS, step.observers(), ignore, "")
    model = step.apply(plain, facts).model
    for (block, hidden, trace), (skipping, layer) in zip(
        watch_layers(plain), model.moe_blocks, strict=True
    ):
        found = BlockRunner(model, skipping).watch(hidden)
        assert trace.routing is not None
        assert found.routing is not None
        (below,) = layer.router.skip_below
        weights = trace.routing.weights.double()
        expected, gone = [], 0
        for ids, own in zip(trace.routing.ids.tolist(), weights.tolist(), strict=True):
            kept = [w for w in own if w >= below * max(own)]
            gone += len(own) - len(kept)
            scale = 1.0 if family in UNSCALED else sum(own) / sum(kept)
            left = {n: w * scale for n, w in zip(ids, own, strict=True) if w in kept}
            expected.append([left.get(n, 0.0) for n in range(8)])
        # Most weights of Phi are equal, and none of them is below another.
        assert family == "phimoe" or 0.3 < gone / len(weights) < 0.7
        counted = torch.zeros(len(weights), 9).scatter_add(
            1, found.routing.ids, found.routing.weights
        )
        assert torch.allclose(counted[:, :8].double(), torch.tensor(expected).double(), atol=1e-5)
        assert int((found.routing.ids == 8).sum()) == gone
        assert not counted[:, 8].any()
        # What the layer adds is the sum of those that are left.
        ones = torch.tensor(expected, dtype=torch.float64)
        total = sum(
            ones[:, n, None] * trace.expert_output(n, trace.routing.inputs).double()
            for n in range(8)
        )
        router = found.router
        assert router is not None
        if (factor := router().factor) is not None:
            change = (found.mlp_outputs - trace.mlp_outputs).flatten(0, -2).double() / factor
            assert torch.allclose(change, total - sum_experts(trace), atol=2e-3)
        assert block.index == skipping.index


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("expert_drop", {"keep": 1, "clamp_top_k": True}),
        ("expert_drop", {"keep": [0, 8, 8]}),
        ("expert_search", {"keep": 1, "clamp_top_k": True}),
        ("expert_merge", {"keep": 1, "method": "ream"}),
    ],
)
def test_a_router_keeps_a_choice(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    """A plain MLP is no form of transformers' layers, so it is refused before any work."""
    model = open_family(tmp_path, "lfm2_moe", num_dense_layers=1, num_experts_per_tok=1)
    with pytest.raises(InputError, match="keep at least 2 in each layer"):
        plan_passes([find_pass(name).model_validate(options)], model)


def test_a_budget_leaves_routers_a_choice(tmp_path: Path) -> None:
    model = open_family(tmp_path, "lfm2_moe")
    assert set(ExpertBudget(keep=4, clamp_top_k=True).floors(model)) == {2}


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss", "granitemoe", "lfm2_moe"])
def test_transformers_refuses_layers_that_differ_in_skipping_alone(
    family: str, tmp_path: Path
) -> None:
    """It would read them as if nothing was skipped."""
    stock = make_folder(tmp_path / "source", family)
    model = source = open_checkpoint(tmp_path / "source").model
    for block, layer in model.moe_blocks:
        router = replace(layer.router, skip_below=(0.9,) * (layer.router.top_k - 1))
        model = model.replace_block(replace(block, mlp=replace(layer, router=router)))
    (tmp_path / "out").mkdir()
    target = Hf(layout="natural")
    target.write(model, tmp_path / "out")
    with pytest.raises(
        (RuntimeError, StrictDataclassError), match=r"per-layer attr|not homogeneous"
    ):
        type(stock).from_pretrained(tmp_path / "out", local_files_only=True)
    again = target.streamed(tmp_path / "out")
    assert again.architecture.anatomy == source.architecture.anatomy
    assert torch.equal(walk_over(again), walk_over(model))
