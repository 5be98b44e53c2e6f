"""The model as a value: slicing, renumbering, proofs, text."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moe2edge.errors import InputError, Moe2EdgeError
from moe2edge.model.family import FAMILIES
from moe2edge.model.hf_config import build_config
from moe2edge.model.model import Model
from moe2edge.model.roles import list_quantizable
from moe2edge.model.weights import Weight
from moe2edge.storage.checkpoint import open_checkpoint
from moe2edge.testing import Make


@pytest.fixture
def model(tiny: Make) -> Model:
    return open_checkpoint(str(tiny("mixtral"))).model


def with_extras(model: Model) -> Model:
    """Give the first router a bias and a correction bias, as other families have."""
    block, layer = model.moe_blocks[0]
    extras = {
        name: Weight(name, (6,), "F32", load=lambda: torch.arange(6.0))
        for name in ("bias", "e_score_correction_bias")
    }
    router = replace(layer.router, per_expert=extras)
    return model.replace_block(replace(block, mlp=replace(layer, router=router)))


def test_keeping_experts_slices_everything_that_has_a_row_per_expert(model: Model) -> None:
    layer = with_extras(model).moe_blocks[0][1]
    kept = layer.keep([4, 1, 3])
    assert [e.origin for e in kept.experts] == [4, 1, 3]
    assert torch.equal(kept.router.weight.load(), layer.router.weight.load()[[4, 1, 3]])
    assert set(kept.router.per_expert) == {"bias", "e_score_correction_bias"}
    for weight in kept.router.per_expert.values():
        assert weight.shape == (3,)
        assert weight.load().tolist() == [4.0, 1.0, 3.0]


def test_keeping_twice_is_keeping_once(model: Model) -> None:
    layer = model.moe_blocks[0][1]
    twice, once = layer.keep([5, 3, 2, 0]).keep([0, 2]), layer.keep([5, 2])
    assert [e.origin for e in twice.experts] == [e.origin for e in once.experts]
    assert torch.equal(twice.router.weight.load(), once.router.weight.load())


def test_top_k_is_clamped_only_where_that_is_asked_for(model: Model) -> None:
    layer = model.moe_blocks[0][1]
    with pytest.raises(InputError, match="1 experts would stay where the router chooses 2"):
        layer.keep([3])
    assert layer.keep([3], clamp_top_k=True).router.top_k == 1
    for ids in ([], [0, 0], [0, 6], [-1, 0]):
        with pytest.raises(InputError):
            layer.keep(ids, clamp_top_k=True)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_roles_and_names_are_unique_and_replaceable(tiny: Make, family: str) -> None:
    model = open_checkpoint(str(tiny(family, mlp_only_layers=[1]))).model
    names = [name for name, _, _ in model.tensors()]
    assert len(set(names)) == len(names)
    for block in model.blocks:
        weights = dict(block.weights())
        renamed = {r: replace(w, name="new") for r, w in weights.items()}
        changed = dict(block.with_weights(renamed).weights())
        assert list(changed) == list(weights)
        assert all(w.name == "new" for w in changed.values())
        with pytest.raises(Moe2EdgeError, match="has no"):
            block.with_weights({"experts.99.up": block.norms["input_layernorm.weight"]})


def test_quantizable_tensors_are_those_of_attention_and_mlps(tiny: Make) -> None:
    model = open_checkpoint(str(tiny("qwen2_moe", mlp_only_layers=[1]))).model
    kinds = {
        role.partition(".")[0] for block in model.blocks for role, _ in list_quantizable(block)
    }
    assert kinds == {"attention", "experts", "shared", "dense"}
    kept = {role for name, role, w in model.tensors()} - {
        role for block in model.blocks for role, _ in list_quantizable(block)
    }
    assert kept == {
        "rest", "router.weight", "shared.router", "norms.input_layernorm.weight",
        "norms.post_attention_layernorm.weight", "attention.q_proj.bias",
        "attention.k_proj.bias", "attention.v_proj.bias",
    }  # fmt: skip


def test_keeping_blocks_renumbers_them(model: Model) -> None:
    kept = model.keep_blocks([0, 2])
    kept.verify()
    assert [(b.index, b.origin) for b in kept.blocks] == [(0, 0), (1, 2)]
    assert build_config(kept)["num_hidden_layers"] == 2


def test_configs_of_blocks_that_differ(tiny: Make) -> None:
    model = open_checkpoint(
        str(
            tiny(
                "qwen2_moe",
                mlp_only_layers=[1],
                use_sliding_window=True,
                sliding_window=4,
                max_window_layers=3,
            )
        )
    ).model
    config = build_config(model.keep_blocks([1, 2]))
    assert config["mlp_only_layers"] == [0]
    assert config["layer_types"] == ["full_attention", "sliding_attention"]


def test_uneven_layers_are_spelt_out(model: Model) -> None:
    block, layer = model.moe_blocks[1]
    uneven = model.replace_block(replace(block, mlp=layer.keep([0, 5, 2])))
    assert not uneven.is_uniform
    config = build_config(uneven)
    assert config["per_layer_config"]["1"] == {"num_local_experts": 3, "num_experts_per_tok": 2}


def test_counts_of_parameters(model: Model) -> None:
    expert = 3 * 64 * 32
    assert model.parameters - model.active_parameters == 3 * 4 * expert


def test_the_same_model_prints_the_same_text(model: Model) -> None:
    block, layer = model.moe_blocks[1]
    trimmed = model.replace_block(replace(block, mlp=layer.keep([0, 5, 2]))).keep_blocks([1, 2])
    assert str(trimmed) == (
        "MixtralForCausalLM: 2 blocks, 93,056 parameters (62,336 active)\n"
        "block 0 (was 1): attention F32; 3 experts of width 32, top-2 renormalized, F32; "
        "from [0, 5, 2]\n"
        "block 1 (was 2): attention F32; 6 experts of width 32, top-2 renormalized, F32\n"
        "model.embed_tokens.weight: F32 [96, 64]\n"
        "model.norm.weight: F32 [64]\n"
        "lm_head.weight: F32 [96, 64]"
    )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda m: replace(m, blocks=()), "no block is left"),
        (lambda m: replace(m, blocks=m.blocks[1:]), "not numbered in order"),
        (lambda m: _router(m, shape=(5, 64)), "5 rows for 6 experts"),
        (lambda m: _top_k(m, 7), "top-k is 7, but the router has 6 rows"),
    ],
)
def test_unsound_models_are_recognized(model: Model, damage: object, message: str) -> None:
    assert callable(damage)
    with pytest.raises(Moe2EdgeError, match=message):
        damage(model).verify()


def _router(model: Model, shape: tuple[int, int]) -> Model:
    block, layer = model.moe_blocks[0]
    router = replace(layer.router, weight=replace(layer.router.weight, shape=shape))
    return model.replace_block(replace(block, mlp=replace(layer, router=router)))


def _top_k(model: Model, k: int) -> Model:
    block, layer = model.moe_blocks[0]
    router = replace(layer.router, top_k=k)
    return model.replace_block(replace(block, mlp=replace(layer, router=router)))
