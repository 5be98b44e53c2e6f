"""`moe2edge decide`: run the part of a recipe that chooses, and keep nothing but the choice."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from moe2edge.commands.environment import list_versions
from moe2edge.commands.preflight import (
    check_pass_memory,
    check_sources,
    estimate_passes,
    list_reads,
    measure_texts,
)
from moe2edge.commands.private_paths import PrivatePaths
from moe2edge.commands.run_inputs import (
    begin_work,
    list_inputs,
    look_at_inputs,
    open_kept_results,
)
from moe2edge.commands.source_check import (
    SourceProof,
    check_ids,
    prove_and_load,
    prove_source,
    report_notes,
)
from moe2edge.commands.texts import load_calibration, resolve_recipe
from moe2edge.errors import InputError
from moe2edge.model.block import Block
from moe2edge.model.model import Model
from moe2edge.pipeline.contract import Pass
from moe2edge.pipeline.decisions import (
    DECISIONS,
    CalibrationText,
    Decisions,
    SourceCheck,
    SourceModel,
    describe_blocks,
)
from moe2edge.pipeline.recipe import Recipe
from moe2edge.pipeline.runner import run_passes
from moe2edge.pipeline.stages import Step, plan_passes
from moe2edge.pipeline.work import EXPERT_ROLES, BlockJournal
from moe2edge.progress import Reporter
from moe2edge.runtime.memory import UNLIMITED
from moe2edge.storage.checkpoint import Checkpoint
from moe2edge.storage.export_folder import Resume, claim_output, open_partial_folder
from moe2edge.storage.kept_results import KeptResults
from moe2edge.storage.text_files import write_json
from moe2edge.storage.work_folder import WorkFolder
from moe2edge.storage.written_files import hash_written

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.calibration.tokens import Tokens
    from moe2edge.model.weights import Weight
    from moe2edge.numerics.grid import Quantized
    from moe2edge.storage.kept_walk import KeptWalk


def decide(
    checkpoint: Checkpoint,
    recipe: Recipe,
    reporter: Reporter,
    *,
    keep_paths: bool = False,
    source_check: bool = True,
) -> tuple[Decisions, tuple[Step, ...]]:
    """Run the choosing passes of ``recipe``; return the decisions, and the report of each pass.

    Args:
        checkpoint: the source.
        recipe: passes that choose.
        reporter: receives progress.
        keep_paths: write paths of source and text as they were given, in place of their names.
        source_check: first compare what is computed for the source with stock transformers.

    Raises:
        InputError: a pass of the recipe computes numbers, which decisions do not hold; or as in an
            export.
        Unsupported: as in an export.
    """
    recipe = _prepare(checkpoint, recipe, reporter)
    proof, tokens = _load(checkpoint, recipe, reporter, KeptResults(), source_check=source_check)
    paths = PrivatePaths.collect(checkpoint, recipe, keep=keep_paths)
    return _run(checkpoint, recipe, tokens, _NoNumbers(), reporter, paths, proof)


def decide_to_file(
    checkpoint: Checkpoint,
    recipe: Recipe,
    out: Path,
    reporter: Reporter,
    *,
    force: bool = False,
    resume: Resume = "auto",
    keep_paths: bool = False,
    source_check: bool = True,
) -> tuple[Decisions, tuple[Step, ...]]:
    """Write decisions to a file; what was observed outlives a kill or a failure, as in an export.

    Args:
        checkpoint: the source.
        recipe: passes that choose.
        out: the file to write.
        reporter: receives progress.
        force: replace a file of decisions.
        resume: what to do about unfinished work for the same file.
        keep_paths: write paths of source and text as they were given, in place of their names.
        source_check: first compare what is computed for the source with stock transformers.

    Raises:
        InputError, Unsupported: as `decide` does; the name is taken; or an input has changed under
            way.
    """
    recipe = _prepare(checkpoint, recipe, reporter)
    out, reads = Path(os.path.abspath(out)), list_reads(checkpoint, recipe)
    with claim_output(out, force=force, reads=reads, form=DECISIONS, log=reporter.log) as claim:
        reporter = claim.watch(reporter)
        files = look_at_inputs(checkpoint, recipe)
        kept = open_kept_results(checkpoint, claim.partial.work, resume)
        proof, tokens = _load(checkpoint, recipe, reporter, kept, source_check=source_check)
        inputs = list_inputs(checkpoint, recipe, tokens, None, UNLIMITED)
        files.settle(checkpoint.sha256)
        with open_partial_folder(claim, inputs, resume) as (content, work):
            begin_work(work, files, kept, reporter)
            paths = PrivatePaths.collect(checkpoint, recipe, keep=keep_paths)
            found, steps = _run(
                checkpoint, recipe, tokens, _NoNumbers(work), reporter, paths, proof
            )
            hash_written(content, write_json(content, found.to_json()))
            files.check()
    return found, steps


def _prepare(checkpoint: Checkpoint, recipe: Recipe, reporter: Reporter) -> Recipe:
    """Resolve and check a recipe before any work."""
    recipe = resolve_recipe(checkpoint, recipe, reporter)
    check_sources(recipe, checkpoint)
    check_decidable(recipe.passes, checkpoint.model)
    plan = plan_passes(recipe.passes, checkpoint.model)
    check_pass_memory(plan.source, estimate_passes(plan, measure_texts(recipe)), None)
    reporter.log(f"recipe:\n{recipe.render()}")
    report_notes(checkpoint, reporter)
    return recipe


def _load(
    checkpoint: Checkpoint,
    recipe: Recipe,
    reporter: Reporter,
    kept: KeptResults,
    *,
    source_check: bool,
) -> tuple[SourceProof, Tokens | None]:
    """Load and check the calibration text, and check the source."""

    def load() -> Tokens | None:
        tokens = load_calibration(checkpoint, recipe, reporter, kept)
        check_ids(checkpoint, {"calibration": tokens}, reporter)
        return tokens

    prove = partial(prove_source, checkpoint, reporter, wanted=source_check, kept=kept)
    return prove_and_load(recipe, prove, load)


def _run(
    checkpoint: Checkpoint,
    recipe: Recipe,
    tokens: Tokens | None,
    work: _NoNumbers,
    reporter: Reporter,
    paths: PrivatePaths,
    proof: SourceProof,
) -> tuple[Decisions, tuple[Step, ...]]:
    """Run the passes, and describe what they chose."""
    source = checkpoint.model
    model, steps = run_passes(source, recipe, tokens, work, reporter)
    found = Decisions(
        source=SourceModel(
            model=paths.source,
            revision=checkpoint.revision,
            sha256=checkpoint.sha256,
            family=source.family.model_type,
        ),
        source_check=SourceCheck(**proof.to_record()),
        recipe=paths.hide_in(recipe).render(),
        calibration=CalibrationText(**paths.hide(tokens.provenance)) if tokens else None,
        versions=list_versions(),
        blocks=describe_blocks(model),
    )
    return found, tuple(steps)


def check_decidable(passes: Sequence[Pass], source: Model) -> None:
    """Refuse, from shapes alone, passes whose result decisions cannot hold.

    Raises:
        InputError: there is no pass; or one of them, which is named, computes numbers.
        Unsupported: a pass does not handle the model.
    """
    if not passes:
        raise InputError("the recipe has no passes; there is nothing to decide")
    model = source
    for step in passes:
        if step.computes_numbers:
            raise _make_refusal(step.name)
        # One by one, so that the first pass that does not fit is the one that is named.
        after = plan_passes([step], model).result
        # A pass that plans no other structure does its work on numbers.
        if _has_new_numbers(model, after) or describe_blocks(after) == describe_blocks(model):
            raise _make_refusal(step.name)
        model = after


def _has_new_numbers(before: Model, after: Model) -> bool:
    """Return whether experts, or their replacements, have numbers that are not computed yet."""
    return any(role.startswith(EXPERT_ROLES) for role, _ in after.new_beside(before))


def _make_refusal(name: str) -> InputError:
    return InputError(
        f"decide: the recipe has {name}, which computes numbers; a file of decisions holds choices "
        f"only. Leave {name} out here, and put it after apply_decisions in the recipe of the export"
    )


@dataclass(frozen=True)
class _NoNumbers:
    """A work folder for passes that compute no numbers.

    Attributes:
        work: keeps walks; None: nothing does.
    """

    work: WorkFolder | None = None

    def ledger(self, step: int) -> BlockJournal:
        """Refuse, as passes that solve were refused before."""
        raise AssertionError(f"pass {step} solves")

    def kept_walk(self, step: int, name: str) -> KeptWalk | None:
        """Return the folder of a walk; None: there is no work folder."""
        return None if self.work is None else self.work.kept_walk(step, name)

    def scratch(self, step: int, name: str) -> Path:
        """Refuse, as passes that train were refused before."""
        raise AssertionError(f"{name} computes numbers")

    def put(self, block: Block, numbers: Mapping[str, Quantized | Tensor]) -> Block:
        """Refuse.

        Raises:
            InputError: always.
        """
        raise InputError(
            f"decide: a pass computed numbers ({min(numbers)} of block {block.origin}); a file of "
            "decisions holds choices only; leave that pass out"
        )

    def put_rest(
        self, rest: Mapping[str, Weight], numbers: Mapping[str, Quantized | Tensor]
    ) -> dict[str, Weight]:
        """Refuse, as `put` does."""
        raise InputError(
            f"decide: a pass computed numbers ({min(numbers)}); a file of decisions holds choices "
            "only; leave that pass out"
        )
