"""The pass ``routing``: derivatives and fits against plain twins; when it leaves a model alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers import compute_logits, each_family, make_context, run
from moe2edge.errors import InputError
from moe2edge.model.layers import MoELayer
from moe2edge.model.model import Model
from moe2edge.model.weights import Weight
from moe2edge.numerics import router_fit
from moe2edge.numerics.subset_loss import RoutingRule
from moe2edge.passes.routing import Routing
from moe2edge.pipeline.contract import Outcome, PassContext
from moe2edge.storage.checkpoint import open_checkpoint
from moe2edge.storage.work_folder import WorkFolder
from moe2edge.testing import Make

IDS = torch.randint(1, 96, (16, 40), generator=torch.Generator().manual_seed(0))
TOKENS, EXPERTS, HIDDEN = 40, 5, 6


def layer(
    rule: RoutingRule, seed: int = 0
) -> tuple[router_fit.RouterEvidence, torch.Tensor, torch.Tensor]:
    """Random evidence with what it was made of: outputs [T, E, H] and what is lacking [T, H]."""
    draw = torch.Generator().manual_seed(seed)
    h = torch.randn(TOKENS, HIDDEN, generator=draw)
    outputs = torch.randn(TOKENS, EXPERTS, HIDDEN, generator=draw)
    lacks = torch.randn(TOKENS, HIDDEN, generator=draw)
    router = torch.randn(EXPERTS, HIDDEN, generator=draw)
    evidence = router_fit.RouterEvidence(
        rule,
        h,
        outputs @ outputs.mT,
        (outputs @ lacks[:, :, None])[:, :, 0],
        lacks.square().sum(1),
        router_fit.route(h @ router.T, rule)[0],
        torch.rand(TOKENS, generator=draw) + 0.5,
    )
    return evidence, outputs, lacks


def slow_loss(
    evidence: router_fit.RouterEvidence,
    outputs: torch.Tensor,
    lacks: torch.Tensor,
    router: torch.Tensor,
) -> torch.Tensor:
    """Return the loss, token by token, from outputs; the chosen set is fixed by values."""
    total = torch.zeros((), dtype=router.dtype)
    for t in range(TOKENS):
        z = router @ evidence.inputs[t].to(router.dtype)
        p = z.softmax(0)
        ids = z.topk(evidence.rule.top_k).indices
        weights = p[ids] / p[ids].sum() if evidence.rule.renormalize else p[ids]
        moved = weights @ outputs[t, ids].to(router.dtype)
        moved = moved - evidence.weights[t].to(router.dtype) @ outputs[t].to(router.dtype)
        total = total + evidence.scale[t] * (lacks[t].to(router.dtype) - moved).square().sum()
    return total


RULES = [
    RoutingRule(2, renormalize=True),
    RoutingRule(2, renormalize=False),
    RoutingRule(EXPERTS, renormalize=True),
]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_loss_equals_a_loop_over_tokens(rule: RoutingRule) -> None:
    evidence, outputs, lacks = layer(rule)
    router = torch.randn(EXPERTS, HIDDEN, generator=torch.Generator().manual_seed(9))
    expected = float(slow_loss(evidence, outputs, lacks, router))
    assert router_fit.compute_router_loss(evidence, router) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_step_solves_the_linearized_problem(
    rule: RoutingRule, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Jacobian by autograd, dense least squares; conjugate gradients run until they are exact."""
    monkeypatch.setattr(router_fit, "ITERATIONS", 500)
    monkeypatch.setattr(router_fit, "PRECISION", 1e-14)
    evidence, outputs, lacks = layer(rule)
    router = torch.randn(EXPERTS, HIDDEN, generator=torch.Generator().manual_seed(3)).double()

    def lacking(rows: torch.Tensor) -> torch.Tensor:
        weights, _ = router_fit.route(evidence.inputs.double() @ rows.T, rule)
        moved = (weights - evidence.weights)[:, None] @ outputs.double()
        left = lacks.double() - moved[:, 0]
        return (evidence.scale.double().sqrt()[:, None] * left).flatten()

    jacobian = torch.func.jacrev(lacking)(router).reshape(-1, EXPERTS * HIDDEN)
    damping, ridge = 0.7, 0.3
    normal = jacobian.T @ jacobian
    products = (evidence.inputs.T @ evidence.inputs).double()
    # The curvature in logits, per expert, of which damping and ridge are parts.
    weights, q = router_fit.route(evidence.inputs.double() @ router.T, rule)
    curvature = torch.zeros(EXPERTS, dtype=torch.float64)
    for t in range(TOKENS):
        for one in range(EXPERTS):
            slope = -q[t, one] * weights[t]
            slope[one] += weights[t, one]
            change = slope @ outputs[t].double()
            curvature[one] += evidence.scale[t] * change @ change / TOKENS
    mean = curvature.mean()
    size = curvature + damping * mean
    shrink = ridge * products.diagonal().mean()
    for one in range(EXPERTS):
        at = slice(one * HIDDEN, (one + 1) * HIDDEN)
        normal[at, at] += damping * mean * products + shrink * size[one] * torch.eye(HIDDEN)
    expected = torch.linalg.solve(normal, -jacobian.T @ lacking(router))
    found = router_fit.take_step(evidence, router.float(), damping, ridge)
    assert torch.allclose(found.flatten().double(), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("renormalize", [True, False])
def test_rows_that_were_disturbed_are_found_again(renormalize: bool) -> None:
    draw = torch.Generator().manual_seed(1)
    rule, tokens = RoutingRule(2, renormalize), 600
    h = torch.randn(tokens, HIDDEN, generator=draw)
    outputs = torch.randn(tokens, EXPERTS, HIDDEN, generator=draw)
    true = torch.randn(EXPERTS, HIDDEN, generator=draw)
    disturbed = true + 0.3 * torch.randn(EXPERTS, HIDDEN, generator=draw)
    before, after = (router_fit.route(h @ rows.T, rule)[0] for rows in (disturbed, true))
    lacks = ((after - before)[:, None] @ outputs)[:, 0]
    evidence = router_fit.RouterEvidence(
        rule,
        h,
        outputs @ outputs.mT,
        (outputs @ lacks[:, :, None])[:, :, 0],
        lacks.square().sum(1),
        before,
        torch.ones(tokens),
    )
    held_out = torch.arange(tokens) % 4 == 0
    found = router_fit.fit_router(
        evidence, held_out, disturbed, torch.float32,
        damping=0.1, ridge=0.001, rounds=20, margin=1e-3,
    )  # fmt: skip
    assert found.router is not None
    assert found.after < 0.2 * found.before
    # Nothing to win: the rows are right already.
    none = replace(evidence, weights=after, pull=evidence.pull * 0, missing=evidence.missing * 0)
    found = router_fit.fit_router(
        none, held_out, true, torch.float32, damping=0.1, ridge=0.001, rounds=5, margin=1e-3
    )
    assert found.router is None


def context(source: Model, model: Model, folder: Path, ids: torch.Tensor = IDS) -> PassContext:
    return make_context(model, ids, source, store=WorkFolder(folder))


def own_text(folder: Path) -> torch.Tensor:
    """Return samples of the model itself, of which it is the best model."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        start = torch.randint(1, 96, (16, 1))
        out: torch.Tensor = model.generate(
            start, do_sample=True, min_new_tokens=39, max_new_tokens=39, top_k=0
        )
    return out


def dropped(model: Model) -> Model:
    for block, _ in model.moe_blocks:
        model = model.replace_block(block.keep_experts([0, 2, 5]))
    return model


def disturbed(model: Model, size: float) -> Model:
    """Routers with noise: something to win."""
    for block, part in model.moe_blocks:
        weight = part.router.weight
        draw = torch.Generator().manual_seed(block.index)
        noise = size * torch.randn(weight.shape, generator=draw)

        def load(weight: Weight = weight, noise: torch.Tensor = noise) -> torch.Tensor:
            return weight.load() + noise

        new = replace(weight, load=load)
        model = model.replace_block(block.with_weights({"router.weight": new}))
    return model


def kl(source: Model, model: Model) -> float:
    ids = torch.randint(1, 96, (8, 40), generator=torch.Generator().manual_seed(77))
    logits = [compute_logits(one, ids).log_softmax(-1) for one in (source, model)]
    return float((logits[0].exp() * (logits[0] - logits[1])).sum(-1).mean())


@pytest.mark.parametrize("family", each_family("qwen3_moe"))
def test_disturbed_routers_get_better(tiny: Make, family: str, tmp_path: Path) -> None:
    source = open_checkpoint(str(tiny(family))).model
    model = disturbed(source, 0.2)
    step = Routing(ridge=0.001, damping=0.1)
    step.check(model)
    outcome = step.search(context(source, model, tmp_path, own_text(tiny(family))))
    assert len(outcome.changed) == 3
    assert kl(source, outcome.model) < 0.8 * kl(source, model)
    outcome.model.verify()
    for (_, new), (_, old) in zip(outcome.model.moe_blocks, model.moe_blocks, strict=True):
        assert [e.origin for e in new.experts] == [e.origin for e in old.experts]


def test_a_model_that_cannot_get_better_is_left_alone(tiny: Make, tmp_path: Path) -> None:
    source = open_checkpoint(str(tiny("mixtral"))).model
    outcome = Routing().search(context(source, source, tmp_path))
    assert outcome.model is source
    assert outcome.changed == ()
    assert "no router was changed" in outcome.notes[-1]


def test_the_whole_is_judged_by_the_loss(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks got better, the language model did not: nothing is changed."""
    from moe2edge.numerics import metrics
    from moe2edge.numerics import metrics as quality

    source = open_checkpoint(str(tiny("mixtral"))).model
    model, losses = disturbed(source, 0.2), iter([[4.0, 5.0, 6.0, 7.0], [3.5, 5.5, 6.5, 6.0]])

    def per_sample(*_: Any) -> list[metrics.SampleSums]:
        return [metrics.SampleSums(1, nll, 0.1, 1) for nll in next(losses)]

    monkeypatch.setattr(quality, "measure_per_sample", per_sample)
    outcome: Outcome = Routing(ridge=0.001, damping=0.1).search(context(source, model, tmp_path))
    assert outcome.model is model
    assert outcome.changed == ()
    assert "routers were not changed: the loss does not fall measurably" in outcome.notes[-1]


def test_rows_are_rounded_before_they_are_judged(tiny: Make, tmp_path: Path) -> None:
    source = open_checkpoint(str(tiny("mixtral", dtype="bfloat16"))).model
    model = dropped(source)
    outcome = Routing(margin=0).search(context(source, model, tmp_path))
    for block in outcome.model.blocks:
        assert isinstance(block.mlp, MoELayer)
        assert block.mlp.router.weight.load().dtype == torch.bfloat16


def test_the_same_twice(tiny: Make, tmp_path: Path) -> None:
    source = open_checkpoint(str(tiny("olmoe"))).model
    model = disturbed(source, 0.2)
    first, second = (
        Routing(damping=0.1, ridge=0.001).search(context(source, model, folder))
        for folder in (tmp_path / "a", tmp_path / "b")
        if not folder.mkdir()  # type: ignore[func-returns-value]
    )
    assert first.notes == second.notes


@pytest.mark.parametrize("parts", [2, 3, 4, 5, 8])
def test_held_out_samples_are_of_every_part_of_a_mix(parts: int) -> None:
    """Samples of a mix take turns; a stride of four would hold out one part of four alone."""
    held_out = Routing()._hold_out(128)
    assert int(held_out.sum()) == 32
    shares = [float(held_out[part::parts].float().mean()) for part in range(parts)]
    assert min(shares) > 0.1
    assert max(shares) < 0.35


def test_refusals(tiny: Make, tmp_path: Path) -> None:
    source = open_checkpoint(str(tiny("mixtral"))).model
    plain = source
    for block, _ in source.moe_blocks:
        plain = plain.replace_block(block.keep_experts([1], clamp_top_k=True))
    with pytest.raises(InputError, match="no layer has a router left"):
        Routing().check(plain)
    block, part = source.moe_blocks[0]
    skips = replace(part, router=replace(part.router, skip_below=(0.5,)))
    with pytest.raises(InputError, match="put expert_skip after routing"):
        Routing().check(source.replace_block(replace(block, mlp=skips)))
    one = make_context(source, IDS[:1])
    with pytest.raises(InputError, match="1 calibration samples are too few"):
        Routing().search(one)


def test_layers_without_a_router_are_passed_over(tiny: Make, tmp_path: Path) -> None:
    source = open_checkpoint(str(tiny("qwen2_moe"))).model
    model = source.replace_block(source.blocks[0].keep_experts([]))
    model = model.replace_block(model.blocks[1].keep_experts([3], clamp_top_k=True))
    outcome = Routing(margin=0).search(context(source, model, tmp_path))
    assert all("block 2" in changed for changed in outcome.changed)


def test_decide_refuses_a_pass_that_computes_weights(tiny: Make, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("passes: [{expert_drop: {keep: 3}}, routing]")
    command = ["decide", str(tiny("mixtral")), "-r", str(recipe), "-o", str(tmp_path / "s.json")]
    done = run(*command)
    assert done.exit_code == 2
    assert "the recipe has routing, which computes numbers" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "s.json").exists()
