"""Architectures of llama.cpp, by family: names of tensors, and what its code takes for granted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from moe2edge.model.block import Block
from moe2edge.model.experts import PARTS
from moe2edge.model.family import Config
from moe2edge.model.model import EMBEDDING, FINAL_NORM, HEAD, Model
from moe2edge.targets._gguf_checks import (
    check_biases,
    check_convolution,
    check_dots,
    check_gpt_oss,
    check_groups,
    check_latent,
    check_linear,
    check_olmoe,
    check_qwen2,
    check_window,
    find_attention_interval,
)
from moe2edge.targets._gguf_forms import Forms, GgufForm, reorder_rows
from moe2edge.targets._gguf_orders import (
    add_one,
    find_rotated_order,
    negate_exponential,
    order_value_columns,
    order_values,
    split_keys_and_values,
    split_mixed_rows,
    squeeze,
)

# Functions of scores, as files number them.
_SOFTMAX, _SIGMOID, _SOFTMAX_OF_CHOSEN = 1, 2, 3


@dataclass(frozen=True)
class GgufLayout:
    """An architecture of llama.cpp, for one family.

    Attributes:
        name: ``general.architecture``.
        forms: returns the forms of the tensors of a block.
        describe: returns the metadata of the family's own, by key without the architecture.
        renormalizes: whether chosen weights are scaled to one sum, whatever the file says; None:
            the file says it.
        ties: whether the embedding is the head where the file has none.
        leads: whether the first blocks may have plain MLPs.
        yarn: whether ``yarn`` rope was compared, without or with ``mscale``.
        norm: name of the last norm in the file.
        centred: whether the weights of norms are around zero in the source.
        check: returns what else of a config it does not compute; empty: nothing.
    """

    name: str
    forms: Callable[[Config, Block], Forms]
    describe: Callable[[Model], Mapping[str, Any]] = lambda _: {}
    renormalizes: bool | None = None
    ties: bool = True
    leads: bool = False
    yarn: Literal["", "plain", "scaled"] = ""
    norm: str = "output_norm"
    centred: bool = False
    check: Callable[[Model], str] = lambda _: ""

    @property
    def rest(self) -> Forms:
        """Forms of tensors outside of blocks."""
        norm = GgufForm((f"{self.norm}.weight",))
        if self.centred:
            norm = GgufForm(norm.names, *add_one(), exact=False)
        return {
            EMBEDDING: GgufForm(("token_embd.weight",)),
            HEAD: GgufForm(("output.weight",)),
            FINAL_NORM: norm,
            "model.embedding_norm.weight": norm,
        }


def _names(**found: str) -> dict[str, GgufForm]:
    return {role.replace("__", "."): GgufForm((name,)) for role, name in found.items()}


_ATTENTION = {
    f"attention.{part}_proj.{kind}": GgufForm((f"attn_{name}.{kind}",))
    for part, name in (("q", "q"), ("k", "k"), ("v", "v"), ("o", "output"))
    for kind in ("weight", "bias")
}
_HEAD_NORMS = {
    f"attention.{part}_norm.weight": GgufForm((f"attn_{part}_norm.weight",)) for part in ("q", "k")
}
_MLPS = {
    "router.weight": GgufForm(("ffn_gate_inp.weight",), precise=True),
    **{f"experts.{part}": GgufForm((f"ffn_{part}_exps.weight",)) for part in PARTS},
    **{f"shared.{part}": GgufForm((f"ffn_{part}_shexp.weight",)) for part in PARTS},
    **{f"dense.{part}": GgufForm((f"ffn_{part}.weight",)) for part in PARTS},
    "shared.router": GgufForm(("ffn_gate_inp_shexp.weight",), *squeeze(0), precise=True),
}
_CORRECTION = {"router.e_score_correction_bias": GgufForm(("exp_probs_b.bias",), precise=True)}
_PLAIN_NORMS = {
    "norms.input_layernorm.weight": GgufForm(("attn_norm.weight",)),
    "norms.post_attention_layernorm.weight": GgufForm(("ffn_norm.weight",)),
}
# Where llama.cpp calls the second norm by its other name.
_LATER_NORMS = {
    **_PLAIN_NORMS,
    "norms.post_attention_layernorm.weight": GgufForm(("post_attention_norm.weight",)),
}
_USUAL = {**_PLAIN_NORMS, **_ATTENTION, **_HEAD_NORMS, **_MLPS}


def get_head_dim(config: Config) -> int:
    """Return the size of a head."""
    found: int = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return found


def _usual(config: Config, block: Block) -> Forms:
    return _USUAL


def _rotated(config: Config, block: Block) -> Forms:
    """Return forms with queries and keys in an order that lets llama.cpp rotate neighbours."""
    heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}
    own = {
        f"attention.{part}_proj.{kind}": reorder_rows(
            f"attn_{part}.{kind}", partial(find_rotated_order, count)
        )
        for part, count in heads.items()
        for kind in ("weight", "bias")
    }
    return {**_USUAL, **own}


def _later(config: Config, block: Block) -> Forms:
    return {**_USUAL, **_LATER_NORMS, **_CORRECTION}


def _corrected(config: Config, block: Block) -> Forms:
    return {**_USUAL, **_CORRECTION}


def _gpt_oss(config: Config, block: Block) -> Forms:
    biases = {
        f"experts.{part}_bias": GgufForm((f"ffn_{part}_exps.bias",), precise=True) for part in PARTS
    }
    own = {
        "attention.sinks": GgufForm(("attn_sinks.weight",)),
        "router.bias": GgufForm(("ffn_gate_inp.bias",), precise=True),
    }
    return {**_USUAL, **_LATER_NORMS, **biases, **own}


def _latent(config: Config, block: Block) -> Forms:
    linear = {
        "q_proj": "attn_q", "q_a_proj": "attn_q_a", "q_b_proj": "attn_q_b",
        "kv_a_proj_with_mqa": "attn_kv_a_mqa", "o_proj": "attn_output",
    }  # fmt: skip
    own = {f"linear.self_attn.{k}.weight": GgufForm((f"{v}.weight",)) for k, v in linear.items()}
    own |= {
        f"attention.{part}_layernorm.weight": GgufForm((f"attn_{part}_norm.weight",))
        for part in ("q_a", "kv_a")
    }
    sizes = config["num_attention_heads"], config["qk_nope_head_dim"], config["v_head_dim"]
    own["linear.self_attn.kv_b_proj.weight"] = GgufForm(
        ("attn_k_b.weight", "attn_v_b.weight"), *split_keys_and_values(*sizes), whole=True
    )
    return {**_USUAL, **_CORRECTION, **own}


def _short_convolution(config: Config, block: Block) -> Forms:
    own = {
        **_names(
            norms__operator_norm__weight="attn_norm.weight",
            norms__ffn_norm__weight="ffn_norm.weight",
            attention__q_layernorm__weight="attn_q_norm.weight",
            attention__k_layernorm__weight="attn_k_norm.weight",
            linear__self_attn__out_proj__weight="attn_output.weight",
            linear__conv__in_proj__weight="shortconv.in_proj.weight",
            linear__conv__out_proj__weight="shortconv.out_proj.weight",
            linear__feed_forward__w1__weight="ffn_gate.weight",
            linear__feed_forward__w3__weight="ffn_up.weight",
            linear__feed_forward__w2__weight="ffn_down.weight",
        ),
        **{
            f"linear.self_attn.{part}_proj.weight": GgufForm((f"attn_{part}.weight",))
            for part in "qkv"
        },
        "other.conv.conv.weight": GgufForm(("shortconv.conv.weight",), *squeeze(1), precise=True),
        "router.feed_forward.expert_bias": GgufForm(("exp_probs_b.bias",), precise=True),
    }
    return {**_MLPS, **own}


def _linear_attention(config: Config, block: Block) -> Forms:
    """Return forms of Qwen3-Next and Qwen3.5, whose norms have weights around zero."""
    keys, values = config["linear_num_key_heads"], config["linear_num_value_heads"]
    wide, size = config["linear_key_head_dim"], config["linear_value_head_dim"]
    place, before = "linear_attn.", 2 * keys * wide
    tiled = config["model_type"] != "qwen3_next"
    own = {
        role: GgufForm(form.names, *add_one(), exact=False)
        for role, form in (_LATER_NORMS | _HEAD_NORMS).items()
    }
    order = partial(order_values, keys, values) if tiled else None

    def put(name: str, width: int, skip: int = 0, **more: Any) -> GgufForm:
        rows = reorder_rows(name, partial(order, width, skip), **more) if order else None
        return rows or GgufForm((name,), **more)

    own |= {
        f"other.{place}dt_bias": put("ssm_dt.bias", 1),
        f"other.{place}A_log": GgufForm(
            ("ssm_a",), *negate_exponential(order and partial(order, 1, 0)), exact=False
        ),
        f"other.{place}conv1d.weight": GgufForm(
            ("ssm_conv1d.weight",),
            *squeeze(1, order and partial(order, size, before)),
            precise=True,
        ),
        f"other.{place}norm.weight": GgufForm(("ssm_norm.weight",)),
        f"linear.{place}in_proj_qkvz.weight": GgufForm(
            ("attn_qkv.weight", "attn_gate.weight"), *split_mixed_rows(keys, values, wide, size)
        ),
        f"linear.{place}in_proj_qkv.weight": put("attn_qkv.weight", size, before),
        f"linear.{place}in_proj_z.weight": put("attn_gate.weight", size),
        f"linear.{place}in_proj_ba.weight": GgufForm(("ssm_ba.weight",)),
        f"other.{place}in_proj_a.weight": put("ssm_alpha.weight", 1),
        f"other.{place}in_proj_b.weight": put("ssm_beta.weight", 1),
        f"linear.{place}out_proj.weight": GgufForm(("ssm_out.weight",)),
    }
    if order:
        columns = order_value_columns(keys, values, size)
        own[f"linear.{place}out_proj.weight"] = GgufForm(
            ("ssm_out.weight",), *columns, whole=bool(size % 32)
        )
    return {**_USUAL, **own}


# ---- metadata ------------------------------------------------------------------------------------


def count_leading_blocks(model: Model) -> int:
    """Return the number of blocks before the first one with experts."""
    first, _ = model.moe_blocks[0]
    return first.index


def _describe_widths(model: Model) -> dict[str, Any]:
    """Describe the widths of the experts, and of a shared one."""
    layer = model.moe_blocks[0][1]
    found: dict[str, Any] = {"expert_feed_forward_length": layer.experts[0].up.shape[0]}
    if layer.shared is not None:
        found["expert_shared_feed_forward_length"] = layer.shared.mlp.up.shape[0]
    return found


def _describe_sigmoid(model: Model) -> dict[str, Any]:
    return {**_describe_scored(model), "expert_gating_func": _SIGMOID}


def _describe_scored(model: Model) -> dict[str, Any]:
    """Describe routers that scale what they chose, in families with leading plain blocks."""
    config = model.config
    found = _describe_widths(model)
    found.pop("expert_shared_feed_forward_length", None)
    return {
        **found,
        "leading_dense_block_count": count_leading_blocks(model),
        "expert_shared_count": config.get("n_shared_experts") or 0,
        "expert_weights_scale": float(config.get("routed_scaling_factor") or 1.0),
        # Transformers does not read the key for DeepSeek-V2.
        "expert_weights_norm": bool(
            config.get("norm_topk_prob") and config["model_type"] != "deepseek_v2"
        ),
    }


def _describe_latent(model: Model) -> dict[str, Any]:
    config = model.config
    sigmoid = config["model_type"] == "deepseek_v3"
    rope, nope, lora = (
        config[key] for key in ("qk_rope_head_dim", "qk_nope_head_dim", "kv_lora_rank")
    )
    found = {
        **_describe_scored(model),
        "expert_gating_func": _SIGMOID if sigmoid else _SOFTMAX,
        "attention.head_count_kv": 1,
        "attention.key_length": lora + rope,
        "attention.value_length": lora,
        "attention.key_length_mla": nope + rope,
        "attention.value_length_mla": config["v_head_dim"],
        "attention.kv_lora_rank": lora,
        "rope.dimension_count": rope,
    }
    if config.get("q_lora_rank"):
        found["attention.q_lora_rank"] = config["q_lora_rank"]
    if sigmoid and (config.get("n_group") or 1) > 1:
        found |= {
            "expert_group_count": config["n_group"],
            "expert_group_used_count": config["topk_group"],
        }
    return found


def _describe_scales(model: Model) -> dict[str, Any]:
    config = model.config
    return {
        "attention.scale": float(config["attention_multiplier"]),
        "embedding_scale": float(config["embedding_multiplier"]),
        "residual_scale": float(config["residual_multiplier"]),
        "logit_scale": float(config["logits_scaling"]),
        **{k: v for k, v in _describe_widths(model).items() if k != "expert_feed_forward_length"},
    }


def _describe_windowed(model: Model) -> dict[str, Any]:
    return {
        **_describe_widths(model), "attention.sliding_window": model.config["sliding_window"]
    }  # fmt: skip


def _describe_convolution(model: Model) -> dict[str, Any]:
    config = model.config
    heads = config["num_key_value_heads"]
    return {
        **_describe_sigmoid(model),
        "shortconv.l_cache": config["conv_L_cache"],
        "attention.head_count_kv": [
            heads if kind == "full_attention" else 0 for kind in config["layer_types"]
        ],
    }


def _describe_linear(model: Model) -> dict[str, Any]:
    config = model.config
    values, size = config["linear_num_value_heads"], config["linear_value_head_dim"]
    found = _describe_widths(model)
    if config["model_type"] != "qwen3_next":
        # Positions of a text are the same in all of these; they count for images.
        rope = config["rope_parameters"]
        half = int(get_head_dim(config) * rope.get("partial_rotary_factor", 1.0)) // 2
        sections = rope.get("mrope_section") or ()
        if sum(sections) != half:
            sections = [(half + 2) // 3, (half + 1) // 3, half // 3]
        found["rope.dimension_sections"] = [*sections, 0]
    return {
        **found,
        "ssm.conv_kernel": config["linear_conv_kernel_dim"],
        "ssm.state_size": config["linear_key_head_dim"],
        "ssm.group_count": config["linear_num_key_heads"],
        "ssm.time_step_rank": values,
        "ssm.inner_size": values * size,
        "full_attention_interval": find_attention_interval(config),
    }


# ---- the table ---------------------------------------------------------------------------------

_LATENT = GgufLayout(
    "deepseek2", _latent, _describe_latent, leads=True, yarn="scaled", check=check_latent
)
LAYOUTS_BY_FAMILY: Mapping[str, GgufLayout] = {
    "mixtral": GgufLayout(
        "llama", _rotated, renormalizes=True, yarn="plain", check=check_window
    ),
    "qwen2_moe": GgufLayout(
        "qwen2moe", _usual, _describe_widths, renormalizes=False, ties=False, yarn="plain",
        check=check_qwen2,
    ),
    "qwen3_moe": GgufLayout(
        "qwen3moe", _usual, _describe_widths, renormalizes=True, yarn="plain", check=check_biases
    ),
    "olmoe": GgufLayout(
        "olmoe", _usual, renormalizes=False, ties=False, yarn="plain", check=check_olmoe
    ),
    "glm4_moe": GgufLayout(
        "glm4moe", _later, _describe_sigmoid, leads=True, check=check_groups
    ),
    "dots1": GgufLayout(
        "dots1", _corrected, _describe_sigmoid, ties=False, leads=True, check=check_dots
    ),
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "granitemoe": GgufLayout("granitemoe", _rotated, _describe_scales, check=check_biases),
    "gpt_oss": GgufLayout(
        "gpt-oss", _gpt_oss, _describe_windowed, ties=False, yarn="plain", check=check_gpt_oss
    ),
    "lfm2_moe": GgufLayout(
        "lfm2moe", _short_convolution, _describe_convolution, renormalizes=True, leads=True,
        norm="token_embd_norm", check=check_convolution,
    ),
    "qwen3_next": GgufLayout(
        "qwen3next", _linear_attention, _describe_linear, renormalizes=True, centred=True,
        check=check_linear,
    ),
    "qwen3_5_moe_text": GgufLayout(
        "qwen35moe", _linear_attention, _describe_linear, centred=True, check=check_linear
    ),
}  # fmt: skip
