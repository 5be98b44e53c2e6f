"""Forecast of an export, from shapes alone: what it gives and takes, and all that refuses it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from moe2edge.commands.export_stages import (
    ExportStage,
    Extent,
    list_export_stages,
    measure_peak,
)
from moe2edge.commands.preflight import (
    check_pass_memory,
    check_training,
    estimate_hidden_bytes,
    estimate_passes,
    measure_texts,
    suit_targets,
)
from moe2edge.commands.texts import check_texts, resolve_recipe
from moe2edge.commands.write_target import fit_for_targets
from moe2edge.errors import DoesNotFit, InputError, Moe2EdgeError, Unsupported
from moe2edge.evaluation.machine_rates import MachineRates
from moe2edge.model.edits import hide_source_integers
from moe2edge.model.model import Model
from moe2edge.model.token_reads import count_token_reads
from moe2edge.pipeline.contract import Pass
from moe2edge.pipeline.recipe import Recipe
from moe2edge.pipeline.registry import list_options
from moe2edge.pipeline.stages import Plan, plan_passes
from moe2edge.pipeline.target import Loader, Target
from moe2edge.progress import QUIET
from moe2edge.runtime.memory import Estimate, Memory
from moe2edge.storage.checkpoint import Checkpoint
from moe2edge.storage.companions import list_companions
from moe2edge.storage.tokenizer import has_tokenizer, load_tokenizer

# Bytes of report, card, manifest and recipe, beside what the report says of each tensor.
DOCUMENTS = 13_000


@dataclass(frozen=True)
class Refusal:
    """A reason for which an export would not begin.

    Attributes:
        part: the pass or the target that it is about; empty: the whole.
        code: the exit code of the export.
        message: its line.
    """

    part: str
    code: int
    message: str


@dataclass(frozen=True)
class TargetForecast:
    """Forecast of one output, in bytes.

    Attributes:
        target, options: the target.
        disk: all files of the folder.
        weights: weights as its runtime holds them.
        cache_per_token: what is remembered of each token until windows of attention are full.
        cache: what is remembered of the whole context.
        runtime: the process with the runtime, and no model.
        resident: memory while running: weights, cache, runtime, and logits of a part of a prompt.
        droppable: part of it that the system takes back when memory runs short: pages of files of
            which the runtime holds copies.
        read: bytes that are read for a token behind the context.
        ceiling: tokens per second at most, by the bandwidth of the memory.
        loaders: programs that load it, with verdicts.
    """

    target: str
    options: Mapping[str, Any]
    disk: int
    weights: int
    cache_per_token: int
    cache: int
    runtime: int
    resident: int
    droppable: int
    read: int
    ceiling: float
    loaders: tuple[Loader, ...]


@dataclass(frozen=True)
class StageForecast:
    """Forecast of a stage of an export: seconds, and the bytes that it holds beside libraries."""

    name: str
    seconds: float
    memory: int


@dataclass(frozen=True)
class ModelSize:
    """Parameters of a model, those that one token uses, and the bytes of its tensors."""

    parameters: int
    active_parameters: int
    bytes: int


@dataclass(frozen=True)
class ExportForecast:
    """Forecast of the export itself.

    Attributes:
        memory: peak resident set, in bytes.
        disk: bytes on the disk until it ends.
        seconds: time.
        stages: its stages.
    """

    memory: int
    disk: int
    seconds: float
    stages: tuple[StageForecast, ...]


@dataclass(frozen=True)
class Forecast:
    """Forecast of an export, and of its outputs.

    Attributes:
        source: MODEL, as it was given.
        family: ``model_type`` of the text model.
        recipe: the recipe with every choice made, as YAML.
        context: tokens of a text that is remembered.
        before: size of the source.
        after: size of what passes leave of it.
        targets: the outputs that nothing refuses.
        export: the export to all of these; None: there are none.
        refusals: all that would refuse the export, in the order in which it would.
        lacking: what this machine does not have for it: memory and disk.
        rates: those of the machine.
        notes: what was not known.
    """

    source: str
    family: str
    recipe: str
    context: int
    before: ModelSize
    after: ModelSize
    targets: tuple[TargetForecast, ...]
    export: ExportForecast | None
    refusals: tuple[Refusal, ...]
    lacking: tuple[str, ...]
    rates: MachineRates
    notes: tuple[str, ...]


def forecast_export(
    checkpoint: Checkpoint,
    recipe: Recipe,
    targets: Sequence[Target],
    rates: MachineRates,
    budget: Memory,
    *,
    context: int,
    notes: Sequence[str] = (),
    materialize: bool = False,
    verify: Extent = "full",
) -> Forecast:
    """Say what an export would give and take, from headers alone.

    Args:
        checkpoint: the source, of which no number is read.
        recipe: the recipe.
        targets: the formats to write.
        rates: those of the machine.
        budget: memory of this machine.
        context: tokens of a text.
        notes: what is not known of the source.
        materialize: give tied experts matrices of their own where a target cannot hold them.
        verify: how much of each output the export compares with the model in memory.

    Raises:
        InputError, Unsupported: the source is no model that anything can be done with.
    """
    source, refused = checkpoint.model, _Refusals()
    recipe = suit_targets(recipe, targets)
    refused.watch("", lambda: check_texts(recipe))
    recipe = refused.watch("", lambda: resolve_recipe(checkpoint, recipe, QUIET)) or recipe
    plan, recipe = _plan_what_can(recipe, source, refused)
    texts = measure_texts(recipe)
    refused.watch("training", lambda: check_training(recipe, texts, source))
    result = plan.result
    fit, each = partial(fit_for_targets, result, materialize=materialize), _Refusals()
    looks = [_look_at_target(one, fit, checkpoint.folder, each) for one in targets]
    found = [look for look in looks if look is not None]
    if each.found and len(targets) > 1:
        # What all targets together refuse with is the line of the export.
        refused.watch("", lambda: fit(targets))
    refused.add(each)
    if not notes and not has_tokenizer(checkpoint.folder):
        refused.watch("tokenizer", lambda: load_tokenizer(checkpoint.folder))
    companions = _measure_companions(checkpoint)
    length = recipe.evaluation.length
    outputs = tuple(
        _forecast_target(*one, source, companions, context, length, rates) for one in found
    )
    costs = estimate_passes(plan, texts)
    export = None
    if found:
        stages = list_export_stages(plan, costs, recipe, found, budget, verify=verify)
        export = _forecast_run(plan, costs, recipe, stages, outputs, budget, rates)
    lacking = tuple(_list_lacking(plan, costs, found, export, budget))
    return Forecast(
        checkpoint.source,
        source.family.model_type,
        recipe.render(),
        context,
        ModelSize(source.parameters, source.active_parameters, _measure_source(checkpoint)),
        ModelSize(result.parameters, result.active_parameters, result.nbytes),
        outputs,
        export,
        tuple(refused.found),
        lacking,
        rates,
        tuple(notes),
    )


class _Refusals:
    """Collects errors, each once."""

    def __init__(self) -> None:
        self.found: list[Refusal] = []

    def watch(self, part: str, look: Callable[[], Any]) -> Any:
        """Return what ``look`` returns; None, with a refusal, if it raises an error of ours."""
        try:
            return look()
        except (InputError, Unsupported) as error:
            self._add(Refusal(part, error.exit_code, str(error)))
            return None

    def add(self, others: _Refusals) -> None:
        """Add those of another collection."""
        for other in others.found:
            self._add(other)

    def _add(self, refusal: Refusal) -> None:
        if refusal.message not in {one.message for one in self.found}:
            self.found.append(refusal)


def _look_at_target(
    target: Target, fit: Callable[[Sequence[Target]], Model], folder: Path, refused: _Refusals
) -> tuple[Target, Model, Estimate] | None:
    """Return what a target gets, and what that takes; None if it refuses.

    Args:
        target: the target.
        fit: returns the result of the passes in a form that targets hold.
        folder: the source's.
        refused: gets the refusals.
    """
    model = refused.watch(target.name, lambda: fit([target]))
    if model is None:
        return None
    estimate = refused.watch(target.name, lambda: target.estimate_folder(model, folder))
    refused.watch(target.name, lambda: target.check_runtime(model))
    return None if estimate is None else (target, model, estimate)


def _plan_what_can(recipe: Recipe, source: Model, refused: _Refusals) -> tuple[Plan, Recipe]:
    """Plan a recipe without the passes that refuse; return that recipe as well.

    So a pass behind one that refuses is looked at, too, though on another model.
    """
    passes: tuple[Pass, ...] = ()
    plan = Plan(source, ())
    if (whole := refused.watch("", lambda: plan_passes(recipe.passes, source))) is not None:
        return whole, recipe
    for step in recipe.passes:
        tried = (*passes, step)
        longer = refused.watch(step.name, partial(plan_passes, tried, source))
        if longer is not None:
            plan, passes = longer, tried
    return plan, replace(recipe, passes=passes)


def _measure_companions(checkpoint: Checkpoint) -> int:
    """Return the bytes of the files beside the weights that outputs get."""
    return sum(path.stat().st_size for path in list_companions(checkpoint.folder))


def _measure_source(checkpoint: Checkpoint) -> int:
    """Return the bytes of the tensors of the source, as they are stored."""
    if checkpoint.known is not None:
        return checkpoint.known.nbytes
    from moe2edge.storage.safetensors_files import open_file

    return sum(open_file(path)[name].nbytes for name, path in checkpoint.files.items())


# ---- outputs -------------------------------------------------------------------------------------


def _forecast_target(
    target: Target,
    model: Model,
    estimate: Estimate,
    source: Model,
    companions: int,
    context: int,
    length: int,
    rates: MachineRates,
) -> TargetForecast:
    """Say what one output takes."""
    from moe2edge.evaluation.reference import estimate_reference_bytes

    stored = target.stored(model)
    changed = model.new_beside(hide_source_integers(source))
    documents = DOCUMENTS + sum(len(weight.name) + 6 for _, weight in changed)
    reference = estimate_reference_bytes(model, stored, length)
    disk = estimate.disk + companions + reference + documents
    each, cache = target.count_cache(model, 1), target.count_cache(model, context)
    state = target.count_cache(model, 0)
    mapped = target.count_mapped(model)
    logits = 4 * model.vocabulary * min(context, target.logits_rows)
    read = sum(count_token_reads(stored, target.count_held(stored)).values()) + cache
    return TargetForecast(
        target.name,
        list_options(target),
        disk,
        estimate.memory,
        each - state,
        cache,
        target.runtime_nbytes,
        target.runtime_nbytes + estimate.memory + mapped + cache + logits,
        target.count_droppable(model) + mapped,
        read,
        rates.bandwidth / read,
        target.loaders(model),
    )


# ---- the export ----------------------------------------------------------------------------------


def _forecast_run(
    plan: Plan,
    costs: Sequence[Estimate],
    recipe: Recipe,
    stages: Sequence[ExportStage],
    outputs: Sequence[TargetForecast],
    budget: Memory,
    rates: MachineRates,
) -> ExportForecast:
    """Say what the export to all outputs takes."""
    evaluated = recipe.evaluation.samples * recipe.evaluation.length
    disk = sum(cost.disk for cost in costs)
    disk += estimate_hidden_bytes(plan, measure_texts(recipe), evaluated, budget)
    told = [_tell(stage, rates) for stage in stages]
    return ExportForecast(
        measure_peak(stages),
        disk + sum(one.disk for one in outputs),
        sum(stage.seconds for stage in told),
        tuple(told),
    )


def _tell(stage: ExportStage, rates: MachineRates) -> StageForecast:
    return StageForecast(stage.name, stage.estimate_seconds(rates), stage.memory)


def _list_lacking(
    plan: Plan,
    costs: Sequence[Estimate],
    found: Sequence[tuple[Target, Model, Estimate]],
    export: ExportForecast | None,
    budget: Memory,
) -> Iterator[str]:
    """Yield what this machine lacks for the export, by the checks of the export itself."""
    looks: list[Callable[[], None]] = [
        partial(estimate.check, budget.limit) for target, _, estimate in found if not target.streams
    ]
    looks.append(lambda: check_pass_memory(plan.source, costs, budget.limit))
    for look in looks:
        try:
            look()
        except DoesNotFit as error:
            yield str(error)
    free = shutil.disk_usage(Path.cwd()).free
    if export is not None and export.disk * 1.05 > free:
        yield (
            f"{Path.cwd()} has {free / 1e9:.2f} GB free, the export needs "
            f"{export.disk * 1.05 / 1e9:.2f} GB; free some space, or write to another disk"
        )


def refuse_like_export(forecast: Forecast) -> None:
    """Raise the error with which the export would refuse, if it would.

    Raises:
        InputError, Unsupported: so, with the line of the export.
    """
    if forecast.refusals:
        first = forecast.refusals[0]
        kinds: tuple[type[Moe2EdgeError], ...] = (InputError, Unsupported)
        raise next(kind for kind in kinds if kind.exit_code == first.code)(first.message)
