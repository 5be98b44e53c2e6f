"""`moe2edge export`: from a checkpoint and a recipe to verified folders and a report."""

from __future__ import annotations

import contextlib
import importlib.metadata
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from moe2edge import memory, registry, workfolder
from moe2edge.calibration import BUILTIN_TEXT
from moe2edge.checkpoint import Checkpoint
from moe2edge.early import check_need, describe, refuse_early
from moe2edge.errors import InputError
from moe2edge.materialize import held, told
from moe2edge.measuring import Measured, write_target
from moe2edge.memory import UNLIMITED, Memory
from moe2edge.model import Model
from moe2edge.pipeline import (
    Facts,
    Lab,
    Outcome,
    Search,
    Slim,
    Step,
    Trim,
    Work,
    enforce,
    stages,
)
from moe2edge.progress import Watcher
from moe2edge.recipe import Recipe, TextSource, read_yaml
from moe2edge.report import Report, ResultRow
from moe2edge.target import Target
from moe2edge.training import Train

if TYPE_CHECKING:
    from moe2edge.calibration import Tokens


def export(
    checkpoint: Checkpoint,
    recipe: Recipe,
    targets: Sequence[Target],
    out: Path,
    watcher: Watcher,
    *,
    force: bool = False,
    resume: workfolder.Resume = "auto",
    most: int | None = None,
    materialize: bool = False,
) -> Report:
    """Run ``recipe`` on ``checkpoint`` and write one folder per target.

    With several targets ``out`` holds one folder for each, all packed from one solve. Nothing is
    left behind when anything fails, but what can be gone on with: see `workfolder.partial_folder`.

    Args:
        checkpoint: the source.
        recipe: what to do.
        targets: what to write.
        out: where to.
        watcher: told about progress.
        force: replace an output of ours.
        resume: what to do about an unfinished export to the same folder.
        most: bytes of memory for the whole process; None: what the machine has.
        materialize: give every member matrices of its own where a target cannot hold it otherwise.

    Raises:
        InputError, Unsupported, DoesNotFit: before any work.
        VerificationFailed: what was written is not what was meant.
    """
    begun = time.perf_counter()
    source = checkpoint.model
    recipe = recipe.resolved(source)
    budget = memory.Memory.of(memory.limit(most))
    memory.keep_no_holes(most)
    refuse_early(checkpoint, recipe, targets, out, budget, force=force, materialize=materialize)
    watcher.log(f"recipe:\n{recipe.render()}")
    describe(recipe.passes, source, watcher)
    calibration = calibration_tokens(checkpoint, recipe, watcher)
    evaluation = evaluation_tokens(checkpoint, recipe)
    training = training_tokens(checkpoint, recipe)
    inputs = _inputs(checkpoint, recipe, calibration, training, budget)
    with workfolder.partial_folder(out, inputs, resume) as (content, work):
        if work.kept:
            watcher.log(f"going on behind {work.kept} of an earlier run")
        budget = replace(budget, folder=work.folder)
        model, steps = run_passes(
            source, recipe, calibration, work, watcher, budget, training=training
        )
        found = model
        model = held(model, targets, materialize=materialize)
        grown = None if model is found else told(found, model)
        if grown:
            watcher.log(f"members are experts of their own now: {grown}")
        elif materialize:
            watcher.log("--materialize changed nothing: the targets hold the model as it is")
        memory.give_back()
        measured = Measured.of(
            source,
            model,
            evaluation.ids,
            watcher,
            budget,
            figures=recipe.evaluation.text != NO_TEXT,
        )
        results: list[ResultRow] = []
        for target in targets:
            folder = content / registry.name_of(target) if len(targets) > 1 else content
            folder.mkdir(exist_ok=True)
            watcher.log(f"writing {registry.name_of(target)}")
            results.append(write_target(target, model, folder, checkpoint, measured, watcher))
        report = Report(
            source=checkpoint.source,
            family=source.family.architecture,
            recipe=recipe.render(),
            steps=tuple(steps),
            before=measured.before(),
            after=measured.after(),
            results=tuple(results),
            skip_rate=measured.skip_rates.rate if model.skips else None,
            loaders={registry.name_of(t): t.loaders(model) for t in targets},
            target_options={registry.name_of(t): registry.options_of(t) for t in targets},
            calibration=calibration.provenance if calibration else None,
            evaluation=evaluation.provenance,
            training=training.provenance if training else None,
            materialized=grown,
            seconds=time.perf_counter() - begun,
            peak_bytes=_peak_bytes(),
        )
        for target in targets:
            folder = content / registry.name_of(target) if len(targets) > 1 else content
            report.write(folder, target, checkpoint, model, versions())
    return report


def _inputs(
    checkpoint: Checkpoint,
    recipe: Recipe,
    calibration: Tokens | None,
    training: Tokens | None,
    budget: Memory,
) -> dict[str, str]:
    """What the numbers of an export depend on, to the last bit."""
    import torch

    from moe2edge import native

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    passes = yaml.safe_dump(yaml.safe_load(recipe.render())["passes"], sort_keys=False)
    return {
        "model": checkpoint.sha256,
        "recipe": passes,
        "calibration": calibration.sha256 if calibration else "none",
        **({"training": training.sha256} if training else {}),
        "number of threads": f"{torch.get_num_threads()}",
        "limit of memory": "one group at a time" if not budget.together else "several groups",
        "innermost loops": native.described(),
        "GPU": gpu,
        "version": ", ".join(f"{name} {v}" for name, v in versions().items() if name in NUMERIC),
    }


# As a text for calibration: what the model writes. As one for evaluation: no figures.
SELF, NO_TEXT = "self", "none"
# Whose versions numbers depend on.
NUMERIC = ("moe2edge", "torch", "transformers", "peft", "numpy", "scipy")


def calibration_tokens(checkpoint: Checkpoint, recipe: Recipe, watcher: Watcher) -> Tokens | None:
    """Tokens for calibration, if a pass needs any.

    Raises:
        InputError: the text does not serve.
        DoesNotFit: the model is to write it and cannot be run.
    """
    from moe2edge.calibration import check_files

    source = recipe.calibration
    if not any(stage.needs_tokens for stage in stages(recipe.passes)):
        if source.text != SELF:
            check_files(source, "calibration")
        return None
    if source.text == SELF:
        from moe2edge import selftext

        return selftext.tokens(checkpoint, source, watcher)
    return _tokens(checkpoint, source, "calibration")


def evaluation_tokens(checkpoint: Checkpoint, recipe: Recipe) -> Tokens:
    """Tokens for the figures of the report; without any, a few to verify outputs with.

    Raises:
        InputError: the text does not serve.
    """
    from moe2edge import verify

    source = recipe.evaluation
    if source.text == NO_TEXT:
        longest = checkpoint.model.family.geometry(checkpoint.config).max_positions
        length = min(longest, verify.PREFILL + verify.STEPS)
        source = TextSource(text=BUILTIN_TEXT, samples=verify.SAMPLES, length=length)
    return _tokens(checkpoint, source, "evaluation")


def training_tokens(checkpoint: Checkpoint, recipe: Recipe) -> Tokens | None:
    """Tokens to train on, if a pass does.

    Raises:
        InputError: the text does not serve.
    """
    return _tokens(checkpoint, recipe.training, "training") if recipe.training else None


def _tokens(checkpoint: Checkpoint, source: TextSource, purpose: str) -> Tokens:
    from moe2edge.artifact import tokenizer_of
    from moe2edge.calibration import load_tokens

    geometry = checkpoint.model.family.geometry(checkpoint.config)
    limits = (geometry.max_positions, geometry.vocab)
    return load_tokens(source, tokenizer_of(checkpoint.folder), purpose, limits)


def run_passes(
    source: Model,
    recipe: Recipe,
    calibration: Tokens | None,
    work: Work,
    watcher: Watcher,
    budget: Memory = UNLIMITED,
    *,
    training: Tokens | None = None,
) -> tuple[Model, list[Step]]:
    """The model after all passes, and a line of the report for each of them."""
    import torch

    from moe2edge import solving, walk

    model = source
    steps: list[Step] = []
    nothing = torch.empty(0, 0, dtype=torch.int64)
    tokens = calibration.ids if calibration else nothing
    ids_to_train = training.ids if training else None
    lab = Lab(source, source, tokens, work, watcher, budget, training=ids_to_train)
    for stage in stages(recipe.passes):
        begun = time.perf_counter()
        facts = Facts()
        if stage.observers and calibration is not None:
            label = f"{', '.join(registry.name_of(p) for p in stage.passes)}: scoring"
            facts = walk.gather(
                model, calibration.ids, stage.observers, watcher.advance, label, budget
            )
        for step in stage.passes:
            name = registry.name_of(step)
            if not any(layer.sharing for _, layer in model.moe_blocks):
                lab = replace(lab, unshared=model)
            # Again: a threshold or a shared budget may have left another model than was planned.
            step.check(model)
            if isinstance(step, Trim):
                outcome = step.apply(model, facts)
            elif isinstance(step, Slim):
                ids = calibration.ids if step.needs_tokens and calibration is not None else None
                kept, advance = work.ledger(len(steps)), watcher.advance
                solved, changed, notes = solving.solve(
                    model, ids, step.solver(model), kept, advance, name, budget
                )
                outcome = Outcome(solved, tuple(changed), notes=tuple(notes))
            elif isinstance(step, Search):
                check_need(step, model, tokens.numel(), budget)
                folder = work.scratch(len(steps), name) if isinstance(step, Train) else None
                outcome = step.search(replace(lab, model=model, scratch=folder))
            else:
                raise AssertionError(f"{name} is no kind of pass that is known")
            enforce(step, name, model, outcome)
            model = outcome.model
            if outcome.originals is not None:
                lab = replace(lab, unshared=outcome.originals)
            steps.append(
                Step(
                    name,
                    step.model_dump(by_alias=True),
                    outcome.changed,
                    outcome.skipped,
                    outcome.notes,
                    time.perf_counter() - begun,
                    model.parameters,
                    model.nbytes,
                    outcome.figures,
                )
            )
            begun = time.perf_counter()
    return model, steps


def _peak_bytes() -> int:
    """Peak resident set of this process."""
    with contextlib.suppress(OSError, StopIteration):
        # What getrusage tells counts from the process that started this one.
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def versions() -> dict[str, str]:
    """Versions of what numbers may depend on."""
    names = (
        "moe2edge", "torch", "transformers", "peft", "numpy", "scipy", "onnx", "onnxruntime",
        "onnxruntime-gpu",
    )  # fmt: skip
    found = {"python": sys.version.split()[0]}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def check_targets(names: str) -> list[Target]:
    """Targets of ``-t``: names with commas between them, each with ``:option=value`` behind it.

    Raises:
        InputError: a name or an option is unknown or given twice, or a value is not one of its.
    """
    entries = [entry.strip() for entry in names.split(",") if entry.strip()]
    wanted = [entry.partition(":")[0].strip() for entry in entries]
    if not wanted or len(set(wanted)) != len(wanted):
        raise InputError(f"-t {names!r}: expected one or more of {registry.target_names()}")
    return [
        registry.target_with(name, _target_options(entry))
        for name, entry in zip(wanted, entries, strict=True)
    ]


def _target_options(entry: str) -> dict[str, Any]:
    """Options of one target, as in ``onnx:accuracy_level=0``."""
    found: dict[str, Any] = {}
    for setting in entry.split(":")[1:]:
        option, equals, value = (part.strip() for part in setting.partition("="))
        if not option or not equals or not value or option in found:
            raise InputError(
                f"-t {entry!r}: expected NAME:option=value, each option once, as in "
                "onnx:accuracy_level=0"
            )
        found[option] = read_yaml(value, f"-t {entry!r}: the value of {option}")
    return found
