"""Calibration and evaluation tokens of a model, the same for every tool.

    python benchmarks/slimming/tokens.py MODEL DATA OUT [--builtin]

Writes ``calibration.npy``, ``evaluation.npy`` and ``tokens.json``, which says where they are from:
equal parts of encyclopedia, math and plays, or the built-in text.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moe2edge.calibration import tokens
from moe2edge.pipeline import recipe
from moe2edge.storage.checkpoint import open_checkpoint
from moe2edge.storage.tokenizer import load_tokenizer

sys.path.append(str(Path(__file__).parent.parent / "trimming"))
import texts

DOMAINS = ("encyclopedia", "math", "plays")
SAMPLES = {"calibration": 128, "evaluation": 72}
LENGTH, SEED = 256, 0


def mixes(data: Path, folder: Path, most: int | None) -> dict[str, str]:
    """By purpose equal parts of the domains, as ``--calib`` takes them, of so many bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    files: Mapping[str, Mapping[str, Path]] = texts.write_texts(data, folder)
    if most is not None:
        for path in (path for paths in files.values() for path in paths.values()):
            path.write_text(path.read_bytes()[:most].decode("utf-8", "ignore"), "utf-8")
    return {
        purpose: ",".join(f"{paths[domain]}:1" for domain in DOMAINS)
        for purpose, paths in files.items()
    }


def cut(model: Path, purpose: str, text: str, path: Path, samples: int) -> dict[str, Any]:
    """Samples of a text for the tokenizer of a model, written to a file."""
    options = {"text": text, "samples": samples, "length": LENGTH, "seed": SEED}
    source = recipe.parse_section(purpose, options)
    checkpoint = open_checkpoint(str(model))
    limits = (LENGTH, checkpoint.model.vocabulary)
    found = tokens.load_tokens(source, load_tokenizer(checkpoint.folder), purpose, limits)
    np.save(path, found.ids.numpy())
    return {**options, "sha256": found.sha256}


def main() -> None:
    """Cut both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--builtin", action="store_true", help="the built-in text")
    parser.add_argument("--samples", type=int, help="of calibration, instead of 128")
    parser.add_argument("--bytes", type=int, help="of each text; all of it if not given")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    purposes = dict.fromkeys(SAMPLES, "builtin")
    if not given.builtin:
        purposes = mixes(given.data, given.out / "texts", given.bytes)
    counts = SAMPLES | ({"calibration": given.samples} if given.samples else {})
    said = {
        purpose: cut(given.model, purpose, text, given.out / f"{purpose}.npy", counts[purpose])
        for purpose, text in purposes.items()
    }
    (given.out / "tokens.json").write_text(json.dumps(said, indent=1))


if __name__ == "__main__":
    main()
