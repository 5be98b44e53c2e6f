"""Hugging Face checkpoints, opened lazily.

Opening reads headers only. MODEL is a local folder, a hub id (``org/name`` or
``org/name@revision``), or ``builtin:tiny-moe``. Only safetensors are read; no code of a checkpoint
is ever executed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from moe2edge.errors import InputError, Unsupported
from moe2edge.model.build import build_model
from moe2edge.model.family import find_family
from moe2edge.model.model import Model
from moe2edge.model.weights import Weight
from moe2edge.storage.hub import download, get_hub_id
from moe2edge.storage.safetensors_files import make_weight, open_file
from moe2edge.storage.text_files import hash_file, read_json

BUILTIN = "builtin:tiny-moe"
BUILTIN_FOLDER = Path(__file__).parents[1] / "builtin" / "tiny-moe"
# Names of weights that are pickles, which are refused.
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")


@dataclass(frozen=True)
class Checkpoint:
    """Folder with ``config.json`` and safetensors.

    Attributes:
        source: MODEL as the user gave it.
        folder: folder with its files.
        revision: commit of a hub model, None for a folder.
        config: content of ``config.json``.
        lacking: files of a hub model that the local cache lacks, none of which is needed.
    """

    source: str
    folder: Path
    revision: str | None
    config: Mapping[str, Any]
    lacking: tuple[str, ...] = ()

    @cached_property
    def files(self) -> Mapping[str, Path]:
        """File of each tensor.

        Raises:
            InputError: a shard is missing or damaged, or the weights are pickles only.
        """
        index = self.folder / "model.safetensors.index.json"
        single = self.folder / "model.safetensors"
        if index.exists():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict):
                raise InputError(f"{index.name} has no weight_map")
            shards = sorted(set(map(str, weight_map.values())))
        elif single.exists():
            weight_map, shards = None, [single.name]
        else:
            raise self._explain_missing_weights()
        files: dict[str, Path] = {}
        for shard in shards:
            path = self.folder / shard
            if Path(shard).name != shard:
                raise InputError(f"{index.name} names {shard!r}, which is not a plain file name")
            if not path.exists():
                raise InputError(
                    f"shard {shard} is missing in {self.folder}; {index.name} names "
                    f"{len(shards)} shards: download the checkpoint again"
                )
            files.update(dict.fromkeys(open_file(path).keys(), path))
        if weight_map is not None and (absent := set(weight_map) - set(files)):
            raise InputError(f"{index.name} names {min(absent)}, which no shard has")
        return files

    def _explain_missing_weights(self) -> InputError:
        """Make the error for a checkpoint without safetensors."""
        pickles = sorted(p.name for pattern in PICKLES for p in self.folder.glob(pattern))
        if pickles:
            return InputError(
                f"{self.folder} has only pickled weights ({pickles[0]}), which can run code when "
                "opened; convert them to safetensors first: "
                "https://huggingface.co/docs/safetensors/convert-weights"
            )
        if self.revision is not None:
            return InputError(
                f"{self.source} has no safetensors on the hub; pickled weights, which can run code "
                "when opened, are not downloaded: convert them to safetensors first: "
                "https://huggingface.co/docs/safetensors/convert-weights"
            )
        return InputError(f"{self.folder} has no model.safetensors and no shards of one")

    @cached_property
    def model(self) -> Model:
        """Model of the checkpoint, from headers only.

        Raises:
            InputError: a tensor is missing or has the wrong shape, the model is quantized already.
            Unsupported: the family or a setting of its config is not supported.
        """
        if self.config.get("quantization_config") or self.config.get("compression_config"):
            raise InputError(
                f"{self.source} is already quantized; start from the unquantized checkpoint"
            )
        if self.config.get("per_layer_config"):
            raise Unsupported(
                f"{self.source} has layers of unequal size, or replaced experts "
                "(per_layer_config); start from the checkpoint that it was made from"
            )
        family, files = find_family(self.config), self.files
        used: set[str] = set()

        def get_weight(name: str, shape: tuple[int, ...]) -> Weight:
            if name not in files:
                raise InputError(f"{self.source} has no tensor {name}")
            used.add(name)
            weight = make_weight(files[name], name)
            if weight.shape != shape:
                raise InputError(
                    f"{name} has shape {list(weight.shape)}, but config.json asks for {list(shape)}"
                )
            return weight

        model = build_model(family, self.config, get_weight)
        unused = set(files) - used
        # Some tools also write tied heads and rotary tables, which only repeat other values.
        unused -= {"lm_head.weight"} if self.config.get("tie_word_embeddings") else set()
        unused = {name for name in unused if not name.endswith("rotary_emb.inv_freq")}
        if unused:
            raise InputError(
                f"{self.source} has {len(unused)} tensors that {family.architecture} does not "
                f"know, such as {min(unused)}"
            )
        model.verify()
        return model

    @cached_property
    def sha256(self) -> str:
        """Digest over config and all weight files, by name and content."""
        digest = hashlib.sha256()
        paths = sorted({*self.files.values(), self.folder / "config.json"})
        with ThreadPoolExecutor() as pool:
            for path, file_digest in zip(paths, pool.map(hash_file, paths), strict=True):
                digest.update(f"{path.name}\0{file_digest}\n".encode())
        return digest.hexdigest()

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
    if not config.exists():
        raise InputError(
            f"{source} is not a checkpoint: it has no config.json; name the folder that has it"
        )
    return Checkpoint(source, folder, commit, read_json(config), lacking)


def _locate(
    source: str, revision: str | None, cache_dir: Path | None
) -> tuple[Path, str | None, tuple[str, ...]]:
    """Find the folder of MODEL; for a hub model also its commit, and what the cache lacks."""
    if source.startswith("builtin:"):
        if source != BUILTIN:
            raise InputError(f"no built-in model {source!r}; there is {BUILTIN}")
        return BUILTIN_FOLDER, None, ()
    try:
        path = Path(source).expanduser()
        if path.is_dir():
            return path, None, ()
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
    return download(name, at or revision, cache_dir)
