#!/bin/sh
# transformers: "return_dict": false in config.json breaks an MoE model, whatever the call asks for.
#
# The key says how a model hands its result over, and every call can override it. A model whose
# config has it false should return tuples. Seen with transformers 5.23.0 and torch 2.13.0: the call
# of MixtralForCausalLM fails inside of the model ('tuple' object has no attribute
# 'last_hidden_state'), with return_dict=True given to the call as well.
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
"$place/venv/bin/python" - <<'P'
import sys

import torch
import transformers
from transformers import MixtralConfig, MixtralForCausalLM

sizes = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 2,
}
ids = torch.arange(4)[None]


def call(said, **options):
    """Return what a call of a model with this key in its config ends with."""
    model = MixtralForCausalLM(MixtralConfig(**sizes, **said)).eval()
    try:
        with torch.no_grad():
            return type(model(ids, **options)).__name__
    except AttributeError as error:
        return f"AttributeError: {error}"


seen = {
    "without the key": call({}),
    "false": call({"return_dict": False}),
    "false, and return_dict=True in the call": call({"return_dict": False}, return_dict=True),
}
print("transformers", transformers.__version__, "torch", torch.__version__)
for name, value in seen.items():
    print(f"  {name}: {value}")
first, second, third = (value.startswith("AttributeError") for value in seen.values())
sys.exit((first, second, third) != (False, True, True))
P
