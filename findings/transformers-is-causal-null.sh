#!/bin/sh
# transformers: "is_causal": null in config.json lets tokens see the future, with eager attention.
#
# A null in a config means "not set" for most keys, so that the default holds: a decoder is causal.
# Seen with transformers 5.23.0 and torch 2.13.0 for MixtralForCausalLM: with sdpa, the default, null
# is causal; with attn_implementation="eager" attention is bidirectional, and the last token changes
# the logits of the first. So two implementations of one model differ, and nothing warns.
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
cd "$place"
"$place/venv/bin/python" - <<'P'
import json
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

torch.manual_seed(0)
sizes = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 2,
}
MixtralForCausalLM(MixtralConfig(**sizes)).save_pretrained("m")
path = Path("m/config.json")
plain = json.loads(path.read_text())


def sees_the_future(said, attention):
    """Return whether the last token changes the logits of the first."""
    path.write_text(json.dumps({**plain, **said}))
    model = AutoModelForCausalLM.from_pretrained("m", attn_implementation=attention).eval()
    with torch.no_grad():
        a, b = (model(torch.tensor([[1, 2, 3, last]])).logits[0, 0] for last in (4, 5))
    return bool((a - b).abs().max() > 1e-4)


cases = [({}, "eager"), ({"is_causal": None}, "sdpa"), ({"is_causal": None}, "eager")]
seen = [sees_the_future(*case) for case in cases]
print("transformers", transformers.__version__, "torch", torch.__version__)
for case, value in zip(cases, seen, strict=True):
    print(f"  {case}: {'sees the future' if value else 'causal'}")
sys.exit(seen != [False, False, True])
P
