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

from moe2edge.errors import InputError, Unsupported, join_lines
from moe2edge.model.config_keys import INERT, RUN_KEPT
from moe2edge.model.transformers_config import find_class, read_text_config

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
# Positions of a model whose config sets no limit.
UNBOUNDED = 1 << 20


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
        generic: nothing but the keys of the numbers of experts is known of the family; all else is
            found in transformers' class, and transformers carries it out.
    """

    model_type: str
    architecture: str
    moe: str = "mlp"
    mlp_names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    experts_key: tuple[str, ...] = ("num_experts",)
    top_k_key: str = "num_experts_per_tok"
    width_key: str = "moe_intermediate_size"
    renormalize: bool | str = "norm_topk_prob"
    qk_norm: Literal["none", "head", "full"] = "none"
    bias_key: str | None = None
    bias_on_o: bool = False
    shared: bool = False
    dense_layers: bool = False
    window: Literal["none", "all", "switched", "layer_types"] = "none"
    clips: bool = False
    generic: bool = False

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
        if self.generic:
            return Geometry(
                hidden=config["hidden_size"],
                heads=0,
                kv_heads=0,
                head_dim=0,
                eps=0.0,
                clip_qkv=None,
                tied=bool(config.get("tie_word_embeddings")),
                max_positions=config.get("max_position_embeddings") or UNBOUNDED,
                vocab=config["vocab_size"],
            )
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

    def renormalizes(self, config: Config) -> bool:
        """Read whether the router scales the chosen weights to sum to one."""
        rule = self.renormalize
        return bool(config[rule] if isinstance(rule, str) else rule)

    def count_groups(self, config: Config) -> int:
        """Read the number of groups of experts of which routers choose some first; 1: none."""
        found = (config.get(key) for key in GROUP_KEYS) if self.generic else ()
        return next((number for number in found if type(number) is int and number), 1)

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


GROUP_KEYS = ("n_group", "num_expert_group")
# Key of the number of groups that are chosen first.
CHOSEN_GROUPS = "topk_group"
# Keys of the numbers of experts, and of chosen ones, in transformers' config classes.
COUNT_KEYS = ("num_local_experts", "n_routed_experts", "num_experts", "moe_num_experts")
TOP_K_KEYS = (
    "num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts",
)  # fmt: skip
_OWN = "its experts are not of the interface that transformers' other families share"
# Families whose experts or routers are none that passes could work on, with the reason.
REFUSED: Mapping[str, str] = {
    "dbrx": f"{_OWN}: one matrix holds all of them",
    "doge": f"{_OWN}: they are rows of embeddings, found by product keys",
    "jetmoe": f"{_OWN}, and its attention is a mixture as well",
    "llama4_text": f"{_OWN}: the weight of the router multiplies their input",
    "longcat_flash": f"{_OWN}: some of them are the identity",
    "inkling_text": "its router has rows for the shared experts as well",
    "inkling2_text": "its layers read the outputs of several layers before them",
    "inkling2_loop_text": "it runs some of its layers several times",
    "lara_mini": "one tensor in files becomes several of its parameters",
    "deepseek_v4": "its first routers look experts up by the ids of tokens",
    "qwen4_exp_text": "its layers read the ids of tokens",
    "glm_moe_dsa": "its layers hand on more than hidden states",
    "hy_v4": "its layers hand on more than hidden states",
    "zaya": "its router has a state of its own, and a row for no expert",
}
# Families without a row in the table below whose tests are those of the table: every pass, in the
# forms in which their models exist (tests/first_class.py). With models that people have.
FIRST_CLASS: Mapping[str, str] = {
    "deepseek_v2": "DeepSeek-V2, DeepSeek-V2-Lite",
    "deepseek_v3": "DeepSeek-V3, Moonlight, Kimi-K2",
    "dots1": "dots.llm1",
    "ernie4_5_moe": "ERNIE-4.5-21B-A3B",
    "gemma4_text": "Gemma 4 26B-A4B",
    "glm4_moe": "GLM-4.5-Air",
    "glm4_moe_lite": "GLM-4.7-Flash",
    "gpt_oss": "gpt-oss-20b",
    "granitemoe": "Granite 3 1B-A400M",
    "granitemoehybrid": "Granite 4 tiny",
    "hunyuan_v1_moe": "Hunyuan-A13B",
    "lfm2_moe": "LFM2-8B-A1B",
    "minimax_m2": "MiniMax-M2",
    "nemotron_h": "Nemotron 3 Nano",
    "phimoe": "Phi-3.5-MoE",
    "qwen3_5_moe_text": "Qwen3.5-35B-A3B",
    "qwen3_next": "Qwen3-Next-80B-A3B",
}
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
    """Find the row of a config, or make one for a family that has none, or is a part of a model.

    Raises:
        InputError: the config names no model type, or transformers refuses the config.
        Unsupported: transformers does not know it, its experts are not of the interface that
            transformers' families share, or the model has no experts.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str):
        part = config.get("_class_name")
        other = f": it is one of {part!r:.100}, a part of a diffusers pipeline" if part else ""
        raise InputError(f"config.json has no model_type; this is not a transformers model{other}")
    if kind in FAMILIES:
        return FAMILIES[kind]
    return make_generic_family(read_text_config(config))


def make_generic_family(config: Any) -> Family:
    """Make a row for transformers' config of a text model.

    Raises:
        InputError: a value is none that the family can have.
        Unsupported: its experts are not of the interface that transformers' families share, or it
            has none.
    """
    kind = config.model_type
    if kind in REFUSED:
        raise Unsupported(f"{kind} is not supported: {REFUSED[kind]}")
    settings = read_settings(config)
    counts = [key for key in COUNT_KEYS if settings.get(key)]
    if not counts:
        raise Unsupported(_explain_no_experts(kind, settings))
    if settings.get("is_encoder_decoder"):
        raise Unsupported(
            f"{kind} is an encoder-decoder model; moe2edge works on decoder-only models"
        )
    architecture = find_class(config).__name__
    choices = [key for key in TOP_K_KEYS if settings.get(key)]
    if not choices:
        named = next((key for key in TOP_K_KEYS if key in settings), TOP_K_KEYS[0])
        if settings.get(named) is None:
            raise Unsupported(
                f"{kind} is not supported: its config does not say how many experts a token "
                f"chooses ({named})"
            )
        raise InputError(
            f"config.json: {named} is {settings[named]!r:.100}, expected: how many experts a token "
            "chooses"
        )
    aliases = (key for key, name in config.attribute_map.items() if name == counts[0])
    return Family(
        kind,
        architecture,
        experts_key=(counts[0], *aliases),
        top_k_key=choices[0],
        width_key="",
        renormalize=False,
        generic=True,
    )


def read_settings(config: Any) -> dict[str, Any]:
    """Return the settings of transformers' config as plain data.

    Raises:
        InputError: transformers cannot write them, because a value is none that they can have.
    """
    try:
        return dict(config.to_dict())
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise InputError(
            f"config.json: transformers cannot read it as {config.model_type} ({join_lines(error)})"
        ) from error


def find_counts(settings: Mapping[str, Any], place: str = "") -> tuple[str, Any] | None:
    """Find the number of experts in settings, or in those of a part: its key, with all above it."""
    for key in COUNT_KEYS:
        value = settings.get(key)
        if isinstance(value, list) or (type(value) is int and value > 1):
            return f"{place}{key}", value
    inner = ((key, value) for key, value in settings.items() if isinstance(value, Mapping))
    found = (find_counts(value, f"{place}{key}.") for key, value in inner)
    return next(filter(None, found), None)


def _explain_no_experts(kind: str, settings: Mapping[str, Any]) -> str:
    found = find_counts(settings)
    if found is not None:
        return (
            f"{kind} is not supported: its experts ({found[0]}) are in a part that is no language "
            "model of transformers"
        )
    return (
        f"{kind!r} is a dense model (its config names no experts); moe2edge works on "
        "Mixture-of-Experts models"
    )
