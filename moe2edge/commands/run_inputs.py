"""Files that a run reads, and all that its numbers depend on."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import yaml

from moe2edge.commands.environment import NUMERIC_PACKAGES, list_versions
from moe2edge.commands.preflight import list_reads
from moe2edge.pipeline.recipe import Recipe
from moe2edge.runtime.memory import Memory
from moe2edge.storage.checkpoint import Checkpoint
from moe2edge.storage.companions import list_companions
from moe2edge.storage.input_files import InputFiles

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
    import torch

    from moe2edge.numerics import compiled

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    passes = yaml.safe_dump(yaml.safe_load(recipe.render())["passes"], sort_keys=False)
    return {
        "model": checkpoint.sha256,
        "recipe": passes,
        "calibration": calibration.sha256 if calibration else "none",
        **({"training": training.sha256} if training else {}),
        "number of threads": f"{torch.get_num_threads()}",
        "limit of memory": "one group at a time" if not budget.group_bytes else "several groups",
        "innermost loops": compiled.describe_kernel(),
        "GPU": gpu,
        "version": ", ".join(
            f"{name} {v}" for name, v in list_versions().items() if name in NUMERIC_PACKAGES
        ),
    }
