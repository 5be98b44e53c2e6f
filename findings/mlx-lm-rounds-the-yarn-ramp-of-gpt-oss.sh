#!/bin/sh
# mlx-lm: gpt-oss's own "truncate": false is not read, so one of 32 frequencies is 76 % too high.
#
# YaRN leaves high frequencies, divides low ones by the factor, and mixes them on a ramp between.
# Whether the ends of the ramp are rounded to whole numbers is `truncate`; configs of gpt-oss have
# false, which transformers follows and which is its default for the family. mlx-lm, which has the
# family, rounds always. Seen with mlx-lm 0.32.2, mlx 0.32.4, transformers 5.23.0 and torch 2.13.0, at
# gpt-oss's numbers (heads of 64, base 150000, factor 32, 4096 positions): frequencies are equal
# with truncate true, and 9 of 32 differ with false, the 18th by 76 %.
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet mlx-lm==0.32.2 "mlx[cpu]==0.32.4" transformers==5.23.0 torch==2.13.0
"$place/venv/bin/python" -W ignore - <<'P'
import sys
from importlib.metadata import version

import mlx.core as mx
import torch
import transformers
from mlx_lm.models import gpt_oss
from transformers import GptOssConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

mx.set_default_device(mx.cpu)
SCALING = dict(
    rope_type="yarn", factor=32.0, beta_fast=32.0, beta_slow=1.0, original_max_position_embeddings=4096,
)
names = ("mlx-lm", "mlx", "transformers", "torch")
print(", ".join(f"{name} {version(name)}" for name in names))
default = GptOssConfig().rope_parameters
print("  default of transformers:", default)


def compare(truncate):
    """Return the largest difference of frequencies, relative, its place, and how many differ."""
    scaling = dict(SCALING, truncate=truncate)
    config = GptOssConfig(rope_parameters=dict(scaling, rope_theta=150000.0))
    expected, _ = ROPE_INIT_FUNCTIONS["yarn"](config, None)
    arguments = gpt_oss.ModelArgs(
        num_hidden_layers=1, num_local_experts=2, num_experts_per_tok=2, vocab_size=64, hidden_size=64,
        intermediate_size=64, head_dim=64, num_attention_heads=1, num_key_value_heads=1,
        rope_theta=150000, rope_scaling=scaling,
    )
    rope = gpt_oss.AttentionBlock(arguments).rope
    error = (1 / torch.tensor(rope._freqs.tolist()) / expected - 1).abs()
    print(f"  truncate {truncate}: {int((error > 1e-5).sum())} of {len(error)} frequencies differ, "
          f"number {int(error.argmax()) + 1} most, by {float(error.max()):.1%}")
    return float(error.max())


same, other = compare(True), compare(False)
sys.exit(not (default["truncate"] is False and same < 1e-5 and 0.7 < other < 0.8))
P
