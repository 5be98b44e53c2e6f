#!/bin/sh
# transformers: with router logits asked for, MoE models fail on a mask of four dimensions.
#
# A mask [1, 1, length, length] is a documented way to say which token sees which. One would expect
# that `output_router_logits: true` in a config, with which models are published, has no effect
# on that. Seen with transformers 5.23.0 and torch 2.13.0: Mixtral computes the balancing loss from
# the mask though there are no labels, takes it for [batch, length], and raises a RuntimeError about
# sizes. The same call with output_router_logits=False, or with a mask of two dimensions, works.
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet transformers==5.23.0 torch==2.13.0
"$place/venv/bin/python" - <<'P'
import sys

import torch
import transformers

config = transformers.MixtralConfig(
    vocab_size=96, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_local_experts=4,
    num_attention_heads=4, num_key_value_heads=2, output_router_logits=True,
)
model = transformers.MixtralForCausalLM(config).eval()
ids = torch.arange(1, 9)[None]
flat = torch.ones(1, 8)
square = torch.full((8, 8), torch.finfo(torch.float32).min).triu(1)[None, None]


def attempt(mask, **more):
    try:
        with torch.no_grad():
            return tuple(model(ids, attention_mask=mask, **more).logits.shape)
    except RuntimeError as error:
        return f"RuntimeError: {error}"


found = {
    "two dimensions": attempt(flat),
    "four dimensions": attempt(square),
    "four dimensions, output_router_logits=False": attempt(square, output_router_logits=False),
}
print("transformers", transformers.__version__, "torch", torch.__version__)
for what, result in found.items():
    print(f"  {what}: {result}")
right = [not isinstance(result, str) for result in found.values()]
sys.exit(right != [True, False, True])
P
