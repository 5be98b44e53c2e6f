"""Mixtral written as Qwen2-MoE, whose layers may be dense MLPs in stock programs.

The two compute the same where Qwen2-MoE's further parts are zero: its shared expert and the biases
of queries, keys and values. These biases could be switched off (``qkv_bias``), but not every
program reads the switch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from moe2edge.model.experts import Dense
from moe2edge.model.family import FAMILIES
from moe2edge.model.layers import MoELayer, Shared
from moe2edge.model.model import Block, Model
from moe2edge.targets._tensors import TILE, fit_scheme, make_zeros

QWEN2_MOE = FAMILIES["qwen2_moe"]
# What transformers' class of Mixtral takes where a config is silent; Qwen2-MoE's takes others.
MIXTRAL_THETA, MIXTRAL_IDS = 1e6, {"bos_token_id": 1, "eos_token_id": 2}


def convert_to_qwen2_moe(model: Model) -> Model:
    """A Mixtral model as Qwen2-MoE; in the latter's family, it computes the same."""
    config = _config(model)
    blocks = tuple(_block(block) for block in model.blocks)
    return Model(QWEN2_MOE, config, blocks, model.rest)


def _config(model: Model) -> dict[str, Any]:
    source, geometry = model.config, model.family.geometry(model.config)
    window = model.family.window_of(source, 0)
    kept = {key: value for key, value in source.items() if key in QWEN2_MOE.known_keys}
    for key in (*QWEN2_MOE.experts_key, "sliding_window"):
        kept.pop(key, None)
    config: dict[str, Any] = {
        **MIXTRAL_IDS,
        **kept,
        "architectures": [QWEN2_MOE.architecture],
        "model_type": QWEN2_MOE.model_type,
        "num_experts": model.family.num_experts(source),
        "moe_intermediate_size": source["intermediate_size"],
        "shared_expert_intermediate_size": TILE,
        "norm_topk_prob": True,
        "qkv_bias": True,
        "rms_norm_eps": geometry.eps,
        "num_key_value_heads": geometry.kv_heads,
        "head_dim": geometry.head_dim,
        "max_position_embeddings": geometry.max_positions,
        "use_sliding_window": window is not None,
    }
    if window is not None:
        config |= {"sliding_window": window, "max_window_layers": len(model.blocks)}
    if "rope_theta" not in {*source, *_mapping(source, "rope_parameters")}:
        config["rope_theta"] = MIXTRAL_THETA
    return config


def _mapping(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value: Mapping[str, Any] = config.get(key) or {}
    return value


def _block(block: Block) -> Block:
    attention = dict(block.attention)
    for name in ("q_proj", "k_proj", "v_proj"):
        weight = attention[f"{name}.weight"]
        attention[f"{name}.bias"] = make_zeros(weight.shape[:1], weight.dtype)
    if isinstance(block.mlp, MoELayer):
        router, expert = block.mlp.router.weight, block.mlp.experts[0]
        hidden = router.shape[1]
        scheme = fit_scheme(expert.gate.scheme, hidden, TILE)
        inner = make_zeros((TILE, hidden), router.dtype, scheme)
        shared = Dense(inner, inner, make_zeros((hidden, TILE), router.dtype, scheme))
        gate = make_zeros((1, hidden), router.dtype)
        block = replace(block, mlp=replace(block.mlp, shared=Shared(shared, gate)))
    return replace(block, attention=attention)
