"""Run the folders in FOLDER, keep their logits, and compare with those of an earlier run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging


def main() -> None:
    """Print a line for each folder."""
    logging.set_verbosity_error()
    if hasattr(logging, "disable_progress_bar"):
        logging.disable_progress_bar()
    print(f"transformers {transformers.__version__}")
    for folder in sorted(place.parent for place in Path(sys.argv[1]).glob("*/config.json")):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        )
        ids = tokenizer("jumps over 12 lazy DOGS", return_tensors="pt").input_ids
        with torch.no_grad():
            logits = model.eval()(ids).logits
        place = folder.parent / f"{folder.name}.json"
        said = f"{ids.shape[1]} tokens, largest logit {float(logits.abs().max()):.4f}"
        if place.exists():
            before = json.loads(place.read_text())
            assert before["ids"] == ids.tolist(), "another tokenizer"
            difference = float((torch.tensor(before["logits"]) - logits).abs().max())
            said += f", largest difference {difference:.1e}"
            assert difference < 1e-4, said
        place.write_text(json.dumps({"ids": ids.tolist(), "logits": logits.tolist()}))
        print(f"{folder.name}: {said}")


if __name__ == "__main__":
    main()
