"""`moe2edge export`: from a checkpoint and a recipe to verified folders and a report."""

from __future__ import annotations

import importlib.metadata
import resource
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe2edge import registry, workfolder
from moe2edge.checkpoint import Checkpoint
from moe2edge.errors import InputError
from moe2edge.model import Model
from moe2edge.pipeline import (
    Facts,
    GroupSolver,
    Lab,
    Outcome,
    Search,
    Slim,
    Step,
    Store,
    Trim,
    enforce,
    plan,
    stages,
)
from moe2edge.progress import Watcher
from moe2edge.recipe import Recipe, TextSource, read_yaml
from moe2edge.report import Report, ResultRow
from moe2edge.target import Target

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.calibration import Tokens
    from moe2edge.skipping import SkipRates
    from moe2edge.verify import Reference


def export(
    checkpoint: Checkpoint,
    recipe: Recipe,
    targets: Sequence[Target],
    out: Path,
    watcher: Watcher,
    *,
    force: bool = False,
) -> Report:
    """Run ``recipe`` on ``checkpoint`` and write one folder per target.

    With several targets ``out`` holds one folder for each, all packed from one solve. Nothing is
    left behind when anything fails.

    Raises:
        InputError, Unsupported, DoesNotFit: before any work.
        VerificationFailed: what was written is not what was meant.
    """
    begun = time.perf_counter()
    source = checkpoint.model
    recipe = recipe.resolved(source)
    check_sources(recipe, checkpoint)
    planned = plan(recipe.passes, source)
    for target in targets:
        target.accepts(planned)
    workfolder.check_output(out, force=force)
    solved = sum(weight.nbytes for _, _, weight in planned.tensors() if weight.scheme)
    needed = sum(target.nbytes(planned) for target in targets) + solved
    workfolder.check_space(out, round(needed * 1.05) + (16 << 20))
    workfolder.check_memory(max(target.runtime_nbytes(planned) for target in targets))
    watcher.log(f"recipe:\n{recipe.render()}")
    for step in recipe.passes:
        if isinstance(step, Slim):
            watcher.log(f"{registry.name_of(step)}: {step.describe(source)}")
    calibration = calibration_tokens(checkpoint, recipe)
    evaluation = _tokens(checkpoint, recipe.evaluation, "evaluation")
    with workfolder.partial_folder(out) as (content, work):
        model, steps = run_passes(source, recipe, calibration, workfolder.WorkFolder(work), watcher)
        for target in targets:
            target.accepts(model)
        measured = _Measured.of(source, model, evaluation.ids, work, watcher)
        results: list[ResultRow] = []
        for target in targets:
            folder = content / registry.name_of(target) if len(targets) > 1 else content
            folder.mkdir(exist_ok=True)
            watcher.log(f"writing {registry.name_of(target)}")
            results.append(_write(target, model, folder, checkpoint, measured, watcher))
        report = Report(
            source=checkpoint.source,
            family=source.family.architecture,
            recipe=recipe.render(),
            steps=tuple(steps),
            before=measured.before(source),
            after=measured.after(model),
            results=tuple(results),
            skip_rate=measured.skip_rates.rate if model.skips else None,
            loaders={registry.name_of(t): t.loaders(model) for t in targets},
            target_options={registry.name_of(t): registry.options_of(t) for t in targets},
            calibration=calibration.provenance if calibration else None,
            evaluation=evaluation.provenance,
            seconds=time.perf_counter() - begun,
            peak_bytes=_peak_bytes(),
        )
        for target in targets:
            folder = content / registry.name_of(target) if len(targets) > 1 else content
            report.write(folder, target, checkpoint, model, versions())
    return report


def check_sources(recipe: Recipe, checkpoint: Checkpoint) -> None:
    """Let passes that fit one source only see that it is theirs.

    Raises:
        InputError: it is not.
    """
    for step in recipe.passes:
        step.check_source(lambda: checkpoint.sha256)


def calibration_tokens(checkpoint: Checkpoint, recipe: Recipe) -> Tokens | None:
    """Tokens for calibration, if a pass needs any.

    Raises:
        InputError: the text does not serve.
    """
    from moe2edge.calibration import check_files

    if not any(stage.needs_tokens for stage in stages(recipe.passes)):
        check_files(recipe.calibration, "calibration")
        return None
    return _tokens(checkpoint, recipe.calibration, "calibration")


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
    work: Store,
    watcher: Watcher,
) -> tuple[Model, list[Step]]:
    """The model after all passes, and a line of the report for each of them."""
    from moe2edge import solving, walk

    model = source
    steps: list[Step] = []
    for stage in stages(recipe.passes):
        begun = time.perf_counter()
        facts = Facts()
        if stage.observers and calibration is not None:
            observers = {kind: kind() for kind in stage.observers}
            label = f"{', '.join(registry.name_of(p) for p in stage.passes)}: scoring"
            seeing = list(observers.values())
            walk.observe(model, calibration.ids, seeing, watcher.advance, label)
            facts = Facts({kind: observer.fact() for kind, observer in observers.items()})
        for step in stage.passes:
            name = registry.name_of(step)
            # Again: a threshold or a shared budget may have left another model than was planned.
            step.check(model)
            if isinstance(step, Trim):
                outcome = step.apply(model, facts)
            elif isinstance(step, Slim):
                ids = calibration.ids if step.needs_tokens and calibration is not None else None
                solver = step.solver(model)
                args = (work, watcher.advance, name)
                if isinstance(solver, GroupSolver):
                    solved, changed, notes = solving.solve(model, ids, solver, *args)
                else:
                    solved, changed, notes = walk.solve(model, ids, solver, *args)
                outcome = Outcome(solved, tuple(changed), notes=tuple(notes))
            elif isinstance(step, Search) and calibration is not None:
                outcome = step.search(Lab(source, model, calibration.ids, work, watcher))
            else:
                raise AssertionError(f"{name} is no kind of pass that is known")
            enforce(step, name, model, outcome)
            model = outcome.model
            steps.append(
                Step(
                    name,
                    step.model_dump(),
                    outcome.changed,
                    outcome.skipped,
                    outcome.notes,
                    time.perf_counter() - begun,
                    model.parameters,
                    model.nbytes,
                )
            )
            begun = time.perf_counter()
    return model, steps


@dataclass(frozen=True)
class _Measured:
    """Hidden states of source and result on the evaluation tokens, and the reference."""

    source: Model
    model: Model
    ids: Tensor
    source_hidden: Tensor
    hidden: Tensor
    reference: Reference
    skip_rates: SkipRates

    @classmethod
    def of(
        cls, source: Model, model: Model, ids: Tensor, work: Path, watcher: Watcher
    ) -> _Measured:
        from moe2edge import verify, walk
        from moe2edge.skipping import SkipObserver

        length = min(ids.shape[1], verify.PREFILL + verify.STEPS)
        skipped, margins = SkipObserver(), verify.MarginObserver(length)
        seeing = (skipped, margins)
        if model is source:
            before = walk.observe(source, ids, seeing, watcher.advance, "evaluation: source")
            after = before
        else:
            before = walk.observe(source, ids, (), watcher.advance, "evaluation: source")
            after = walk.observe(model, ids, seeing, watcher.advance, "evaluation: result")
        watcher.log("recording what verify compares with")
        rows = verify.reference_rows(margins.fact(), len(ids))
        reference = verify.record(
            model,
            ids[rows, :length],
            list(walk.head_logits(source, before[rows, :length])),
            after[rows, :length],
        )
        return cls(source, model, ids, before, after, reference, skipped.fact())

    def source_logits(self) -> Iterator[Tensor]:
        from moe2edge import walk

        return walk.head_logits(self.source, self.source_hidden)

    def logits(self) -> Iterator[Tensor]:
        from moe2edge import walk

        return walk.head_logits(self.model, self.hidden)

    def before(self, source: Model) -> ResultRow:
        from moe2edge import quality

        return ResultRow.of("source", source, quality.measure(self.ids, self.source_logits(), None))

    def after(self, model: Model) -> ResultRow:
        from moe2edge import quality

        found = quality.measure(self.ids, self.logits(), self.source_logits())
        return ResultRow.of("result, float32 activations", model, found)

    def in_runtime(self, logits: Iterable[Tensor]) -> Any:
        from moe2edge import quality

        return quality.measure(self.ids, logits, self.source_logits())


def _write(
    target: Target,
    model: Model,
    folder: Path,
    checkpoint: Checkpoint,
    measured: _Measured,
    watcher: Watcher,
) -> ResultRow:
    """Write one target, reopen it in its runtime, and hold it against the model in memory."""
    from moe2edge import verify
    from moe2edge.skipping import measure_times

    name = registry.name_of(target)
    for companion in checkpoint.companions:
        shutil.copyfile(companion, folder / companion.name)
    target.write(model, folder)
    stored = target.stored(model)
    reference = measured.reference.of_stored(model, stored)
    reference.save(folder)
    watcher.log(f"reading {name} back")
    verify.audit(target, folder, stored)
    watcher.log(f"running {name}")
    parity, shipped = verify.parity(reference, target, folder)
    if parity.shipped > verify.SHIPPED_USUAL:
        watcher.log(
            f"warning: {name} as shipped differs from PyTorch by {parity.shipped:.1%} (median); "
            f"{verify.SHIPPED_USUAL:.0%} is usual. Its perplexity and KL say what that costs"
        )

    def logits() -> Iterator[Tensor]:
        for n, row in enumerate(measured.ids):
            watcher.advance(f"evaluation: {name}", n, len(measured.ids))
            yield shipped.logits(row[None])[0]
        watcher.advance(f"evaluation: {name}", len(measured.ids), len(measured.ids))

    found = measured.in_runtime(logits())
    size = sum(path.stat().st_size for path in folder.iterdir())
    times = None
    if model.skips:
        watcher.log(f"timing {name} with and without skipping")
        text = measured.ids[0].tolist()
        times = measure_times(shipped, target.without_skipping(model, folder), text)
    return ResultRow.of(f"{name}, in its runtime", model, found, size, parity, times)


def _peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def versions() -> dict[str, str]:
    """Versions of what numbers may depend on."""
    names = ("moe2edge", "torch", "transformers", "onnx", "onnxruntime", "onnxruntime-gpu")
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
