"""Configs of five published models, from published facts; no weights belong to them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_LLAMA = {"hidden_act": "silu", "rms_norm_eps": 1e-05, "tie_word_embeddings": False}
_PERIOD = ["linear_attention"] * 3 + ["full_attention"]

SHAPES: Mapping[str, Mapping[str, Any]] = {
    "OLMoE-1B-7B": {
        "model_type": "olmoe", "architectures": ["OlmoeForCausalLM"], **_LLAMA,
        "hidden_size": 2048, "intermediate_size": 1024, "num_hidden_layers": 16,
        "num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 64,
        "num_experts_per_tok": 8, "norm_topk_prob": False, "vocab_size": 50304,
        "max_position_embeddings": 4096, "rope_theta": 10000.0, "torch_dtype": "bfloat16",
        "eos_token_id": 50279, "pad_token_id": 1,
    },
    "Mixtral-8x7B": {
        "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], **_LLAMA,
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8,
        "num_experts_per_tok": 2, "vocab_size": 32000, "max_position_embeddings": 32768,
        "rope_theta": 1000000.0, "sliding_window": None, "torch_dtype": "bfloat16",
        "bos_token_id": 1, "eos_token_id": 2,
    },
    "Qwen3-30B-A3B": {
        "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], **_LLAMA,
        "rms_norm_eps": 1e-06, "hidden_size": 2048, "intermediate_size": 6144,
        "moe_intermediate_size": 768, "num_hidden_layers": 48, "num_attention_heads": 32,
        "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
        "num_experts_per_tok": 8, "norm_topk_prob": True, "decoder_sparse_step": 1,
        "mlp_only_layers": [], "vocab_size": 151936, "max_position_embeddings": 40960,
        "rope_theta": 1000000.0, "use_sliding_window": False, "torch_dtype": "bfloat16",
        "bos_token_id": 151643, "eos_token_id": 151645,
    },
    "gpt-oss-20b": {
        "model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"], **_LLAMA,
        "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 24,
        "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64,
        "num_local_experts": 32, "num_experts_per_tok": 4, "vocab_size": 201088,
        "max_position_embeddings": 131072, "sliding_window": 128, "rope_theta": 150000,
        "rope_scaling": {
            "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
            "original_max_position_embeddings": 4096, "truncate": False,
        },
        "layer_types": ["sliding_attention", "full_attention"] * 12, "attention_bias": True,
        "swiglu_limit": 7.0, "eos_token_id": 200002, "pad_token_id": 199999,
        "quantization_config": {
            "quant_method": "mxfp4",
            "modules_to_not_convert": [
                "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens",
                "lm_head",
            ],
        },
    },
    "Qwen3.5-35B-A3B": {
        "model_type": "qwen3_5_moe", "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "tie_word_embeddings": False, "image_token_id": 248056, "video_token_id": 248057,
        "text_config": {
            "model_type": "qwen3_5_moe_text", "hidden_act": "silu", "rms_norm_eps": 1e-06,
            "hidden_size": 2048, "moe_intermediate_size": 512,
            "shared_expert_intermediate_size": 512, "num_hidden_layers": 40,
            "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 256,
            "num_experts": 256, "num_experts_per_tok": 8, "linear_conv_kernel_dim": 4,
            "linear_key_head_dim": 128, "linear_value_head_dim": 128,
            "linear_num_key_heads": 16, "linear_num_value_heads": 32,
            "layer_types": _PERIOD * 10, "vocab_size": 248320,
            "max_position_embeddings": 262144, "dtype": "bfloat16", "eos_token_id": 248044,
            "tie_word_embeddings": False,
        },
        "vision_config": {"model_type": "qwen3_5_moe"},
    },
}  # fmt: skip


def write_config(name: str, folder: Path) -> Path:
    """Write the ``config.json`` of a shape into a new folder, and return the folder."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(SHAPES[name], indent=2))
    return folder
