#!/bin/sh
# transformers: Jamba multiplies with the weight of a linear layer that it never calls.
#
# Tools that calibrate quantization record what each nn.Linear gets by a forward hook. One would
# expect that every nn.Linear of a model is called in a forward pass. Seen with transformers 5.23.0
# and torch 2.13.0: of a Jamba model, mamba.dt_proj is the one that no hook sees, as its weight is
# taken out and multiplied by hand; unless the config has an attribute `_is_quantized`, of any
# value, False as well. With it the module is called, and the logits are the same.
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet transformers==5.23.0 torch==2.13.0
"$place/venv/bin/python" - <<'P'
import sys

import torch
import transformers
from torch import nn

config = transformers.JambaConfig(
    vocab_size=96, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_experts=4,
    num_attention_heads=4, num_key_value_heads=2, attn_layer_period=2, attn_layer_offset=1,
    expert_layer_period=2, expert_layer_offset=1, mamba_dt_rank=4,
)
torch.manual_seed(0)
model = transformers.JambaForCausalLM(config).eval()
linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
called = set()
for name, module in linear.items():
    module.register_forward_hook(lambda *_, name=name: called.add(name))


@torch.no_grad()
def run():
    called.clear()
    logits = model(torch.arange(1, 9)[None], use_cache=False).logits
    return sorted(linear.keys() - called), logits


missed, logits = run()
model.config._is_quantized = False
missed_then, logits_then = run()
apart = float((logits - logits_then).abs().max())
print("transformers", transformers.__version__, "torch", torch.__version__)
print("  not called:", missed, "- with _is_quantized = False:", missed_then, f"({apart:.1e} apart)")
sys.exit((missed, missed_then) != (["model.layers.0.mamba.dt_proj"], []) or apart > 1e-5)
P
