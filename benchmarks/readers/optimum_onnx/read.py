"""Run an ONNX folder by ``ORTModelForCausalLM``, without our code: ``read.py FOLDER TOKENS``.

The tokenizer that transformers 4 makes of the folder must give the same ids, the logits of the
prompt must be those of our own session within 1e-4, and the greedy tokens the same.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer


def main() -> int:
    """Print what was compared; return the exit code."""
    folder, known = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
    names = ("optimum-onnx", "optimum", "transformers", "onnxruntime")
    print(", ".join(f"{name} {version(name)}" for name in names))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(known["text"], return_tensors="pt")
    same = inputs.input_ids[0].tolist() == known["prompt"]
    print(f"inputs of the tokenizer: {', '.join(inputs)}; ids equal: {same}")
    model = ORTModelForCausalLM.from_pretrained(folder)
    heads = model.config.num_key_value_heads, model.config.head_dim
    if (model.num_key_value_heads, model.embed_size_per_head) != heads:
        print("it takes its cache for one of other sizes: heads and their size have to be set")
        try:
            model(**inputs)
        except Exception as raised:  # whatever it may raise
            print(f"  else {type(raised).__name__}: {' '.join(str(raised).split())[:200]}")
        model.num_key_value_heads, model.embed_size_per_head = heads
    logits = model(**inputs).logits[0]
    wanted = torch.tensor(known["logits"])
    error = float((logits - wanted).norm() / wanted.norm())
    count = len(known["tokens"])
    out = model.generate(**inputs, max_new_tokens=count, do_sample=False, eos_token_id=None)
    found = out[0, len(known["prompt"]) :].tolist()
    equal = sum(map(int.__eq__, found, known["tokens"]))
    print(f"logits of the prompt, to our session: {error:.1e} relative")
    print(f"inputs of the graph: {', '.join(sorted(model.input_names)[:3])}, ...")
    print(f"greedy tokens, equal: {equal} of {count}")
    return int(not same or error > 1e-4 or equal < count)


if __name__ == "__main__":
    sys.exit(main())
