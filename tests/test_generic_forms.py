"""Layers that are dropped and experts that are replaced, in families without a row."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor

import helpers
import moe2edge
from every_family import GENERIC, IDS, make_folder, run_stock, spread_families, walk_over
from helpers import ignore, plan, slow_except
from moe2edge.calibration import walk
from moe2edge.calibration.block_runner import BlockRunner
from moe2edge.errors import InputError, Unsupported
from moe2edge.evaluation import verify
from moe2edge.model.architecture import find_layers
from moe2edge.model.edits import drop_mlp
from moe2edge.model.experts import Constant, Expert, Full, Linear
from moe2edge.model.layers import MoELayer
from moe2edge.model.model import Model
from moe2edge.numerics.scheme import Scheme
from moe2edge.passes._awq_folding import Folding
from moe2edge.passes._awq_trials import find_places_by_trial
from moe2edge.passes.expert_merge import ExpertMerge
from moe2edge.passes.expert_replace import ExpertReplace
from moe2edge.passes.layer_drop import LayerDrop
from moe2edge.passes.recover import Recover
from moe2edge.pipeline.decisions import describe_blocks
from moe2edge.storage.checkpoint import open_checkpoint
from moe2edge.storage.solved_blocks import attach_numbers
from moe2edge.targets.gptq import Gptq
from moe2edge.targets.hf import Hf
from test_every_family_quantized import RULES, check_numbers, quantize
from test_real_layouts import make_wrapped
from test_staged_work import Recorder, check_block, run_block

FAST = ("deepseek_v3", "gemma4_text", "gpt_oss", "nemotron_h", "qwen3_next")
MARKED = spread_families(FAST, 4)
# Modules of a layer that go with its experts, where it is not the one that has them.
BODIES = {
    "gemma4_text": ("experts", "mlp"),
    **dict.fromkeys(
        ("granitemoehybrid", "granitemoeshared", "granitemoe_swa"),
        ("block_sparse_moe", "shared_mlp"),
    ),
}
# Norms of the layer that go, where it is not the usual one, and families where none does.
NORMS = {
    "afmoe": ("pre_mlp_layernorm", "post_mlp_layernorm"),
    "beam": ("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    "cohere2_moe": (),
    "flex_olmo": ("post_feedforward_layernorm",),
    "gemma4_text": (
        "pre_feedforward_layernorm", "post_feedforward_layernorm", "pre_feedforward_layernorm_2",
        "post_feedforward_layernorm_1", "post_feedforward_layernorm_2",
    ),
    "jamba": ("pre_ff_layernorm",),
    "kolibri1": ("post_attention_layernorm", "post_mlp_layernorm"),
    "lfm2_moe": ("ffn_norm",),
    "minimax": (),
    "nemotron_h": ("norm",),
}  # fmt: skip
USUAL = ("post_attention_layernorm",)
# Families without one norm in front of one module.
NO_NORM = ("cohere2_moe", "flex_olmo", "minimax", *BODIES)
HAVE_NORM = [family for family in GENERIC if family not in NO_NORM]


def open_family(folder: Path, family: str, **changes: Any) -> tuple[Any, Model]:
    stock = make_folder(folder / "source", family, **changes)
    return stock, open_checkpoint(folder / "source").model


def write(model: Model, folder: Path, target: Hf | Gptq) -> Path:
    """Write a model, and prove what was written."""
    folder.mkdir()
    target.accepts(model)
    target.write(model, folder)
    verify.audit(target, folder, target.stored(model))
    return folder


def check_written(model: Model, folder: Path, family: str, expected: Tensor) -> None:
    """Write to both targets, and compare what is loaded with logits, and with a walk."""
    out = write(model, folder / "hf", Hf(layout="natural"))
    again = Hf(layout="natural").streamed(out)
    loaded = moe2edge.load(out, dtype=torch.float32)
    check_numbers(loaded, model)
    logits = run_stock(loaded)
    assert (logits - expected).abs().max() <= 1e-4  # sums are in another order
    assert (logits - walk_over(model)).abs().max() <= 1e-5
    assert torch.equal(walk_over(again), walk_over(model))
    rounded = quantize(model, rules=RULES.get(family, []))
    loaded = moe2edge.load(write(rounded, folder / "gptq", Gptq()), dtype=torch.float32)
    check_numbers(loaded, rounded)
    assert (run_stock(loaded) - walk_over(rounded)).abs().max() <= 1e-5


def check_stock_refuses(stock: Any, folder: Path) -> None:
    # One family asks for the settings of a kind of layers when the config is opened.
    errors, words = (RuntimeError, StrictDataclassError), "per-layer attribute|not homogeneous"
    with pytest.raises(errors, match=words):
        type(stock).from_pretrained(folder, local_files_only=True)


# ---- layer_drop ----------------------------------------------------------------------------------


def give(value: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    """Return a hook that puts a function of the input in the place of the output."""

    def hook(_: Any, args: tuple[Tensor, ...], output: Any) -> Any:
        found = value(args[0])
        return (found, *output[1:]) if isinstance(output, tuple) else found

    return hook


def operate(stock: Any, family: str, index: int, value: Callable[[Tensor], Tensor]) -> list[Any]:
    """Take the MoE layer of transformers' model out of a layer."""
    layer = find_layers(stock)[1][index]
    names = BODIES.get(family) or tuple(
        name
        for name, child in layer.named_children()
        if any(hasattr(module, "has_gate") for module in child.modules())
    )
    return [layer.get_submodule(n).register_forward_hook(give(value)) for n in names]


def list_outputs(stock: Any) -> Iterator[Tensor]:
    """Yield the output of each layer."""
    found: list[Tensor] = []
    hooks = [
        layer.register_forward_hook(
            lambda _, __, out: found.append((out[0] if isinstance(out, tuple) else out).clone())
        )
        for layer in find_layers(stock)[1]
    ]
    run_stock(stock)
    for handle in hooks:
        handle.remove()
    return iter(found)


def drop(model: Model, **options: Any) -> Model:
    step = LayerDrop.model_validate(options)
    plan([step], model)
    facts = walk.gather(model, IDS, step.observers(), ignore, "")
    return step.apply(model, facts).model


@pytest.mark.parametrize("family", MARKED)
def test_a_dropped_layer_adds_what_is_left_without_its_experts(family: str, tmp_path: Path) -> None:
    stock, model = open_family(tmp_path, family)
    whole, cosines = list(list_outputs(stock)), {}
    for block, _ in model.moe_blocks:
        hooks = operate(stock, family, block.index, torch.zeros_like)
        bare = list(list_outputs(stock))[block.index]
        cosines[block.index] = float(torch.cosine_similarity(whole[block.index], bare, -1).mean())
        for handle in hooks:
            handle.remove()
    index = max(cosines, key=lambda n: cosines[n])
    found = drop(model, drop=1)
    assert [block.index for block in found.blocks if block != model.blocks[block.index]] == [index]
    operate(stock, family, index, torch.zeros_like)
    expected = run_stock(stock)
    check_written(found, tmp_path, family, expected)
    check_stock_refuses(stock, tmp_path / "hf")
    # What makes no difference is gone, and nothing else of what is not in the layer itself.
    left = {role for role, _ in found.blocks[index].weights()}
    layer = find_layers(stock)[1][index]
    for name, child in layer.named_children():
        if "norm" in name:
            gone = name in NORMS.get(family, USUAL)
            assert any(f".{name}." in f".{role}." for role in left) is not gone, name
            with torch.no_grad():
                for parameter in child.parameters():
                    before = parameter.clone()
                    parameter.copy_(torch.rand_like(parameter) + 1)
                    assert torch.equal(run_stock(stock), expected) is gone, name
                    parameter.copy_(before)


@pytest.mark.parametrize("family", spread_families(FAST, 5, HAVE_NORM))
def test_a_norm_can_stay_in_the_place_of_a_layer(family: str, tmp_path: Path) -> None:
    stock, model = open_family(tmp_path, family)
    found = drop(model, drop=1, norm=False)
    (block,) = (block for block in found.blocks if block != model.blocks[block.index])
    operate(stock, family, block.index, lambda x: x)
    check_written(found, tmp_path, family, run_stock(stock))


@pytest.mark.parametrize("family", slow_except(NO_NORM, "gemma4_text"))
def test_a_norm_that_stands_for_no_layer_is_refused(family: str, tmp_path: Path) -> None:
    _, model = open_family(tmp_path, family)
    with pytest.raises(Unsupported, match=f"norm: false does not work on {family}: block 0 has no"):
        plan([LayerDrop(drop=1, norm=False)], model)


# ---- expert_replace ------------------------------------------------------------------------------

TEXT = torch.randint(1, 96, (8, 12), generator=torch.Generator().manual_seed(3))
KINDS: dict[str, dict[str, Any]] = {
    "constant": {"keep": 5},
    "linear": {"keep": 5, "rank": 4, "min_tokens": 4},
    "base": {"budget": 0.8, "rank": 2, "group_size": 2},
    "svd": {"budget": 0.8, "rank": 4},
}
# Families whose experts have no gate, or biases.
NO_FACTORS = {"nemotron_h": "experts with a gate", "gpt_oss": "experts without biases"}


def run_expert(module: Any, x: Tensor, n: int) -> Tensor:
    """Run one expert of transformers' module."""
    ids = torch.full((len(x), 1), n)
    found: Tensor = type(module).forward(module, x, ids, torch.ones(len(x), 1))
    return found


def run_stored(module: Any, expert: Expert, x: Tensor) -> Tensor:
    """Run a stored expert by the formula of all, with the activation of transformers' module."""

    def multiply(part: str, inputs: Tensor) -> Tensor:
        out: Tensor = inputs @ getattr(expert, part).load().T
        return out + expert.biases[part].load() if part in expert.biases else out

    up = multiply("up", x)
    if not module.has_gate:
        inside = module.act_fn(up)
    elif module.is_concatenated:
        inside = module._apply_gate(torch.cat([multiply("gate", x), up], dim=1))
    else:
        inside = module._apply_gate(torch.stack([multiply("gate", x), up], dim=2).flatten(1))
    return multiply("down", inside)


def make_row(module: Any, layer: MoELayer, row: Any) -> Callable[[Tensor], Tensor]:
    """Return what a row of a router computes by its formula, from the numbers of the model.

    Args:
        module: transformers' own module of the experts as they were.
        layer: the layer.
        row: the row.
    """
    if isinstance(row, Full) and len(layer.experts) < len(layer.routed):
        return lambda x: run_stored(module, layer.experts[row.expert], x)
    if isinstance(row, Full):
        return lambda x: run_expert(module, x, layer.experts[row.expert].origin)
    if isinstance(row, Constant):
        return lambda x: row.constant.load().expand(len(x), -1)
    if isinstance(row, Linear):
        first, second = row.first.load(), row.second.load()
        return lambda x: row.constant.load() + x @ first.T @ second.T
    assert module.is_concatenated
    parts = {part: low.second.load() @ low.first.load() for part, low in row.factors.items()}
    if row.base is not None:
        base = layer.experts[row.base]
        parts = {part: low + getattr(base, part).load() for part, low in parts.items()}
    inner = torch.cat([parts["gate"], parts["up"]])
    return lambda x: module._apply_gate(x @ inner.T) @ parts["down"].T


def replace_experts(stock: Any, index: int, layer: MoELayer) -> None:
    """Have a layer of transformers' model run rows in a loop over tokens."""
    modules = find_layers(stock)[1][index].modules()
    module: Any = next(m for m in modules if hasattr(m, "has_gate"))
    rows = {row.origin: make_row(module, layer, row) for row in layer.rows}

    def forward(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for token, (own, gates) in enumerate(zip(ids.tolist(), weights, strict=True)):
            for n, gate in zip(own, gates, strict=True):
                out[token] += gate * rows[n](x[token][None])[0]
        return out

    module.forward = forward


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", MARKED)
def test_replaced_experts_are_run_as_a_loop_over_tokens_does(
    family: str, kind: str, tmp_path: Path
) -> None:
    stock, source = open_family(tmp_path, family)
    step = ExpertReplace.model_validate({"with": kind, **KINDS[kind]})
    if kind in ("base", "svd") and family in NO_FACTORS:
        message = f"does not work on {family}: it needs {NO_FACTORS[family]}"
        with pytest.raises(Unsupported, match=message):
            plan([step], source)
        return
    plan([step], source)
    model = helpers.search(step, source, TEXT).model
    model.verify()
    changed = 0
    for block, layer in model.moe_blocks:
        if not layer.is_plain:
            changed += 1
            replace_experts(stock, block.index, layer)
            origins = [row.origin for row in layer.rows]
            assert sorted(origins) == list(range(8))
            assert layer.router.groups == 1 or origins == list(range(8))
    assert changed
    check_written(model, tmp_path, family, run_stock(stock))
    check_stock_refuses(make_folder(tmp_path / "again", family), tmp_path / "hf")


@pytest.mark.parametrize("method", ["ream", "m-smoe"])
@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss", "nemotron_h", "granitemoe"])
def test_rows_that_share_a_merged_expert_are_run_as_a_loop_does(
    family: str, method: str, tmp_path: Path
) -> None:
    stock, source = open_family(tmp_path, family)
    step = ExpertMerge.model_validate({"method": method, "keep": 5, "routing": "members"})
    plan([step], source)
    model = helpers.search(step, source, TEXT).model
    for block, layer in model.moe_blocks:
        assert len(layer.experts) == 5
        assert [row.origin for row in layer.rows] == list(range(8))
        replace_experts(stock, block.index, layer)
    check_written(model, tmp_path, family, run_stock(stock))


# ---- passes behind it ----------------------------------------------------------------------------


def replace_in(folder: Path, family: str, kind: str) -> Model:
    _, source = open_family(folder, family)
    step = ExpertReplace.model_validate({"with": kind, **KINDS[kind]})
    return helpers.search(step, source, TEXT).model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss", "nemotron_h", "qwen3_next"])
def test_solvers_see_what_the_walk_over_replaced_experts_says(
    family: str, kind: str, tmp_path: Path
) -> None:
    if kind in ("base", "svd") and family in NO_FACTORS:
        return
    model = replace_in(tmp_path, family, kind)
    hidden = walk.embed(model, IDS)
    for block in model.blocks:
        solver = Recorder(Scheme(4, -1, True))
        numbers, outputs = run_block(model, block, solver, hidden)
        trace = BlockRunner(model, attach_numbers(block, numbers)).watch(hidden)
        torch.testing.assert_close(outputs, trace.outputs, atol=2e-5, rtol=1e-5)
        hidden, layer, routing = trace.outputs, block.mlp, trace.routing
        if not isinstance(layer, MoELayer):
            continue
        assert routing is not None
        for n in range(len(layer.experts)):
            rows = [row for row, base in enumerate(layer.bases) if base == n]
            token, place = torch.where(torch.isin(routing.ids, torch.tensor(rows)))
            if not len(token):
                continue
            x, ran = routing.inputs[token], routing.ids[token, place]
            torch.testing.assert_close(solver.inputs[f"experts.{n}.up"], x, atol=2e-5, rtol=1e-5)
            inside = torch.cat(
                [trace.expert_hidden(int(row), one[None]) for row, one in zip(ran, x, strict=True)]
            )
            found = solver.inputs[f"experts.{n}.down"]
            torch.testing.assert_close(found, inside, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_scales_fold_into_all_that_takes_the_place_of_experts(kind: str, tmp_path: Path) -> None:
    model = replace_in(tmp_path, "deepseek_v3", kind)
    draw = torch.Generator().manual_seed(0)
    found = model
    for block in model.blocks:
        folding = Folding()
        weights = dict(block.weights())
        for place in find_places_by_trial(model, block):
            producer = weights[place.producers[-1]]
            size = producer.shape[0] // place.copies if place.copies > 1 else producer.shape[0]
            folding.add(place, torch.rand(size, generator=draw) + 0.5)
        new = {
            role: replace(
                weights[role], load=partial(folding.apply, role, weights[role].load().float())
            )
            for role in folding.roles
        }
        assert not isinstance(block.mlp, MoELayer) or any("experts." in role for role in new)
        found = found.replace_block(block.with_weights(new))
    assert (walk_over(found) - walk_over(model)).abs().max() <= 1e-4


@pytest.mark.parametrize("kind", ["linear", "base"])
def test_adapters_are_tried_on_layers_as_they_are(kind: str, tmp_path: Path) -> None:
    """What peft is shown before any work are layers with what takes the place of experts."""
    model = replace_in(tmp_path, "deepseek_v3", kind)
    plan([Recover.model_validate({"train": "lora", "lora_rank": 2, "steps": 1})], model)


def test_experts_with_biases_are_not_annealed(tmp_path: Path) -> None:
    _, source = open_family(tmp_path, "gpt_oss")
    merge = ExpertMerge.model_validate({"method": "ream", "keep": 5, "routing": "members"})
    with pytest.raises(Unsupported, match="recover does not work on gpt_oss: it needs experts wit"):
        plan([merge, Recover.model_validate({"steps": 1, "anneal": 0.5})], source)


def test_blocks_without_experts_are_solved(tmp_path: Path) -> None:
    for family in ("nemotron_h", "gemma4_text"):
        _, source = open_family(tmp_path / family, family)
        model = drop(source, drop=1)
        hidden = walk.embed(model, IDS)
        for block in model.blocks:
            check_block(model, block, Recorder(Scheme(4, -1, True)), hidden)
            hidden = BlockRunner(model, block).run(hidden)


# ---- files ---------------------------------------------------------------------------------------


def skip(model: Model) -> Model:
    for block, layer in model.moe_blocks:
        router = replace(layer.router, skip_below=(0.9,) * (layer.router.top_k - 1))
        model = model.replace_block(replace(block, mlp=replace(layer, router=router)))
    return model


@pytest.mark.parametrize("family", MARKED)
def test_layers_that_differ_in_skipping_alone_are_refused_by_transformers(
    family: str, tmp_path: Path
) -> None:
    stock, source = open_family(tmp_path, family)
    model = skip(source)
    out = write(model, tmp_path / "out", Hf(layout="natural"))
    check_stock_refuses(stock, out)
    again = Hf(layout="natural").streamed(out)
    assert again.architecture.anatomy == source.architecture.anatomy
    assert torch.equal(walk_over(again), walk_over(model))


# Layers of Gemma 4 with a head size of their own; in more than ten, transformers writes 01.
OWN_HEADS: dict[str, Any] = {
    "global_head_dim": 32, "num_hidden_layers": 12,
    "layer_types": ["sliding_attention", "full_attention"] * 6,
}  # fmt: skip


@pytest.mark.parametrize("form", ["drop", "skip", "linear", "experts"])
def test_settings_of_single_layers_stay_beside_ours(form: str, tmp_path: Path) -> None:
    stock, source = open_family(tmp_path, "gemma4_text", **OWN_HEADS)
    if form == "drop":
        model = drop(source, drop=2)
    elif form == "skip":
        model = skip(source)
    elif form == "linear":
        step = ExpertReplace.model_validate({"with": "linear", **KINDS["linear"]})
        model = helpers.search(step, source, TEXT).model
    else:
        model = source.replace_block(source.blocks[3].keep_experts((0, 2, 5)))
    out = write(model, tmp_path / "out", Hf(layout="natural"))
    check_stock_refuses(stock, out)
    logits = run_stock(moe2edge.load(out, dtype=torch.float32))
    assert (logits - walk_over(model)).abs().max() <= 1e-5
    assert not torch.allclose(logits, run_stock(stock), atol=1e-3)


def test_settings_of_single_layers_are_found_again_when_blocks_go(tmp_path: Path) -> None:
    stock, source = open_family(tmp_path, "gemma4_text", **OWN_HEADS)
    model = source.keep_blocks([n for n in range(12) if n not in (4, 5)])
    out = write(model, tmp_path / "out", Hf())
    again = type(stock).from_pretrained(out, dtype=torch.float32, local_files_only=True).eval()
    assert (run_stock(again) - walk_over(model)).abs().max() <= 1e-5


def test_decisions_drop_the_same_layers(tmp_path: Path) -> None:
    for family in ("deepseek_v3", "gemma4_text", "minimax", "nemotron_h"):
        _, source = open_family(tmp_path / family, family)
        for norm in (True, False) if family not in NO_NORM else (True,):
            model = drop(source, drop=1, norm=norm)
            again = source
            for entry, block in zip(describe_blocks(model), source.blocks, strict=True):
                if entry.mlp in ("none", "norm") and entry.experts_before:
                    kept = entry.mlp == "norm"
                    assert kept is not norm
                    again = again.replace_block(drop_mlp(source, block, keep_norm=kept))
            assert again.blocks == model.blocks


def test_rows_of_replaced_experts_stay_in_their_groups(tmp_path: Path) -> None:
    """Experts that go afterwards leave as many rows in each group."""
    model = replace_in(tmp_path, "deepseek_v3", "constant")
    block, layer = model.moe_blocks[0]
    half = [[n for n in layer.routed if (n < 4) is first] for first in (True, False)]
    kept = {row.expert for row in layer.rows if isinstance(row, Full)}
    first = {layer.rows[n].expert for n in half[0][:1]}  # type: ignore[union-attr]
    with pytest.raises(InputError, match="groups of experts, of which the same number"):
        layer.keep(sorted(kept - first))
    second = {layer.rows[n].expert for n in half[1][:1]}  # type: ignore[union-attr]
    small = layer.keep(sorted(kept - first - second))
    origins = [row.origin for row in small.rows]
    assert origins == sorted(origins)
    assert len(origins) == 6
    found = model.replace_block(replace(block, mlp=small))
    out = write(found, tmp_path / "out", Hf(layout="natural"))
    assert torch.equal(walk_over(Hf(layout="natural").streamed(out)), walk_over(found))


@pytest.mark.parametrize("form", ["drop", "skip", "linear", "base"])
def test_layers_of_a_text_model_in_a_larger_one_have_forms(form: str, tmp_path: Path) -> None:
    stock = make_wrapped(tmp_path / "source")
    source = open_checkpoint(tmp_path / "source").model
    if form == "drop":
        model = drop(source, drop=1)
    elif form == "skip":
        model = skip(source)
    else:
        step = ExpertReplace.model_validate({"with": form, **KINDS[form]})
        model = helpers.search(step, source, TEXT).model
    out = write(model, tmp_path / "out", Hf(layout="natural"))
    check_stock_refuses(stock, out)
    loaded = moe2edge.load(out, dtype=torch.float32)
    check_numbers(loaded, model)
    assert (run_stock(loaded) - walk_over(model)).abs().max() <= 1e-5
    names = {name for name, _, _ in model.tensors()}
    beside = ("model.language_model.", "lm_head.")
    assert all(name.startswith(beside) for name in names)
