"""`moe2edge export`: from a checkpoint and a recipe to verified folders and a report."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from moe2edge.commands.environment import list_versions, measure_peak_bytes
from moe2edge.commands.export_stages import FINISHING, READING, Extent
from moe2edge.commands.preflight import describe, list_reads, refuse_early, suit_targets
from moe2edge.commands.private_paths import PrivatePaths
from moe2edge.commands.report import Report
from moe2edge.commands.router_ties import TieJudge
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
from moe2edge.commands.source_format import count_by_target, report_source_format
from moe2edge.commands.texts import (
    NO_TEXT,
    SELF,
    Texts,
    list_default_texts,
    load_texts,
    resolve_recipe,
)
from moe2edge.commands.time_left import start_clock
from moe2edge.commands.trial import try_outputs
from moe2edge.commands.write_target import describe_cost, fit_for_targets, write_target
from moe2edge.evaluation.comparison import Comparison, ResultRow
from moe2edge.model.model import Model
from moe2edge.pipeline.recipe import Recipe
from moe2edge.pipeline.registry import list_options
from moe2edge.pipeline.runner import run_passes
from moe2edge.pipeline.stages import Plan, Step
from moe2edge.pipeline.target import Target
from moe2edge.progress import Reporter
from moe2edge.runtime import memory
from moe2edge.runtime.memory import Memory
from moe2edge.storage import export_folder
from moe2edge.storage.checkpoint import Checkpoint
from moe2edge.storage.companions import Companions, read_companions
from moe2edge.storage.input_files import InputFiles
from moe2edge.storage.kept_results import KeptResults
from moe2edge.storage.work_folder import WorkFolder


def export_targets(
    checkpoint: Checkpoint,
    recipe: Recipe,
    targets: Sequence[Target],
    out: Path,
    reporter: Reporter,
    *,
    force: bool = False,
    resume: export_folder.Resume = "auto",
    most: int | None = None,
    materialize: bool = False,
    keep_paths: bool = False,
    source_check: bool = True,
    verify: Extent = "full",
) -> Report:
    """Run ``recipe`` on ``checkpoint`` and write one folder per target.

    With several targets ``out`` holds one folder for each, all packed from one solve. What is left
    when anything fails can be resumed: see `moe2edge.storage.export_folder.open_partial_folder`.

    Args:
        checkpoint: the source.
        recipe: the passes and their texts.
        targets: the formats to write.
        out: the folder to write.
        reporter: receives progress.
        force: replace an output of ours.
        resume: what to do about an unfinished export to the same folder.
        most: bytes of memory for the whole process; None: what the machine has.
        materialize: give tied experts matrices of their own where a target cannot hold them.
        keep_paths: write paths of source and texts as they were given, in place of their names.
        source_check: first compare what is computed for the source with stock transformers.
        verify: how much of each output is compared with the model in memory.

    Raises:
        InputError, Unsupported, DoesNotFit: before any work.
        VerificationFailed: an output differs from the model in memory, or the source from stock.
    """
    recipe = suit_targets(recipe, targets)
    begun, defaults = time.perf_counter(), list_default_texts(recipe)
    recipe = resolve_recipe(checkpoint, recipe, reporter)
    paths = PrivatePaths.collect(checkpoint, recipe, keep=keep_paths)
    reads, ties = list_reads(checkpoint, recipe), TieJudge(targets, reporter)
    with export_folder.claim_output(out, force=force, reads=reads, log=reporter.log) as claim:
        budget = memory.Memory.from_limit(memory.find_limit(most))
        memory.avoid_fragmentation(most)
        plan, held = refuse_early(checkpoint, recipe, targets, out, budget, materialize=materialize)
        reporter, files = claim.watch(reporter), look_at_inputs(checkpoint, recipe)
        clock = start_clock(
            plan, recipe, targets, held, budget, reporter.log, source_check=source_check,
            verify=verify, leftover=None if resume == "never" else claim.partial.work,
        )  # fmt: skip
        reporter = clock.watch(reporter)
        _report_plan(checkpoint, recipe, plan, reporter, held, targets)
        companions = _read_companions(checkpoint, reporter)
        remarks = try_outputs(targets, held, companions, reporter)
        ties.look(checkpoint.model, recipe.passes)
        kept = open_kept_results(checkpoint, claim.partial.work, resume)
        prove = partial(prove_source, checkpoint, reporter, wanted=source_check, targets=targets)
        prove = partial(prove, within=budget.limit, kept=kept)
        proof, texts = _prove_and_load(checkpoint, recipe, reporter, prove, kept)
        inputs = list_inputs(checkpoint, recipe, texts.calibration, texts.training, budget)
        files.settle(checkpoint.sha256)
        begin = _Beginning(
            checkpoint, recipe, targets, texts, budget, proof, paths, companions, ties,
            materialize, defaults, begun, remarks, verify,
        )  # fmt: skip
        return _publish(claim, begin, inputs, resume, files, kept, reporter)


@dataclass(frozen=True)
class _Beginning:
    """All that is known before the first block.

    Attributes:
        checkpoint: the source.
        recipe: the recipe with every choice made.
        targets: the formats to write.
        texts: the texts of the recipe.
        budget: memory that may be used.
        proof: result of the source check.
        paths: what stands for the paths of the user.
        companions: files beside config and weights.
        ties: judges routers with equal rows.
        materialize: whether tied experts may get matrices of their own.
        defaults: purposes for which the recipe named no text.
        begun: when the export began.
        remarks: what a user should know of the outputs, by target.
        verify: how much of each output is compared with the model in memory.
    """

    checkpoint: Checkpoint
    recipe: Recipe
    targets: Sequence[Target]
    texts: Texts
    budget: Memory
    proof: SourceProof
    paths: PrivatePaths
    companions: Companions
    ties: TieJudge
    materialize: bool
    defaults: tuple[str, ...]
    begun: float
    remarks: Mapping[str, tuple[str, ...]]
    verify: Extent

    def list_outcome(self) -> dict[str, str]:
        """List what the files of an output depend on beside its numbers."""
        source = self.checkpoint
        return {
            "source": f"{source.source} {source.revision}",
            "recipe": self.recipe.render(),
            "targets": ", ".join(f"{one.name} {list_options(one)}" for one in self.targets),
            "evaluation": self.texts.evaluation.sha256,
            "materialize": f"{self.materialize}",
            "source check": self.proof.status,
            "verification": self.verify,
            "versions": f"{list_versions()}",
            "other files": self.companions.sha256,
            "paths": f"{self.paths.are_kept}",
        }


def _report_plan(
    checkpoint: Checkpoint,
    recipe: Recipe,
    plan: Plan,
    reporter: Reporter,
    held: Model,
    targets: Sequence[Target],
) -> None:
    """Report what will be done, and what was found out about the source."""
    reporter.log(f"recipe:\n{recipe.render()}")
    describe(plan, reporter)
    report_notes(checkpoint, reporter)
    report_source_format(checkpoint, held, targets, reporter)


def _prove_and_load(
    checkpoint: Checkpoint,
    recipe: Recipe,
    reporter: Reporter,
    prove: Callable[[], SourceProof],
    kept: KeptResults,
) -> tuple[SourceProof, Texts]:
    """Prove the source, load the texts, and check their ids."""

    def load() -> Texts:
        texts = load_texts(checkpoint, recipe, reporter, kept)
        if not checkpoint.was_read:
            reporter.begin(READING)
        check_ids(checkpoint, texts.by_purpose, reporter, recipe.passes)
        return texts

    if recipe.calibration.text == SELF and not checkpoint.was_read:
        reporter.begin(READING)
    return prove_and_load(recipe, prove, load)


def _publish(
    claim: export_folder.Claim,
    begin: _Beginning,
    inputs: dict[str, str],
    resume: export_folder.Resume,
    files: InputFiles,
    kept: KeptResults,
    reporter: Reporter,
) -> Report:
    """Make and publish an output, or publish the one that an earlier run has finished."""
    outcome, targets, out = begin.list_outcome(), begin.targets, claim.out
    if export_folder.publish_finished(claim, inputs, outcome, resume):
        reporter.log(f"{out} had been finished by an earlier run, and has its name now")
        return Report.read(out if len(targets) == 1 else out / targets[0].name)
    with export_folder.open_partial_folder(claim, inputs, resume, outcome) as (content, work):
        begin_work(work, files, kept, reporter)
        report = _make_output(begin, content, work, reporter)
        files.check()
    return report


def _make_output(begin: _Beginning, content: Path, work: WorkFolder, reporter: Reporter) -> Report:
    """Run the passes, and write, check and describe an output in ``content``."""
    checkpoint, recipe, targets, texts = begin.checkpoint, begin.recipe, begin.targets, begin.texts
    source, budget = checkpoint.model, replace(begin.budget, folder=work.folder)
    model, steps = run_passes(
        source, recipe, texts.calibration, work, reporter, budget,
        training=texts.training, look=begin.ties.look,
    )  # fmt: skip
    model, grown = _fit(model, targets, reporter, materialize=begin.materialize)
    memory.give_back()
    figures, ids = recipe.evaluation.text != NO_TEXT, texts.evaluation.ids
    keep_walk = partial(work.kept_walk, len(steps))
    measured = Comparison.measure(
        source, model, ids, reporter, budget, figures=figures, keep_walk=keep_walk
    )
    targets = _settle(targets, model, measured.largest, reporter)
    begin = replace(begin, targets=targets)
    folders = _make_folders(targets, content)
    model = replace(model, about=_describe_origin(begin))
    written = [
        write_target(
            target, model, folder, begin.companions, measured, reporter, texts.calibration,
            verify=begin.verify,
        )
        for target, folder in folders
    ]  # fmt: skip
    reporter.begin(FINISHING)
    report = replace(
        _build_report(begin, steps, measured, [one.row for one in written]),
        materialized=grown,
        seconds=time.perf_counter() - begin.begun,
    )
    for (target, folder), one in zip(folders, written, strict=True):
        report.write(folder, target, checkpoint, model, list_versions(), one)
    return report


def _settle(
    targets: Sequence[Target], model: Model, largest: float, reporter: Reporter
) -> list[Target]:
    """Settle the options that depend on how large activations are, and report them."""
    settled = [target.settle(model, largest) for target in targets]
    for before, after in zip(targets, settled, strict=True):
        chosen = list_options(after).items() - list_options(before).items()
        for key, value in sorted(chosen):
            reporter.log(
                f"{after.name}: {key} {value} is chosen, as the largest activation is {largest:.0f}"
            )
    return settled


def _read_companions(checkpoint: Checkpoint, reporter: Reporter) -> Companions:
    """Read the files beside config and weights, and report what does not fit."""
    companions = read_companions(checkpoint)
    for note in companions.notes:
        reporter.log(f"warning: {note}")
    return companions


def _fit(
    model: Model, targets: Sequence[Target], reporter: Reporter, *, materialize: bool
) -> tuple[Model, str | None]:
    """Return the model as all targets hold it, and what materializing costs; None: it was not."""
    fitted = fit_for_targets(model, targets, materialize=materialize)
    if fitted is not model:
        grown = describe_cost(model, fitted)
        reporter.log(f"tied experts were materialized, as a target needs it: {grown}")
        return fitted, grown
    if materialize:
        reporter.log("--materialize had no effect: the targets can hold the model as it is")
    return model, None


def _make_folders(targets: Sequence[Target], content: Path) -> list[tuple[Target, Path]]:
    """Make a folder for each of several targets; one alone is written into ``content``."""
    folders = [(t, content / t.name if len(targets) > 1 else content) for t in targets]
    for _, folder in folders:
        folder.mkdir(exist_ok=True)
    return folders


def _build_report(
    begin: _Beginning,
    steps: Sequence[Step],
    measured: Comparison,
    results: Sequence[ResultRow],
) -> Report:
    """Collect what an export did; the time that it took is still to come."""
    model, targets, paths = measured.model, begin.targets, begin.paths
    notes = (*begin.checkpoint.notes, *begin.companions.notes)
    return Report(
        source=paths.source,
        family=model.family.architecture,
        recipe=paths.hide_in(begin.recipe).render(),
        steps=tuple(
            replace(step, options=paths.hide(step.options), notes=paths.hide(step.notes))
            for step in steps
        ),
        before=measured.measure_source(),
        after=measured.measure_result(),
        results=tuple(results),
        skip_rate=measured.skip_rates.rate if model.skips else None,
        loaders={target.name: target.loaders(model) for target in targets},
        target_options={target.name: list_options(target) for target in targets},
        **paths.hide(begin.texts.describe()),
        seconds=0.0,
        peak_bytes=measure_peak_bytes(),
        default_texts=begin.defaults,
        license=begin.companions.license,
        notes=paths.hide(notes),
        source_check=begin.proof.to_json(),
        source_format=count_by_target(begin.checkpoint, model, targets) or None,
        remarks=begin.remarks,
        verification=begin.verify,
    )


def _describe_origin(begin: _Beginning) -> dict[str, str]:
    """Return what files say of where the model comes from."""
    found = {"name": begin.paths.source, "base_model": begin.checkpoint.hub_id or ""}
    licenses = {key: str(value) for key, value in begin.companions.license.items()}
    return {key: value for key, value in (found | licenses).items() if value}
