"""Shared parts of the scripts of both peers; run in their environments."""

from __future__ import annotations

import argparse
import os
from pathlib import Path


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that both take."""
    made = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    made.add_argument("model", type=Path)
    made.add_argument("tokens", type=Path, help="int64 [samples, length], .npy")
    made.add_argument("out", type=Path)
    made.add_argument("--bits", type=int, default=4)
    made.add_argument("--group-size", type=int, default=128)
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--batch-size", type=int, default=4, help="samples in a forward pass")
    made.add_argument("--experts-only", action="store_true", help="attention stays in 16 bits")
    return made


def use_processor(threads: int) -> None:
    """Use so many threads and no GPU; called before torch is imported, which reads it once."""
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(threads)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
