"""What an exhaustive expert search costs, next to a plain Expert Drop by `reap`.

    python benchmarks/trimming/search_cost.py --models DIR --data DIR

Both run on the same calibration tokens in one process, in turn, several times; the medians are
compared, and how long the parts of the search take is shown. Where other work runs on the machine,
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

import run
import texts
import torch
import yaml

from moe2edge.calibration import tokens
from moe2edge.calibration.sources import TextSource
from moe2edge.calibration.tokens import Tokens
from moe2edge.numerics import subset_loss as subsets
from moe2edge.pipeline import recipe
from moe2edge.pipeline.runner import run_passes
from moe2edge.storage.checkpoint import Checkpoint, open_checkpoint
from moe2edge.storage.tokenizer import load_tokenizer
from moe2edge.storage.work_folder import WorkFolder


def tokens_of(checkpoint: Checkpoint, data: Path, samples: int, length: int) -> Tokens:
    """Equal parts of all domains."""
    tokenizer, share = load_tokenizer(checkpoint.folder), samples // len(texts.DOMAINS)
    parts = []
    with tempfile.TemporaryDirectory() as folder:
        for path in texts.write_texts(data, Path(folder))["calibration"].values():
            source = TextSource(text=str(path), samples=share, length=length)
            limits = (length, checkpoint.model.vocabulary)
            parts.append(tokens.load_tokens(source, tokenizer, "calibration", limits).ids)
    return Tokens(torch.cat(parts), "all domains", "")


def seconds(checkpoint: Checkpoint, step: dict[str, Any], tokens: Tokens) -> tuple[float, float]:
    """Wall and processor time of a recipe of one pass, without reading text or evaluation."""
    parsed = recipe.parse(yaml.safe_dump({"passes": [step]})).resolve(checkpoint.model)
    with tempfile.TemporaryDirectory() as work:
        wall, processor = time.perf_counter(), time.process_time()
        run_passes(checkpoint.model, parsed, tokens, WorkFolder(Path(work)), run.QUIET)
        return time.perf_counter() - wall, time.process_time() - processor


def timed(name: str, spent: dict[str, float]) -> None:
    """Let a function of `moe2edge.numerics.subset_loss` add its time to ``spent``."""
    inner: Callable[..., Any] = getattr(subsets, name)

    def outer(*given: Any) -> Any:
        begun = time.perf_counter()
        result = inner(*given)
        spent[name] = spent.get(name, 0.0) + time.perf_counter() - begun
        return result

    setattr(subsets, name, outer)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, required=True, help="folder of checkpoints")
    parser.add_argument("--data", type=Path, required=True, help="folder of texts")
    parser.add_argument("--model", default="mixtral-mini", help="which of them")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    checkpoint = open_checkpoint(str(options.models / options.model))
    tokens = tokens_of(checkpoint, options.data, options.samples, options.length)
    reap = {"expert_drop": {"keep": 0.5, "criterion": "reap"}}
    search = {"expert_search": {"keep": 0.5}}
    spent: dict[str, float] = {}
    for name in ("_products", "make_part", "exhaustive", "beam"):
        timed(name, spent)
    reaps, searches = [], []
    for _ in range(options.repeats):
        reaps.append(seconds(checkpoint, reap, tokens))
        searches.append(seconds(checkpoint, search, tokens))
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
