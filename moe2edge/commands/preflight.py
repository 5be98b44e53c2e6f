"""Checks before an export starts, from headers and shapes: what it cannot do, or hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from moe2edge.commands.texts import NO_TEXT, SELF
from moe2edge.commands.write_target import fit_for_targets
from moe2edge.model.model import Model
from moe2edge.pipeline.contract import TextSize, TextSizes
from moe2edge.pipeline.recipe import Recipe
from moe2edge.pipeline.stages import Plan, plan_passes
from moe2edge.pipeline.target import Target
from moe2edge.progress import Reporter
from moe2edge.runtime import memory
from moe2edge.runtime.memory import Estimate, Memory
from moe2edge.storage.checkpoint import Checkpoint
from moe2edge.storage.output_checks import check_space


def refuse_early(
    checkpoint: Checkpoint,
    recipe: Recipe,
    targets: Sequence[Target],
    out: Path,
    budget: Memory,
    *,
    materialize: bool,
) -> tuple[Plan, Model]:
    """Plan an export; refuse, from headers, what could not be done, written or verified later.

    Returns:
        The plan, and its result in the form that all targets hold.

    Raises:
        InputError, Unsupported, DoesNotFit: so.
    """
    source, texts = checkpoint.model, measure_texts(recipe)
    check_sources(recipe, checkpoint)
    plan = plan_passes(recipe.passes, source)
    check_training(recipe, texts, source)
    result = fit_for_targets(plan.result, targets, materialize=materialize)
    passes = estimate_passes(plan, texts)
    outputs = [(target, target.estimate(result)) for target in targets]
    needed = sum(estimate.disk for estimate in (*passes, *(own for _, own in outputs)))
    evaluated = recipe.evaluation.samples * recipe.evaluation.length
    needed += estimate_hidden_bytes(plan, texts, evaluated, budget)
    check_space(out, round(needed * 1.05) + (16 << 20))
    for target, estimate in outputs:
        if not target.streams:
            estimate.check(budget.limit)
    check_pass_memory(source, passes, budget.limit)
    return plan, result


def suit_targets(recipe: Recipe, targets: Sequence[Target]) -> Recipe:
    """Return the recipe with what the targets of an export decide about it."""
    return replace(
        recipe,
        calibrates_targets=any(each.reads_calibration for each in targets),
        narrows_head=all(each.narrow_head for each in targets),
    )


def list_reads(checkpoint: Checkpoint, recipe: Recipe) -> list[Path]:
    """List the files and folders that an export reads while it runs, or reads again to resume.

    The recipe itself is read once.

    Raises:
        InputError: a text is missing.
    """
    from moe2edge.calibration.mixes import list_text_files

    paths = [checkpoint.folder, *checkpoint.folder.iterdir()]
    texts = {
        "calibration": recipe.calibration,
        "evaluation": recipe.evaluation,
        "training": recipe.training,
    }
    for purpose, source in texts.items():
        if source is not None and source.text not in (SELF, NO_TEXT):
            paths += list_text_files(source, purpose)
    # Decisions, and whatever other passes read.
    files = [value for step in recipe.passes for name, value in step if name == "file"]
    return paths + [Path(file) for file in files if isinstance(file, str)]


def estimate_passes(plan: Plan, texts: TextSizes) -> list[Estimate]:
    """Return what each pass will take with texts of these sizes, from shapes alone."""
    return [planned.step.estimate(planned, texts) for planned in plan.steps]


def check_pass_memory(source: Model, passes: Sequence[Estimate], within: int | None) -> None:
    """Refuse a limit of memory that a walk over the source, or a pass, cannot keep.

    Args:
        source: the model before the first pass.
        passes: the estimates of the passes, in order.
        within: bytes for the whole process; None: what the machine has.

    Raises:
        DoesNotFit: the limit is too small.
    """
    walk = "running the model block by block holds one block in float32"
    remedy = "raise --max-memory, or use a larger machine"
    memory.check_memory(source.block_nbytes, walk, remedy, within)
    for estimate in passes:
        estimate.check(within)


def measure_texts(recipe: Recipe) -> TextSizes:
    """Return the sizes of a recipe's texts, none of which is read."""
    calibration, training = recipe.calibration, recipe.training
    return TextSizes(
        TextSize(calibration.samples, calibration.length),
        TextSize(training.samples, training.length) if training else None,
    )


def check_training(recipe: Recipe, texts: TextSizes, model: Model) -> None:
    """Refuse a training text that is not there, or that is too short or too long.

    Raises:
        InputError: it is.
    """
    from moe2edge.calibration.mixes import check_text_files
    from moe2edge.calibration.tokens import check_length

    if recipe.training is not None and texts.training is not None:
        check_text_files(recipe.training, "training")
        positions = model.family.geometry(model.config).max_positions
        check_length(recipe.training, "training", positions)
        for step in recipe.passes:
            step.check_text(texts.training)


def estimate_hidden_bytes(plan: Plan, texts: TextSizes, evaluated: int, budget: Memory) -> int:
    """Count the bytes of hidden states that are on the disk at once.

    Args:
        plan: the passes.
        texts: the sizes of their texts.
        evaluated: tokens of the evaluation.
        budget: hidden states beyond it are on the disk, too.
    """
    hidden = plan.source.family.geometry(plan.source.config).hidden

    def count(tokens: int, kept: int, in_memory: int) -> int:
        stream = 4 * tokens * hidden
        spilled = budget.hidden_bytes is not None and stream > budget.hidden_bytes
        return (kept + in_memory * spilled) * stream

    steps = [planned.step for planned in plan.steps if planned.step.needs_tokens]
    solving = any(step.computes_numbers for step in steps)
    # Passes that search walk over the source as well, and compare several models.
    searching = any(not (step.computes_numbers or step.observers()) for step in steps)
    # In front of a block and behind it; in memory, what enters a block, and what a solver adds and
    # computes once for all experts, in families whose blocks it knows.
    more = (1 if plan.source.family.generic else 2) if solving else 0
    calibrated = count(texts.calibration.tokens, 2 + 2 * searching, 1 + more) if steps else 0
    # The same, and those of the source, which stay.
    return max(calibrated, count(evaluated, 3, 2))


def check_sources(recipe: Recipe, checkpoint: Checkpoint) -> None:
    """Let passes that fit one source only check that it is the right one.

    Raises:
        InputError: it is not.
    """
    for step in recipe.passes:
        step.check_source(lambda: checkpoint.sha256)


def describe(plan: Plan, reporter: Reporter) -> None:
    """Report what passes will do to the model, as far as that is known before."""
    for planned in plan.steps:
        if line := planned.step.describe(planned):
            reporter.log(f"{planned.step.name}: {line}")
