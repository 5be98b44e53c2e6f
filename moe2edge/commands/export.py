"""`moe2edge export`: from a checkpoint and a recipe to verified folders and a report."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from moe2edge.commands.environment import NUMERIC_PACKAGES, list_versions, measure_peak_bytes
from moe2edge.commands.preflight import describe, refuse_early
from moe2edge.commands.report import Report
from moe2edge.commands.texts import NO_TEXT, load_calibration, load_evaluation, load_training
from moe2edge.commands.write_target import describe_cost, fit_for_targets, write_target
from moe2edge.evaluation.comparison import Comparison, ResultRow
from moe2edge.pipeline.recipe import Recipe
from moe2edge.pipeline.registry import list_options
from moe2edge.pipeline.runner import run_passes
from moe2edge.pipeline.target import Target
from moe2edge.progress import Reporter
from moe2edge.runtime import memory
from moe2edge.runtime.memory import Memory
from moe2edge.storage import work_folder
from moe2edge.storage.checkpoint import Checkpoint

if TYPE_CHECKING:
    from moe2edge.calibration.tokens import Tokens


def export_targets(
    checkpoint: Checkpoint,
    recipe: Recipe,
    targets: Sequence[Target],
    out: Path,
    reporter: Reporter,
    *,
    force: bool = False,
    resume: work_folder.Resume = "auto",
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
        reporter: receives progress.
        force: replace an output of ours.
        resume: what to do about an unfinished export to the same folder.
        most: bytes of memory for the whole process; None: what the machine has.
        materialize: give tied experts matrices of their own where a target cannot hold them.

    Raises:
        InputError, Unsupported, DoesNotFit: before any work.
        VerificationFailed: what was written is not what was meant.
    """
    begun = time.perf_counter()
    source = checkpoint.model
    recipe = recipe.resolve(source)
    budget = memory.Memory.from_limit(memory.find_limit(most))
    memory.avoid_fragmentation(most)
    plan = refuse_early(
        checkpoint, recipe, targets, out, budget, force=force, materialize=materialize
    )
    reporter.log(f"recipe:\n{recipe.render()}")
    describe(plan, reporter)
    calibration = load_calibration(checkpoint, recipe, reporter)
    evaluation = load_evaluation(checkpoint, recipe)
    training = load_training(checkpoint, recipe)
    inputs = _inputs(checkpoint, recipe, calibration, training, budget)
    with work_folder.open_partial_folder(out, inputs, resume) as (content, work):
        if work.kept:
            reporter.log(f"going on behind {work.kept} of an earlier run")
        budget = replace(budget, folder=work.folder)
        model, steps = run_passes(
            source, recipe, calibration, work, reporter, budget, training=training
        )
        found = model
        model = fit_for_targets(model, targets, materialize=materialize)
        grown = None if model is found else describe_cost(found, model)
        if grown:
            reporter.log(f"tied experts have matrices of their own now: {grown}")
        elif materialize:
            reporter.log("--materialize changed nothing: the targets hold the model as it is")
        memory.give_back()
        measured = Comparison.measure(
            source,
            model,
            evaluation.ids,
            reporter,
            budget,
            figures=recipe.evaluation.text != NO_TEXT,
        )
        results: list[ResultRow] = []
        for target in targets:
            folder = content / target.name if len(targets) > 1 else content
            folder.mkdir(exist_ok=True)
            reporter.log(f"writing {target.name}")
            results.append(write_target(target, model, folder, checkpoint, measured, reporter))
        report = Report(
            source=checkpoint.source,
            family=source.family.architecture,
            recipe=recipe.render(),
            steps=tuple(steps),
            before=measured.measure_source(),
            after=measured.measure_result(),
            results=tuple(results),
            skip_rate=measured.skip_rates.rate if model.skips else None,
            loaders={t.name: t.loaders(model) for t in targets},
            target_options={t.name: list_options(t) for t in targets},
            calibration=calibration.provenance if calibration else None,
            evaluation=evaluation.provenance,
            training=training.provenance if training else None,
            materialized=grown,
            seconds=time.perf_counter() - begun,
            peak_bytes=measure_peak_bytes(),
        )
        for target in targets:
            folder = content / target.name if len(targets) > 1 else content
            report.write(folder, target, checkpoint, model, list_versions())
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

    from moe2edge.numerics import compiled

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    passes = yaml.safe_dump(yaml.safe_load(recipe.render())["passes"], sort_keys=False)
    return {
        "model": checkpoint.sha256,
        "recipe": passes,
        "calibration": calibration.sha256 if calibration else "none",
        **({"training": training.sha256} if training else {}),
        "number of threads": f"{torch.get_num_threads()}",
        "limit of memory": "one group at a time" if not budget.group_bytes else "several groups",
        "innermost loops": compiled.describe_kernel(),
        "GPU": gpu,
        "version": ", ".join(
            f"{name} {v}" for name, v in list_versions().items() if name in NUMERIC_PACKAGES
        ),
    }
