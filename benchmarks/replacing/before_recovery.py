"""What substitutes for half of the experts leave of the excess loss, before any training.

    python benchmarks/replacing/before_recovery.py --model MODEL --data DIR [--seeds 3]

Calibrates on 24 x 256 tokens of each of four domains, measures on as many held-out tokens of each:
the mean log-perplexity over domains, in nats above that of the source. Dropping experts by every
criterion of `expert_drop`, and by `expert_search`, stands beside it; what is left of the excess of
the best of them is in the last column. Needs one model in memory a block at a time.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import torch
from methods import svd_rank

from moe2edge import walk
from moe2edge.artifact import tokenizer_of
from moe2edge.checkpoint import open_checkpoint
from moe2edge.criteria import Criterion
from moe2edge.model import Model
from moe2edge.passes.expert_drop import ExpertDrop
from moe2edge.passes.expert_replace import ExpertReplace
from moe2edge.passes.expert_search import ExpertSearch
from moe2edge.pipeline import Lab
from moe2edge.testing import InMemory

sys.path.insert(0, str(Path(__file__).parents[1] / "trimming"))
from texts import DOMAINS, write_texts

SAMPLES, LENGTH, KEEP = 24, 256, 0.5
# Of linear maps; what answers, by which criterion, fitted on what.
RANK = 16
DROPS = tuple(c for c in get_args(Criterion) if c != "random")
REPLACED = (
    ("constant", "mone", "intact"),
    ("constant", "residual", "changed"),
    ("linear", "reap", "intact"),
    ("linear", "mone", "intact"),
    ("linear", "mone", "changed"),
    ("linear", "residual", "intact"),
    ("linear", "residual", "changed"),
)


BUDGETS: dict[str, dict[str, Any]] = {
    "linear, ranks by budget": {"with": "linear"},
    "base, SVD factors": {"with": "base"},
    "base, no factors": {"with": "base", "rank": 0},
    "SVD of each": {"with": "svd"},
}


def quietly(*_: Any) -> None:
    """Watch nothing."""


def tokens(tokenizer: Any, path: Path, seed: int) -> torch.Tensor:
    """Samples of a file from a place of their own for each seed, int64 [samples, length]."""
    ids = torch.tensor(tokenizer(path.read_text()[:1_500_000])["input_ids"])
    count = SAMPLES * LENGTH
    start = seed * count % (len(ids) - count)
    return ids[start : start + count].view(SAMPLES, LENGTH)


def losses(model: Model, texts: dict[str, torch.Tensor]) -> list[float]:
    """Mean loss of each domain, nats per token."""
    found = []
    for ids in texts.values():
        hidden = walk.observe(model, ids, (), quietly, "evaluation")
        rows = zip(ids, walk.head_logits(model, hidden), strict=True)
        each = [torch.nn.functional.cross_entropy(lo[:-1], row[1:]).item() for row, lo in rows]
        found.append(sum(each) / len(each))
    return found


WATCHER: Any = SimpleNamespace(advance=quietly, log=quietly)


def searched(model: Model, ids: torch.Tensor, progressive: bool) -> Model:
    """With the half of each layer's experts that a search found."""
    step = ExpertSearch(keep=KEEP, progressive=progressive)
    return step.search(Lab(model, model, ids, InMemory(), WATCHER)).model


def dropped(model: Model, ids: torch.Tensor, criterion: Any) -> Model:
    """Without the lower half of each layer's experts."""
    step = ExpertDrop(keep=KEEP, criterion=criterion)
    facts = walk.gather(model, ids, step.observers(), quietly, "scores")
    return step.apply(model, facts).model


def replaced(model: Model, ids: torch.Tensor, how: tuple[str, str, str]) -> Model:
    """With substitutes for half of each layer's experts."""
    kind, criterion, fitted_on = how
    rank = RANK if kind == "linear" else None
    step = ExpertReplace.model_validate(
        {
            "with": kind,
            "keep": KEEP,
            "rank": rank,
            "criterion": criterion,
            "fitted_on": fitted_on,
        }
    )
    return step.search(Lab(model, model, ids, InMemory(), WATCHER)).model


def by_budget(model: Model, ids: torch.Tensor, options: dict[str, Any]) -> Model:
    """With half of the experts' bytes."""
    if options["with"] == "svd":
        options = {**options, "rank": svd_rank(model)}
    step = ExpertReplace.model_validate({"budget": KEEP, **options}).resolved(model)
    step.check(model)
    return step.search(Lab(model, model, ids, InMemory(), WATCHER)).model


def methods() -> Iterator[tuple[str, Callable[[Model, torch.Tensor], Model]]]:
    """By name."""
    for criterion in DROPS:
        yield f"drop, {criterion}", lambda m, ids, c=criterion: dropped(m, ids, c)
    for progressive in (False, True):
        name = "drop, expert_search" + ", progressive" * progressive
        yield name, lambda m, ids, p=progressive: searched(m, ids, p)
    for how in REPLACED:
        yield f"{how[0]}, {how[1]}, {how[2]}", lambda m, ids, h=how: replaced(m, ids, h)
    for name, options in BUDGETS.items():
        yield name, lambda m, ids, o=options: by_budget(m, ids, o)


def main() -> None:
    """Measure, and print a table and lines of JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, help="a checkpoint, or builtin:tiny-moe")
    parser.add_argument("--data", type=Path, required=True, help="folder of texts")
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    checkpoint = open_checkpoint(given.model)
    model, tokenizer = checkpoint.model, tokenizer_of(checkpoint.folder)
    with tempfile.TemporaryDirectory() as folder:
        texts = write_texts(given.data, Path(folder))
        held_out = {d: tokens(tokenizer, texts["evaluation"][d], 0) for d in DOMAINS}
        calibration = [
            torch.cat([tokens(tokenizer, texts["calibration"][d], seed) for d in DOMAINS])
            for seed in range(given.seeds)
        ]
    source = losses(model, held_out)
    shown = ", ".join(f"{d} {math.exp(v):.2f}" for d, v in zip(DOMAINS, source, strict=True))
    print(f"{given.model}: source {model.nbytes / 1e6:.1f} MB, perplexity {shown}")
    best = math.inf
    for name, make in methods():
        results = [make(model, ids) for ids in calibration]
        excess = []
        for result in results:
            found = losses(result, held_out)
            excess.append((sum(found) - sum(source)) / len(DOMAINS))
        mean = sum(excess) / len(excess)
        each = ", ".join(f"{value:.4f}" for value in excess)
        best = min(best, mean) if name.startswith("drop") else best
        left = "" if name.startswith("drop") else f"  {mean / best:.0%} of the best drop's"
        size = results[0].nbytes / 1e6
        print(f"{name:32} {size:6.1f} MB  {mean:.4f}  ({each}){left}", flush=True)
        print(json.dumps({"model": given.model, "method": name, "excess": excess}), file=sys.stderr)


if __name__ == "__main__":
    main()
