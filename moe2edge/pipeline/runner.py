"""Run the passes of a recipe in order."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

from moe2edge.calibration.observation import Facts
from moe2edge.model.model import Model
from moe2edge.pipeline.contract import Outcome, PassContext, PlannedStep, Search, Slim, Train, Trim
from moe2edge.pipeline.recipe import Recipe
from moe2edge.pipeline.stages import Step, enforce, group_stages
from moe2edge.pipeline.work import Work
from moe2edge.progress import Reporter
from moe2edge.runtime.memory import UNLIMITED, Memory

if TYPE_CHECKING:
    from moe2edge.calibration.tokens import Tokens


def run_passes(
    source: Model,
    recipe: Recipe,
    calibration: Tokens | None,
    work: Work,
    reporter: Reporter,
    budget: Memory = UNLIMITED,
    *,
    training: Tokens | None = None,
) -> tuple[Model, list[Step]]:
    """The model after all passes, and a line of the report for each of them."""
    import torch

    from moe2edge.calibration import walk
    from moe2edge.pipeline import blockwise

    model = source
    steps: list[Step] = []
    nothing = torch.empty(0, 0, dtype=torch.int64)
    tokens = calibration.ids if calibration else nothing
    ids_to_train = training.ids if training else None
    context = PassContext(source, source, tokens, work, reporter, budget, training=ids_to_train)
    for stage in group_stages(recipe.passes):
        begun = time.perf_counter()
        facts = Facts()
        if stage.observers and calibration is not None:
            label = f"{', '.join(p.name for p in stage.passes)}: scoring"
            facts = walk.gather(
                model, calibration.ids, stage.observers, reporter.advance, label, budget
            )
        for step in stage.passes:
            name = step.name
            if not any(layer.sharing for _, layer in model.moe_blocks):
                context = replace(context, unshared=model)
            # Again: a threshold or a shared budget may have left another model than was planned.
            step.check(model)
            if isinstance(step, Trim):
                outcome = step.apply(model, facts)
            elif isinstance(step, Slim):
                ids = calibration.ids if step.needs_tokens and calibration is not None else None
                kept, advance = work.ledger(len(steps)), reporter.advance
                solved, changed, notes = blockwise.solve_blocks(
                    model, ids, step.solver(model), kept, advance, name, budget
                )
                outcome = Outcome(solved, tuple(changed), notes=tuple(notes))
            elif isinstance(step, Search):
                if not isinstance(step, Train):
                    shapes = PlannedStep(step, model, model)
                    step.estimate(shapes, context.texts).check(budget.limit)
                folder = work.scratch(len(steps), name) if isinstance(step, Train) else None
                outcome = step.search(replace(context, model=model, scratch=folder))
            else:
                raise AssertionError(f"{name} is no kind of pass that is known")
            enforce(step, name, model, outcome)
            model = outcome.model
            if outcome.originals is not None:
                context = replace(context, unshared=outcome.originals)
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
