"""Time of an exhaustive expert search, beside that of a plain Expert Drop by `reap`.

    python -m benchmarks.trimming.search_cost --models DIR --data DIR

Both run on the same calibration tokens in one process, in turn, several times; the medians are
compared, and the time of each part of the search is shown. Where other work runs on the machine,
processor time says more than wall time.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import moe2edge
from benchmarks import _texts as texts
from benchmarks._held_out import load_samples
from benchmarks._study import QUIET
from moe2edge import Checkpoint
from moe2edge.calibration import evidence
from moe2edge.calibration.tokens import Tokens
from moe2edge.numerics import subset_loss
from moe2edge.pipeline.runner import run_passes
from moe2edge.storage.work_folder import WorkFolder

# Functions of a search whose time is shown, in the modules whose names are called.
PARTS = (
    (evidence, "compute_products"),
    (evidence, "make_part"),
    (subset_loss, "search_exhaustively"),
    (subset_loss, "search_beam"),
)


def load_all_domains(checkpoint: Checkpoint, data: Path, samples: int, length: int) -> Tokens:
    """Return samples in equal parts of all domains."""
    parts, share = [], samples // len(texts.DOMAINS)
    with tempfile.TemporaryDirectory() as folder:
        for path in texts.write_texts(data, Path(folder))["calibration"].values():
            text = {"text": str(path), "samples": share, "length": length}
            parts.append(load_samples(checkpoint, "calibration", text).ids)
    return Tokens(torch.cat(parts), "all domains", "")


def measure_seconds(
    checkpoint: Checkpoint, step: dict[str, Any], tokens: Tokens
) -> tuple[float, float]:
    """Return wall and processor time of a recipe of one pass; text was read before."""
    parsed = moe2edge.parse_recipe({"passes": [step]}).resolve(checkpoint.model)
    with tempfile.TemporaryDirectory() as work:
        wall, processor = time.perf_counter(), time.process_time()
        run_passes(checkpoint.model, parsed, tokens, WorkFolder(Path(work)), QUIET)
        return time.perf_counter() - wall, time.process_time() - processor


def add_timer(module: Any, name: str, spent: dict[str, float]) -> None:
    """Let a function add its time to ``spent``."""
    inner: Callable[..., Any] = getattr(module, name)

    def outer(*given: Any) -> Any:
        begun = time.perf_counter()
        result = inner(*given)
        spent[name] = spent.get(name, 0.0) + time.perf_counter() - begun
        return result

    setattr(module, name, outer)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", type=Path, required=True, help="folder of checkpoints")
    parser.add_argument("--data", type=Path, required=True, help="folder of texts")
    parser.add_argument("--model", default="mixtral-mini", help="which of them")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    checkpoint = moe2edge.open_checkpoint(options.models / options.model)
    tokens = load_all_domains(checkpoint, options.data, options.samples, options.length)
    reap = {"expert_drop": {"keep": 0.5, "criterion": "reap"}}
    search = {"expert_search": {"keep": 0.5}}
    spent: dict[str, float] = {}
    for module, name in PARTS:
        add_timer(module, name, spent)
    reaps, searches = [], []
    for _ in range(options.repeats):
        reaps.append(measure_seconds(checkpoint, reap, tokens))
        searches.append(measure_seconds(checkpoint, search, tokens))
    for name, total in spent.items():
        print(f"{name}: {total / options.repeats:.2f} s of wall time per search")
    print(
        f"{options.model}, {tokens.ids.numel():,} tokens, {torch.get_num_threads()} threads, "
        f"{options.repeats} runs each"
    )
    for n, kind in enumerate(("wall", "processor")):
        a, b = ([times[n] for times in of] for of in (reaps, searches))
        print(
            f"{kind} time: reap {', '.join(f'{t:.1f}' for t in a)} s; "
            f"search {', '.join(f'{t:.1f}' for t in b)} s; "
            f"ratio of medians {statistics.median(b) / statistics.median(a):.2f}"
        )


if __name__ == "__main__":
    main()
