"""AWQ: folding keeps the function, and alpha is the one that a slow search finds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

from helpers import compute_logits, plan
from moe2edge.calibration import walk
from moe2edge.calibration.block_runner import BlockRunner
from moe2edge.model.block import SECOND_NORM, Block, is_quantizable
from moe2edge.model.family import FAMILIES
from moe2edge.model.layers import MoELayer
from moe2edge.model.model import Model
from moe2edge.model.weights import Weight
from moe2edge.numerics import awq_scales
from moe2edge.numerics.grid import Quantized
from moe2edge.numerics.rounding import round_to_nearest
from moe2edge.numerics.scheme import Scheme
from moe2edge.passes import _awq_folding
from moe2edge.passes._quantize import Rule
from moe2edge.passes.awq import Awq
from moe2edge.passes.rtn import Rtn
from moe2edge.pipeline.contract import Outcome
from moe2edge.pipeline.solver import GroupSolver
from moe2edge.pipeline.stages import enforce
from moe2edge.storage.checkpoint import open_checkpoint
from moe2edge.testing import Make

IDS = torch.randint(1, 96, (4, 40), generator=torch.Generator().manual_seed(0))
NORM, NEXT_NORM = "norms.input_layernorm.weight", f"norms.{SECOND_NORM}"
Q, K, V, OUT = (f"attention.{name}_proj.weight" for name in "qkvo")


class Memory:
    """Keeps numbers as an export would, without a disk."""

    def put(self, block: Block, numbers: Mapping[str, Quantized | torch.Tensor]) -> Block:
        weights = dict(block.weights())
        return block.with_weights({r: stored(weights[r], value) for r, value in numbers.items()})


def stored(weight: Weight, value: Quantized | torch.Tensor) -> Weight:
    if isinstance(value, Quantized):
        return replace(
            weight, load=value.dequantize, scheme=value.scheme, load_quantized=lambda: value
        )
    assert value.shape == weight.shape
    kept = value.to(weight.load().dtype)
    return replace(weight, load=lambda: kept)


def model_of(make: Make, family: str, **changes: Any) -> Model:
    return open_checkpoint(str(make(family, **changes))).model


def run(step: Awq, model: Model, ids: torch.Tensor = IDS) -> tuple[Model, list[str]]:
    """Return the model after the pass, held against the contract, and the notes."""
    planned, before = plan([step], model), model
    notes: list[str] = []
    solver, hidden = step.solver(model), walk.embed(model, ids)
    assert not isinstance(solver, GroupSolver)
    for block in before.blocks:
        runner = BlockRunner(model, block)
        for at in range(0, len(hidden), 3):
            solver.observe(runner.watch(hidden[at : at + 3]))
        found = solver.solve(block)
        assert 0 < found.loss[0] < found.loss[1]
        notes += found.notes
        solved = Memory().put(block, found.numbers)
        model = model.replace_block(solved)
        hidden = BlockRunner(model, solved).run(hidden)
    enforce(step, before, Outcome(model, ("all",), notes=tuple(notes)))
    assert [w.scheme for _, _, w in model.tensors()] == [w.scheme for _, _, w in planned.tensors()]
    return model, notes


def rounded(step: Rtn, model: Model) -> Model:
    schemes = step.schemes(model)
    for block in model.blocks:
        new = {
            role: round_to_nearest(weight.load(), schemes[name], step.scales)
            for role, weight in block.weights()
            if (name := model.disk_name(block, role)) in schemes
        }
        model = model.replace_block(Memory().put(block, new))
    return model


def logits(model: Model) -> torch.Tensor:
    return compute_logits(model, IDS)


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


def places(model: Model, block: Block) -> list[_awq_folding.FoldingPlace]:
    return list(_awq_folding.find_folding_places(block, model.family.geometry(model.config)))


def folded(model: Model) -> Model:
    """With random scales in all places, and nothing rounded."""
    draw = torch.Generator().manual_seed(1)
    for block in model.blocks:
        weights, folding = dict(block.weights()), _awq_folding.Folding()
        for place in places(model, block):
            channels = weights[place.producers[0]].shape[0]
            scales = torch.randn(channels, generator=draw).exp()
            for role in place.producers:
                if len(weights[role].shape) == 1:
                    scales = awq_scales.round_to_exact(scales, weights[role].load())
            folding.add(place, scales)
        numbers = {role: folding.apply(role, weights[role].load()) for role in folding.roles}
        model = model.replace_block(Memory().put(block, numbers))
    return model


def formed(make: Make, form: str) -> Model:
    """Return a model in whose middle block something else follows attention."""
    shared = form.startswith("shared")
    dense_first = {"mlp_only_layers": [0]}
    model = model_of(make, "qwen2_moe", **dense_first) if shared else model_of(make, "mixtral")
    block = model.blocks[1]
    if form == "skip":
        assert isinstance(block.mlp, MoELayer)
        router = replace(block.mlp.router, skip_below=(0.7,))
        return model.replace_block(replace(block, mlp=replace(block.mlp, router=router)))
    kept = {"dense": [4], "shared": [], "shared, dense": [4]}
    if form in kept:
        return model.replace_block(block.keep_experts(kept[form], clamp_top_k=True))
    return model.replace_block(block.without_mlp(keep_norm=form == "norm"))


FORMS = ["skip", "dense", "shared", "shared, dense", "norm", "nothing"]


# ---- folding -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_folding_keeps_the_function(tiny: Make, family: str) -> None:
    changes = {"attention_bias": True} if family in ("olmoe", "qwen3_moe") else {}
    model = model_of(tiny, family, **changes)
    changed = folded(model)
    for block in changed.blocks:
        weights = dict(model.blocks[block.index].weights())
        same = {r for r, w in block.weights() if torch.equal(w.load(), weights[r].load())}
        whole = {r for r in weights if r.endswith(("q_norm.weight", "k_norm.weight", "bias"))}
        assert same == whole - {"attention.v_proj.bias"}
    assert distance(logits(changed), logits(model)) < 1e-5


@pytest.mark.parametrize("form", FORMS)
def test_folding_keeps_the_function_of_other_forms(tiny: Make, form: str) -> None:
    model = formed(tiny, form)
    assert distance(logits(folded(model)), logits(model)) < 1e-5


def test_scales_do_not_fold_into_clipped_values(tiny: Make) -> None:
    model = model_of(tiny, "olmoe", clip_qkv=0.5)
    assert not any(OUT in place.consumers for place in places(model, model.blocks[0]))
    assert distance(logits(folded(model)), logits(model)) < 1e-5


def test_scales_do_not_fold_into_a_norm_that_feeds_the_residual_stream(tiny: Make) -> None:
    model = formed(tiny, "norm")
    assert not any(NEXT_NORM in place.producers for place in places(model, model.blocks[1]))
    after, _ = run(Awq(), model)
    assert after.blocks[1].norms[SECOND_NORM] is model.blocks[1].norms[SECOND_NORM]


def test_query_heads_share_the_scales_of_their_values() -> None:
    place = _awq_folding.FoldingPlace((V,), (OUT,), heads=2, copies=3)
    spread = place.spread(torch.tensor([1.0, 2.0, 3.0, 4.0]))  # two heads of two channels
    assert spread.tolist() == [1, 2] * 3 + [3, 4] * 3
    assert place.gather(torch.arange(12.0)).tolist() == [2, 3, 8, 9]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_are_what_a_stored_vector_is_divided_by(dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(2)
    vector = torch.randn(500, generator=draw).to(dtype)
    vector[:3] = torch.tensor([0.0, 6e4, 1e-7])
    scales = torch.randn(3, 500, generator=draw).exp()
    scales[:, 1:3] = torch.tensor([1e-38, 1e38])  # overflows, vanishes
    found = awq_scales.round_to_exact(scales, vector)
    assert (found[:, 1:3] == 1).all()
    assert torch.equal(found[:, 0], scales[:, 0])
    quotients = vector.float() / found
    torch.testing.assert_close(quotients, quotients.to(dtype).float(), rtol=1e-6, atol=0)
    assert ((found / scales)[:, 3:] - 1).abs().max() < 2**-7


def test_candidates() -> None:
    magnitudes = torch.tensor([0.0, 1.0, 4.0, 16.0, 1e-9])
    found = awq_scales.list_candidates(magnitudes, 20)
    assert found.shape == (20, 5)
    assert (found[0] == 1).all()
    bounded = magnitudes.clamp(min=16 / awq_scales.SPAN)
    powers = bounded**0.35
    torch.testing.assert_close(found[7], powers / (powers.max() * powers.min()).sqrt())
    assert (awq_scales.list_candidates(torch.zeros(4), 3) == 1).all()


def test_samples_are_evenly_spaced_however_they_come() -> None:
    inputs, weights = torch.arange(1000.0)[:, None], torch.arange(1000.0) + 1
    whole = awq_scales.Sample(64, 1)
    whole.add(inputs, torch.arange(1000), weights)
    parts = awq_scales.Sample(64, 1)
    for at in range(0, 1000, 77):
        tokens = torch.arange(at, min(at + 77, 1000))
        parts.add(inputs, tokens, weights[tokens])
    for sample in (whole, parts):
        assert sample.inputs[:, 0].tolist() == list(range(0, 1000, 16))
        assert torch.equal(sample.weights, sample.inputs[:, 0] + 1)
        assert (sample.seen, sample.stride) == (1000, 16)


# ---- choosing ----------------------------------------------------------------------------------


def slow_search(
    matrices: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]], scheme: Scheme
) -> tuple[int, list[float]]:
    """Alpha in twentieths, and the errors of all.

    Args:
        matrices: W, its inputs, their weights, and for each alpha the scales [20, in].
        scheme: to round to.
    """
    errors = []
    for step in range(20):
        error = 0.0
        for weight, x, weights, scales in matrices:
            s = scales[step]
            importance = ((x / s) * weights[:, None]).square().mean(0)
            rounded = round_to_nearest(weight * s, scheme, "mse", importance).dequantize() / s
            outputs = (x @ weight.T - x @ rounded.T) * weights[:, None]
            error += float(outputs.double().square().sum())
        errors.append(error)
    return min(range(20), key=errors.__getitem__), errors


def uneven(model: Model, seed: int = 5) -> Model:
    """Return the same function with a few large channels behind the norms: exact in any dtype."""
    draw = torch.Generator().manual_seed(seed)
    for block in model.blocks:
        folding, weights = _awq_folding.Folding(), dict(block.weights())
        for place in places(model, block):
            if place.producers[0] in (NORM, NEXT_NORM):
                few = torch.rand(weights[place.producers[0]].shape[0], generator=draw) < 0.1
                folding.add(place, torch.where(few, 1 / 16, 1.0))
        numbers = {role: folding.apply(role, weights[role].load()) for role in folding.roles}
        model = model.replace_block(Memory().put(block, numbers))
    return model


def powers(x: torch.Tensor) -> torch.Tensor:
    """``mean |x| ** alpha``, normalized, for twenty alphas."""
    rows = [x.abs().mean(0).clamp(min=1e-12) ** (step / 20) for step in range(20)]
    return torch.stack([row / (row.max() * row.min()).sqrt() for row in rows])


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_alpha_is_that_of_a_slow_search(tiny: Make, family: str) -> None:
    model = uneven(model_of(tiny, family, num_hidden_layers=1))
    seen = BlockRunner(model, model.blocks[0]).watch(walk.embed(model, IDS))
    after = dict(run(Awq(bits=3, min_tokens=1), model)[0].blocks[0].weights())
    before = {role: w.load().float() for role, w in model.blocks[0].weights()}
    scheme = next(w.scheme for w in after.values() if w.scheme)
    routing = seen.routing
    assert routing is not None

    def searched(role: str, producer: str, matrices: list[Any], scales: torch.Tensor) -> None:
        """Hold the producer against the best scales."""
        best, errors = slow_search(matrices, scheme)
        assert errors[best] < errors[0], role
        expected = before[producer] / scales[best]
        found = after[producer].load()
        assert distance(found, expected) < 1e-5, f"{role}: alpha is not {best} / 20"

    x, even = seen.linear_inputs[Q], torch.ones(len(seen.linear_inputs[Q]))
    scales = powers(x)
    searched(NORM, NORM, [(before[r], x, even, scales) for r in (Q, K, V)], scales)

    x = routing.inputs
    scales, matrices = powers(x), []
    for n in range(6):
        tokens, place = torch.where(routing.ids == n)
        own = x[tokens], routing.weights[tokens, place]
        matrices += [(before[f"experts.{n}.{p}"], *own, scales) for p in ("gate", "up")]
    if "shared.router" in before:
        gate = (x @ before["shared.router"].T).sigmoid()[:, 0]
        matrices += [(before[f"shared.{p}"], x, gate, scales) for p in ("gate", "up")]
    searched(NEXT_NORM, NEXT_NORM, matrices, scales)


def test_alpha_of_values_that_stay_in_16_bits(tiny: Make) -> None:
    """They are divided; what nothing quantized reads is left alone."""
    model = model_of(tiny, "mixtral")
    rules = (Rule(match=r"(q|k|v)_proj", bits=16),)
    seen = BlockRunner(model, model.blocks[0]).watch(walk.embed(model, IDS))
    after = dict(run(Awq(bits=3, rules=rules), model)[0].blocks[0].weights())
    before = dict(model.blocks[0].weights())
    assert after[NORM] is before[NORM]
    assert after[Q] is before[Q]
    x = seen.linear_inputs[OUT]
    channels = x.abs().mean(0).view(2, 2, 16).mean(1).flatten()
    scales = powers(channels[None])
    spread = scales.view(20, 2, 1, 16).expand(20, 2, 2, 16).reshape(20, 64)
    scheme = after[OUT].scheme
    assert scheme is not None
    best, _ = slow_search([(before[OUT].load(), x, torch.ones(len(x)), spread)], scheme)
    assert distance(after[V].load(), before[V].load() / scales[best][:, None]) < 1e-5


@pytest.mark.parametrize("scheme", [Scheme(4, 32), Scheme(3, 32, False), Scheme(2, -1)], ids=str)
def test_losses(scheme: Scheme) -> None:
    draw = torch.Generator().manual_seed(4)
    weight, x = (torch.randn(n, 64, generator=draw) for n in (24, 50))
    gate, scales = torch.rand(50, generator=draw), powers(x * torch.logspace(-1, 1, 64))
    x = x * torch.logspace(-1, 1, 64)
    inputs = awq_scales.AwqInputs.from_sample(x, gate, x.abs().mean(0), share=3)
    found = awq_scales.compute_losses(weight, scales, inputs, scheme, "mse")
    _, errors = slow_search([(weight, x, gate, scales)], scheme)
    torch.testing.assert_close(found / 3, torch.tensor(errors), rtol=1e-4, atol=0)


def test_losses_of_large_matrices_are_estimated() -> None:
    draw = torch.Generator().manual_seed(4)
    weight, x = (torch.randn(n, 64, generator=draw) for n in (4000, 50))
    inputs = awq_scales.AwqInputs.from_sample(x, torch.ones(50), x.abs().mean(0))

    def losses(rows: torch.Tensor) -> torch.Tensor:
        return awq_scales.compute_losses(rows, powers(x)[:3], inputs, Scheme(4, 32), "absmax")

    found, parts = losses(weight), [losses(weight[at : at + 400]) for at in range(0, 4000, 400)]
    torch.testing.assert_close(found, torch.stack(parts).sum(0), rtol=0.05, atol=0)


def test_large_channels_cost_less_than_with_rounding(tiny: Make) -> None:
    even = model_of(tiny, "olmoe")
    source = logits(even)
    model = uneven(even)
    torch.testing.assert_close(logits(model), source)
    options: dict[str, Any] = {"bits": 4, "group_size": 32, "scales": "mse"}
    awq = distance(logits(run(Awq(**options), model)[0]), source)
    rtn = distance(logits(rounded(Rtn(**options), model)), source)
    assert awq < 0.75 * rtn


# ---- what comes out ----------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen2_moe", "olmoe"])
def test_tensors_stored_in_16_bits_are_rounded_consistently(tiny: Make, family: str) -> None:
    """Norms and biases are divided by what the columns are multiplied with; routers round."""
    model = uneven(model_of(tiny, family, dtype="bfloat16", num_hidden_layers=1))
    rules = (Rule(match="q_proj", bits=16),)
    after, _ = run(Awq(bits=4, rules=rules), model)
    for block in model.blocks:
        before, now = dict(block.weights()), dict(after.blocks[block.index].weights())
        assert {r: w.dtype for r, w in now.items()} == {r: w.dtype for r, w in before.items()}
        numbers = {role: weight.load().float() for role, weight in before.items()}
        found = {role: weight.load() for role, weight in now.items()}
        first = numbers[NORM] / found[NORM].float()
        second = numbers[NEXT_NORM] / found[NEXT_NORM].float()
        assert first.max() / first.min() > 4  # the large channels
        assert torch.equal(found[Q], (numbers[Q] * first).bfloat16())
        router = "router.weight"
        assert torch.equal(found[router], (numbers[router] * second).bfloat16())
        k, scheme = now[K].quantized(), now[K].scheme
        assert scheme is not None
        steps = k.scales.repeat_interleave(scheme.group_size, 1)
        inside = (k.q > 0) & (k.q < 15)
        off = (k.dequantize() - numbers[K] * first).abs() / steps
        assert off[inside].max() < 0.5001
        bias = "attention.v_proj.bias"
        if bias in found:
            values = numbers[bias] / found[bias].float()
            v = now[V].quantized()
            expected = numbers[V] * first / values[:, None]
            width = v.scales.repeat_interleave(scheme.group_size, 1)
            inside = (v.q > 0) & (v.q < 15)
            assert ((v.dequantize() - expected).abs() / width)[inside].max() < 0.5001


@pytest.mark.parametrize("form", FORMS)
def test_other_forms(tiny: Make, form: str) -> None:
    model = formed(tiny, form)
    after, _ = run(Awq(bits=8, group_size=32, steps=5, scales="absmax"), model)
    assert distance(logits(after), logits(model)) < 0.15


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_schemes_as_the_options_say(tiny: Make, family: str) -> None:
    model = model_of(tiny, family)
    rules = (
        Rule(match="o_proj", bits=2, group_size=-1),
        Rule(blocks=(-1,), bits=16),
        Rule(match="shared_expert|k_proj", bits=8),
    )
    usable = rules if family == "qwen2_moe" else rules[:2]
    after, _ = run(Awq(bits=3, symmetric=False, rules=usable, steps=3), model)
    kinds = {str(w.scheme) for _, role, w in after.tensors() if is_quantizable(role)}
    assert {"w3a16_asym, groups of 32", "w2a16_asym, per channel", "None"} <= kinds
    # Nothing folds where nothing is rounded, save for rules on one matrix of the last block.
    last = dict(after.blocks[-1].weights())
    assert last[NORM] is dict(model.blocks[-1].weights())[NORM]


def test_sparse_weights_stay_sparse(tiny: Make) -> None:
    model = model_of(tiny, "mixtral", num_hidden_layers=1)
    block = model.blocks[0]
    weight = dict(block.weights())["experts.2.up"]
    sparse = weight.load() * (torch.arange(weight.shape[1]) % 2)
    model = model.replace_block(block.with_weights({"experts.2.up": stored(weight, sparse)}))
    for symmetric in (True, False):
        after, _ = run(Awq(bits=3, symmetric=symmetric, steps=4), model)
        found = dict(after.blocks[0].weights())["experts.2.up"].load()
        assert (found[:, ::2] == 0).all()


def test_experts_without_tokens(tiny: Make) -> None:
    model = model_of(tiny, "mixtral")
    after, notes = run(Awq(steps=2), model, IDS[:1, :2])  # two tokens, two experts each
    assert len([note for note in notes if note.startswith("block 0: expert")]) == 6
    assert any("saw 0 tokens, fewer than 32" in note for note in notes)
    assert all(torch.isfinite(w.load()).all() for _, _, w in after.tensors())
    notes = run(Awq(steps=1, min_tokens=1), model)[1]
    assert [note.split()[3] for note in notes] == ["experts"] * 3  # how many tokens they saw


def test_an_expert_with_few_tokens_uses_all_tokens_of_its_layer(tiny: Make) -> None:
    model = model_of(tiny, "mixtral", num_hidden_layers=1)
    seen = BlockRunner(model, model.blocks[0]).watch(walk.embed(model, IDS))
    after = dict(run(Awq(bits=3, min_tokens=10**6), model)[0].blocks[0].weights())
    before = dict(model.blocks[0].weights())
    second = before[NEXT_NORM].load() / after[NEXT_NORM].load()
    assert seen.routing is not None
    for n in range(2):
        x, down = seen.expert_hidden(n, seen.routing.inputs), before[f"experts.{n}.down"].load()
        scheme = after[f"experts.{n}.down"].scheme
        assert scheme is not None
        scales = powers(x)
        best, _ = slow_search([(down, x, torch.ones(len(x)), scales)], scheme)
        importance = (x / scales[best]).square().mean(0)
        expected = round_to_nearest(down * scales[best], scheme, "mse", importance)
        found = after[f"experts.{n}.down"].quantized()
        assert (found.q != expected.q).float().mean() < 0.01
        up = before[f"experts.{n}.up"].load() * second / scales[best][:, None]
        assert distance(after[f"experts.{n}.up"].load(), up) < 0.25
