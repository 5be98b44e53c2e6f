"""Which text to calibrate on where none was given: half of the experts dropped, by domain.

    python -m benchmarks.default_texts.run --models DIR --data DIR --work WORK
    python -m benchmarks.default_texts.run --models DIR --data DIR --work WORK --model tiny-moe

Makes the rows that ``MODEL.jsonl`` lacks: for each text and seed the experts that every criterion
of ``expert_drop``, and ``expert_search``, keep; for each such set its perplexity by domain; and the
same after 4 bits, calibrated on that text. The model is mixtral-mini below ``--models``, or the
built-in one, which knows code alone. Tokens are kept in ``WORK``. A run can be stopped and goes on;
at the end it writes ``report.md`` from ``findings.md``, which was written by hand, and the rows.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

import moe2edge
from benchmarks._study import QUIET, Job, Row, Study
from benchmarks._texts import DOMAINS
from benchmarks.default_texts import report
from benchmarks.default_texts.texts import Texts
from moe2edge import Model
from moe2edge.calibration import criteria, walk
from moe2edge.calibration.evidence import EvidenceObserver
from moe2edge.calibration.observation import BlockTrace, Facts
from moe2edge.calibration.router_observers import OutputObserver, RoutingObserver
from moe2edge.calibration.tokens import wrap_tokens
from moe2edge.model.layers import MoELayer
from moe2edge.numerics import metrics
from moe2edge.passes.expert_drop import ExpertDrop
from moe2edge.passes.expert_search import ExpertSearch
from moe2edge.pipeline import recipe as recipes
from moe2edge.pipeline.runner import run_passes
from moe2edge.storage.checkpoint import BUILTIN
from moe2edge.testing import InMemory

HERE = Path(__file__).parent
SEEDS = range(5)
CRITERIA = [c for c in get_args(criteria.Criterion) if c not in (*criteria.WEIGHTS, "random")]
Sets = Sequence[Sequence[int]]


class SearchObserver:
    """Finds the set of each layer that `ExpertSearch` keeps, on a walk that changes nothing."""

    def __init__(self, tokens: int) -> None:
        self._step = ExpertSearch(keep=0.5)
        self._evidence = EvidenceObserver(tokens)
        self._kept: list[list[int]] = []

    def observe(self, trace: BlockTrace) -> None:
        """Add one batch of a block."""
        layer = trace.block.mlp
        assert isinstance(layer, MoELayer)
        self._evidence.observe(trace)
        if self._evidence.complete:
            found = self._step.choose(self._evidence.take(layer), QUIET.advance, "")
            self._kept.append(list(found.kept))

    def result(self) -> list[list[int]]:
        """Return the kept experts of each layer."""
        return self._kept


class Bench:
    """A model with its texts."""

    def __init__(self, name: str, models: Path, data: Path, work: Path) -> None:
        own = name in BUILTIN
        self.checkpoint = moe2edge.open_checkpoint(BUILTIN if own else models / name)
        domains = ("code",) if own else DOMAINS
        self.texts = Texts(self.checkpoint, data, work / name, domains)

    @property
    def model(self) -> Model:
        """The source."""
        return self.checkpoint.model

    @cached_property
    def held_out(self) -> dict[str, Tensor]:
        """Held-out tokens by domain."""
        return self.texts.load_evaluation()

    def choose(self, name: str, seed: int, methods: Sequence[str]) -> Row:
        """Return the experts that stay with a text, by method: all criteria, perhaps a search."""
        begun = time.perf_counter()
        ids = self.texts.load(name, seed)
        made = time.perf_counter() - begun
        search = SearchObserver(ids.numel())
        watchers = {RoutingObserver: RoutingObserver(), OutputObserver: OutputObserver()}
        searches = [search] if "search" in methods else []
        walk.observe(self.model, ids, [*watchers.values(), *searches], QUIET.advance, "")
        facts = Facts({kind: watcher.result() for kind, watcher in watchers.items()})
        kept = {
            criterion: [list(block.expert_origins) for block in dropped.blocks]
            for criterion in CRITERIA
            for dropped in [
                ExpertDrop(keep=0.5, criterion=criterion).apply(self.model, facts).model
            ]
        }
        return {
            "text": name,
            "seed": seed,
            "kept": {**kept, **({"search": search.result()} if searches else {})},
            "seconds_of_the_text": round(made, 1),
            "seconds": round(time.perf_counter() - begun, 1),
        }

    def prune(self, kept: Sets) -> Model:
        """Return the model with these experts of each layer."""
        model = self.model
        for (block, _), experts in zip(self.model.moe_blocks, kept, strict=True):
            model = model.replace_block(block.keep_experts(experts))
        return model

    def measure(self, model: Model) -> Row:
        """Return the perplexity of each domain."""
        found = {}
        for domain, ids in self.held_out.items():
            hidden = walk.observe(model, ids, [], QUIET.advance, "")
            found[domain] = metrics.measure(
                ids, walk.compute_logits(model, hidden), None
            ).perplexity
        return {"perplexity": found}

    def measure_sets(self, kept: Sets) -> Row:
        """Return the row of a choice of experts."""
        return self.measure(self.prune(kept))

    def measure_bits(self, name: str, seed: int, method: str, kept: Sets) -> Row:
        """Return the row of a choice of experts and 4 bits, both calibrated on one text."""
        tokens = wrap_tokens(self.texts.load(name, seed), name)
        recipe = recipes.parse("passes: [gptq]")
        model, _ = run_passes(self.prune(kept), recipe, tokens, KeepInMemory(), QUIET)
        return {"text": name, "seed": seed, "method": method, "bits": 4, **self.measure(model)}


class KeepInMemory:
    """Work of an export, kept in memory."""

    def ledger(self, _: int) -> InMemory:
        """Return where a pass keeps its blocks."""
        return InMemory()


def list_choices(bench: Bench, names: Sequence[str], methods: Sequence[str]) -> Iterator[Job]:
    """Yield the rows that say which experts stay."""
    for seed in SEEDS:
        for name in names:
            yield Job(None, f"choice {name} {seed}", partial(bench.choose, name, seed, methods))


def list_measures(bench: Bench, rows: Sequence[Row], methods: Sequence[str]) -> Iterator[Job]:
    """Yield the rows that say what choices are worth."""
    yield Job(None, "source", partial(bench.measure, bench.model))
    for row in rows:
        for method in methods:
            kept = row["kept"][method]
            yield Job(None, report.name_sets(kept), partial(bench.measure_sets, kept))


def list_bits(bench: Bench, rows: Sequence[Row], methods: Sequence[str]) -> Iterator[Job]:
    """Yield the rows that say what choices are worth at 4 bits."""
    for row in rows:
        for method in methods:
            make = partial(
                bench.measure_bits, row["text"], row["seed"], method, row["kept"][method]
            )
            yield Job(None, f"bits {row['text']} {row['seed']} {method}", make)


def main() -> None:
    """Make the rows that are missing, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", type=Path, required=True, help="folder of checkpoints")
    parser.add_argument("--data", type=Path, required=True, help="folder of texts")
    parser.add_argument("--work", type=Path, required=True, help="folder to keep tokens in")
    parser.add_argument("--model", default="mixtral-mini", help="name [default: mixtral-mini]")
    parser.add_argument("--texts", default=",".join(report.TEXTS), help="texts, parted by commas")
    parser.add_argument("--methods", default=",".join(report.METHODS), help="likewise")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="how many")
    parser.add_argument("--stop-after", type=float, default=math.inf, help="seconds")
    parser.add_argument("--no-bits", action="store_true", help="leave out 4 bits")
    given = parser.parse_args()
    torch.manual_seed(0)
    study, names = Study(HERE / f"{given.model}.jsonl"), given.texts.split(",")
    methods = given.methods.split(",")
    bench = Bench(given.model, given.models, given.data, given.work)
    ends = time.perf_counter() + given.stop_after

    def run(jobs: Iterator[Job]) -> None:
        for job in study.list_missing(jobs):
            if time.perf_counter() < ends:
                study.run([job])

    def choices() -> list[Row]:
        rows = [row for row in study.read() if "kept" in row]
        return [row for row in rows if row["text"] in names and row["seed"] < given.seeds]

    run(
        job for job in list_choices(bench, names, methods) if int(job.key.split()[-1]) < given.seeds
    )
    run(list_measures(bench, choices(), methods))
    if not given.no_bits:
        run(list_bits(bench, choices(), methods))
    report.write(HERE)


if __name__ == "__main__":
    main()
