"""The files of a checkpoint that hold its tensors, as transformers chooses them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moe2edge.errors import InputError, Unreadable, Unsupported
from moe2edge.storage.safetensors_files import open_file
from moe2edge.storage.tensor_bytes import have_same_bytes
from moe2edge.storage.text_files import read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# An adapter of the library peft, which transformers adds to the weights beside it.
ADAPTER_CONFIG = "adapter_config.json"
# Names of weights that are pickles, which are refused.
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
CONVERT = "https://huggingface.co/docs/safetensors/convert-weights"


@dataclass(frozen=True)
class Twin:
    """Second copy of a tensor, which has to have the same bytes.

    Attributes:
        name: the tensor.
        read: file that it is read from.
        copy: file of the copy.
        error: the error if they differ, without the name of the tensor.
    """

    name: str
    read: Path
    copy: Path
    error: str

    def check_header(self) -> None:
        """Refuse copies of another dtype or shape.

        Raises:
            InputError: so.
        """
        first, second = (open_file(path)[self.name] for path in (self.read, self.copy))
        if (first.dtype, first.shape) != (second.dtype, second.shape):
            raise self.make_error()

    def check_bytes(self) -> None:
        """Refuse copies that differ in any byte.

        Raises:
            InputError: so.
        """
        self.check_header()
        if not have_same_bytes((self.read, self.name), (self.copy, self.name)):
            raise self.make_error()

    def make_error(self) -> InputError:
        """Make the error for copies that differ."""
        return InputError(f"{self.error} {self.name}")


@dataclass(frozen=True)
class WeightFiles:
    """The tensors of a checkpoint.

    Attributes:
        files: file of each tensor.
        twins: further copies of tensors, whose bytes were not compared yet.
        absent: tensors that the index names and no shard has.
        notes: what was found beside these files and is not read.
    """

    files: Mapping[str, Path]
    twins: tuple[Twin, ...] = ()
    absent: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()


def has_weights(folder: Path) -> bool:
    """Return whether a folder holds weights of the names that are read, sound or not."""
    places = (folder / SINGLE, folder / INDEX)
    return any(place.exists() or place.is_symlink() for place in places)


def find_weight_files(folder: Path, config: Mapping[str, Any], missing: str) -> WeightFiles:
    """Find the tensors of a checkpoint, from headers only.

    As in transformers, ``model.safetensors`` comes before an index; of shards every tensor counts,
    be it in the index or not, and of copies the last.

    Args:
        folder: its folder.
        config: content of ``config.json``.
        missing: the error if there are no weights of any kind.

    Raises:
        InputError: a file is missing or damaged, the folder holds an adapter or two checkpoints
            that differ, or its weights are pickles only.
        Unsupported: ``config.json`` names other files.
    """
    if config.get("transformers_weights") is not None:
        raise Unsupported(
            f"config.json: transformers_weights names {config['transformers_weights']!r}; only "
            f"{SINGLE} and {INDEX} are read: give the weights one of these names, and take the "
            "key out of config.json"
        )
    single, index = folder / SINGLE, folder / INDEX
    if not single.exists() and not index.exists():
        raise InputError(_explain_missing_weights(folder, missing))
    if (folder / ADAPTER_CONFIG).exists():
        raise InputError(
            f"{folder} holds an adapter ({ADAPTER_CONFIG}) beside its weights, and transformers "
            "adds it to them; merge it into the weights (merge_and_unload in peft), or move the "
            "files of the adapter to another folder"
        )
    if not single.exists():
        return _note_unread(folder, _read_shards(folder, index))
    try:
        found = WeightFiles(dict.fromkeys(open_file(single), single))
    except Unreadable:
        raise
    except InputError as error:
        other = f"; if it is moved away, the shards of {INDEX} are read" if index.exists() else ""
        raise InputError(f"{error}{other}") from error
    if not index.exists():
        return _note_unread(folder, found)
    try:
        shards = _read_shards(folder, index)
    except Unreadable:  # whether there are two checkpoints is not known
        raise
    except InputError as error:
        note = f"{SINGLE} is read; {INDEX} beside it is no checkpoint ({error})"
        return replace(found, notes=(note,))
    return replace(found, twins=tuple(_pair(folder, found, shards)))


def _read_shards(folder: Path, index: Path) -> WeightFiles:
    """Read the headers of all shards of an index."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index.name} has no weight_map")
    shards = sorted(set(map(str, weight_map.values())))
    copies: dict[str, list[Path]] = {}
    for shard in shards:
        path = folder / shard
        if Path(shard).name != shard:
            raise InputError(f"{index.name} names {shard!r}, which is not a plain file name")
        if not path.exists():
            raise InputError(
                f"shard {shard} is missing in {folder}; {index.name} names "
                f"{len(shards)} shards: download the checkpoint again"
            )
        for name in open_file(path):
            copies.setdefault(name, []).append(path)
    files = {name: paths[-1] for name, paths in copies.items()}
    twins = tuple(
        Twin(
            name,
            files[name],
            path,
            f"{path.name} and {files[name].name} are shards of one checkpoint with two values of",
        )
        for name, paths in copies.items()
        for path in paths[:-1]
    )
    for twin in twins:
        twin.check_header()
    return WeightFiles(files, twins, frozenset(set(weight_map) - set(files)))


def _pair(folder: Path, found: WeightFiles, shards: WeightFiles) -> Iterator[Twin]:
    """Yield the tensors of two checkpoints in one folder.

    Raises:
        InputError: they have not the same tensors.
    """
    error = (
        f"{folder} holds two checkpoints: {SINGLE}, which transformers reads, and the shards of "
        f"{INDEX}; move the one that is left over away. They differ in"
    )
    for name in sorted({*found.files, *shards.files}):
        twin = Twin(name, folder / SINGLE, shards.files.get(name, folder / SINGLE), error)
        if name not in found.files or name not in shards.files:
            raise twin.make_error()
        twin.check_header()
        if twin.copy != twin.read:
            yield twin


def _note_unread(folder: Path, found: WeightFiles) -> WeightFiles:
    """Name further files of weights beside those that are read."""
    read = {path.name for path in found.files.values()}
    unread = sorted(path.name for path in folder.glob("*.safetensors") if path.name not in read)
    if not unread:
        return found
    more = f" and {len(unread) - 3} more" if len(unread) > 3 else ""
    note = f"weights that are not read, as in transformers: {', '.join(unread[:3])}{more}"
    return replace(found, notes=(*found.notes, note))


def _explain_missing_weights(folder: Path, missing: str) -> str:
    """Say what a folder without weights of the usual names holds in their place."""
    for path in (folder / SINGLE, folder / INDEX):
        if path.is_symlink():
            return f"{path} is a link that leads nowhere; download the checkpoint again"
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if "adapter_model.safetensors" in others or (folder / ADAPTER_CONFIG).exists():
        return (
            f"{folder} holds an adapter and no model; merge it into its base model "
            "(merge_and_unload in peft), and name the folder of the result"
        )
    if others:
        return (
            f"{missing}, but {others[0]}; transformers reads {SINGLE}, or the shards of {INDEX}: "
            "if these are the weights under another name, rename them"
        )
    if pickles := sorted(path.name for pattern in PICKLES for path in folder.glob(pattern)):
        return (
            f"{folder} has only pickled weights ({pickles[0]}), which can run code when opened; "
            f"convert them to safetensors first: {CONVERT}"
        )
    inside = sorted(
        path.parent.name for name in (SINGLE, INDEX) for path in folder.glob(f"*/{name}")
    )
    return f"{missing}; the folder {inside[0]} in it has: name that one" if inside else missing
