#!/bin/sh
# llm-compressor: a Mixtral that it quantized opens in transformers with random experts.
#
# It quantizes single experts as linear layers, and writes them as experts.N.gate_proj and so on in
# every family. transformers, which it is built on, knows those names of Qwen2-MoE and Qwen3-MoE, but of
# Mixtral w1, w2 and w3, and of GPT-OSS and GraniteMoE no single experts. One would expect a folder
# that opens there, as those of dense models do, or an error. Seen with llmcompressor 0.14.0.1,
# compressed-tensors 0.19.0, transformers 5.17.0 and torch 2.13.0, on random models in 4 bits: experts
# of those three are drawn anew at each load, with a table of missing and unexpected names as the
# only sign; of the Qwens logits are those before saving.
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet llmcompressor==0.14.0.1 compressed-tensors==0.19.0 \
    transformers==5.17.0 torch==2.13.0
cd "$place"
"$place/venv/bin/python" -W ignore - 2> /dev/null <<'P'
import os
import sys
from importlib.metadata import version

os.environ["LLM_COMPRESSOR_LOG_DISABLED"] = "true"

import torch
from compressed_tensors.quantization import QuantizationScheme
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = dict(
    vocab_size=64, hidden_size=64, intermediate_size=64, moe_intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=2, head_dim=32, num_local_experts=4, num_experts=4,
    num_experts_per_tok=2, max_position_embeddings=64, tie_word_embeddings=False,
)
WEIGHTS = dict(num_bits=4, type="int", symmetric=True, strategy="group", group_size=32)
IDS = torch.arange(1, 33)[None]


def run(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def compare(one, other):
    return float((one - other).norm() / other.norm())


names = ("llmcompressor", "compressed-tensors", "transformers", "torch")
print(", ".join(f"{name} {version(name)}" for name in names))
found = {}
for family in ("qwen2_moe", "qwen3_moe", "mixtral", "gpt_oss", "granitemoe"):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES)).save_pretrained(f"{family}-plain")
    model = AutoModelForCausalLM.from_pretrained(f"{family}-plain", dtype=torch.float32)
    scheme = QuantizationScheme(targets=["Linear"], weights=WEIGHTS)
    kept = ["lm_head", r"re:.*gate$", r"re:.*router.*"]
    oneshot(model=model, recipe=QuantizationModifier(config_groups={"all": scheme}, ignore=kept))
    before = run(model)
    model.save_pretrained(family, save_compressed=True)
    logits, kinds = [], {}
    for seed in (1, 2):
        torch.manual_seed(seed)
        model, report = AutoModelForCausalLM.from_pretrained(
            family, dtype=torch.float32, output_loading_info=True
        )
        kinds = {kind: len(keys) for kind, keys in report.items() if keys}
        logits.append(run(model))
    errors = compare(logits[0], before), compare(*logits)
    random = min(errors) > 0.05 and "missing_keys" in kinds
    found[family] = "random" if random else "as saved" if max(errors) < 1e-4 and not kinds else "unclear"
    print(f"  {family}: {found[family]}; off by {errors[0]:.0%}, two loads apart by {errors[1]:.0%}, {kinds}")
sys.exit(list(found.values()) != ["as saved"] * 2 + ["random"] * 3)
P
