"""Hugging Face checkpoints, opened lazily.

Opening reads headers only. MODEL is a local folder, a hub id (``org/name`` or
``org/name@revision``), or ``builtin:tiny-moe``. Only safetensors are read; no code of a checkpoint
is ever executed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from moe2edge.errors import InputError, Unsupported
from moe2edge.model.build import build_model
from moe2edge.model.family import FAMILIES, find_family
from moe2edge.model.hf_config import OWN, find_text_part
from moe2edge.model.model import EMBEDDING, HEAD, Model
from moe2edge.model.stored_layout import list_stored
from moe2edge.model.weights import Weight
from moe2edge.storage.hub import download, get_hub_id
from moe2edge.storage.source_formats.reading import SourceTensors, dequantize_ends
from moe2edge.storage.source_formats.recognition import drop_settings, find_source_format
from moe2edge.storage.source_formats.source_format import SourceFormat
from moe2edge.storage.source_formats.stored_tensors import StoredTensors
from moe2edge.storage.tensor_bytes import find_broken_rows, hash_tensors, have_same_numbers
from moe2edge.storage.text_files import hash_file, read_json
from moe2edge.storage.weight_files import (
    ADAPTER_CONFIG,
    CONVERT,
    INDEX,
    SINGLE,
    WeightFiles,
    find_weight_files,
)

BUILTIN = "builtin:tiny-moe"
BUILTIN_FOLDER = Path(__file__).parents[1] / "builtin" / "tiny-moe"
# What diffusers has in the place of `config.json`.
PIPELINE = "model_index.json"
# Key of a config that says whether the embedding is the head.
TIE_FLAG = "tie_word_embeddings"


@dataclass(frozen=True)
class Checkpoint:
    """Folder with ``config.json`` and safetensors.

    Attributes:
        source: MODEL as the user gave it.
        folder: folder with its files.
        revision: commit of a hub model, None for a folder.
        config: content of ``config.json``.
        lacking: files of a hub model that the local cache lacks, none of which is needed.
        reads_numbers: whether numbers may be read; else a stored head counts as equal to the
            embedding where the config says so.
        known: the model, where its config is all that is known of it.
    """

    source: str
    folder: Path
    revision: str | None
    config: Mapping[str, Any]
    lacking: tuple[str, ...] = ()
    reads_numbers: bool = True
    known: Model | None = None

    @property
    def files(self) -> Mapping[str, Path]:
        """File of each tensor."""
        return self.weights.files

    @cached_property
    def weights(self) -> WeightFiles:
        """The files of the weights, by the rules of transformers.

        Raises:
            InputError: a shard is missing or damaged, or the weights are pickles only.
            Unsupported: ``config.json`` names files that are not read.
        """
        if self.revision is None:
            missing = f"{self.folder} has no {SINGLE} and no shards of one"
        else:
            missing = (
                f"{self.source} has no safetensors on the hub; pickled weights, which can run code "
                f"when opened, are not downloaded: convert them to safetensors first: {CONVERT}"
            )
        return find_weight_files(self.folder, self.config, missing)

    @cached_property
    def model(self) -> Model:
        """Model of the checkpoint, from headers only.

        Raises:
            InputError: a tensor is missing or has the wrong shape.
            Unsupported: the family, its quantization or a setting of its config is not supported.
        """
        if self.known is not None:
            return self.known
        if has_own_layers(self.config):
            raise Unsupported(
                f"{self.source} has layers of unequal size, or replaced experts "
                "(per_layer_config); start from the checkpoint that it was made from"
            )
        family, tensors = find_family(self.config), self.tensors

        def get_weight(name: str, shape: tuple[int, ...] | None) -> Weight:
            if name == EMBEDDING and self.tying == "head only":
                name = HEAD
            weight = tensors.take(name, shape)
            if weight is None:
                raise self._explain_missing_tensor(name)
            if shape is not None and weight.shape != shape:
                raise InputError(
                    f"{name} has shape {list(weight.shape)}, but config.json asks for {list(shape)}"
                )
            return weight

        config = drop_settings(self.config)
        if self.tying == "contradicted":
            config[TIE_FLAG] = False
        names = tensors.list_names()
        model = dequantize_ends(build_model(family, config, get_weight, names))
        unused = tensors.list_spare()
        # Some tools also write tied heads and rotary tables, which only repeat other values.
        unused -= {HEAD} if self.tying == "tied" else set()
        unused = {name for name in unused if not name.endswith("rotary_emb.inv_freq")}
        if unused:
            raise InputError(
                f"{self.source} has {len(unused)} tensors that {family.architecture} does not "
                f"know, such as {min(unused)}"
            )
        model.verify()
        return model

    @cached_property
    def source_format(self) -> SourceFormat | None:
        """The format of quantized tensors; None if the checkpoint is not quantized.

        Raises:
            InputError: config and tensors contradict each other.
            Unsupported: the format is not read.
        """
        return find_source_format(self.config, StoredTensors(self.files))

    @cached_property
    def tensors(self) -> SourceTensors:
        """Handles on the tensors; once `model` was read, what they were made of."""
        return SourceTensors(self.files, self.source_format)

    @cached_property
    def tying(self) -> Literal["not tied", "tied", "head only", "contradicted"]:
        """The form in which head and embedding are stored, by the rule of transformers.

        ``tie_word_embeddings`` holds where one of the two is stored, or both and they are equal.
        Where they differ, the head is one of its own, whatever the config says ("contradicted").
        Only then numbers are read: those of the two, up to the first difference.
        """
        if not self.config.get(TIE_FLAG):
            return "not tied"
        if HEAD not in self.files or EMBEDDING not in self.files:
            return "head only" if HEAD in self.files else "tied"
        if not self.reads_numbers:
            return "tied"
        head, table = ((self.files[name], name) for name in (HEAD, EMBEDDING))
        return "tied" if have_same_numbers(head, table) else "contradicted"

    @property
    def notes(self) -> tuple[str, ...]:
        """Lines on what was read, or not read, where that may surprise."""
        said = [*self.weights.notes, *self._describe_carried()]
        if self.tying == "contradicted":
            said.append(
                f"config.json says {TIE_FLAG}: true, but {HEAD} is stored and differs from "
                f"{EMBEDDING}: the stored head is used, as in transformers, and outputs say false"
            )
        if self.tying == "head only":
            said.append(f"{EMBEDDING} is not stored; {HEAD} is both, as {TIE_FLAG} says")
        return tuple(said)

    def _describe_carried(self) -> Iterator[str]:
        """Yield lines on tensors of other parts of the model than the text model."""
        model = self.model
        ahead = [name for name in model.carried if model.names.is_prediction(name)]
        if count := len(model.carried) - len(ahead):
            yield (
                f"{count} tensors of other parts than the text model, such as "
                f"{min(set(model.carried) - set(ahead))}, are not looked at; targets hf and gptq "
                "write them as they are, and others leave them out"
            )
        if ahead:
            yield (
                f"{len(ahead)} tensors of layers that predict further tokens, such as "
                f"{min(ahead)}, are not looked at; targets hf and gptq write them as long as every "
                "block and expert stays"
            )

    def _explain_missing_tensor(self, name: str) -> InputError:
        """Make the error for a tensor that is not stored."""
        if name in self.weights.absent:
            return InputError(f"{INDEX} names {name}, which no shard has; download it again")
        hint = ""
        if name == HEAD:
            hint = f"; if the head is {EMBEDDING}, config.json has to say {TIE_FLAG}: true"
        return InputError(f"{self.source} has no tensor {name}{hint}")

    @property
    def sha256(self) -> str:
        """Digest over config and all weight files, by name and content.

        Every number is looked at on the way.

        Raises:
            InputError: a tensor holds numbers that are not finite, unless it is an embedding of
                which only some ids read them; or copies of one tensor differ.
        """
        return self._contents[0]

    @property
    def was_read(self) -> bool:
        """True once `sha256` is known, so that nothing has to be read for it."""
        return "_contents" in self.__dict__

    @property
    def broken_ids(self) -> tuple[int, ...]:
        """Ids whose row of the embedding is not finite. Raises as `sha256` does."""
        return self._contents[1]

    @cached_property
    def _contents(self) -> tuple[str, tuple[int, ...]]:
        """The digest, and the ids whose row of the embedding is not finite."""
        table = self.model.embedding
        used = {weight.name for _, weight in list_stored(self.model)} | self.tensors.used
        config = self.folder / "config.json"
        paths = sorted(set(self.files.values()))
        digests, broken = {config: hash_file(config)}, set()
        with ThreadPoolExecutor() as pool:
            for path, (digest, names) in zip(paths, pool.map(hash_tensors, paths), strict=True):
                digests[path] = digest
                broken |= {name for name in names if self.files[name] == path and name in used}
        for twin in self.weights.twins:
            twin.check_bytes()
        if not broken:
            rows: tuple[int, ...] = ()
        elif broken == {table.name} and HEAD in self.model.rest:
            rows = find_broken_rows(table.load())
        else:
            more = f", and {len(broken) - 1} more tensors do" if len(broken) > 1 else ""
            raise InputError(
                f"{min(broken)} holds numbers that are not finite in float32{more}; the checkpoint "
                "is damaged, get it again"
            )
        whole = hashlib.sha256()
        for path in sorted(digests):
            whole.update(f"{path.name}\0{digests[path]}\n".encode())
        return whole.hexdigest(), rows

    @property
    def hub_id(self) -> str | None:
        """Name of the model on the hub, where it is certain; None for other folders."""
        return get_hub_id(self.folder)

    @property
    def name(self) -> str:
        """Name for reports, which may be published: never where a folder of the user lies."""
        if self.source == BUILTIN or self.hub_id is not None:
            return self.hub_id or BUILTIN
        return " ".join(self.folder.resolve().name.split())[:100] or "model"


def has_own_layers(config: Mapping[str, Any]) -> bool:
    """Return whether layers have settings that moe2edge wrote; transformers has such of its own."""
    layers = find_text_part(dict(config)).get("per_layer_config")
    if str(config.get("model_type")) in FAMILIES or not isinstance(layers, Mapping):
        return bool(layers)
    return any(isinstance(own, Mapping) and OWN in own for own in layers.values())


def open_checkpoint(
    source: str | Path, *, revision: str | None = None, cache_dir: Path | None = None
) -> Checkpoint:
    """Open MODEL: a folder, a hub id or ``builtin:tiny-moe``. Reads headers only.

    Args:
        source: MODEL.
        revision: branch, tag or commit of a hub model.
        cache_dir: cache of hub files; None: that of huggingface_hub.

    Returns:
        The checkpoint. Its ``model`` is read when it is first used.

    Raises:
        InputError: there is no such model, or it is not a checkpoint.

    >>> open_checkpoint("builtin:tiny-moe").model.expert_counts
    (16, 16, 16, 16, 16, 16)
    """
    source = str(source)
    folder, commit, lacking = _locate(source, revision, cache_dir)
    config = folder / "config.json"
    if config.is_symlink() and not config.exists():
        raise InputError(f"{config} is a link that leads nowhere; download the checkpoint again")
    if not config.exists():
        raise InputError(f"{source} is not a checkpoint: {_explain_missing_config(folder)}")
    return Checkpoint(source, folder, commit, read_json(config), lacking)


def _explain_missing_config(folder: Path) -> str:
    """Say what a folder without ``config.json`` holds, and what to name in its place."""
    if (folder / ADAPTER_CONFIG).exists():
        base = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
        return (
            f"it holds an adapter of {base or 'a base model'!r:.200}; merge it into its base model "
            "(merge_and_unload in peft), and name the folder of the result"
        )
    inside = sorted(path.parent.name for path in folder.glob("*/config.json"))
    if (folder / PIPELINE).exists():
        part = f"such as {inside[0]}" if inside else "none of which is there"
        return f"it holds a pipeline of diffusers ({PIPELINE}); name one of its parts, {part}"
    if inside:
        return f"it has no config.json; the folder {inside[0]} in it has: name that one"
    return "it has no config.json; name the folder that has it"


def _locate(
    source: str, revision: str | None, cache_dir: Path | None
) -> tuple[Path, str | None, tuple[str, ...]]:
    """Find the folder of MODEL; for a hub model also its commit, and what the cache lacks."""
    if (hub := split_hub_id(source, revision)) is not None:
        return download(*hub, cache_dir)
    return (BUILTIN_FOLDER if source == BUILTIN else Path(source).expanduser()), None, ()


def split_hub_id(source: str, revision: str | None) -> tuple[str, str | None] | None:
    """Split MODEL into the name of a hub model and its revision; None: it is a local folder.

    Raises:
        InputError: there is no such folder, and it is no hub id.
    """
    if source.startswith("builtin:"):
        if source != BUILTIN:
            raise InputError(f"no built-in model {source!r}; there is {BUILTIN}")
        return None
    try:
        path = Path(source).expanduser()
        if path.is_dir():
            return None
    except (OSError, RuntimeError) as error:  # an unknown user's home, or a name that is too long
        raise InputError(f"{source[:100]} cannot be opened: {str(error)[:100]}") from error
    name, _, at = source.removeprefix("hf://").partition("@")
    if path.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise InputError(
            f"there is no folder {source}; MODEL is a local folder, a hub id (org/name) "
            f"or {BUILTIN}"
        )
    if at and revision and at != revision:
        raise InputError(f"{source} names revision {at}, and --revision {revision}; give one")
    return name, at or revision
