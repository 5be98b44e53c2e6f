"""Print the greedy tokens, and the logits behind the prompt, of an ONNX folder: our own session."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from moe2edge.pipeline.registry import find_target
from moe2edge.runtime.generation import generate
from moe2edge.storage.tokenizer import load_tokenizer

TEXT, TOKENS = "def read_json(path):", 48


def main() -> None:
    """Print one JSON document."""
    folder = Path(sys.argv[1])
    runtime = find_target("onnx").reopen(folder)
    prompt = load_tokenizer(folder)(TEXT)["input_ids"]
    logits = runtime.logits(torch.tensor([prompt]))[0].tolist()
    tokens = list(generate(runtime, prompt, max_tokens=TOKENS))
    print(json.dumps({"text": TEXT, "prompt": prompt, "logits": logits, "tokens": tokens}))


if __name__ == "__main__":
    main()
