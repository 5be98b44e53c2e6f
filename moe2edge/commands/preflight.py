"""What an export finds out from headers and shapes before it starts: what it cannot do, or hold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from moe2edge.commands.write_target import fit_for_targets
from moe2edge.model.model import Model
from moe2edge.pipeline.contract import Cost, Pass, Search, Slim
from moe2edge.pipeline.contract import list_training_passes as training_passes
from moe2edge.pipeline.recipe import Recipe
from moe2edge.pipeline.runner import check_need
from moe2edge.pipeline.stages import plan_passes
from moe2edge.pipeline.target import Target
from moe2edge.progress import Reporter
from moe2edge.runtime import memory
from moe2edge.runtime.memory import Memory
from moe2edge.storage import solved_blocks, work_folder
from moe2edge.storage.checkpoint import Checkpoint

# Roles of what answers for experts, and of the one that may be left of a layer.
EXPERTS = ("experts.", "members.", "substitutes.", "dense.")


def refuse_early(
    checkpoint: Checkpoint,
    recipe: Recipe,
    targets: Sequence[Target],
    out: Path,
    budget: Memory,
    *,
    force: bool,
    materialize: bool,
) -> None:
    """Refuse, from headers, what could not be done, written, held or verified later.

    Raises:
        InputError, Unsupported, DoesNotFit: so.
    """
    check_sources(recipe, checkpoint)
    planned = plan_passes(recipe.passes, checkpoint.model)
    _check_training(checkpoint, recipe)
    planned = fit_for_targets(planned, targets, materialize=materialize)
    work_folder.check_output(out, force=force)
    needed = sum(target.nbytes(planned) for target in targets)
    needed += estimate_work_bytes(recipe, checkpoint.model, budget)
    work_folder.check_space(out, round(needed * 1.05) + (16 << 20))
    for target in targets:
        if not target.streams:
            memory.check_memory(target.runtime_nbytes(planned), within=budget.limit)
    check_walk_memory(recipe.passes, checkpoint.model, budget.limit)
    for step, before, _ in _chain(recipe.passes, checkpoint.model):
        check_need(step, before, recipe.calibration.samples * recipe.calibration.length, budget)
    for name, cost in _training_costs(recipe, checkpoint.model):
        cost.check(name, budget.limit)


def _check_training(checkpoint: Checkpoint, recipe: Recipe) -> None:
    """Refuse a training text that is not there, or that cannot be what the passes want.

    Raises:
        InputError: so.
    """
    from moe2edge.calibration.tokens import check_length, check_text_files

    if (source := recipe.training) is not None:
        check_text_files(source, "training")
        positions = checkpoint.model.family.geometry(checkpoint.config).max_positions
        check_length(source, "training", positions)
        for step, _ in training_passes(recipe.passes, checkpoint.model):
            step.check_text(source.samples, source.length)


def _training_costs(recipe: Recipe, model: Model) -> Iterator[tuple[str, Cost]]:
    """What each pass that trains will take."""
    if (text := recipe.training) is not None:
        for step, before in training_passes(recipe.passes, model):
            yield step.name, step.cost(before, text.samples, text.length)


def estimate_work_bytes(recipe: Recipe, model: Model, budget: Memory) -> int:
    """Bytes of what passes keep on the disk: numbers, hidden states, checkpoints of training."""
    tokens = recipe.calibration.samples * recipe.calibration.length
    stream = 4 * tokens * model.family.geometry(model.config).hidden
    found = most = 0
    for step, before, after in _chain(recipe.passes, model):
        if isinstance(step, Slim | Search):
            found += _new_nbytes(before, after, known=isinstance(step, Slim))
        if isinstance(step, Slim) and step.needs_tokens:
            spilled = budget.stream is not None and stream > budget.stream
            # In front of a block and behind it; in memory, what enters a block and what it adds.
            most = 4 * stream if spilled else 2 * stream
    return found + most + sum(cost.disk for _, cost in _training_costs(recipe, model))


def _new_nbytes(before: Model, after: Model, *, known: bool) -> int:
    """Bytes of numbers that a pass keeps, at most; what was there before is read where it was.

    If it is not known which experts of which layers are new, all of them may be.
    """
    new = after.new_beside(before)
    if not known and any(role.startswith("experts.") for role, _ in new):
        return sum(
            solved_blocks.estimate_saved_bytes(w)
            for _, r, w in after.tensors()
            if r.startswith(EXPERTS)
        )
    return sum(solved_blocks.estimate_saved_bytes(weight) for _, weight in new)


def check_sources(recipe: Recipe, checkpoint: Checkpoint) -> None:
    """Let passes that fit one source only see that it is theirs.

    Raises:
        InputError: it is not.
    """
    for step in recipe.passes:
        step.check_source(lambda: checkpoint.sha256)


def describe(passes: Sequence[Pass], model: Model, reporter: Reporter) -> None:
    """Tell what the slimming passes will do to the model as it will be then."""
    for step, before in _slimming(passes, model):
        reporter.log(f"{step.name}: {step.describe(before)}")


def check_walk_memory(passes: Sequence[Pass], model: Model, within: int | None) -> None:
    """Refuse a limit of memory that a pass, or the walks before and after, cannot keep.

    Raises:
        DoesNotFit: it is too small.
    """
    from moe2edge.pipeline import blockwise

    remedy = "allow more"
    memory.check_memory(model.block_nbytes, "a walk holds a block in float32", remedy, within)
    for step, before in _slimming(passes, model):
        needed = blockwise.estimate_largest_part(before, step.solver(before))
        name = step.name
        memory.check_memory(needed, f"{name} solves a part of a block at once", remedy, within)


def _chain(passes: Sequence[Pass], model: Model) -> Iterator[tuple[Pass, Model, Model]]:
    """The passes, each with the shape of the model that it gets, and of what it makes of it."""
    for step in passes:
        before, model = model, step.plan(model)
        yield step, before, model


def _slimming(passes: Sequence[Pass], model: Model) -> Iterator[tuple[Slim, Model]]:
    """The slimming passes, each with the shape of the model that it will get."""
    for step, before, _ in _chain(passes, model):
        if isinstance(step, Slim):
            yield step, before
