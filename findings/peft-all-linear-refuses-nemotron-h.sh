#!/bin/sh
# peft: "all-linear" picks a module of Nemotron-H that peft itself then refuses, by the model's name.
#
# LoRA's target_modules="all-linear" stands for every linear module but the head, and is what one
# takes where names of modules are not known. Of models whose type is on a list (nemotron_h among
# them) peft refuses out_proj of the state space layers, as fused kernels read its weight past the
# adapter. "all-linear" does not leave it out, so it raises; so does the weight as a target
# parameter. Seen with peft 0.21.2, transformers 5.23.0 and torch 2.13.0. Granite 4, whose mixers
# have the same modules, is on no list, and gets an adapter on out_proj.
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet peft==0.21.2 transformers==5.23.0 torch==2.13.0
"$place/venv/bin/python" -W ignore - <<'P'
import sys

import peft
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

COMMON = dict(vocab_size=32, hidden_size=32, intermediate_size=32, num_attention_heads=2, num_key_value_heads=1)
NEMOTRON = AutoConfig.for_model(
    "nemotron_h", **COMMON, layers_block_type=["linear_attention", "full_attention"], head_dim=16,
    mamba_num_heads=4, mamba_head_dim=16, ssm_state_size=8, n_groups=1, expand=2, chunk_size=16,
)
GRANITE = AutoConfig.for_model(
    "granitemoehybrid", **COMMON, layer_types=["mamba", "attention"], num_hidden_layers=2,
    shared_intermediate_size=32, num_local_experts=0, mamba_n_heads=4, mamba_d_head=16,
    mamba_expand=2, mamba_d_state=8, mamba_n_groups=1,
)


def try_lora(config, **targets):
    model = AutoModelForCausalLM.from_config(config)
    try:
        found = peft.get_peft_model(model, peft.LoraConfig(r=2, **targets))
    except ValueError as error:
        return f"refused: {str(error).partition('. ')[0]}"
    return "adapted" if any("out_proj.lora_A" in name for name, _ in found.named_parameters()) else "others"


place = "model.layers.0.mixer.out_proj.weight"
results = {
    "nemotron_h, all-linear": try_lora(NEMOTRON, target_modules="all-linear"),
    "nemotron_h, the weight": try_lora(NEMOTRON, target_parameters=[place]),
    "nemotron_h, in_proj": try_lora(NEMOTRON, target_modules=["in_proj"]),
    "granitemoehybrid, all-linear": try_lora(GRANITE, target_modules="all-linear"),
}
print("peft", peft.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
for name, result in results.items():
    print(f"  {name}: {result}")
expected = ["refused", "refused", "others", "adapted"]
sys.exit([result.partition(":")[0] for result in results.values()] != expected)
P
