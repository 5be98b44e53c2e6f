"""Checkpoints of random numbers in published shapes: OLMoE-1B-7B whole, the others a few blocks.

    python -m benchmarks.scale.models OLMoE-1B-7B OUT

A model of which only some blocks are made has the layers of the first ones. The tokenizer is the
built-in one, and ids of special tokens are those that it has. Weights that are published in blocks
of four bits (gpt-oss) are written in bfloat16.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from shutil import disk_usage
from typing import Any

from benchmarks.plan.random_model import write_random_model
from benchmarks.plan.shapes import SHAPES
from moe2edge.storage.hollow import plan_checkpoint

# Blocks of each shape that are made; None: all. Full width in any case.
BLOCKS: Mapping[str, int | None] = {
    "OLMoE-1B-7B": None,
    "Mixtral-8x7B": 1,
    "Qwen3-30B-A3B": 3,
    "gpt-oss-20b": 2,
    "Qwen3.5-35B-A3B": 1,
}
TOKENS = {"eos_token_id": 0, "bos_token_id": None, "pad_token_id": None}


def make_config(name: str, blocks: int | None) -> dict[str, Any]:
    """Make the config of a shape with only the first ``blocks`` blocks; None: all."""
    config = {key: value for key, value in SHAPES[name].items() if key != "quantization_config"}
    if isinstance(text := config.get("text_config"), dict):
        # The text model alone, which is a model of its own.
        config = {**text, "architectures": ["Qwen3_5MoeForCausalLM"]}
    config |= TOKENS
    if blocks is not None:
        config["num_hidden_layers"] = blocks
        if "layer_types" in config:
            config["layer_types"] = list(config["layer_types"])[:blocks]
    return config


def write_shape(name: str, folder: Path, blocks: int | None) -> Path:
    """Write a checkpoint, which has its name only when it is complete; return the folder."""
    if folder.exists():
        return folder
    config = make_config(name, blocks)
    needed, free = (
        sum(one.nbytes for one in plan_checkpoint(config)),
        disk_usage(folder.parent).free,
    )
    if needed > 0.95 * free:
        raise OSError(f"{folder} takes {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free")
    partial = folder.with_name(f"{folder.name}.partial")
    if partial.exists():
        for path in partial.iterdir():
            path.unlink()
        partial.rmdir()
    write_random_model(config, partial)
    return partial.rename(folder)


if __name__ == "__main__":
    write_shape(sys.argv[1], Path(sys.argv[2]), BLOCKS[sys.argv[1]])
