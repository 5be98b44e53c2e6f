"""The Python API: the commands as functions that take strings, paths and mappings.

Everything public is listed, and imported from here, in `moe2edge`.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moe2edge.errors import InputError, join_lines
from moe2edge.model.model import Model
from moe2edge.pipeline import recipe as recipes
from moe2edge.pipeline.recipe import Recipe
from moe2edge.pipeline.stages import Step
from moe2edge.progress import QUIET, Reporter
from moe2edge.storage.checkpoint import Checkpoint, open_checkpoint

if TYPE_CHECKING:
    from moe2edge.calibration.sources import TextSource
    from moe2edge.calibration.tokens import Tokens
    from moe2edge.commands.report import Report
    from moe2edge.evaluation.profile.result import Profile


def parse_recipe(recipe: str | Path | Mapping[str, Any], settings: Sequence[str] = ()) -> Recipe:
    """Parse a recipe; torch is not imported.

    Args:
        recipe: the name of a bundled recipe, the path of a YAML file, or what such a file holds.
        settings: overrides, as ``--set`` takes them.

    Returns:
        The recipe, with every option checked. ``render()`` gives it as YAML.

    Raises:
        InputError: there is no such recipe, or an option is unknown or wrong.

    >>> parse_recipe("w4", ["gptq.group_size=64"]).passes[0].group_size
    64
    >>> parse_recipe({"passes": [{"expert_drop": {"keep": 8}}]}).passes[0].keep
    8
    """
    if isinstance(recipe, Mapping):
        import yaml

        try:
            text = yaml.safe_dump(dict(recipe))
        except yaml.YAMLError as error:
            raise InputError(
                f"the recipe has a value that YAML cannot write: {join_lines(error, 200)}; use "
                "numbers, words, lists and mappings"
            ) from error
    else:
        text = recipes.find(str(recipe))
    return recipes.parse(text, settings)


@dataclass(frozen=True)
class Compressed:
    """A compressed model that is not written for a target.

    Its numbers are on the disk until `model` is garbage collected; keep that as long as models that
    were made from it are in use.

    Attributes:
        source: the checkpoint.
        model: the result. ``print(model)`` shows every block.
        steps: one entry for each pass: its options, notes, figures and seconds.
        source_check: whether the numbers of the source were compared with stock transformers, and
            the result.
    """

    source: Checkpoint
    model: Model
    steps: tuple[Step, ...]
    source_check: Mapping[str, Any]


def compress(
    model: str | Path | Checkpoint,
    recipe: str | Path | Mapping[str, Any] | Recipe,
    *,
    max_memory: int | None = None,
    source_check: bool = True,
    reporter: Reporter | None = None,
) -> Compressed:
    """Run the passes of a recipe, and write nothing.

    Args:
        model: a folder, a hub id, ``builtin:tiny-moe``, or an open checkpoint.
        recipe: as `parse_recipe` takes it, or a parsed one.
        max_memory: bytes for the whole process; None: what the machine has.
        source_check: first compare what is computed for the model with stock transformers.
        reporter: receives lines and progress; None: nothing is reported.

    Returns:
        The model, and what each pass did.

    Raises:
        InputError: the model, the recipe or a text is wrong.
        Unsupported: a pass cannot do its work on this model.
        DoesNotFit: there is too little memory.
        VerificationFailed: what is computed for the model is not what stock transformers computes.

    >>> recipe = {"passes": [{"expert_drop": {"keep": 8, "criterion": "magnitude"}}]}
    >>> result = compress("builtin:tiny-moe", recipe)
    >>> result.model.expert_counts
    (8, 8, 8, 8, 8, 8)
    >>> [step.name for step in result.steps]
    ['expert_drop']
    """
    from moe2edge.commands.preflight import (
        check_pass_memory,
        check_sources,
        estimate_passes,
        measure_texts,
    )
    from moe2edge.commands.source_check import prove_and_load, prove_source, report_notes
    from moe2edge.commands.texts import resolve_recipe
    from moe2edge.pipeline.runner import run_passes
    from moe2edge.pipeline.stages import plan_passes
    from moe2edge.runtime.memory import Memory, find_limit
    from moe2edge.storage.work_folder import WorkFolder

    checkpoint, reporter = _open(model), reporter or QUIET
    source, parsed = checkpoint.model, resolve_recipe(checkpoint, _parse(recipe), reporter)
    check_sources(parsed, checkpoint)
    plan, limit = plan_passes(parsed.passes, source), find_limit(max_memory)
    check_pass_memory(source, estimate_passes(plan, measure_texts(parsed)), limit)
    report_notes(checkpoint, reporter)
    prove = partial(prove_source, checkpoint, reporter, wanted=source_check, within=limit)
    load = partial(_load_texts, checkpoint, parsed, reporter)
    proof, (calibration, training) = prove_and_load(parsed, prove, load)
    folder = Path(tempfile.mkdtemp(prefix="moe2edge-"))
    budget = replace(Memory.from_limit(limit), folder=folder)
    try:
        found, steps = run_passes(
            source, parsed, calibration, WorkFolder(folder), reporter, budget, training=training
        )
        result = Compressed(checkpoint, found, tuple(steps), proof.to_json())
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    weakref.finalize(found, shutil.rmtree, folder, ignore_errors=True)
    return result


def export(
    model: str | Path | Checkpoint,
    recipe: str | Path | Mapping[str, Any] | Recipe,
    targets: str | Sequence[str],
    out: str | Path,
    *,
    force: bool = False,
    resume: Literal["auto", "never", "require"] = "auto",
    max_memory: int | None = None,
    materialize: bool = False,
    keep_paths: bool = False,
    source_check: bool = True,
    verify: Literal["full", "quick"] = "full",
    reporter: Reporter | None = None,
) -> Report:
    """Compress a model, write it for one or more targets, verify it there, and report.

    With several targets ``out`` holds one folder for each, all packed from one computation. The
    docstring of `moe2edge` has an example.

    Args:
        model: a folder, a hub id, ``builtin:tiny-moe``, or an open checkpoint.
        recipe: as `parse_recipe` takes it, or a parsed one.
        targets: as ``-t`` takes them: ``"onnx"``, ``"onnx,gptq"``, ``"hf:dequantize=true"``, or a
            sequence of such.
        out: folder to write; its parent has to exist.
        force: replace a folder that moe2edge wrote.
        resume: go on with an unfinished export to the same folder where there is one (``auto``),
            not at all (``never``), or only if there is one (``require``).
        max_memory: bytes for the whole process; None: what the machine has.
        materialize: where a target cannot hold experts that share matrices, write each with its
            own.
        keep_paths: write the paths of model and texts into the output, not only their names.
        source_check: first compare what is computed for the model with stock transformers.
        verify: ``full``, or ``quick``: read no tensor back, and run one prompt alone.
        reporter: receives lines and progress; None: nothing is reported.

    Returns:
        Sizes, quality before and after, agreement of each output with PyTorch, and who loads it.

    Raises:
        InputError: the model, the recipe, a target or a text is wrong, or ``out`` is taken.
        Unsupported: a pass or a target cannot hold this model.
        DoesNotFit: there is too little memory or disk.
        VerificationFailed: an output does not give the logits that it has to.
    """
    from moe2edge.commands.export import export_targets
    from moe2edge.commands.texts import check_texts
    from moe2edge.pipeline.registry import parse_targets
    from moe2edge.storage.output_checks import check_output_early

    names = targets if isinstance(targets, str) else ",".join(targets)
    parsed, wanted, place = _parse(recipe), parse_targets(names), Path(out).absolute()
    # Before the model is downloaded.
    check_output_early(place, force=force)
    check_texts(parsed)
    return export_targets(
        _open(model),
        parsed,
        wanted,
        place,
        reporter or QUIET,
        force=force,
        resume=resume,
        most=max_memory,
        materialize=materialize,
        keep_paths=keep_paths,
        source_check=source_check,
        verify=verify,
    )


def profile(
    model: str | Path | Checkpoint,
    *,
    preset: Literal["quick", "ci", "full"] = "ci",
    text: str | Path | TextSource | None = None,
    prompt_tokens: int | None = None,
    gen_tokens: int | None = None,
    repeats: int | None = None,
    threads: int | None = None,
    explain: bool | None = None,
    reporter: Reporter | None = None,
) -> Profile:
    """Measure latency and memory of an output folder, or of a source model, in fresh processes.

    The docstring of `moe2edge` has an example.

    Args:
        model: an output folder, or a model as `open_checkpoint` takes it, which runs in
            transformers.
        preset: how much is measured.
        text: file of natural text for the prompts, or a text with options, as recipes have it;
            None: the built-in text.
        prompt_tokens: tokens of a prompt, in place of the preset's.
        gen_tokens: tokens generated after it, likewise.
        repeats: fresh processes, likewise.
        threads: processor threads; None: one per core.
        explain: measure a cold load, memory over time, operators and the use of experts, too, in
            one more process; None: as in the preset.
        reporter: receives progress; None: nothing is reported.

    Returns:
        Times in milliseconds, memory and sizes in bytes; ``to_json()`` gives it as plain data.

    Raises:
        InputError: the model, the text or a number is wrong.
        Moe2EdgeError: a process failed or took too long.
    """
    from moe2edge.commands.profile import profile_models

    sizes = {
        "prompt_tokens": prompt_tokens,
        "gen_tokens": gen_tokens,
        "repeats": repeats,
        "threads": threads,
        "explain": explain,
    }
    found = profile_models(
        [model], preset=preset, text=text, sizes=sizes, reporter=reporter or QUIET
    )
    return found.profiles[0]


def _open(model: str | Path | Checkpoint) -> Checkpoint:
    return model if isinstance(model, Checkpoint) else open_checkpoint(model)


def _load_texts(
    checkpoint: Checkpoint, recipe: Recipe, reporter: Reporter
) -> tuple[Tokens | None, Tokens | None]:
    """Load the texts for calibration and training, and check their ids."""
    from moe2edge.commands.source_check import check_ids
    from moe2edge.commands.texts import load_calibration, load_training

    training = load_training(checkpoint, recipe, reporter)
    calibration = load_calibration(checkpoint, recipe, reporter)
    texts = {"calibration": calibration, "training": training}
    check_ids(checkpoint, texts, reporter, recipe.passes)
    return calibration, training


def _parse(recipe: str | Path | Mapping[str, Any] | Recipe) -> Recipe:
    return recipe if isinstance(recipe, Recipe) else parse_recipe(recipe)
