#!/bin/sh
# transformers: a gap in position_ids is attention across the gap with a cache, and none without.
#
# A model of transformers 5.23.0 (Qwen3-MoE here; its masks are those of most decoders) is called
# with one sequence whose positions jump from 7 to 100, and no attention mask. A reader of the
# documentation expects one causal sequence. Seen with torch 2.13.0:
#
#   use_cache left out or True: tokens behind the gap attend to tokens before it
#   use_cache=False:            they do not; the gap is taken for the start of a second packed text
#   attention_mask of ones:     they do, in both cases
#
# So use_cache, which should change speed only, changes logits, without a warning. It matters for
# whoever checks a model at the far end of its context with a short text, as `moe2edge verify` does.
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
"$place/venv/bin/python" - <<'P'
import sys

import torch
import transformers
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

torch.manual_seed(0)
config = Qwen3MoeConfig(
    vocab_size=96, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, moe_intermediate_size=32, intermediate_size=64,
    num_experts=4, num_experts_per_tok=2,
)
model = Qwen3MoeForCausalLM(config).eval()
ids = torch.randint(1, 96, (1, 16))
other = ids.clone()
other[0, :8] = 1  # another text before the gap
positions = torch.cat([torch.arange(8), torch.arange(100, 108)])[None]


def reaches(**options):
    """Return whether the text before the gap changes logits behind it."""
    with torch.no_grad():
        a, b = (model(x, position_ids=positions, **options).logits for x in (ids, other))
    return float((a - b)[0, 8:].abs().max()) > 1e-3


ones = torch.ones_like(ids)
seen = {
    "use_cache left out": reaches(),
    "use_cache=False": reaches(use_cache=False),
    "use_cache=False, mask of ones": reaches(use_cache=False, attention_mask=ones),
}
print("transformers", transformers.__version__, "torch", torch.__version__)
for name, value in seen.items():
    print(f"  {name}: the text before the gap {'reaches' if value else 'does not reach'} behind it")
sys.exit(list(seen.values()) != [True, False, True])
P
