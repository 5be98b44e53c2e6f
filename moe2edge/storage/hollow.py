"""Checkpoints without numbers: headers of a folder or of the hub, or a ``config.json`` alone.

Where no file is there whose header could be read, one is written that has the header and a hole in
the place of the numbers. So a model is opened as any other, and whatever looks at shapes alone sees
no difference.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from moe2edge.errors import InputError
from moe2edge.model.build import build_model
from moe2edge.model.family import find_family
from moe2edge.model.model import Model
from moe2edge.model.weights import Weight
from moe2edge.storage.checkpoint import Checkpoint, open_checkpoint, split_hub_id
from moe2edge.storage.hub import fetch_headers
from moe2edge.storage.safetensors_files import (
    PlannedTensor,
    refuse_numbers,
    write_hollow_safetensors,
)
from moe2edge.storage.source_formats.mxfp4 import plan_mxfp4
from moe2edge.storage.source_formats.recognition import (
    drop_settings,
    find_config_dtype,
    find_settings,
    read_method,
)
from moe2edge.storage.text_files import read_json
from moe2edge.storage.weight_files import SINGLE, has_weights

# What is said of a model whose config is all that is known.
CONFIG_ALONE = (
    "only config.json was read: names, shapes and dtypes of tensors are those that transformers "
    "would write"
)


@contextmanager
def open_without_numbers(
    source: str | Path, *, revision: str | None = None, cache_dir: Path | None = None
) -> Iterator[tuple[Checkpoint, tuple[str, ...]]]:
    """Open MODEL without reading, or downloading, a number of its weights.

    Args:
        source: a folder, with weights or a ``config.json`` alone; that file; a hub id; or
            ``builtin:tiny-moe``.
        revision: branch, tag or commit of a hub model.
        cache_dir: cache of hub files; None: that of huggingface_hub.

    Yields:
        The checkpoint, whose files may be gone afterwards, and notes on what was not known.

    Raises:
        InputError, Unsupported: there is no such model, or no checkpoint.
    """
    source = str(source)
    with tempfile.TemporaryDirectory(prefix="moe2edge-") as name:
        place, notes = Path(name), tuple[str, ...]()
        if Path(source).name == "config.json" and Path(source).is_file():
            found = _describe_config(Path(source).parent, source, place)
            notes = _list_notes(found.config)
        elif (hub := split_hub_id(source, revision)) is not None:
            folder, commit = fetch_headers(*hub, cache_dir, place)
            found = replace(open_checkpoint(folder), source=source, revision=commit)
        else:
            found = open_checkpoint(source)
            if not has_weights(found.folder) and not any(found.folder.glob("*.safetensors")):
                notes = _list_notes(found.config)
                found = _describe_config(found.folder, source, place)
        yield replace(found, reads_numbers=False), notes


def _list_notes(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Say what a config alone leaves open."""
    notes = [CONFIG_ALONE]
    settings = find_settings(config)
    if settings is not None and read_method(settings) != "mxfp4":
        notes.append(
            f"config.json says that the weights are quantized ({read_method(settings)}); without "
            "their headers they are taken to be unquantized"
        )
    if "text_config" in config:
        notes.append("parts beside the text model are not counted")
    return tuple(notes)


def _describe_config(folder: Path, source: str, place: Path) -> Checkpoint:
    """Return the checkpoint that a config describes; other files may be beside it."""
    config = dict(read_json(folder / "config.json"))
    settings = find_settings(config)
    if settings is None or read_method(settings) != "mxfp4":
        return Checkpoint(source, folder, None, config, known=_describe(config)[0])
    for path in folder.iterdir():
        if path.is_file() and path.suffix in (".json", ".jinja", ".model", ".txt"):
            (place / path.name).write_bytes(path.read_bytes())
    planned: list[PlannedTensor] = []
    for one in plan_checkpoint(config):
        parts = plan_mxfp4(one.name, one.shape)
        planned += [
            PlannedTensor(part, shape, "U8", refuse_numbers) for part, shape in parts.items()
        ] or [one]
    write_hollow_safetensors(place / SINGLE, planned)
    return replace(open_checkpoint(place), source=source)


def plan_checkpoint(config: Mapping[str, Any]) -> list[PlannedTensor]:
    """Plan the tensors that transformers would write for a config, without numbers."""
    return [PlannedTensor(w.name, w.shape, w.dtype, w.load) for w in _describe(config)[1]]


def _describe(config: Mapping[str, Any]) -> tuple[Model, Iterable[Weight]]:
    """Build the model that a config describes, and list its tensors by their names in files.

    Raises:
        InputError: the config does not tell the shape of a tensor.
    """
    plain, dtype = drop_settings(config), find_config_dtype(config)
    found: dict[str, Weight] = {}
    like = Weight("", (), dtype, load=refuse_numbers)

    def take(name: str, shape: tuple[int, ...] | None) -> Weight:
        if shape is None:
            raise InputError(
                f"config.json alone does not say which shape {name} has; give a folder with the "
                "weights, or a hub id"
            )
        weight = found[name] = like.change(name=name, shape=shape)
        return weight

    model = build_model(find_family(plain), plain, take)
    model.verify()
    return model, found.values()
