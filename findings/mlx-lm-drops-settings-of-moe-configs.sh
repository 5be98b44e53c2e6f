#!/bin/sh
# mlx-lm: clip_qkv of OLMoE, windows of Mixtral, norm_topk_prob of Qwen2-MoE change nothing.
#
# One would expect that a family that mlx-lm has is computed as its config says, or refused. Seen with
# mlx-lm 0.32.2 and mlx 0.32.4 on a CPU, and transformers 5.23.0 with torch 2.13.0, by logits of random
# models with one setting changed: transformers follows all of clip_qkv in OLMoE, sliding_window in
# Mixtral and Qwen3-MoE, and norm_topk_prob in Qwen2-MoE, Qwen3-MoE and OLMoE. mlx-lm follows the last
# in Qwen3-MoE and OLMoE, and of the others none: it computes the same bits, and says nothing.
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet mlx-lm==0.32.2 "mlx[cpu]==0.32.4" transformers==5.23.0 torch==2.13.0
"$place/venv/bin/python" -W ignore - 2> /dev/null <<'P'
import importlib
import sys
from importlib.metadata import version

import mlx.core as mx
import torch
from transformers import AutoConfig, AutoModelForCausalLM

mx.set_default_device(mx.cpu)
COMMON = dict(
    vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, num_experts_per_tok=2, max_position_embeddings=64, rms_norm_eps=1e-5,
    tie_word_embeddings=False, rope_theta=10000.0, head_dim=32,
)
QWEN = dict(
    num_experts=4, moe_intermediate_size=64, decoder_sparse_step=1, mlp_only_layers=[], norm_topk_prob=False,
)
OWN = {
    "olmoe": dict(num_experts=4, norm_topk_prob=False), "mixtral": dict(num_local_experts=4),
    "qwen2_moe": dict(QWEN, shared_expert_intermediate_size=64), "qwen3_moe": QWEN,
}
WINDOW = dict(use_sliding_window=True, max_window_layers=0, sliding_window=8)
TRIED = [
    ("olmoe", dict(clip_qkv=None), dict(clip_qkv=0.1)),
    ("mixtral", dict(sliding_window=None), dict(sliding_window=8)),
    ("qwen3_moe", dict(WINDOW, use_sliding_window=False), WINDOW),
    *((family, dict(norm_topk_prob=False), dict(norm_topk_prob=True))
      for family in ("qwen2_moe", "qwen3_moe", "olmoe")),
]


def run_transformers(family, config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
        return model(torch.arange(1, 33)[None]).logits


def run_mlx(family, config):
    module = importlib.import_module(f"mlx_lm.models.{family}")
    mx.random.seed(0)
    model = module.Model(module.ModelArgs.from_dict({"model_type": family, **config}))
    return torch.tensor(model(mx.arange(1, 33)[None]).tolist())


names = ("mlx-lm", "mlx", "transformers", "torch")
print(", ".join(f"{name} {version(name)}" for name in names))
dropped = []
for family, before, after in TRIED:
    changes = []
    for run in (run_transformers, run_mlx):
        first, second = (run(family, {**COMMON, **OWN[family], **how}) for how in (before, after))
        changes.append(float((second - first).norm() / first.norm()))
    key = list(after)[-1]
    print(f"  {family}, {key}: logits change by {changes[0]:.0%} in transformers, {changes[1]:.0%} in mlx-lm")
    if changes[0] > 0.01 and changes[1] == 0:
        dropped.append((family, key))
    elif min(changes) < 0.01:
        sys.exit("unclear")
expected = [
    ("olmoe", "clip_qkv"), ("mixtral", "sliding_window"), ("qwen3_moe", "sliding_window"),
    ("qwen2_moe", "norm_topk_prob"),
]
sys.exit(dropped != expected)
P
