"""The table of model families: one row per ``model_type``.

A row gives the names of tensors on disk, the spellings of config keys, the rules of the router, and
which other switches of a config are supported; `moe2edge.model.config_keys` says what becomes of
all other keys. It describes the per-expert layout on disk, which is the stable one (transformers 5
fuses experts only in memory). ``tests/test_families.py`` compares each row with transformers'
logits, ``tests/test_config_keys.py`` with all keys of transformers' config class.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from moe2edge.errors import InputError, Moe2EdgeError, Unsupported, suggest
from moe2edge.model.config_keys import INERT, RUN_KEPT

# Keys that every row reads.
READ = frozenset(
    {
        "head_dim", "hidden_act", "hidden_size", "max_position_embeddings", "num_attention_heads",
        "num_experts_per_tok", "num_hidden_layers", "num_key_value_heads", "rms_norm_eps",
        "rope_parameters", "tie_word_embeddings", "vocab_size",
    }
)  # fmt: skip
# Older spellings of what `rope_parameters` holds.
ROPE_KEYS = frozenset(
    {"original_max_position_embeddings", "partial_rotary_factor", "rope_scaling", "rope_theta"}
)

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
        experts_key: spellings of the number of experts that transformers reads; it writes the
            first.
        width_key: key of the width of an expert.
        renormalize: whether the router renormalizes; a string is the config key that decides.
        qk_norm: norm on queries and keys: none, per head, or over the full width.
        bias_key: config key that gives q, k, v (and o, if ``bias_on_o``) a bias.
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
    experts_key: tuple[str, ...] = ("num_experts",)
    width_key: str = "moe_intermediate_size"
    renormalize: bool | str = "norm_topk_prob"
    qk_norm: Literal["none", "head", "full"] = "none"
    bias_key: str | None = None
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
    def reads(self) -> frozenset[str]:
        """All config keys whose values this row reads, but for older spellings."""
        keys = {*READ, self.experts_key[0], self.width_key}
        if isinstance(self.renormalize, str):
            keys.add(self.renormalize)
        if self.bias_key:
            keys.add(self.bias_key)
        if self.shared:
            keys.add("shared_expert_intermediate_size")
        if self.dense_layers:
            keys |= {"intermediate_size", "mlp_only_layers", "decoder_sparse_step"}
        if self.window != "none":
            keys.add("sliding_window")
        if self.window in ("switched", "layer_types"):
            keys.add("use_sliding_window")
        if self.window == "layer_types":
            keys |= {"layer_types", "max_window_layers"}
        if self.clips:
            keys.add("clip_qkv")
        return frozenset(keys)

    @property
    def known_keys(self) -> frozenset[str]:
        """All config keys that this row reads, or that every family has and that do nothing."""
        return self.reads | ROPE_KEYS | set(self.experts_key) | INERT | RUN_KEPT

    def geometry(self, config: Config) -> Geometry:
        """Read the sizes that all blocks share from a config as `parse_config` returns it."""
        return Geometry(
            hidden=config["hidden_size"],
            heads=config["num_attention_heads"],
            kv_heads=config["num_key_value_heads"],
            head_dim=config["head_dim"],
            eps=float(config["rms_norm_eps"]),
            clip_qkv=config.get("clip_qkv") if self.clips else None,
            tied=config["tie_word_embeddings"],
            max_positions=config["max_position_embeddings"],
            vocab=config["vocab_size"],
        )

    def num_experts(self, config: Config) -> int:
        """Read the number of experts per MoE layer, whichever spelling the config uses."""
        return int(next(config[key] for key in self.experts_key if key in config))

    def is_moe(self, config: Config, index: int) -> bool:
        """Test if block ``index`` has an MoE layer."""
        if not self.dense_layers:
            return True
        step = config["decoder_sparse_step"]
        return index not in config["mlp_only_layers"] and (index + 1) % step == 0

    def window_of(self, config: Config, index: int) -> int | None:
        """Read the sliding window of block ``index``, None for full attention."""
        if self.window == "none":
            return None
        if self.window != "all" and not config["use_sliding_window"]:
            return None
        if self.window == "layer_types" and config["layer_types"][index] == "full_attention":
            return None
        size: int | None = config.get("sliding_window")
        return size


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
            experts_key=("num_experts", "num_local_experts"),
            width_key="intermediate_size",
            qk_norm="full",
            bias_key="attention_bias",
            bias_on_o=True,
            clips=True,
        ),
    )
}


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
