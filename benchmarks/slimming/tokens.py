"""Calibration and evaluation tokens of a model, the same for every tool.

    python -m benchmarks.slimming.tokens MODEL DATA OUT [--builtin]

Writes ``calibration.npy``, ``evaluation.npy``, and ``tokens.json`` with their source: equal parts
of encyclopedia, math and plays, or the built-in text.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import _texts as texts
from benchmarks._held_out import load_samples
from moe2edge import open_checkpoint

DOMAINS = ("encyclopedia", "math", "plays")
SAMPLES = {"calibration": 128, "evaluation": 72}
LENGTH, SEED = 256, 0


def write_mixes(data: Path, folder: Path, most: int | None) -> dict[str, str]:
    """Return by purpose equal parts of the domains, as ``--calib`` takes them, of so many bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    files: Mapping[str, Mapping[str, Path]] = texts.write_texts(data, folder)
    if most is not None:
        for path in (path for paths in files.values() for path in paths.values()):
            path.write_text(path.read_bytes()[:most].decode("utf-8", "ignore"), "utf-8")
    return {
        purpose: ",".join(f"{paths[domain]}:1" for domain in DOMAINS)
        for purpose, paths in files.items()
    }


def cut_samples(model: Path, purpose: str, text: str, path: Path, samples: int) -> dict[str, Any]:
    """Write samples of a text for the tokenizer of a model, and return their provenance."""
    options = {"text": text, "samples": samples, "length": LENGTH, "seed": SEED}
    found = load_samples(open_checkpoint(model), purpose, options)
    np.save(path, found.ids.numpy())
    return {**options, "sha256": found.sha256}


def main() -> None:
    """Cut calibration and evaluation."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--builtin", action="store_true", help="the built-in text")
    parser.add_argument("--samples", type=int, help="samples for calibration, instead of 128")
    parser.add_argument("--bytes", type=int, help="bytes of each text; default: all")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    purposes = dict.fromkeys(SAMPLES, "builtin")
    if not given.builtin:
        purposes = write_mixes(given.data, given.out / "texts", given.bytes)
    counts = SAMPLES | ({"calibration": given.samples} if given.samples else {})
    said = {
        purpose: cut_samples(
            given.model, purpose, text, given.out / f"{purpose}.npy", counts[purpose]
        )
        for purpose, text in purposes.items()
    }
    (given.out / "tokens.json").write_text(json.dumps(said, indent=1))


if __name__ == "__main__":
    main()
