#!/bin/sh
# transformers 4.57.6 opens a Mixtral that transformers 5 saved, warns of nothing, and computes other
# numbers; of Qwen3-MoE it makes 128 experts.
#
# Release 5 writes the base of rotary embeddings only into rope_parameters, where release 4 does not
# look: its default for the family is taken (Mixtral 1e6, OLMoE 1e4), whatever the model was trained
# with. Of Qwen3-MoE the number of experts is num_local_experts in files of release 5, and
# num_experts in release 4, whose default is 128, so shapes differ from the weights' and it raises.
# OLMoE and Qwen2-MoE, whose spelling stayed, open with their number of experts. Seen with
# transformers 5.23.0 and 4.57.6, torch 2.13.0, on random models.
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
# The older release and what it needs in other versions, in a folder of their own.
"$place/venv/bin/pip" install --quiet --no-deps --target "$place/old" \
    transformers==4.57.6 tokenizers==0.22.1 huggingface_hub==0.36.0 requests urllib3 idna charset_normalizer certifi
cat > "$place/save.py" <<'P'
import sys

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = dict(
    vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=4, num_experts_per_tok=2, max_position_embeddings=64,
)
OWN = {
    "mixtral": dict(num_local_experts=4), "olmoe": dict(num_experts=4),
    "qwen2_moe": dict(num_experts=4, moe_intermediate_size=64, shared_expert_intermediate_size=64),
    "qwen3_moe": dict(num_experts=4, moe_intermediate_size=64, head_dim=16),
}
print("saved by transformers", transformers.__version__)
torch.manual_seed(0)
for family, own in OWN.items():
    rope = {"rope_type": "default", "rope_theta": 100.0}
    config = AutoConfig.for_model(family, **SIZES, **own, rope_parameters=rope)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():  # sharper attention, so that positions matter
        for name, parameter in model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                parameter.mul_(20)
        logits = model(torch.arange(1, 33)[None]).logits
    model.save_pretrained(f"{sys.argv[1]}/{family}")
    torch.save(logits, f"{sys.argv[1]}/{family}.pt")
P
cat > "$place/read.py" <<'P'
import logging
import sys
import warnings

import torch
import transformers
from transformers import AutoModelForCausalLM


class Heard(logging.Handler):
    messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())


transformers.utils.logging.get_logger("transformers").addHandler(Heard())
print("read by transformers", transformers.__version__)
found = {}
for family in ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe"):
    Heard.messages.clear()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            model = AutoModelForCausalLM.from_pretrained(f"{sys.argv[1]}/{family}", dtype=torch.float32)
        except RuntimeError as error:
            found[family] = "raises"
            print(f"  {family}: RuntimeError, {str(error).splitlines()[0][:90]}")
            continue
    said = [m for m in (*Heard.messages, *map(str, seen)) if "rope" in m or "theta" in m]
    with torch.no_grad():
        logits = model.eval()(torch.arange(1, 33)[None]).logits
    before = torch.load(f"{sys.argv[1]}/{family}.pt")
    error = float((logits - before).norm() / before.norm())
    found[family] = "other numbers" if error > 0.01 and not said else "as saved"
    print(f"  {family}: rope_theta {model.config.rope_theta:g} in place of 100, logits {error:.0%} off, warnings {said}")
expected = {"mixtral": "other numbers", "olmoe": "other numbers", "qwen2_moe": "other numbers", "qwen3_moe": "raises"}
sys.exit(found != expected)
P
"$place/venv/bin/python" -W ignore "$place/save.py" "$place" 2> /dev/null
PYTHONPATH="$place/old" "$place/venv/bin/python" "$place/read.py" "$place"
