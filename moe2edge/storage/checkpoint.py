"""Open a Hugging Face checkpoint lazily, and write one shard by shard.

Opening reads headers only. MODEL is a local folder, a hub id (``org/name`` or
``org/name@revision``), or ``builtin:tiny-moe``. Only safetensors are read; nothing of a
checkpoint is ever executed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe2edge.errors import InputError, Unsupported
from moe2edge.model.build import build_model
from moe2edge.model.family import find_family
from moe2edge.model.layers import Weight
from moe2edge.model.model import Model
from moe2edge.storage.safetensors_files import make_weight, open_file
from moe2edge.storage.text_files import get_first_line, hash_file, read_json

if TYPE_CHECKING:
    pass

BUILTIN = "builtin:tiny-moe"
BUILTIN_FOLDER = Path(__file__).parents[1] / "builtin" / "tiny-moe"
# What belongs to a checkpoint besides its weights, copied into every output.
COMPANIONS = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
    "generation_config.json", "LICENSE", "LICENSE.txt",
)  # fmt: skip

PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")


@dataclass(frozen=True)
class Checkpoint:
    """A folder with ``config.json`` and safetensors.

    Attributes:
        source: MODEL as the user gave it.
        folder: where its files are.
        revision: commit of a hub model, None for a folder.
        config: ``config.json``.
    """

    source: str
    folder: Path
    revision: str | None
    config: Mapping[str, Any]

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
            raise self._no_weights()
        found: dict[str, Path] = {}
        for shard in shards:
            path = self.folder / shard
            if Path(shard).name != shard:
                raise InputError(f"{index.name} names {shard!r}, which is not a plain file name")
            if not path.exists():
                raise InputError(
                    f"shard {shard} is missing in {self.folder}; {index.name} names "
                    f"{len(shards)} shards: download the checkpoint again"
                )
            found.update(dict.fromkeys(open_file(path).keys(), path))
        if weight_map is not None and (lost := set(weight_map) - set(found)):
            raise InputError(f"{index.name} names {min(lost)}, which no shard has")
        return found

    def _no_weights(self) -> InputError:
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
        """The model, from headers only.

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
        taken: set[str] = set()

        def take(name: str, shape: tuple[int, ...]) -> Weight:
            if name not in files:
                raise InputError(f"{self.source} has no tensor {name}")
            taken.add(name)
            weight = make_weight(files[name], name)
            if weight.shape != shape:
                raise InputError(
                    f"{name} has shape {list(weight.shape)}, but config.json asks for {list(shape)}"
                )
            return weight

        model = build_model(family, self.config, take)
        spare = set(files) - taken
        # Tied heads and rotary tables are written by some tools; they repeat what is known.
        spare -= {"lm_head.weight"} if self.config.get("tie_word_embeddings") else set()
        spare = {name for name in spare if not name.endswith("rotary_emb.inv_freq")}
        if spare:
            raise InputError(
                f"{self.source} has {len(spare)} tensors that {family.architecture} does not know, "
                f"such as {min(spare)}"
            )
        model.verify()
        return model

    @cached_property
    def sha256(self) -> str:
        """Digest over config and all weight files, by name and content."""
        digest = hashlib.sha256()
        paths = sorted({*self.files.values(), self.folder / "config.json"})
        with ThreadPoolExecutor() as pool:
            for path, own in zip(paths, pool.map(hash_file, paths), strict=True):
                digest.update(f"{path.name}\0{own}\n".encode())
        return digest.hexdigest()

    @property
    def companions(self) -> list[Path]:
        """Tokenizer, chat template and the like."""
        return [self.folder / name for name in COMPANIONS if (self.folder / name).exists()]


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
        InputError: there is no such model, or it is no checkpoint.

    >>> open_checkpoint("builtin:tiny-moe").model.expert_counts
    (16, 16, 16, 16, 16, 16)
    """
    source = str(source)
    folder, commit = _locate(source, revision, cache_dir)
    config = folder / "config.json"
    if not config.exists():
        raise InputError(f"{source} is no checkpoint: it has no config.json")
    return Checkpoint(source, folder, commit, read_json(config))


def _locate(source: str, revision: str | None, cache_dir: Path | None) -> tuple[Path, str | None]:
    if source.startswith("builtin:"):
        if source != BUILTIN:
            raise InputError(f"no built-in model {source!r}; there is {BUILTIN}")
        return BUILTIN_FOLDER, None
    try:
        path = Path(source).expanduser()
        if path.is_dir():
            return path, None
    except (OSError, RuntimeError) as error:  # no such user's home, a name that is too long
        raise InputError(f"{source[:100]} cannot be opened: {str(error)[:100]}") from error
    name, _, at = source.removeprefix("hf://").partition("@")
    if path.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise InputError(
            f"there is no folder {source}; MODEL is a local folder, a hub id (org/name) "
            f"or {BUILTIN}"
        )
    if at and revision and at != revision:
        raise InputError(f"{source} names revision {at}, and --revision {revision}; give one")
    return _download(name, at or revision, cache_dir)


def _download(name: str, revision: str | None, cache_dir: Path | None) -> tuple[Path, str]:
    """Files of a hub model in the local cache; fetches what is missing unless offline."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(
            name,
            revision=revision,
            cache_dir=cache_dir,
            allow_patterns=[
                "config.json",
                "*.safetensors",
                "*.safetensors.index.json",
                *COMPANIONS,
            ],
            # A star matches slashes, too; weights in other layouts would be fetched for nothing.
            ignore_patterns=["*/*", "consolidated*"],
        )
    except LocalEntryNotFoundError as error:
        raise InputError(
            f"{name} is not in the local cache and the hub cannot be reached; download it first, "
            "or give a local folder"
        ) from error
    except (HfHubHTTPError, HFValidationError) as error:
        raise InputError(f"{name} cannot be had from the hub: {get_first_line(error)}") from error
    return Path(folder), Path(folder).name
