"""Mixtral written as Qwen2-MoE, whose layers may be dense MLPs in stock programs.

The two compute the same if the additional parts of Qwen2-MoE are zero: its shared expert and the
biases of queries, keys and values. The config can switch these biases off (``qkv_bias``), but not
every program reads that key.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moe2edge.model.architecture import find_architecture
from moe2edge.model.block import Block
from moe2edge.model.config_parser import parse_config
from moe2edge.model.disk_names import DiskNames
from moe2edge.model.experts import Dense
from moe2edge.model.family import FAMILIES
from moe2edge.model.layers import MoELayer, Shared
from moe2edge.model.model import Model
from moe2edge.targets._tensors import TILE, fit_scheme, make_zeros

QWEN2_MOE = FAMILIES["qwen2_moe"]
# Defaults of transformers' Mixtral for keys that a config lacks; those of Qwen2-MoE differ.
MIXTRAL_IDS = {"bos_token_id": 1, "eos_token_id": 2}


def convert_to_qwen2_moe(model: Model) -> Model:
    """Convert a Mixtral model to the family Qwen2-MoE, in which it computes the same."""
    config = _convert_config(model)
    blocks = tuple(_convert_block(block) for block in model.blocks)
    names = DiskNames(find_architecture(QWEN2_MOE, config), ())
    return Model(QWEN2_MOE, config, blocks, model.rest, names)


def _convert_config(model: Model) -> dict[str, Any]:
    """Build the config, with everything explicit whose default differs between the families."""
    source, geometry = model.config, model.family.geometry(model.config)
    window = model.family.window_of(source, 0)
    shared_keys = {key: value for key, value in source.items() if key in QWEN2_MOE.known_keys}
    for key in (*QWEN2_MOE.experts_key, "sliding_window"):
        shared_keys.pop(key, None)
    config: dict[str, Any] = {
        **MIXTRAL_IDS,
        **shared_keys,
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
    return parse_config(QWEN2_MOE, config)


def _convert_block(block: Block) -> Block:
    """Add biases of zero, and a shared expert of zeros with its gate."""
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
