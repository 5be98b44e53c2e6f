"""Models of the benchmark, written and exported once into a folder that is kept."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks._held_out import load_samples
from moe2edge import open_checkpoint
from moe2edge.storage.checkpoint import BUILTIN, BUILTIN_FOLDER
from moe2edge.testing import make_checkpoint

# 0.94 B parameters in the layout of OLMoE.
RANDOM: dict[str, Any] = {
    "vocab_size": 50304, "hidden_size": 1024, "intermediate_size": 1024, "num_hidden_layers": 8,
    "num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 32,
    "num_experts_per_tok": 4, "max_position_embeddings": 4096, "tie_word_embeddings": False,
    "initializer_range": 0.02,
}  # fmt: skip
# Targets by what is done to head and embedding; a GPTQ checkpoint holds them in 16 bits only.
TARGETS = {16: ("onnx", "gptq", "gguf"), 8: ("onnx", "gguf")}


@dataclass(frozen=True)
class Subject:
    """A model, with its outputs.

    Attributes:
        title: its name.
        source: the checkpoint.
        outputs: folders by target and by the bits of head and embedding.
        tokens: ids that prompts are cut from, int64 [tokens].
    """

    title: str
    source: Path
    outputs: Mapping[tuple[str, int], Path]
    tokens: torch.Tensor


def prepare_builtin(cache: Path) -> Subject:
    """Export the built-in model; its prompts are held-out code."""
    text = {"samples": 4, "length": 512, "seed": 0}
    ids = load_samples(open_checkpoint(BUILTIN), "evaluation", text).ids.flatten()
    return Subject("tiny-moe", BUILTIN_FOLDER, export(BUILTIN, "gptq", cache / "tiny-moe"), ids)


def prepare_random(cache: Path) -> Subject:
    """Write and export a random model, rounded to nearest: its numbers say nothing anyway."""
    place = cache / "random-olmoe"
    source = place / "source"
    if not (source / "config.json").exists():
        make_checkpoint(source, "olmoe", dtype="bfloat16", **RANDOM)
        # The vocabulary is larger, which is filled with entries that no text has.
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(BUILTIN_FOLDER / name, source / name)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(RANDOM["vocab_size"], (4 * 512,), generator=draw)
    return Subject("random OLMoE, 0.94 B", source, export(str(source), "rtn", place), ids)


def export(source: str, name: str, place: Path) -> dict[tuple[str, int], Path]:
    """Export with one solve for each kind of ends, unless the outputs are there; return them.

    Raises:
        SystemExit: an export failed.
    """
    found = {}
    for bits, targets in TARGETS.items():
        out = place / f"ends-{bits}"
        ends = {"head": bits, "embedding": bits}
        recipe = place / f"ends-{bits}.yaml"
        if not all((out / target / "manifest.json").exists() for target in targets):
            place.mkdir(parents=True, exist_ok=True)
            # Groups of 32: those of Q4_0, so that all formats hold the same numbers.
            recipe.write_text(yaml.safe_dump({"passes": [{name: {"group_size": 32, **ends}}]}))
            command = [sys.executable, "-m", "moe2edge", "export", source, "-t", ",".join(targets)]
            command += ["-r", str(recipe), "-o", str(out), "--eval", "none", "--force", "--quiet"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{' '.join(command)}:\n{done.stdout}{done.stderr}")
        found |= {(target, bits): out / target for target in targets}
    return found


def measure_size(folder: Path) -> int:
    """Return the bytes of weights and graph of a folder."""
    kinds = (".safetensors", ".onnx", ".data", ".gguf")
    return sum(path.stat().st_size for path in folder.iterdir() if path.suffix in kinds)


def read_options(folder: Path) -> dict[str, Any]:
    """Return the options that a folder was written with."""
    options: dict[str, Any] = json.loads((folder / "manifest.json").read_text())["target_options"]
    return options
