"""Every trimming method on small trained models, against random draws; see README.md here.

    python benchmarks/trimming/run.py --models DIR --data DIR

Results are appended cell by cell to results.jsonl, so that a run can be stopped and goes on where
it was; then results.md and results.png are made from them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cells
import report
import texts
from torch import Tensor

from moe2edge.calibration import router_observers, tokens, walk
from moe2edge.calibration.tokens import Tokens
from moe2edge.model.model import Model
from moe2edge.numerics import metrics
from moe2edge.pipeline import recipe
from moe2edge.pipeline.runner import run_passes
from moe2edge.progress import Reporter
from moe2edge.storage.checkpoint import BUILTIN, Checkpoint, open_checkpoint
from moe2edge.storage.tokenizer import load_tokenizer
from moe2edge.storage.work_folder import WorkFolder

HERE = Path(__file__).parent
QUIET = Reporter(lambda _: None, lambda *_: None)
LENGTH, CALIBRATION, EVALUATION = 256, 128, 24


@dataclass(frozen=True)
class Bench:
    """A model with its texts.

    Attributes:
        name: of the model.
        checkpoint: the model.
        sources: files by purpose and domain; of the built-in model none, it has its own.
        evaluation: held-out tokens by domain.
        hidden: what the source makes of them, after its last block.
    """

    name: str
    checkpoint: Checkpoint
    sources: Mapping[str, Mapping[str, Path]]
    evaluation: Mapping[str, Tensor]
    hidden: Mapping[str, Tensor]

    @property
    def model(self) -> Model:
        """The source."""
        return self.checkpoint.model

    @property
    def domains(self) -> tuple[str, ...]:
        """What is evaluated."""
        return tuple(self.evaluation)

    def tokens(self, purpose: str, domains: tuple[str, ...], samples: int, seed: int = 0) -> Tokens:
        """Samples in equal parts of the domains."""
        options: dict[str, Any] = {"samples": samples, "length": LENGTH, "seed": seed}
        if self.sources:
            files = self.sources[purpose]
            options["text"] = ",".join(f"{domain}:1" for domain in domains)
            options["sources"] = {domain: {"text": str(files[domain])} for domain in domains}
        source = recipe.parse_section(purpose, options)
        tokenizer = load_tokenizer(self.checkpoint.folder)
        return tokens.load_tokens(source, tokenizer, purpose, (LENGTH, self.model.vocabulary))


def open_bench(name: str, folder: str, sources: Mapping[str, Mapping[str, Path]]) -> Bench:
    """Open a model and run it over the held-out texts."""
    bench = Bench(name, open_checkpoint(folder), sources, {}, {})
    domains = texts.DOMAINS if sources else ("built-in",)
    ids = {d: bench.tokens("evaluation", (d,), EVALUATION).ids for d in domains}
    hidden = {d: walk.observe(bench.model, part, (), QUIET.advance, "") for d, part in ids.items()}
    return Bench(name, bench.checkpoint, sources, ids, hidden)


def measure(bench: Bench, model: Model) -> dict[str, Any]:
    """Perplexity and KL per domain, and the skip rate."""
    skipped = router_observers.SkipObserver()
    found: dict[str, Any] = {"perplexity": {}, "kl": {}}
    for domain, ids in bench.evaluation.items():
        hidden = walk.observe(model, ids, [skipped], QUIET.advance, "")
        source = walk.compute_logits(bench.model, bench.hidden[domain])
        result = metrics.measure(ids, walk.compute_logits(model, hidden), source)
        found["perplexity"][domain], found["kl"][domain] = result.perplexity, result.kl
    rates = skipped.result()
    if rates.routed:
        found["skip_rate"] = rates.rate
    return found


def run_cell(bench: Bench, cell: cells.Cell) -> dict[str, Any]:
    """Run a recipe and measure what it leaves."""
    parsed = recipe.parse(cell.recipe).resolve(bench.model)
    tokens = bench.tokens("calibration", cell.domains or bench.domains, CALIBRATION, cell.seed)
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as work:
        store = WorkFolder(Path(work))
        model, steps = run_passes(bench.model, parsed, tokens, store, QUIET)
        seconds = time.perf_counter() - begun
        return {
            "model": bench.name,
            "key": cell.key,
            "group": cell.group,
            "method": cell.method,
            "setting": cell.setting,
            "domains": list(cell.domains),
            "seed": cell.seed,
            "seconds": round(seconds, 2),
            "parameters": model.parameters,
            "kept": {str(b.origin): list(b.expert_origins) for b in model.blocks},
            "notes": [note for step in steps for note in step.notes],
            **measure(bench, model),
        }


def oracle(bench: Bench) -> dict[str, Any]:
    """True loss of one layer's every subset of half of its experts, by the set."""
    model = bench.model
    block, layer = model.moe_blocks[len(model.moe_blocks) // 2]
    half = len(layer.experts) // 2
    before = {d: _until(model, ids, block.index) for d, ids in bench.evaluation.items()}
    later = [walk.BlockRunner(model, b) for b in model.blocks[block.index + 1 :]]
    losses = {}
    for kept in itertools.combinations(range(len(layer.experts)), half):
        runner = walk.BlockRunner(model, block.keep_experts(kept))
        total = 0.0
        for domain, ids in bench.evaluation.items():
            hidden = before[domain].clone()
            for step in (runner, *later):
                for part in walk.split_batches(ids):
                    hidden[part] = step.run(hidden[part])
            found = metrics.measure(ids, walk.compute_logits(model, hidden), None)
            total += math.log(found.perplexity) / len(bench.evaluation)
        losses[" ".join(map(str, kept))] = total
    return {"model": bench.name, "key": "oracle", "block": block.origin, "losses": losses}


def _until(model: Model, ids: Tensor, block: int) -> Tensor:
    """Input of a block."""
    hidden = walk.embed(model, ids)
    for before in model.blocks[:block]:
        runner = walk.BlockRunner(model, before)
        for part in walk.split_batches(ids):
            hidden[part] = runner.run(hidden[part])
    return hidden


def plan(bench: Bench) -> Iterator[cells.Cell]:
    """Cells of a model."""
    model = bench.model
    yield from cells.cells(bench.domains, len(model.moe_blocks[0][1].experts), len(model.blocks))


def main() -> None:
    """Run what has no result yet, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, required=True, help="folder of checkpoints")
    parser.add_argument("--data", type=Path, required=True, help="folder of texts")
    parser.add_argument("--only", help="cells whose key holds this")
    parser.add_argument("--model", help="this model alone")
    parser.add_argument("--results", type=Path, default=HERE / "results.jsonl")
    options = parser.parse_args()
    done = report.read(options.results)
    with tempfile.TemporaryDirectory() as folder:
        sources = texts.write_texts(options.data, Path(folder))
        named = {p.parent.name: str(p.parent) for p in sorted(options.models.glob("*/config.json"))}
        for name, place in {**named, "tiny-moe": BUILTIN}.items():
            if options.model not in (None, name):
                continue
            run_model(name, place, {} if place == BUILTIN else sources, done, options)
    report.write(report.read(options.results), HERE)


def run_model(
    name: str,
    place: str,
    sources: Mapping[str, Mapping[str, Path]],
    done: list[dict[str, Any]],
    options: argparse.Namespace,
) -> None:
    """All cells of a model that are not done."""
    bench = open_bench(name, place, sources)
    known = {row["key"] for row in done if row["model"] == name}

    def keep(row: dict[str, Any]) -> None:
        with options.results.open("a") as file:
            file.write(json.dumps(row) + "\n")

    if "source" not in known:
        keep({"model": name, "key": "source", **measure(bench, bench.model)})
    experts = len(bench.model.moe_blocks[0][1].experts)
    if "oracle" not in known and experts <= 8 and options.only in (None, "oracle"):
        keep(oracle(bench))
    wanted = [c for c in plan(bench) if c.key not in known and (options.only or "") in c.key]
    for n, cell in enumerate(wanted, start=1):
        row = run_cell(bench, cell)
        keep(row)
        print(f"{name} {n}/{len(wanted)} {row['key']}: {row['seconds']} s", flush=True)


if __name__ == "__main__":
    main()
