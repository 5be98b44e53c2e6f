"""Files that a run reads, and all that its numbers depend on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from moe2edge.commands.environment import NUMERIC_PACKAGES, list_versions
from moe2edge.commands.preflight import list_reads
from moe2edge.pipeline.recipe import Recipe
from moe2edge.progress import Reporter
from moe2edge.runtime.memory import Memory
from moe2edge.storage.checkpoint import Checkpoint
from moe2edge.storage.companions import list_companions
from moe2edge.storage.export_folder import Resume
from moe2edge.storage.input_files import InputFiles
from moe2edge.storage.kept_results import KeptResults
from moe2edge.storage.work_folder import WorkFolder

if TYPE_CHECKING:
    from moe2edge.calibration.tokens import Tokens


def look_at_inputs(checkpoint: Checkpoint, recipe: Recipe) -> InputFiles:
    """Look at the files of the source, the texts and what passes read; the recipe is read once."""
    weights = {*checkpoint.files.values(), checkpoint.folder / "config.json"}
    inside = {checkpoint.folder, *checkpoint.folder.iterdir()}
    files = {path for path in list_reads(checkpoint, recipe) if path not in inside}
    files |= {*list_companions(checkpoint.folder)}
    files |= {path for path in checkpoint.folder.glob("*.index.json") if path.is_file()}
    # A new checkpoint, because the old one keeps its digest.
    return InputFiles(sorted(files), weights, lambda: replace(checkpoint).sha256)


def list_inputs(
    checkpoint: Checkpoint,
    recipe: Recipe,
    calibration: Tokens | None,
    training: Tokens | None,
    budget: Memory,
) -> dict[str, str]:
    """List what the numbers of a run depend on, to the last bit."""
    passes = yaml.safe_dump(yaml.safe_load(recipe.render())["passes"], sort_keys=False)
    return {
        "model": checkpoint.sha256,
        "recipe": passes,
        "calibration": calibration.sha256 if calibration else "none",
        **({"training": training.sha256} if training else {}),
        "limit of memory": "one group at a time" if not budget.group_bytes else "several groups",
        **_describe_machine(),
    }


def _describe_machine() -> dict[str, str]:
    """Describe what computes, as far as the last bits of numbers depend on it."""
    import torch

    from moe2edge.numerics import bfloat16

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "number of threads": f"{torch.get_num_threads()}",
        "innermost loops": bfloat16.describe_loops(),
        "GPU": gpu,
        "version": ", ".join(
            f"{name} {v}" for name, v in list_versions().items() if name in NUMERIC_PACKAGES
        ),
    }


def open_kept_results(checkpoint: Checkpoint, work: Path, resume: Resume) -> KeptResults:
    """Open what a run for the same output had found before it opened its work folder.

    Args:
        checkpoint: the source.
        work: the work folder, which may not be there.
        resume: ``never`` finds nothing.
    """

    def describe() -> dict[str, str]:
        return {"model": checkpoint.sha256, **_describe_machine()}

    return KeptResults(None if resume == "never" else work, describe)


def begin_work(work: WorkFolder, files: InputFiles, kept: KeptResults, reporter: Reporter) -> None:
    """Begin to work in a folder: watch the inputs, keep what was found, and say what is there."""
    work.watch(files.check)
    work.report(reporter)
    kept.save(work.folder)
