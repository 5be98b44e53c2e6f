"""Run the passes of a recipe in order."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from moe2edge.calibration.observation import Facts
from moe2edge.model.edits import hide_source_integers, restore_source_integers
from moe2edge.model.model import Model
from moe2edge.pipeline.contract import Outcome, Pass, PassContext
from moe2edge.pipeline.recipe import Recipe
from moe2edge.pipeline.stages import SCORING, Stage, Step, enforce, group_stages
from moe2edge.pipeline.work import Work
from moe2edge.progress import Reporter
from moe2edge.runtime.memory import UNLIMITED, Memory

if TYPE_CHECKING:
    from moe2edge.calibration.tokens import Tokens
    from moe2edge.storage.kept_walk import KeptWalk


def run_passes(
    source: Model,
    recipe: Recipe,
    calibration: Tokens | None,
    work: Work,
    reporter: Reporter,
    budget: Memory = UNLIMITED,
    *,
    training: Tokens | None = None,
    look: Callable[[Model, Sequence[Pass]], None] = lambda *_: None,
) -> tuple[Model, list[Step]]:
    """Run all passes; return the last model, and a line of the report for each pass.

    Passes see the integers of a quantized source as plain numbers; those that no pass changed are
    in the model that is returned. After each pass, ``look`` gets the model and the passes that are
    still to come.
    """
    import torch

    tokens = calibration.ids if calibration else torch.empty(0, 0, dtype=torch.int64)
    plain = hide_source_integers(source)
    context = PassContext(plain, plain, tokens, work, reporter, budget)
    context = replace(context, training=training.ids if training else None)
    steps: list[Step] = []
    left: dict[type, object] = {}
    for stage in group_stages(recipe.passes):
        begun = time.perf_counter()
        reporter.begin(stage.passes[0].name)
        observed = _observe(stage, context, work.kept_walk(len(steps), SCORING))
        for n, step in enumerate(stage.passes):
            if n:
                reporter.begin(step.name)
            # Again: a threshold or a shared budget may have left another model than was planned.
            step.check(context.model)
            facts = observed.for_pass(left, step.reads)
            outcome = step.run(_with_work(context, work, step, len(steps), facts))
            enforce(step, context.model, outcome)
            context = replace(context, model=outcome.model)
            left |= {type(fact): fact for fact in outcome.facts}
            ended = time.perf_counter()
            steps.append(_report(step, outcome, ended - begun))
            look(context.model, recipe.passes[len(steps) :])
            begun = ended
    if context.model is plain:
        return source, steps
    return restore_source_integers(context.model, source), steps


def _observe(stage: Stage, context: PassContext, kept: KeptWalk | None) -> Facts:
    """Gather the facts that the passes of a stage need, in one walk over the calibration text."""
    if not context.tokens.numel():
        return Facts()
    return context.gather(stage.observers, stage.label, kept, stage.compute)


def _with_work(
    context: PassContext, work: Work, step: Pass, position: int, facts: Facts
) -> PassContext:
    """Add the facts for a pass, and its part of the work folder."""
    return replace(
        context,
        facts=facts,
        keep_walk=partial(work.kept_walk, position),
        journal=work.ledger(position) if step.computes_numbers else None,
        scratch=work.scratch(position, step.name) if step.needs_training_text else None,
    )


def _report(step: Pass, outcome: Outcome, seconds: float) -> Step:
    """Make the line of the report for a pass that was run."""
    return Step(
        step.name,
        step.model_dump(by_alias=True),
        outcome.changed,
        outcome.skipped,
        outcome.notes,
        seconds,
        outcome.model.parameters,
        outcome.model.nbytes,
        outcome.figures,
    )
