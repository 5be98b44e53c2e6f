"""The table of model families: one row per ``model_type``.

A row gives the names of tensors on disk, the spellings of config keys, the rules of the router, and
which other switches of a config are supported; the rest is refused. It describes the per-expert
layout on disk, which is the stable one (transformers 5 fuses experts only in memory).
``tests/test_families.py`` compares each row with transformers' logits and checks that every key of
transformers' config class is accounted for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from moe2edge.errors import InputError, Moe2EdgeError, Unsupported, suggest
from moe2edge.model.config_types import check_rope, check_types, parse_whole_number

# Keys that do not affect inference, or whose values are read from the tensors.
NEUTRAL = frozenset(
    {
        "architectures", "attention_dropout", "bos_token_id", "chunk_size_feed_forward", "dtype",
        "eos_token_id", "id2label", "initializer_range", "is_encoder_decoder", "label2id",
        "max_position_embeddings", "model_type", "output_attentions", "output_hidden_states",
        "output_router_logits", "pad_token_id", "problem_type", "return_dict",
        "router_aux_loss_coef", "router_jitter_noise", "torch_dtype", "transformers_version",
        "use_cache", "_name_or_path", "vocab_size",
    }
)  # fmt: skip
# Keys that every row reads.
READ = frozenset(
    {
        "head_dim", "hidden_act", "hidden_size", "num_attention_heads", "num_experts_per_tok",
        "num_hidden_layers", "num_key_value_heads", "rms_norm_eps", "rope_parameters",
        "rope_scaling", "rope_theta", "tie_word_embeddings",
    }
)  # fmt: skip

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Geometry:
    """Sizes that all blocks share, read from a config."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    clip_qkv: float | None
    tied: bool
    max_positions: int
    vocab: int


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Attributes:
        model_type: value of ``model_type`` in ``config.json``.
        architecture: class name in transformers.
        moe: name of the MoE module in a block.
        mlp_names: names of gate, up and down of an expert.
        experts_key: spellings of the number of experts; transformers writes the first.
        width_key: key of the width of an expert.
        renormalize: whether the router renormalizes; a string is the config key that decides.
        qk_norm: norm on queries and keys: none, per head, or over the full width.
        bias_key: config key that gives q, k, v (and o, if ``bias_on_o``) a bias.
        bias_default: its value if the config lacks the key.
        bias_on_o: whether that bias includes o.
        shared: whether MoE layers have a shared expert.
        dense_layers: whether ``mlp_only_layers`` and ``decoder_sparse_step`` are supported.
        window: how sliding windows are switched on: not at all, for all blocks, by
            ``use_sliding_window``, or for each block by ``layer_types``.
        clips: whether ``clip_qkv`` is supported.
    """

    model_type: str
    architecture: str
    moe: str = "mlp"
    mlp_names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    experts_key: tuple[str, ...] = ("num_experts", "num_local_experts")
    width_key: str = "moe_intermediate_size"
    renormalize: bool | str = "norm_topk_prob"
    qk_norm: Literal["none", "head", "full"] = "none"
    bias_key: str | None = None
    bias_default: bool = False
    bias_on_o: bool = False
    shared: bool = False
    dense_layers: bool = False
    window: Literal["none", "all", "switched", "layer_types"] = "none"
    clips: bool = False

    # ---- names -----------------------------------------------------------------------------

    def disk_name(self, index: int, role: str) -> str:
        """Return the name on disk of the tensor with ``role`` in block ``index``.

        >>> FAMILIES["mixtral"].disk_name(0, "experts.3.up")
        'model.layers.0.block_sparse_moe.experts.3.w3.weight'
        """
        kind, _, rest = role.partition(".")
        at = f"model.layers.{index}"
        names = dict(zip(("gate", "up", "down"), self.mlp_names, strict=True))
        if kind == "norms":
            return f"{at}.{rest}"
        if kind == "attention":
            return f"{at}.self_attn.{rest}"
        if kind == "router":
            return f"{at}.{self.moe}.gate.{rest}"
        if kind == "experts":
            n, _, part = rest.partition(".")
            return f"{at}.{self.moe}.experts.{n}.{names[part]}.weight"
        if kind in ("substitutes", "members"):
            return f"{at}.{self.moe}.{role}"
        if role == "shared.router":
            return f"{at}.{self.moe}.shared_expert_gate.weight"
        if kind == "shared":
            return f"{at}.{self.moe}.shared_expert.{rest}_proj.weight"
        if kind == "dense":
            return f"{at}.mlp.{rest}_proj.weight"
        raise Moe2EdgeError(f"family {self.model_type} has no tensor name for {role}")

    # ---- reading a config ------------------------------------------------------------------

    @property
    def known_keys(self) -> frozenset[str]:
        """All config keys that this row reads or knows to have no effect."""
        keys = {*NEUTRAL, *READ, *self.experts_key, self.width_key, "intermediate_size"}
        if isinstance(self.renormalize, str):
            keys.add(self.renormalize)
        if self.bias_key:
            keys.add(self.bias_key)
        if self.shared:
            keys.add("shared_expert_intermediate_size")
        if self.dense_layers:
            keys |= {"mlp_only_layers", "decoder_sparse_step"}
        if self.window != "none":
            keys.add("sliding_window")
        if self.window in ("switched", "layer_types"):
            keys |= {"use_sliding_window", "max_window_layers"}
        if self.window == "layer_types":
            keys.add("layer_types")
        if self.clips:
            keys.add("clip_qkv")
        return frozenset(keys)

    def check_config(self, config: Config) -> None:
        """Refuse a config that this row does not support.

        Raises:
            InputError: a value is missing or has the wrong type.
            Unsupported: a key is set that changes inference and is not supported for this family.
        """
        check_types(config)
        refused = {
            key: config[key]
            for key in REFUSED - self.known_keys
            if config.get(key) not in (None, False, 0, [], {})
        }
        if refused:
            raise Unsupported(f"{self.model_type} with {refused} is not supported")
        if config.get("hidden_act", "silu") != "silu":
            raise Unsupported(
                f"hidden_act {config['hidden_act']!r} is not supported; only 'silu' is"
            )
        check_rope(config)

    def geometry(self, config: Config) -> Geometry:
        """Read the sizes that all blocks share.

        Raises:
            InputError: a size is missing or not a positive number.
        """
        heads = parse_whole_number(config, "num_attention_heads")
        hidden = parse_whole_number(config, "hidden_size")
        return Geometry(
            hidden=hidden,
            heads=heads,
            kv_heads=parse_whole_number(config, "num_key_value_heads", heads),
            head_dim=parse_whole_number(config, "head_dim", hidden // heads),
            eps=float(config.get("rms_norm_eps", 1e-6 if "qwen" in self.model_type else 1e-5)),
            clip_qkv=config.get("clip_qkv") if self.clips else None,
            tied=bool(config.get("tie_word_embeddings", False)),
            max_positions=parse_whole_number(config, "max_position_embeddings", 2048),
            vocab=parse_whole_number(config, "vocab_size"),
        )

    def num_experts(self, config: Config) -> int:
        """Read the number of experts per MoE layer, whichever spelling the config uses.

        Raises:
            InputError: it is missing or not a positive number.
        """
        for key in self.experts_key:
            if config.get(key) is not None:
                return parse_whole_number(config, key)
        raise InputError(f"config.json has no {' or '.join(self.experts_key)}")

    def is_moe(self, config: Config, index: int) -> bool:
        """Test if block ``index`` has an MoE layer."""
        if not self.dense_layers:
            return True
        step = config.get("decoder_sparse_step") or 1
        return index not in (config.get("mlp_only_layers") or ()) and (index + 1) % step == 0

    def window_of(self, config: Config, index: int) -> int | None:
        """Read the sliding window of block ``index``, None for full attention.

        Raises:
            Unsupported: ``layer_types`` names an unknown kind of attention.
        """
        size = config.get("sliding_window") or None
        if self.window == "none":
            return None
        if self.window == "all":
            return size
        if not config.get("use_sliding_window"):
            return None
        if self.window == "switched":
            return size
        types = config.get("layer_types")
        if types is None:  # the default of transformers
            return size if (index + 1) % 2 and index < config.get("max_window_layers", 28) else None
        if types[index] not in ("full_attention", "sliding_attention"):
            raise Unsupported(f"layer type {types[index]!r} is not supported")
        return size if types[index] == "sliding_attention" else None


FAMILIES: Mapping[str, Family] = {
    row.model_type: row
    for row in (
        Family(
            "mixtral",
            "MixtralForCausalLM",
            moe="block_sparse_moe",
            mlp_names=("w1", "w3", "w2"),
            experts_key=("num_local_experts", "num_experts"),
            width_key="intermediate_size",
            renormalize=True,
            window="all",
        ),
        Family(
            "qwen2_moe",
            "Qwen2MoeForCausalLM",
            bias_key="qkv_bias",
            bias_default=True,
            shared=True,
            dense_layers=True,
            window="layer_types",
        ),
        Family(
            "qwen3_moe",
            "Qwen3MoeForCausalLM",
            experts_key=("num_local_experts", "num_experts"),
            qk_norm="head",
            bias_key="attention_bias",
            bias_on_o=True,
            dense_layers=True,
            window="switched",
        ),
        Family(
            "olmoe",
            "OlmoeForCausalLM",
            width_key="intermediate_size",
            qk_norm="full",
            bias_key="attention_bias",
            bias_on_o=True,
            clips=True,
        ),
    )
}

# Switches of related families. A row that does not read one of them refuses a config that sets it.
REFUSED = frozenset(
    {
        "attention_bias", "attn_logit_softcapping", "clip_qkv", "final_logit_softcapping",
        "layer_types", "logits_scaling", "mlp_bias", "n_group", "n_shared_experts",
        "num_shared_experts", "per_layer_config", "qk_layernorm", "qkv_bias",
        "query_pre_attn_scalar", "residual_multiplier", "routed_scaling_factor", "scoring_func",
        "shared_expert_intermediate_size", "topk_group", "use_qk_norm", "use_sliding_window",
        "attention_multiplier", "embedding_multiplier",
    }
)  # fmt: skip


def find_family(config: Config) -> Family:
    """Find the row of a config.

    Raises:
        InputError: the config names no model type.
        Unsupported: the family is unknown, or the model has no experts.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise InputError("config.json has no model_type; this is not a transformers model")
    if kind in FAMILIES:
        return FAMILIES[kind]
    spelled = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    if not any(config.get(key) for key in spelled):
        raise Unsupported(
            f"{kind!r} is a dense model (its config names no experts); moe2edge works on "
            f"Mixture-of-Experts models: {', '.join(FAMILIES)}"
        )
    raise Unsupported(suggest("model family", kind, FAMILIES))
