"""Refusals of single families: what llama.cpp would compute as something else.

Each function returns what it is, or an empty text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe2edge.model.model import Model


def find_attention_interval(config: Mapping[str, Any]) -> int:
    """Return the period of full attention; 0: there is none, or nothing else."""
    kinds = list(config["layer_types"])
    period = kinds.index("full_attention") + 1 if "full_attention" in kinds else 0
    expected = [
        "linear_attention" if not period or (n + 1) % period else "full_attention"
        for n in range(len(kinds))
    ]
    return period if kinds == expected and period > 1 else 0


def check_window(model: Model) -> str:
    """Name a sliding window that hides tokens."""
    config = model.config
    window = next((b.window for b in model.blocks if b.window is not None), None)
    if window is None or window >= config["max_position_embeddings"]:
        return ""
    return f"its sliding window of {window} tokens"


def check_olmoe(model: Model) -> str:
    """Name what OLMoE has there in one form only."""
    config = model.config
    if config["num_key_value_heads"] != config["num_attention_heads"]:
        return "fewer heads of keys and values than of queries"
    if config.get("clip_qkv"):
        return "clip_qkv"
    return "attention_bias" if config["attention_bias"] else ""


def check_qwen2(model: Model) -> str:
    """Name heads of another size than the hidden states share out, or a window."""
    config = model.config
    if config["num_attention_heads"] * config["head_dim"] != config["hidden_size"]:
        return "heads whose sizes do not add up to hidden_size"
    return check_window(model)


def check_biases(model: Model) -> str:
    """Name biases of attention, or a window."""
    return "attention_bias" if model.config.get("attention_bias") else check_window(model)


def check_groups(model: Model) -> str:
    """Name groups of experts that the router chooses first."""
    chosen = model.config.get("n_group") or 1
    return "" if chosen == 1 else f"routers that choose among {chosen} groups of experts"


def check_dots(model: Model) -> str:
    """Name what dots1 has there in one form only."""
    if model.config["num_key_value_heads"] != model.config["num_attention_heads"]:
        return "fewer heads of keys and values than of queries"
    return check_biases(model) or check_groups(model)


def check_convolution(model: Model) -> str:
    """Name what LFM2 has there in one form only."""
    config = model.config
    if config.get("routed_scaling_factor", 1.0) != 1.0:
        return f"routed_scaling_factor {config['routed_scaling_factor']}"
    if config.get("conv_bias"):
        return "conv_bias"
    if len(set(config["layer_types"])) == 1:
        return "blocks of one kind only"
    return "" if config.get("use_expert_bias", True) else "use_expert_bias false"


def check_latent(model: Model) -> str:
    """Name what DeepSeek has there in one form only."""
    config, count = model.config, len(model.blocks)
    if config["model_type"] == "deepseek_v2" and config.get("topk_method") != "greedy":
        return check_groups(model)
    if config.get("attention_bias"):
        return "attention_bias"
    # Its code tells the two forms of queries by nothing but these numbers.
    lite = count in (26, 27) or (count == 48 and model.vocabulary == 128256)
    if lite and config.get("q_lora_rank"):
        return f"{count} blocks and queries of low rank: with 26 or 27 it expects others"
    if not lite and not config.get("q_lora_rank"):
        return (
            f"{count} blocks and plain queries, which it expects with 26 or 27 blocks only; drop "
            "experts instead of blocks"
        )
    return "" if config.get("rope_interleave", True) else "rope_interleave false"


def check_gpt_oss(model: Model) -> str:
    """Name what gpt-oss has there in one form only."""
    config = model.config
    if (config.get("swiglu_alpha", 1.702), config.get("swiglu_limit", 7.0)) != (1.702, 7.0):
        return "swiglu_alpha or swiglu_limit other than gpt-oss has"
    kinds = ["full_attention" if n % 2 else "sliding_attention" for n in range(len(model.blocks))]
    if list(config["layer_types"]) != kinds:
        return "layers that do not alternate between windows and full attention"
    return ""


def check_linear(model: Model) -> str:
    """Name an order of layers that is not periodic, or biases."""
    if not find_attention_interval(model.config):
        return "layers of full attention that are not every n-th one"
    return "attention_bias" if model.config.get("attention_bias") else ""
