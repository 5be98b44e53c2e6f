"""Put the trained model and its texts into the folder of ``builtin:tiny-moe``.

    python benchmarks/tiny_moe/pack.py --work /tmp/tiny-moe

Copies the weights and the tokenizer, and writes the held-out texts: whole modules of the standard
library, in an order given by a hash of their path.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
from pathlib import Path

from corpus import Module, modules

BUILTIN = Path(__file__).parents[2] / "moe2edge" / "builtin" / "tiny-moe"
MODEL_FILES = (
    "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
    "tokenizer_config.json",
)  # fmt: skip
SIZES = {"calibration": 420_000, "evaluation": 240_000}


def excerpt(corpus: list[Module], split: str) -> list[Module]:
    """Choose whole modules of a split up to the text's size, none longer than a tenth of it."""
    size, taken, total = SIZES[split], [], 0
    order = sorted(corpus, key=lambda m: hashlib.sha256(m.path.encode()).digest())
    for module in order:
        if module.split == split and len(module.text) <= size // 10 and total < size:
            taken.append(module)
            total += len(module.text)
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    args = parser.parse_args()
    BUILTIN.mkdir(parents=True, exist_ok=True)
    for name in MODEL_FILES:
        shutil.copyfile(args.work / "model" / name, BUILTIN / name)
    corpus = modules()
    for split in SIZES:
        taken = excerpt(corpus, split)
        (BUILTIN / f"{split}.txt").write_text("\n".join(m.text for m in taken), "utf-8")
        print(f"{split}: {len(taken)} modules: {', '.join(m.path for m in taken)}")


if __name__ == "__main__":
    main()
