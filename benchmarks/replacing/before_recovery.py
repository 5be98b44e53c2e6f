"""Excess loss with replacements for half of the experts, before any training.

    python -m benchmarks.replacing.before_recovery --model MODEL --data DIR [--seeds 3]

Calibrates on 96 x 256 tokens, as many of each domain, and measures on as many held-out ones, the
texts of run.py: the mean log-perplexity over domains, in nats above that of the source. Dropping
experts by every criterion of `expert_drop`, and by `expert_search`, is measured as well; the last
column is the part of the excess loss of the best of them that is left. With ``--save FOLDER`` the
tokens of the first seed are written there as arrays, for other programs.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from benchmarks._study import QUIET
from benchmarks.replacing import run
from benchmarks.replacing.methods import compute_svd_rank
from benchmarks.replacing.report import compute_mean
from moe2edge import Model
from moe2edge.calibration import walk
from moe2edge.calibration.criteria import Criterion
from moe2edge.passes.expert_drop import ExpertDrop
from moe2edge.passes.expert_replace import ExpertReplace
from moe2edge.passes.expert_search import ExpertSearch
from moe2edge.pipeline.contract import PassContext
from moe2edge.testing import InMemory

KEEP = 0.5
# Rank of linear maps.
RANK = 16
DROPS = tuple(c for c in get_args(Criterion) if c != "random")
# Kind of replacement, criterion, and the inputs that it is fitted on.
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


@dataclass(frozen=True)
class Setup:
    """A model and its texts.

    Attributes:
        bench: the source, with held-out text.
        calibration: tokens of each seed, int64 [samples, length].
    """

    bench: run.Bench
    calibration: Sequence[torch.Tensor]

    def loss(self, model: Model) -> float:
        """Return the mean loss over domains, nats per token."""
        return _compute_loss(self.bench.measure(model)["perplexity"])

    def save(self, folder: Path) -> None:
        """Write tokens of each domain, uint16."""
        folder.mkdir(parents=True, exist_ok=True)
        for domain, ids in self.bench.held_out.ids.items():
            np.save(folder / f"evaluation-{domain}.npy", ids.numpy().astype(np.uint16))
        np.save(folder / "calibration.npy", self.calibration[0].numpy().astype(np.uint16))


def _compute_loss(perplexities: Mapping[str, float]) -> float:
    return math.log(compute_mean(perplexities, log=True))


def prepare(model: str, data: Path, seeds: int) -> Setup:
    """Open a model, and read its texts."""
    with tempfile.TemporaryDirectory() as folder:
        bench = run.Bench(model, model, run.write_files(model, data, Path(folder)))
        calibration = [bench.load_calibration(seed=seed).ids for seed in range(seeds)]
        _ = bench.held_out  # read as long as the files are there
    return Setup(bench, calibration)


def make_context(model: Model, ids: torch.Tensor) -> PassContext:
    """Return what a pass needs that runs by itself, in memory."""
    return PassContext(model, model, ids, InMemory(), QUIET)


def search(model: Model, ids: torch.Tensor, progressive: bool) -> Model:
    """Keep the half of each layer's experts that a search finds."""
    step = ExpertSearch(keep=KEEP, progressive=progressive)
    return step.search(make_context(model, ids)).model


def drop(model: Model, ids: torch.Tensor, criterion: Any) -> Model:
    """Drop the lower half of each layer's experts."""
    step = ExpertDrop(keep=KEEP, criterion=criterion)
    facts = walk.gather(model, ids, step.observers(), QUIET.advance, "scores")
    return step.apply(model, facts).model


def replace(model: Model, ids: torch.Tensor, how: tuple[str, str, str]) -> Model:
    """Replace half of each layer's experts."""
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
    return step.search(make_context(model, ids)).model


def replace_by_budget(model: Model, ids: torch.Tensor, options: dict[str, Any]) -> Model:
    """Replace experts so that half of their bytes are left."""
    if options["with"] == "svd":
        options = {**options, "rank": compute_svd_rank(model)}
    step = ExpertReplace.model_validate({"budget": KEEP, **options}).resolve(model)
    step.check(model)
    return step.search(make_context(model, ids)).model


def list_methods() -> Iterator[tuple[str, Callable[[Model, torch.Tensor], Model]]]:
    """Yield the methods by name."""
    for criterion in DROPS:
        yield f"drop, {criterion}", partial(drop, criterion=criterion)
    for progressive in (False, True):
        name = "drop, expert_search" + ", progressive" * progressive
        yield name, partial(search, progressive=progressive)
    for how in REPLACED:
        yield f"{how[0]}, {how[1]}, {how[2]}", partial(replace, how=how)
    for name, options in BUDGETS.items():
        yield name, partial(replace_by_budget, options=options)


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
    found = setup.bench.measure(model)["perplexity"]
    source = _compute_loss(found)
    shown = ", ".join(f"{domain} {value:.2f}" for domain, value in found.items())
    title, size = Path(given.model).name, f"{model.nbytes / 1e6:.1f} MB"
    print(f"{title}: source {size}, perplexity {shown}, all {math.exp(source):.2f}", flush=True)
    best = math.inf
    for name, make in list_methods():
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
