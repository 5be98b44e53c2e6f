"""What an export finds out from headers and shapes before it starts: what it cannot do, or hold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from moe2edge.commands.write_target import fit_for_targets
from moe2edge.model.model import Model
from moe2edge.pipeline.contract import Cost, Search, Slim, Train
from moe2edge.pipeline.recipe import Recipe
from moe2edge.pipeline.runner import check_need
from moe2edge.pipeline.stages import Plan, plan_passes
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
) -> Plan:
    """Plan an export; refuse, from headers, what could not be done, written or verified later.

    Raises:
        InputError, Unsupported, DoesNotFit: so.
    """
    check_sources(recipe, checkpoint)
    plan = plan_passes(recipe.passes, checkpoint.model)
    _check_training(checkpoint, recipe)
    planned = fit_for_targets(plan.result, targets, materialize=materialize)
    work_folder.check_output(out, force=force)
    needed = sum(target.nbytes(planned) for target in targets)
    needed += estimate_work_bytes(plan, recipe, budget)
    work_folder.check_space(out, round(needed * 1.05) + (16 << 20))
    for target in targets:
        if not target.streams:
            memory.check_memory(target.runtime_nbytes(planned), within=budget.limit)
    check_walk_memory(plan, budget.limit)
    tokens = recipe.calibration.samples * recipe.calibration.length
    for step in plan.steps:
        check_need(step.step, step.before, tokens, budget)
    for name, cost in _training_costs(plan, recipe):
        cost.check(name, budget.limit)
    return plan


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
        for step in recipe.passes:
            if isinstance(step, Train):
                step.check_text(source.samples, source.length)


def _training_costs(plan: Plan, recipe: Recipe) -> Iterator[tuple[str, Cost]]:
    """What each pass that trains will take."""
    if (text := recipe.training) is not None:
        for planned in plan.steps:
            if isinstance(step := planned.step, Train):
                yield step.name, step.cost(planned.before, text.samples, text.length)


def estimate_work_bytes(plan: Plan, recipe: Recipe, budget: Memory) -> int:
    """Bytes of what passes keep on the disk: numbers, hidden states, checkpoints of training."""
    tokens = recipe.calibration.samples * recipe.calibration.length
    source = plan.source
    stream = 4 * tokens * source.family.geometry(source.config).hidden
    found = most = 0
    for planned in plan.steps:
        step = planned.step
        if isinstance(step, Slim | Search):
            found += _new_nbytes(planned.before, planned.after, known=isinstance(step, Slim))
        if isinstance(step, Slim) and step.needs_tokens:
            spilled = budget.stream is not None and stream > budget.stream
            # In front of a block and behind it; in memory, what enters a block and what it adds.
            most = 4 * stream if spilled else 2 * stream
    return found + most + sum(cost.disk for _, cost in _training_costs(plan, recipe))


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


def describe(plan: Plan, reporter: Reporter) -> None:
    """Report what passes will do to the model, as far as that is known before."""
    for planned in plan.steps:
        if line := planned.step.describe(planned):
            reporter.log(f"{planned.step.name}: {line}")


def check_walk_memory(plan: Plan, within: int | None) -> None:
    """Refuse a limit of memory that a pass, or the walks before and after, cannot keep.

    Raises:
        DoesNotFit: it is too small.
    """
    from moe2edge.pipeline import blockwise

    remedy = "allow more"
    memory.check_memory(plan.source.block_nbytes, "a walk holds a block in float32", remedy, within)
    for planned in plan.steps:
        if isinstance(step := planned.step, Slim):
            solver = step.solver(planned.before)
            needed = blockwise.estimate_largest_part(planned.before, solver)
            purpose = f"{step.name} solves a part of a block at once"
            memory.check_memory(needed, purpose, remedy, within)
