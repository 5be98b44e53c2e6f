#!/bin/sh
# mlx-lm: rope_scaling lengthens the context of Qwen3, and is ignored in Qwen3-MoE.
#
# The cards of both tell to put yarn into rope_scaling of config.json for longer texts, and mlx-lm has
# a field of that name in both. Seen with mlx-lm 0.32.2 and mlx 0.32.4 on a CPU, on random models:
# Qwen3-MoE, GLM-4.5 (glm4_moe) and Mixtral compute the same with linear or yarn scaling by 4 as
# without, and say nothing; Qwen3, OLMoE and dots1 follow both. Qwen2-MoE refuses yarn, with the
# words that it supports linear scaling only, and then ignores linear scaling, too.
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet mlx-lm==0.32.2 "mlx[cpu]==0.32.4"
"$place/venv/bin/python" -W ignore - <<'P'
import importlib
import sys
from importlib.metadata import version

import mlx.core as mx

mx.set_default_device(mx.cpu)
SIZES = dict(
    vocab_size=64, hidden_size=64, intermediate_size=64, moe_intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=2, head_dim=32, rms_norm_eps=1e-5, rope_theta=10000.0,
    num_experts_per_tok=2, max_position_embeddings=4096, attention_bias=False, tie_word_embeddings=False,
)
ROUTED = dict(
    n_routed_experts=4, n_shared_experts=1, first_k_dense_replace=0, n_group=1, topk_group=1,
    norm_topk_prob=True, routed_scaling_factor=1.0,
)
OWN = {
    "qwen3": {}, "olmoe": dict(num_experts=4), "dots1": ROUTED,
    "qwen3_moe": dict(num_experts=4, decoder_sparse_step=1, mlp_only_layers=[], norm_topk_prob=True),
    "glm4_moe": dict(ROUTED, use_qk_norm=True, partial_rotary_factor=0.5),
    "mixtral": dict(num_local_experts=4),
    "qwen2_moe": dict(num_experts=4, shared_expert_intermediate_size=64),
}
KINDS = {
    "linear": dict(type="linear", factor=4.0),
    "yarn": dict(type="yarn", factor=4.0, original_max_position_embeddings=1024),
}


def run(family, scaling):
    """Return the logits of a random model, the same one at each call but for the scaling."""
    module = importlib.import_module(f"mlx_lm.models.{family}")
    config = dict(SIZES, **OWN[family], model_type=family, rope_scaling=scaling)
    mx.random.seed(0)
    model = module.Model(module.ModelArgs.from_dict(config))
    return model(mx.arange(1, 33)[None]).astype(mx.float32).flatten()


print("mlx-lm", version("mlx-lm"), "mlx", version("mlx"))
found = {}
for family in OWN:
    plain, found[family] = run(family, None), []
    for kind, scaling in KINDS.items():
        try:
            change = (mx.linalg.norm(run(family, scaling) - plain) / mx.linalg.norm(plain)).item()
        except ValueError as error:
            found[family].append("refused")
            print(f"  {family}, {kind}: refused, {error}")
            continue
        found[family].append("followed" if change > 0.01 else "ignored" if not change else "unclear")
        print(f"  {family}, {kind}: logits change by {change:.1%}, {found[family][-1]}")
followed, ignored = ["followed"] * 2, ["ignored"] * 2
expected = {
    "qwen3": followed, "olmoe": followed, "dots1": followed, "qwen3_moe": ignored, "glm4_moe": ignored,
    "mixtral": ignored, "qwen2_moe": ["ignored", "refused"],
}
sys.exit(found != expected)
P
