"""The folder that a profile measures: what it is, what it holds, what a token reads of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe2edge.errors import InputError, Moe2EdgeError, join_lines
from moe2edge.model.token_reads import count_token_reads
from moe2edge.pipeline import registry
from moe2edge.storage.checkpoint import open_checkpoint
from moe2edge.storage.manifest import (
    MANIFEST,
    SYSTEM_FOLDERS,
    check_sizes,
    is_artifact,
    list_files,
    open_artifact,
)
from moe2edge.storage.text_files import hash_file, read_json
from moe2edge.storage.tokenizer import read_context_length

# Ends of the names of files with the weights of a graph.
_DATA_NAME = re.compile(r"(\.data|\.onnx_data(_\d+)?)$")


@dataclass(frozen=True)
class Subject:
    """A folder that is measured.

    Attributes:
        folder: its path.
        about: path, target, hash of its manifest and model, for the profile.
        request: folder, target, options and dtype, for the process that opens it.
        sizes: bytes of each class of files.
        context: context length of the model in tokens; None if its config has none.
    """

    folder: Path
    about: Mapping[str, Any]
    request: Mapping[str, Any]
    sizes: Mapping[str, int]
    context: int | None

    def check_installed(self) -> None:
        """Refuse a folder whose runtime is not installed.

        Raises:
            InputError: no target has its name.
            Unsupported: with the command that installs it.
        """
        if (name := self.request["target"]) is not None:
            target = registry.make_target(name, self.request["options"])
            target.check_installed(self.folder)

    def count_reads(self) -> tuple[dict[str, int] | None, str | None]:
        """Count the bytes of weights that a token reads, by kind.

        Returns:
            The bytes, or None and the reason why they are not known.
        """
        name = self.request["target"]
        try:
            if name is None:
                model = open_checkpoint(self.folder).model
            else:
                target = registry.make_target(name, self.request["options"])
                model = target.outline(self.folder)
            return count_token_reads(model), None
        except Moe2EdgeError as error:
            return None, join_lines(error)


def open_subject(folder: Path) -> Subject:
    """Open an output folder or a checkpoint, whose sizes are compared with its manifest.

    Raises:
        InputError: it is neither.
        VerificationFailed: a file has another size than the manifest says.
    """
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}; name an output folder or a checkpoint")
    about, request = _describe(folder)
    config = folder / "config.json"
    context = read_context_length(read_json(config)) if config.is_file() else None
    return Subject(folder, about, request, measure_sizes(folder), context)


def _describe(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    path = str(folder.resolve())
    if is_artifact(folder):
        artifact = open_artifact(folder)
        check_sizes(artifact)
        about = {
            "path": str(folder),
            "target": artifact.target,
            "manifest_sha256": hash_file(folder / MANIFEST),
            "model": artifact.manifest.get("model"),
        }
        how = {"target": artifact.target, "options": dict(artifact.options)}
        return about, {"folder": path, **how, "dtype": None}
    if not (folder / "config.json").is_file():
        raise InputError(
            f"{folder} is neither an output folder (no {MANIFEST}) nor a checkpoint "
            "(no config.json); name one of them"
        )
    about = {"path": str(folder), "target": None, "runtime": "transformers"}
    return about, {"folder": path, "target": None, "dtype": "bfloat16"}


def measure_sizes(folder: Path) -> dict[str, int]:
    """Return the bytes of the files of a folder by class, such as ``weights``.

    A clone keeps every file once more, in a folder of its own; that does not count.
    """
    files = {n: path for n, path in list_files(folder).items() if not n.startswith(SYSTEM_FOLDERS)}
    sizes = dict.fromkeys(("weights", "graph", "tokenizer", "config", "other"), 0)
    outside = any(_DATA_NAME.search(name) for name in files)
    for name, path in files.items():
        sizes[_classify_file(name, outside)] += path.stat().st_size
    return sizes


def _classify_file(name: str, weights_outside_graph: bool) -> str:
    """Return the class of a file. A graph without a data file contains the weights itself."""
    base = name.rpartition("/")[2]
    if base.endswith((".safetensors", ".gguf")) or _DATA_NAME.search(base):
        return "weights"
    if base.endswith(".onnx"):
        return "graph" if weights_outside_graph else "weights"
    vocabulary = ("vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json")
    if base.startswith(("tokenizer", "chat_template")) or base in vocabulary:
        return "tokenizer"
    return "config" if base.endswith((".json", ".yaml")) else "other"
