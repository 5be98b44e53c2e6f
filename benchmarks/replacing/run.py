"""Replacing, merging and dropping experts, each followed by training on the same tokens.

    python benchmarks/replacing/run.py --models DIR --data DIR [--only TEXT] [--model NAME]

Goes through what has no line in ``results.jsonl`` yet, for every checkpoint in ``--models`` and the
built-in model: compress, measure, train, measure, quantize to 4 bits (factors and linear maps to
8), measure. A run that is killed goes on from the training's last checkpoint (``--work``). At the
end it writes ``results.md``, ``results.png`` and ``sizes.png``. The source is trained as well, and
quantized to 3 and 2 bits besides. Texts are of four domains, for the built-in model of Python
alone, as it knows nothing else; those for evaluation are others than those for calibration and
training, which share files.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import report
import torch
from methods import Method, methods
from torch import Tensor

from moe2edge.calibration import tokens, walk
from moe2edge.calibration.tokens import BUILTIN_FILES, Tokens
from moe2edge.errors import Moe2EdgeError
from moe2edge.model.model import Model, is_low_rank
from moe2edge.numerics import metrics
from moe2edge.passes._replace_bases import count_expert_bytes
from moe2edge.passes.recover import Recover
from moe2edge.pipeline import recipe
from moe2edge.pipeline.contract import PassContext
from moe2edge.pipeline.runner import run_passes
from moe2edge.progress import Reporter
from moe2edge.storage.checkpoint import BUILTIN, BUILTIN_FOLDER, Checkpoint, open_checkpoint
from moe2edge.storage.tokenizer import load_tokenizer
from moe2edge.storage.work_folder import WorkFolder
from moe2edge.testing import InMemory

sys.path.insert(0, str(Path(__file__).parents[1] / "trimming"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tiny_moe"))
from corpus import modules
from texts import write_texts

HERE = Path(__file__).parent
LENGTH = 256
# Samples; as many of each domain.
CALIBRATION, EVALUATION, HELD_OUT = 96, 96, 64
# Of the built-in model, enough for all steps: bytes of modules that it was trained on.
OWN_TEXT = 12_000_000
TRAIN: dict[str, Any] = {
    "steps": 500, "batch": 8, "learning_rate": 3e-4, "held_out": HELD_OUT, "eval_every": 50,
    "patience": 0, "save_every": 50,
}  # fmt: skip
# Of the built-in model, which knows its text so well that it has less to recover.
OWN_STEPS = 100
QUIET = Reporter(lambda _: None, lambda *_: None)


@dataclass(frozen=True)
class Bench:
    """A source model, its texts, and what it says about the held-out ones.

    Attributes:
        name: of the model.
        checkpoint: the source.
        calibration, training: tokens.
        evaluation: held-out ids by domain.
        hidden: hidden states of the source on them.
    """

    name: str
    checkpoint: Checkpoint
    calibration: Tokens
    training: Tensor
    evaluation: Mapping[str, Tensor]
    hidden: Mapping[str, Tensor]

    @property
    def model(self) -> Model:
        """The source."""
        return self.checkpoint.model


Texts = Mapping[str, Mapping[str, Path]]


def texts_of(model: str, data: Path, folder: Path) -> Texts:
    """Files by purpose and domain, for a model: a folder, or the built-in one."""
    if model != BUILTIN:
        return write_texts(data, folder)
    text, path = "", folder / "own.txt"
    for module in modules():
        if module.split == "train" and len(text) < OWN_TEXT:
            text += f"{module.text}\n"
    path.write_text(text)
    own = BUILTIN_FOLDER / BUILTIN_FILES["evaluation"]
    return {"calibration": {"code": path}, "evaluation": {"code": own}}


def open_bench(name: str, folder: str, texts: Texts, steps: int) -> Bench:
    """Open a model, and run it over the held-out texts."""
    checkpoint = open_checkpoint(folder)
    model, domains = checkpoint.model, tuple(texts["evaluation"])

    def tokens(purpose: str, domains: Sequence[str], samples: int, seed: int = 0) -> Tokens:
        return tokens_of(checkpoint, texts[purpose], domains, samples, seed)

    each = EVALUATION // len(domains)
    held_out = {d: tokens("evaluation", (d,), each).ids for d in domains}
    hidden = {d: walk.observe(model, ids, (), QUIET.advance, "") for d, ids in held_out.items()}
    samples = steps * TRAIN["batch"] + HELD_OUT if steps else 0
    training = tokens("calibration", domains, samples, 1).ids if steps else torch.empty(0)
    return Bench(
        name, checkpoint, tokens("calibration", domains, CALIBRATION), training, held_out, hidden
    )


def tokens_of(
    checkpoint: Checkpoint,
    texts: Mapping[str, Path],
    domains: Sequence[str],
    samples: int,
    seed: int,
) -> Tokens:
    """So many samples, as many of each domain."""
    options: dict[str, Any] = {
        "samples": samples,
        "length": LENGTH,
        "seed": seed,
        "text": ",".join(f"{domain}:1" for domain in domains),
        "sources": {domain: {"text": str(texts[domain])} for domain in domains},
    }
    source, tokenizer = (
        recipe.parse_section("calibration", options),
        load_tokenizer(checkpoint.folder),
    )
    limits = LENGTH, checkpoint.model.vocabulary
    return tokens.load_tokens(source, tokenizer, "text", limits)


def measure(bench: Bench, model: Model) -> dict[str, Any]:
    """Perplexity and KL per domain, and bytes."""
    found: dict[str, Any] = {"perplexity": {}, "kl": {}}
    for domain, ids in bench.evaluation.items():
        hidden = walk.observe(model, ids, (), QUIET.advance, "")
        source = walk.compute_logits(bench.model, bench.hidden[domain])
        result = metrics.measure(ids, walk.compute_logits(model, hidden), source)
        found["perplexity"][domain], found["kl"][domain] = result.perplexity, result.kl
    return {**found, "bytes": model.nbytes, "expert_bytes": count_expert_bytes(model)}


def passed(model: Model, passes: list[Any], bench: Bench, work: WorkFolder) -> Model:
    """The model after some passes."""
    parsed = recipe.parse(json.dumps({"passes": passes})).resolve(model)
    return run_passes(model, parsed, bench.calibration, work, QUIET)[0]


def quantized(bench: Bench, model: Model, bits: int) -> dict[str, Any]:
    """What is measured with so many bits, and 8 for factors and linear maps if there are any."""
    low = any(is_low_rank(role) for _, role, _ in model.tensors())
    passes = [{"gptq": {"bits": bits, **({"factors": 8} if low else {})}}]
    with tempfile.TemporaryDirectory() as folder:
        return measure(bench, passed(model, passes, bench, WorkFolder(Path(folder))))


def run(bench: Bench, method: Method, work: Path, steps: int) -> dict[str, Any]:
    """All measurements of a method."""
    row: dict[str, Any] = {"model": bench.name, "key": method.key, "name": method.name}
    row["size"] = method.size
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        store = WorkFolder(Path(folder))
        try:
            model = passed(bench.model, method.passes, bench, store)
        except Moe2EdgeError as error:
            return {**row, "refused": str(error)}
        row["seconds"] = round(time.perf_counter() - begun, 1)
        row["before"] = measure(bench, model)
        if method.recover is None:
            return row
        begun = time.perf_counter()
        model, row["history"] = trained(bench, model, method, work, steps)
        row["training"] = {
            "seconds": round(time.perf_counter() - begun, 1),
            "tokens": steps * TRAIN["batch"] * LENGTH,
        }
        row["after"] = measure(bench, model)
        row["quantized"] = quantized(bench, model, 4)
        row["fewer"] = {str(bits): quantized(bench, model, bits) for bits in method.fewer}
    return row


def trained(
    bench: Bench, model: Model, method: Method, work: Path, steps: int
) -> tuple[Model, list[Any]]:
    """After training, and its history; goes on from what ``work`` holds."""
    options = {**TRAIN, "steps": steps, **(method.recover or {})}
    step = Recover.model_validate(options)
    step.check(model)

    def log(line: str) -> None:
        print(f"  {line}", flush=True)

    reporter = Reporter(log, lambda *_: None)
    work.mkdir(parents=True, exist_ok=True)
    none = torch.empty(0, 0, dtype=torch.int64)
    context = PassContext(
        bench.model, model, none, InMemory(), reporter, training=bench.training, scratch=work
    )
    outcome = step.search(context)
    return outcome.model, outcome.figures["history"]


def main() -> None:
    """Run what has no result yet, and write the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", type=Path, required=True, help="folder of checkpoints")
    parser.add_argument("--data", type=Path, required=True, help="folder of texts")
    parser.add_argument("--only", default="", help="methods whose key holds this")
    parser.add_argument("--model", help="this model alone")
    parser.add_argument(
        "--steps", type=int, help=f"of training; {TRAIN['steps']}, for {BUILTIN} {OWN_STEPS}"
    )
    parser.add_argument("--results", type=Path, default=HERE / "results.jsonl")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "replacing")
    given = parser.parse_args()
    named = {p.parent.name: str(p.parent) for p in sorted(given.models.glob("*/config.json"))}
    for name, place in {**named, "tiny-moe": BUILTIN}.items():
        if given.model in (None, name):
            steps = given.steps or (OWN_STEPS if place == BUILTIN else TRAIN["steps"])
            with tempfile.TemporaryDirectory() as folder:
                texts = texts_of(place, given.data, Path(folder))
                run_model(open_bench(name, place, texts, steps), steps, given)
    report.write(report.read(given.results), given.results.parent)


def run_model(bench: Bench, steps: int, given: argparse.Namespace) -> None:
    """All methods of a model that have no result."""
    own = [row for row in report.read(given.results) if row["model"] == bench.name]
    tokens = steps * TRAIN["batch"] * LENGTH
    if any(row["training"]["tokens"] != tokens for row in own if "training" in row):
        raise SystemExit(f"{given.results} has {bench.name} with other steps: give --results")
    for method in methods(bench.model):
        rows = report.read(given.results)
        known = {row["key"] for row in rows if row["model"] == bench.name}
        if method.key in known or given.only not in method.key:
            continue
        work = (
            given.work / bench.name / str(steps) / method.key.replace(" | ", "-").replace(" ", "_")
        )
        print(f"{bench.name}: {method.key}", flush=True)
        row = run(bench, method, work, steps)
        with given.results.open("a") as file:
            file.write(json.dumps(row) + "\n")
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
