"""Forms in which models of first-class families exist, as settings of tiny ones."""

from __future__ import annotations

from typing import Any

THREE_TO_ONE = ["linear_attention"] * 3 + ["full_attention"]
WINDOWS = ["sliding_attention", "full_attention"] * 2
YARN = {
    "rope_type": "yarn", "factor": 2.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 64, "rope_theta": 150000,
}  # fmt: skip
ONE_GROUP = {"n_group": 1, "topk_group": 1}
# By family; what is not said is as in `every_family`.
FORMS: dict[str, tuple[dict[str, Any], ...]] = {
    "deepseek_v2": (
        # V2-Lite, and V2
        {**ONE_GROUP, "q_lora_rank": None, "topk_method": "greedy", "n_shared_experts": 2},
        {"norm_topk_prob": True},
    ),
    "deepseek_v3": (
        # Moonlight and Kimi-K2, and V3
        {**ONE_GROUP, "q_lora_rank": None, "n_shared_experts": 2},
        {"n_group": 2, "topk_group": 2, "rope_parameters": YARN},
    ),
    "dots1": (
        {**ONE_GROUP, "layer_types": WINDOWS, "n_shared_experts": 2},
        {"norm_topk_prob": True, "tie_word_embeddings": True},
    ),
    "ernie4_5_moe": (
        {"moe_num_shared_experts": 2},
        {"moe_num_shared_experts": 0, "use_bias": True},
        {"moe_layer_interval": 2, "tie_word_embeddings": True},
    ),
    "gemma4_text": (
        {"tie_word_embeddings": True, "final_logit_softcapping": 30.0},
        {"attention_k_eq_v": True},
    ),
    "glm4_moe": (
        {**ONE_GROUP, "use_qk_norm": True},
        {**ONE_GROUP, "attention_bias": True, "norm_topk_prob": False},
    ),
    "glm4_moe_lite": (ONE_GROUP, {"q_lora_rank": None}),
    "gpt_oss": ({"layer_types": WINDOWS}, {"rope_parameters": YARN}),
    "granitemoe": ({}, {"tie_word_embeddings": True, "attention_bias": True}),
    "granitemoehybrid": (
        {"position_embedding_type": "nope"},
        {"tie_word_embeddings": True, "shared_intermediate_size": 0},
    ),
    "hunyuan_v1_moe": (
        # settings by layer, as in HunYuan-A13B
        {"moe_topk": [2, 2, 2, 2], "num_shared_expert": [1, 1, 1, 1]},
        {"moe_topk": [2, 1, 2, 3], "moe_intermediate_size": [32, 32, 32, 32]},
        {"tie_word_embeddings": True, "attention_bias": True},
    ),
    "lfm2_moe": (
        {"num_dense_layers": 2, "use_expert_bias": True},
        {"use_expert_bias": False, "norm_topk_prob": False, "tie_word_embeddings": True},
    ),
    "minimax_m2": ({}, {"num_mtp_modules": 1}),
    "nemotron_h": (
        ONE_GROUP,
        {
            "layers_block_type": [*["linear_attention", "moe"] * 2, "full_attention", "moe"],
            "use_bias": True,
        },
    ),
    "phimoe": ({"attention_bias": True, "lm_head_bias": True}, {"sliding_window": 16}),
    "qwen3_5_moe_text": ({"layer_types": THREE_TO_ONE, "tie_word_embeddings": True},),
    "qwen3_next": (
        {"layer_types": THREE_TO_ONE},
        {"mlp_only_layers": [0], "norm_topk_prob": False},
    ),
}  # fmt: skip
