"""What replacements of half of the experts leave of the excess loss, before any training.

    python benchmarks/replacing/before_recovery.py --model MODEL --data DIR [--seeds 3]

Calibrates on 96 x 256 tokens, as many of each domain, and measures on as many held-out ones, the
texts of run.py: the mean log-perplexity over domains, in nats above that of the source.
Dropping experts by every criterion of `expert_drop`, and by `expert_search`, stands beside it; what
is left of the excess of the best of them is in the last column. With ``--save FOLDER`` the tokens
of the first seed are written there as arrays, for other programs.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import report
import run
import torch
from methods import svd_rank

from moe2edge.calibration import walk
from moe2edge.calibration.criteria import Criterion
from moe2edge.model.model import Model
from moe2edge.passes.expert_drop import ExpertDrop
from moe2edge.passes.expert_replace import ExpertReplace
from moe2edge.passes.expert_search import ExpertSearch
from moe2edge.pipeline.contract import PassContext
from moe2edge.testing import InMemory

KEEP = 0.5
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


@dataclass(frozen=True)
class Setup:
    """A model and its texts.

    Attributes:
        bench: the source, and what it says about held-out text.
        calibration: tokens of each seed, int64 [samples, length].
    """

    bench: run.Bench
    calibration: Sequence[torch.Tensor]

    def loss(self, model: Model) -> float:
        """Mean over domains, nats per token."""
        return _loss(run.measure(self.bench, model)["perplexity"])

    def save(self, folder: Path) -> None:
        """Write tokens of each domain, uint16."""
        folder.mkdir(parents=True, exist_ok=True)
        for domain, ids in self.bench.evaluation.items():
            np.save(folder / f"evaluation-{domain}.npy", ids.numpy().astype(np.uint16))
        np.save(folder / "calibration.npy", self.calibration[0].numpy().astype(np.uint16))


def _loss(perplexities: Mapping[str, float]) -> float:
    return math.log(report.mean(perplexities, log=True))


def prepare(model: str, data: Path, seeds: int) -> Setup:
    """Open a model, and read its texts."""
    with tempfile.TemporaryDirectory() as folder:
        texts = run.texts_of(model, data, Path(folder))
        bench = run.open_bench(model, model, texts, 0)
        parts = texts["calibration"], tuple(texts["calibration"]), run.CALIBRATION
        calibration = [run.tokens_of(bench.checkpoint, *parts, seed).ids for seed in range(seeds)]
    return Setup(bench, calibration)


WATCHER: Any = SimpleNamespace(advance=quietly, log=quietly)


def searched(model: Model, ids: torch.Tensor, progressive: bool) -> Model:
    """With the half of each layer's experts that a search found."""
    step = ExpertSearch(keep=KEEP, progressive=progressive)
    return step.search(PassContext(model, model, ids, InMemory(), WATCHER)).model


def dropped(model: Model, ids: torch.Tensor, criterion: Any) -> Model:
    """Without the lower half of each layer's experts."""
    step = ExpertDrop(keep=KEEP, criterion=criterion)
    facts = walk.gather(model, ids, step.observers(), quietly, "scores")
    return step.apply(model, facts).model


def replaced(model: Model, ids: torch.Tensor, how: tuple[str, str, str]) -> Model:
    """With replacements for half of each layer's experts."""
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
    return step.search(PassContext(model, model, ids, InMemory(), WATCHER)).model


def by_budget(model: Model, ids: torch.Tensor, options: dict[str, Any]) -> Model:
    """With half of the experts' bytes."""
    if options["with"] == "svd":
        options = {**options, "rank": svd_rank(model)}
    step = ExpertReplace.model_validate({"budget": KEEP, **options}).resolve(model)
    step.check(model)
    return step.search(PassContext(model, model, ids, InMemory(), WATCHER)).model


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
    parser.add_argument("--save", type=Path, help="folder for arrays of the tokens")
    parser.add_argument("--only", default="", help="methods whose name holds this; with ;, or this")
    given = parser.parse_args()
    setup = prepare(given.model, given.data, given.seeds)
    if given.save is not None:
        setup.save(given.save)
    model = setup.bench.model
    found = run.measure(setup.bench, model)["perplexity"]
    source = _loss(found)
    shown = ", ".join(f"{domain} {value:.2f}" for domain, value in found.items())
    title, size = Path(given.model).name, f"{model.nbytes / 1e6:.1f} MB"
    print(f"{title}: source {size}, perplexity {shown}, all {math.exp(source):.2f}", flush=True)
    best = math.inf
    for name, make in methods():
        if not any(part in name for part in given.only.split(";")):
            continue
        results = [make(model, ids) for ids in setup.calibration]
        excess = [setup.loss(result) - source for result in results]
        mean = sum(excess) / len(excess)
        each = ", ".join(f"{value:.4f}" for value in excess)
        best = min(best, mean) if name.startswith("drop") else best
        left = "" if name.startswith("drop") else f"  {mean / best:.0%} of the best drop's"
        size = results[0].nbytes / 1e6
        print(f"{name:32} {size:6.1f} MB  {mean:.4f}  ({each}){left}", flush=True)
        print(json.dumps({"model": title, "method": name, "excess": excess}), file=sys.stderr)


if __name__ == "__main__":
    main()
