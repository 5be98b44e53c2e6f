#!/bin/sh
# transformers: in a saved Gemma 4 config, an empty per_layer_config is what says the head size.
#
# Gemma4TextConfig takes global_head_dim, the head size of layers with full attention, and does not
# save it: what is saved is per_layer_config, in which layers differ. Where the size is that of all
# other layers, that is an empty object. One would expect that a key with nothing in it may go, as
# programs do that tidy configs. Seen with transformers 5.23.0 and torch 2.13.0: without it the
# default of global_head_dim comes back, and the query matrix of such layers grows from 64 to 2048
# rows.
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet transformers==5.23.0 torch==2.13.0
"$place/venv/bin/python" - <<'P'
import sys

import torch
import transformers

config = transformers.Gemma4TextConfig(
    vocab_size=96, vocab_size_per_layer_input=96, hidden_size=64, intermediate_size=96,
    hidden_size_per_layer_input=0, num_hidden_layers=2, num_attention_heads=4, head_dim=16,
    num_key_value_heads=2, global_head_dim=16, num_global_key_value_heads=2,
    layer_types=["sliding_attention", "full_attention"],
)
saved = config.to_dict()
empty = saved.get("per_layer_config") == {} and "global_head_dim" not in saved
tidied = {key: value for key, value in saved.items() if value != {}}


def list_rows(settings):
    again = transformers.Gemma4TextConfig.from_dict(settings)
    with torch.device("meta"):
        model = transformers.Gemma4ForCausalLM._from_config(again)
    return [layer.self_attn.q_proj.weight.shape[0] for layer in model.model.layers]


rows, rows_tidied = list_rows(dict(saved)), list_rows(tidied)
print("transformers", transformers.__version__, "torch", torch.__version__)
print("  saved as an empty object:", empty)
print("  rows of q_proj:", rows, "- without the empty object:", rows_tidied)
sys.exit(not empty or (rows, rows_tidied) != ([64, 64], [64, 2048]))
P
