#!/bin/sh
# transformers: a Mixtral in compressed-tensors does not load unless its experts are quantized.
#
# A quantization_config says in `targets` and `ignore` which modules are quantized, so a folder with
# int4 attention and plain experts is a usual one; dense models load so. Seen with transformers 5.23.0,
# compressed-tensors 0.20.1 and torch 2.13.0: Mixtral and Qwen3-MoE raise a RuntimeError about
# conversion (torch.cat() of no tensors), as all experts are looked for in packed form whatever the
# config says, and plain ones are "missing". Llama, GPT-OSS and GraniteMoE, whose files have no
# tensors of single experts to join, load the same and compute the expected logits. So do Mixtral
# and Qwen3-MoE once their experts are packed, too.
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet transformers==5.23.0 compressed-tensors==0.20.1 torch==2.13.0
"$place/venv/bin/python" -W ignore - "$place/model" 2> /dev/null <<'P'
import json
import re
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

folder = Path(sys.argv[1])
tensors, config = folder / "model.safetensors", folder / "config.json"
SIZES = dict(
    vocab_size=64, hidden_size=64, intermediate_size=64, moe_intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=2, head_dim=32, num_local_experts=4, num_experts=4,
    num_experts_per_tok=2, max_position_embeddings=64, tie_word_embeddings=False,
)
WEIGHTS = dict(num_bits=4, type="int", symmetric=True, strategy="group", group_size=32)
ATTENTION, EXPERTS = r"self_attn\.[qkvo]_proj", r"experts\.\d+\.\w+"
IDS = torch.arange(1, 33)[None]


def load():
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model.eval()(IDS).logits


def attempt(family, packed, ignored):
    """Save a random model, pack the modules that match, and load the folder."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES)).save_pretrained(folder)
    scheme = QuantizationScheme(targets=["Linear"], weights=WEIGHTS, format="pack-quantized")
    library = BaseCompressor.get_value_from_registry("pack-quantized")
    rounded, compressed = {}, {}
    for name, tensor in load_file(tensors).items():
        module = name.removesuffix(".weight")
        if not re.search(f"({packed})$", module):
            rounded[name] = compressed[name] = tensor
            continue
        scale = tensor.unflatten(1, (-1, 32)).abs().amax(-1) / 7
        parts = library.compress({"weight": tensor, "weight_scale": scale}, scheme)
        rounded[name] = library.decompress(parts, scheme)["weight"]
        compressed |= {f"{module}.{kind}": part.contiguous() for kind, part in parts.items()}
    save_file(rounded, tensors, {"format": "pt"})
    expected = load()
    save_file(compressed, tensors, {"format": "pt"})
    how = QuantizationConfig(
        config_groups={"group_0": scheme}, ignore=["lm_head", *ignored], format="pack-quantized",
        quantization_status="compressed",
    )
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": how.to_dict()}))
    try:
        logits = load()
    except RuntimeError as error:
        return f"raises, {str(error)[:70]}"
    error = float((logits - expected).norm() / expected.norm())
    return f"{'loads' if error < 1e-4 else 'loads another model'}, logits {error:.0e} off"


names = ("transformers", "compressed-tensors", "torch")
print(", ".join(f"{name} {version(name)}" for name in names))
ALONE = (ATTENTION, [r"re:.*mlp.*", r"re:.*block_sparse_moe.*"])
WITH = (f"{ATTENTION}|{EXPERTS}", [])
found = {}
for family in ("llama", "gpt_oss", "granitemoe", "mixtral", "qwen3_moe"):
    found[family, "attention alone"] = attempt(family, *ALONE)
for family in ("mixtral", "qwen3_moe"):
    found[family, "experts, too"] = attempt(family, *WITH)
for (family, what), result in found.items():
    print(f"  {family}, {what}: {result}")
sys.exit([result.split(",")[0] for result in found.values()] != ["loads"] * 3 + ["raises"] * 2 + ["loads"] * 2)
P
