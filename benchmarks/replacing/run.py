"""Replacing, merging and dropping experts, each followed by training on the same tokens.

    python -m benchmarks.replacing.run --models DIR --data DIR [--only TEXT] [--model NAME]

Makes the rows that ``results.jsonl`` lacks, for every checkpoint in ``--models`` and the built-in
model: compress, measure, train, measure, quantize to 4 bits (factors and linear maps to 8),
measure. A run that is killed continues from the training's last checkpoint (``--work``). At the
end it writes ``results.md``, ``results.png`` and ``sizes.png``. The source is trained as well, and
quantized to 3 and 2 bits besides. Texts are of four domains, for the built-in model of Python
alone, as it knows nothing else; those for evaluation are others than those for calibration and
training, which share files.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import moe2edge
from benchmarks._held_out import HeldOut, describe_text, load_samples
from benchmarks._study import QUIET, Job, Row, Study, list_checkpoints, make_parser
from benchmarks._texts import write_texts
from benchmarks.replacing import report
from benchmarks.replacing.methods import Method, list_methods
from benchmarks.tiny_moe.corpus import modules
from moe2edge import Model, Moe2EdgeError, Reporter
from moe2edge.calibration.builtin_texts import BUILTIN_TEXT, find_builtin_file
from moe2edge.calibration.tokens import Tokens
from moe2edge.model.block import is_low_rank
from moe2edge.passes._replace_bases import count_expert_bytes
from moe2edge.passes.recover import Recover
from moe2edge.pipeline.contract import PassContext
from moe2edge.pipeline.runner import run_passes
from moe2edge.storage.checkpoint import BUILTIN
from moe2edge.storage.work_folder import WorkFolder
from moe2edge.testing import InMemory

HERE = Path(__file__).parent
LENGTH = 256
# Samples; as many of each domain.
CALIBRATION, EVALUATION, HELD_OUT = 96, 96, 64
# For the built-in model, enough for all steps: bytes of modules that it was trained on.
OWN_TEXT = 12_000_000
TRAIN: dict[str, Any] = {
    "steps": 500, "batch": 8, "learning_rate": 3e-4, "held_out": HELD_OUT, "eval_every": 50,
    "patience": 0, "save_every": 50,
}  # fmt: skip
# For the built-in model, which knows its text so well that it has less to recover.
OWN_STEPS = 100
Files = Mapping[str, Mapping[str, Path]]


def write_files(place: str | Path, data: Path, folder: Path) -> Files:
    """Write text files for a model, and return them by purpose and domain."""
    if place != BUILTIN:
        return write_texts(data, folder)
    text, path = "", folder / "own.txt"
    for module in modules():
        if module.split == "train" and len(text) < OWN_TEXT:
            text += f"{module.text}\n"
    path.write_text(text)
    own = find_builtin_file(BUILTIN_TEXT, "evaluation")
    assert own is not None
    return {"calibration": {"code": path}, "evaluation": {"code": own}}


class Bench:
    """A source model with its texts.

    Attributes:
        name: of the model.
        checkpoint: the source.
        files: texts by purpose and domain.
        steps: of training.
    """

    def __init__(self, name: str, place: str | Path, files: Files, steps: int = 0) -> None:
        self.name, self.files, self.steps = name, files, steps
        self.checkpoint = moe2edge.open_checkpoint(place)

    @property
    def model(self) -> Model:
        """The source."""
        return self.checkpoint.model

    def describe_calibration(self, samples: int = CALIBRATION, seed: int = 0) -> dict[str, Any]:
        """Return a text section of a recipe: samples of the files for calibration and training."""
        files = self.files["calibration"]
        return describe_text(files, tuple(self.files["evaluation"]), samples, LENGTH, seed)

    def load_calibration(self, samples: int = CALIBRATION, seed: int = 0) -> Tokens:
        """Return such samples."""
        text = self.describe_calibration(samples, seed)
        return load_samples(self.checkpoint, "calibration", text)

    @cached_property
    def calibration(self) -> Tokens:
        """Tokens for calibration."""
        return self.load_calibration()

    @cached_property
    def training(self) -> Tensor:
        """Tokens to train on, int64 [samples, length]."""
        return self.load_calibration(self.steps * TRAIN["batch"] + HELD_OUT, seed=1).ids

    @cached_property
    def held_out(self) -> HeldOut:
        """The source on the held-out texts."""
        files = self.files["evaluation"]
        ids = {}
        for domain in files:
            text = describe_text(files, (domain,), EVALUATION // len(files), LENGTH)
            ids[domain] = load_samples(self.checkpoint, "evaluation", text).ids
        return HeldOut.run(self.model, ids)

    def measure(self, model: Model) -> Row:
        """Return perplexity and KL per domain, and bytes."""
        found = self.held_out.measure(model)
        return {**found, "bytes": model.nbytes, "expert_bytes": count_expert_bytes(model)}


def measure_quantized(bench: Bench, model: Model, bits: int) -> Row:
    """Measure a model in so many bits, and 8 for factors and linear maps if there are any."""
    low = any(is_low_rank(role) for _, role, _ in model.tensors())
    passes = [{"gptq": {"bits": bits, **({"factors": 8} if low else {})}}]
    parsed = moe2edge.parse_recipe({"passes": passes}).resolve(model)
    with tempfile.TemporaryDirectory() as folder:
        work = WorkFolder(Path(folder))
        return bench.measure(run_passes(model, parsed, bench.calibration, work, QUIET)[0])


def measure_method(bench: Bench, method: Method, work: Path) -> Row:
    """Return all measurements of a method."""
    row: Row = {"name": method.name, "size": method.size}
    begun = time.perf_counter()
    recipe = {"calibration": bench.describe_calibration(), "passes": method.passes}
    try:
        result = moe2edge.compress(bench.checkpoint, recipe)
    except Moe2EdgeError as error:
        return {**row, "refused": str(error)}
    row["seconds"] = round(time.perf_counter() - begun, 1)
    row["before"] = bench.measure(result.model)
    if method.recover is None:
        return row
    begun = time.perf_counter()
    model, row["history"] = train(bench, result.model, method, work)
    row["training"] = {
        "seconds": round(time.perf_counter() - begun, 1),
        "tokens": bench.steps * TRAIN["batch"] * LENGTH,
    }
    row["after"] = bench.measure(model)
    row["quantized"] = measure_quantized(bench, model, 4)
    row["fewer"] = {str(bits): measure_quantized(bench, model, bits) for bits in method.fewer}
    shutil.rmtree(work, ignore_errors=True)
    return row


def train(bench: Bench, model: Model, method: Method, work: Path) -> tuple[Model, list[Any]]:
    """Train a model, and return it with its history; continues from the state in ``work``."""
    step = Recover.model_validate({**TRAIN, "steps": bench.steps, **(method.recover or {})})
    step.check(model)
    reporter = Reporter(lambda line: print(f"  {line}", flush=True), lambda *_: None)
    work.mkdir(parents=True, exist_ok=True)
    none = torch.empty(0, 0, dtype=torch.int64)
    context = PassContext(
        bench.model, model, none, InMemory(), reporter, training=bench.training, scratch=work
    )
    outcome = step.search(context)
    return outcome.model, outcome.figures["history"]


def list_jobs(bench: Bench, study: Study, work: Path) -> Iterator[Job]:
    """Yield every row of a model.

    Raises:
        SystemExit: rows of other numbers of steps are there.
    """
    rows = [row for row in study.read() if row["model"] == bench.name and "training" in row]
    if any(row["training"]["tokens"] != bench.steps * TRAIN["batch"] * LENGTH for row in rows):
        raise SystemExit(f"{study.path} has {bench.name} with other steps: give --results")
    for method in list_methods(bench.model):
        folder = method.key.replace(" | ", "-").replace(" ", "_")
        place = work / bench.name / str(bench.steps) / folder
        yield Job(bench.name, method.key, partial(measure_method, bench, method, place))


def describe_row(row: Row) -> str:
    """Return what is printed about a row."""
    return str(row.get("refused") or f"{row['seconds']} s before training")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this study alone."""
    steps = f"of training; default {TRAIN['steps']}, for {BUILTIN} {OWN_STEPS}"
    parser.add_argument("--model", help="this model alone")
    parser.add_argument("--steps", type=int, help=steps)
    parser.add_argument(
        "--work",
        type=Path,
        default=Path(tempfile.gettempdir()) / "replacing",
        help="folder for the state of training",
    )


def main() -> None:
    """Make the rows that are missing, and write the tables."""
    parser = make_parser(__doc__, HERE / "results.jsonl")
    add_options(parser)
    given = parser.parse_args()
    study = Study(given.results)
    places: dict[str, str | Path] = {**list_checkpoints(given.models), "tiny-moe": BUILTIN}
    for name, place in places.items():
        if given.model not in (None, name):
            continue
        steps = given.steps or (OWN_STEPS if place == BUILTIN else TRAIN["steps"])
        with tempfile.TemporaryDirectory() as folder:
            files = write_files(place, given.data, Path(folder))
            jobs = list_jobs(Bench(name, place, files, steps), study, given.work)
            study.run((job for job in jobs if given.only in job.key), describe_row)
    report.write_report(study.read(), given.results.parent)


if __name__ == "__main__":
    main()
