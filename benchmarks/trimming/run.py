"""Every trimming method on small trained models, against random draws; see README.md here.

    python -m benchmarks.trimming.run --models DIR --data DIR

Results are appended cell by cell to results.jsonl, so that a run can be stopped and continues where
it was; then results.md and results.png are made from them.
"""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from torch import Tensor

import moe2edge
from benchmarks import _texts as texts
from benchmarks._held_out import HeldOut, describe_text, load_samples
from benchmarks._study import Job, Row, Study, list_checkpoints, make_parser
from benchmarks.trimming import report
from benchmarks.trimming.cells import Cell, list_cells
from moe2edge import Model
from moe2edge.calibration import router_observers, walk
from moe2edge.calibration.block_runner import BlockRunner
from moe2edge.numerics import metrics
from moe2edge.storage.checkpoint import BUILTIN

HERE = Path(__file__).parent
LENGTH, CALIBRATION, EVALUATION = 256, 128, 24
Files = Mapping[str, Mapping[str, Path]]


class Bench:
    """A model with its texts.

    Attributes:
        name: of the model.
        checkpoint: the model.
        files: texts by purpose and domain; empty for the built-in model, which has its own.
    """

    def __init__(self, name: str, place: str | Path, files: Files) -> None:
        self.name, self.files = name, files
        self.checkpoint = moe2edge.open_checkpoint(place)

    @property
    def model(self) -> Model:
        """The source."""
        return self.checkpoint.model

    @property
    def domains(self) -> tuple[str, ...]:
        """Domains that are evaluated."""
        return texts.DOMAINS if self.files else ("built-in",)

    @cached_property
    def held_out(self) -> HeldOut:
        """The source on the held-out texts."""
        ids = {}
        for domain in self.domains:
            text = self.describe_text("evaluation", (domain,), EVALUATION)
            ids[domain] = load_samples(self.checkpoint, "evaluation", text).ids
        return HeldOut.run(self.model, ids)

    def describe_text(
        self, purpose: str, domains: tuple[str, ...], samples: int, seed: int = 0
    ) -> dict[str, Any]:
        """Return a text section of a recipe: samples in equal parts of the domains."""
        files = self.files[purpose] if self.files else {}
        return describe_text(files, domains, samples, LENGTH, seed)

    def measure(self, model: Model) -> Row:
        """Return perplexity and KL per domain, and the skip rate."""
        skipped = router_observers.SkipObserver()
        found = self.held_out.measure(model, [skipped])
        rates = skipped.result()
        return {**found, "skip_rate": rates.rate} if rates.routed else found


def measure_source(bench: Bench) -> Row:
    """Return the row of the source."""
    return bench.measure(bench.model)


def measure_cell(bench: Bench, cell: Cell) -> Row:
    """Run a recipe, and return the row of the result."""
    domains = cell.domains or bench.domains
    calibration = bench.describe_text("calibration", domains, CALIBRATION, cell.seed)
    recipe = {"calibration": calibration, "passes": cell.passes}
    result = moe2edge.compress(bench.checkpoint, recipe)
    return {
        "group": cell.group,
        "method": cell.method,
        "setting": cell.setting,
        "domains": list(cell.domains),
        "seed": cell.seed,
        "seconds": round(sum(step.seconds for step in result.steps), 2),
        "parameters": result.model.parameters,
        "kept": {str(b.origin): list(b.expert_origins) for b in result.model.blocks},
        "notes": [note for step in result.steps for note in step.notes],
        **bench.measure(result.model),
    }


def measure_all_sets(bench: Bench) -> Row:
    """Return the true loss of one layer's every subset of half of its experts, by the set."""
    model, ids = bench.model, bench.held_out.ids
    block, layer = model.moe_blocks[len(model.moe_blocks) // 2]
    half = len(layer.experts) // 2
    before = {domain: _compute_input(model, part, block.index) for domain, part in ids.items()}
    later = [BlockRunner(model, b) for b in model.blocks[block.index + 1 :]]
    losses = {}
    for kept in itertools.combinations(range(len(layer.experts)), half):
        runner = BlockRunner(model, block.keep_experts(kept))
        total = 0.0
        for domain, part in ids.items():
            hidden = before[domain].clone()
            for step in (runner, *later):
                _run_block(step, part, hidden)
            found = metrics.measure(part, walk.compute_logits(model, hidden), None)
            total += math.log(found.perplexity) / len(ids)
        losses[" ".join(map(str, kept))] = total
    return {"block": block.origin, "losses": losses}


def _compute_input(model: Model, ids: Tensor, block: int) -> Tensor:
    """Return the input of a block, float32 [samples, length, hidden]."""
    hidden = walk.embed(model, ids)
    for before in model.blocks[:block]:
        _run_block(BlockRunner(model, before), ids, hidden)
    return hidden


def _run_block(runner: BlockRunner, ids: Tensor, hidden: Tensor) -> None:
    """Replace hidden states in front of a block by those behind it."""
    for part in walk.split_batches(ids):
        hidden[part] = runner.run(hidden[part])


def list_jobs(bench: Bench) -> Iterator[Job]:
    """Yield every row of a model."""
    model, name = bench.model, bench.name
    experts = len(model.moe_blocks[0][1].experts)
    yield Job(name, "source", partial(measure_source, bench))
    if experts <= 8:
        yield Job(name, "oracle", partial(measure_all_sets, bench))
    for cell in list_cells(bench.domains, experts, len(model.blocks)):
        yield Job(name, cell.key, partial(measure_cell, bench, cell))


def main() -> None:
    """Make the rows that are missing, and write the tables."""
    parser = make_parser(__doc__, HERE / "results.jsonl")
    parser.add_argument("--model", help="this model alone")
    given = parser.parse_args()
    study = Study(given.results)
    with tempfile.TemporaryDirectory() as folder:
        files = texts.write_texts(given.data, Path(folder))
        benches = [
            *(Bench(name, place, files) for name, place in list_checkpoints(given.models).items()),
            Bench("tiny-moe", BUILTIN, {}),
        ]
        jobs = [
            job
            for bench in benches
            if given.model in (None, bench.name)
            for job in list_jobs(bench)
            # The tables compare every row with the source.
            if given.only in job.key or job.key == "source"
        ]
        study.run(jobs, lambda row: f"{row['seconds']} s" if "seconds" in row else "measured")
    report.write_report(study.read(), given.results.parent)


if __name__ == "__main__":
    main()
