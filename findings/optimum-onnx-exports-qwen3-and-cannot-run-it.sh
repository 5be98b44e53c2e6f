#!/bin/sh
# optimum-onnx: exports Qwen3 and Qwen3-MoE, and cannot run what it exported if head_dim is not
# hidden_size / num_attention_heads.
#
# That is so in published models: Qwen3-0.6B has 1024, 16 and 128, Qwen3-30B-A3B has 2048, 32 and
# 128. ORTModelForCausalLM computes the size of empty keys and values by that division, and reads
# head_dim for four other families only; so the first step fails inside of onnxruntime with
# "Got: 16 Expected: 32". The exported graph itself is right: with the attribute set by hand its
# logits are those of transformers. Seen with optimum-onnx 0.1.0, optimum 2.1.0, transformers
# 4.57.6 and onnxruntime 1.31.1, on random models.
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet optimum-onnx==0.1.0 optimum==2.1.0 transformers==4.57.6 \
    onnx==1.23.2 onnxruntime==1.31.1 torch==2.13.0
"$place/venv/bin/python" -W ignore - "$place" <<'PY'
import sys
from importlib.metadata import version

import torch
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = dict(
    vocab_size=64, hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_experts=4,
    num_experts_per_tok=2, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=64,
)
names = ("optimum-onnx", "optimum", "transformers", "onnxruntime")
print(*(f"{name} {version(name)}" for name in names))
found = {}
for family in ("qwen3", "qwen3_moe"):
    for size in (16, 32):
        torch.manual_seed(0)
        config = AutoConfig.for_model(family, head_dim=size, **SIZES)
        model = AutoModelForCausalLM.from_config(config).eval()
        folder = f"{sys.argv[1]}/{family}-{size}"
        model.save_pretrained(folder)
        exported = ORTModelForCausalLM.from_pretrained(folder, export=True)
        ids = torch.arange(1, 9)[None]
        inputs = dict(input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=ids - 1)
        try:
            exported(**inputs)
            runs = "runs"
        except Exception as error:
            runs = "fails"
            print(" ", " ".join(str(error).split())[-90:])
        exported.embed_size_per_head = size
        with torch.no_grad():
            off = float((exported(**inputs).logits - model(ids).logits).abs().max())
        found[family, size] = runs
        print(f"  {family}, head_dim {size}: {runs}; told its size, logits are {off:.0e} off")
        assert off < 1e-4
expected = {(family, size): "runs" if size == 16 else "fails" for family, size in found}
sys.exit(found != expected)
PY
