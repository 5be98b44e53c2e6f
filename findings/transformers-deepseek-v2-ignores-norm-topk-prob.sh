#!/bin/sh
# transformers: DeepSeek-V2 has norm_topk_prob in its config, documented, and never reads it.
#
# The key says whether the weights of the chosen experts are scaled to sum to one. The published
# checkpoints have false; a config with true is read and saved as true, and computes what false does.
# Seen with transformers 5.23.0 and torch 2.13.0: logits are equal bit by bit. The same key, beside
# the same sizes, changes logits of DeepSeek-V3 (2.9 % here) and of Qwen2-MoE (3.8 %). So whoever
# converts a DeepSeek-V2 by its config alone, as the key asks, gets another model than transformers.
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet transformers==5.23.0 torch==2.13.0
"$place/venv/bin/python" -W ignore - "$place" <<'P'
import sys

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = dict(
    vocab_size=64, hidden_size=32, intermediate_size=32, moe_intermediate_size=32, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=2, num_experts_per_tok=2,
)
LATENT = dict(
    q_lora_rank=None, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16, head_dim=8,
    n_routed_experts=8, n_shared_experts=1, first_k_dense_replace=0, n_group=1, topk_group=1,
    routed_scaling_factor=1.0,
)
OWN = {"deepseek_v2": LATENT, "deepseek_v3": LATENT, "qwen2_moe": dict(num_experts=8)}
print("transformers", transformers.__version__, "torch", torch.__version__)
reads = {}
for family, own in OWN.items():
    logits = []
    for scaled in (False, True):
        AutoConfig.for_model(family, **SIZES, **own, norm_topk_prob=scaled).save_pretrained(sys.argv[1])
        config = AutoConfig.from_pretrained(sys.argv[1])
        assert config.norm_topk_prob is scaled
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.2)
            logits.append(model(torch.arange(1, 17)[None]).logits)
    plain, other = logits
    reads[family] = not torch.equal(plain, other)
    change = float((other - plain).norm() / plain.norm())
    print(f"  {family}: norm_topk_prob true in place of false changes logits by {change:.1%}")
sys.exit(reads != {"deepseek_v2": False, "deepseek_v3": True, "qwen2_moe": True})
P
