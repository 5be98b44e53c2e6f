"""Open a Hugging Face checkpoint lazily, and write one shard by shard.

Opening reads headers only. MODEL is a local folder, a hub id (``org/name`` or
``org/name@revision``), or ``builtin:tiny-moe``. Only safetensors are read; nothing of a
checkpoint is ever executed.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from moe2edge.errors import InputError, Unsupported
from moe2edge.families import build_model, family_of
from moe2edge.layers import DTYPE_BYTES, Weight
from moe2edge.model import Model

if TYPE_CHECKING:
    from torch import Tensor

BUILTIN = "builtin:tiny-moe"
BUILTIN_FOLDER = Path(__file__).parent / "builtin" / "tiny-moe"
# What belongs to a checkpoint besides its weights, copied into every output.
COMPANIONS = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
    "generation_config.json", "LICENSE", "LICENSE.txt",
)  # fmt: skip
# Floating-point dtypes as safetensors and as torch spell them.
DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
# All that we read and write.
_TORCH_NAMES = DTYPES | {"I32": "int32", "U8": "uint8", "I64": "int64"}
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
SHARD_BYTES = 4 << 30


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
        family, files = family_of(self.config), self.files
        taken: set[str] = set()

        def take(name: str, shape: tuple[int, ...]) -> Weight:
            if name not in files:
                raise InputError(f"{self.source} has no tensor {name}")
            taken.add(name)
            weight = stored_weight(files[name], name)
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
            for path, own in zip(paths, pool.map(file_sha256, paths), strict=True):
                digest.update(f"{path.name}\0{own}\n".encode())
        return digest.hexdigest()

    @property
    def companions(self) -> list[Path]:
        """Tokenizer, chat template and the like."""
        return [self.folder / name for name in COMPANIONS if (self.folder / name).exists()]


def open_checkpoint(
    source: str, *, revision: str | None = None, cache_dir: Path | None = None
) -> Checkpoint:
    """Open MODEL: a folder, a hub id or ``builtin:tiny-moe``.

    Raises:
        InputError: there is no such model, or it is no checkpoint.
    """
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
        raise InputError(f"{name} cannot be had from the hub: {_first_line(error)}") from error
    return Path(folder), Path(folder).name


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        InputError: the file cannot be read or holds something else.
    """
    try:
        data = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{path} is damaged ({_first_line(error)}); export or download it again"
        ) from error
    if not isinstance(data, dict):
        raise InputError(
            f"{path} is damaged (it holds no JSON object); export or download it again"
        )
    return data


@dataclass(frozen=True)
class Entry:
    """One tensor of a safetensors file.

    Attributes:
        shape: its shape.
        dtype: as the file spells it.
        start: its first byte in the file.
        nbytes: how many it has.
    """

    shape: tuple[int, ...]
    dtype: str
    start: int
    nbytes: int


def open_file(path: Path) -> Mapping[str, Entry]:
    """The header of a safetensors file, which is read once.

    Raises:
        InputError: it is missing or damaged.
    """
    try:
        state = path.stat()
        return _entries(path, state.st_mtime_ns, state.st_size)
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path.name} is damaged or cut short ({_first_line(error)}); download it again"
        ) from error


@lru_cache(maxsize=256)
def _entries(path: Path, changed: int, size: int) -> Mapping[str, Entry]:
    """Header of a file; one that was written anew has another key.

    The library, which checks the whole of it, does not tell where tensors are.
    """
    with safe_open(path, framework="np"):
        pass
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header: dict[str, Any] = json.loads(file.read(length))
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        shape = tuple(entry["shape"])
        found[name] = Entry(shape, entry["dtype"], 8 + length + start, end - start)
    return found


def stored_weight(path: Path, name: str) -> Weight:
    """Handle on one tensor of a safetensors file.

    Raises:
        Unsupported: its dtype is not a floating-point one that we read.
    """
    shape, dtype = header(path, name)
    if dtype not in DTYPE_BYTES:
        raise Unsupported(f"{name} has dtype {dtype}; supported: {', '.join(DTYPE_BYTES)}")
    return Weight(name, shape, dtype, load=lambda: read_tensor(path, name))


def header(path: Path, name: str) -> tuple[tuple[int, ...], str]:
    """Shape and dtype of one tensor of a safetensors file, as the file spells them."""
    entry = open_file(path)[name]
    return entry.shape, entry.dtype


def read_tensor(path: Path, name: str) -> Tensor:
    """One tensor of a safetensors file, through a map of nothing else.

    A map of the whole file would count as memory of the process, page by page as it is read; this
    one is gone with the tensor. Writing to the tensor does not change the file.
    """
    import numpy as np
    import torch

    entry = open_file(path)[name]
    dtype = getattr(torch, _TORCH_NAMES[entry.dtype])
    if not entry.nbytes:
        return torch.empty(entry.shape, dtype=dtype)
    mapped = np.memmap(path, np.uint8, "c", entry.start, entry.nbytes)
    return torch.from_numpy(mapped).view(dtype).view(entry.shape)


def read_all(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the safetensors files of a folder, one at a time, in file order."""
    for path in sorted(folder.glob("*.safetensors")):
        for name in open_file(path).keys():  # noqa: SIM118
            yield name, read_tensor(path, name)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, data: object) -> None:
    """Write ``data`` as indented JSON."""
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", "utf-8")


# ---- writing ----------------------------------------------------------------------------------

_SPELLING = {f"torch.{name}": spelling for spelling, name in _TORCH_NAMES.items()}


def as_stored(tensor: Tensor, dtype: str) -> Tensor:
    """``tensor`` in a dtype as safetensors spells it."""
    import torch

    return tensor.to(getattr(torch, DTYPES[dtype]))


@dataclass(frozen=True)
class Planned:
    """A tensor that is to be written: shape and dtype now, numbers when its turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        width = {**DTYPE_BYTES, "I32": 4, "U8": 1, "I64": 8}[self.dtype]
        for size in self.shape:
            width *= size
        return width


def write_safetensors(path: Path, tensors: Iterable[Planned]) -> None:
    """Write one safetensors file with a single tensor in memory at a time.

    The library's own writer wants all tensors of a file at once. The format is a header of JSON
    behind its length in 8 bytes, then the tensors without gaps
    (https://huggingface.co/docs/safetensors).
    """
    tensors = list(tensors)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for t in tensors:
        header[t.name] = {
            "dtype": t.dtype,
            "shape": list(t.shape),
            "data_offsets": [offset, offset + t.nbytes],
        }
        offset += t.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for t in tensors:
            file.write(tensor_bytes(t.make(), t))
        file.flush()
        os.fsync(file.fileno())


def tensor_bytes(tensor: Tensor, planned: Planned) -> memoryview:
    """Bytes of a tensor, after a check that it is the one that was planned."""
    import torch

    found = (tuple(tensor.shape), _SPELLING[str(tensor.dtype)])
    if found != (planned.shape, planned.dtype):
        raise AssertionError(
            f"{planned.name}: made {found}, planned {(planned.shape, planned.dtype)}"
        )
    # Flat first: a matrix of one column may have any stride there and count as contiguous.
    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)


def write_checkpoint(folder: Path, tensors: Iterable[Planned]) -> None:
    """Write tensors as ``model.safetensors``, or as shards with an index beyond 4 GiB."""
    shards: list[list[Planned]] = [[]]
    size = 0
    for t in tensors:
        if shards[-1] and size + t.nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(t)
        size += t.nbytes
    if len(shards) == 1:
        write_safetensors(folder / "model.safetensors", shards[0])
        return
    weight_map = {}
    for n, shard in enumerate(shards, start=1):
        name = f"model-{n:05}-of-{len(shards):05}.safetensors"
        write_safetensors(folder / name, shard)
        weight_map.update({t.name: name for t in shard})
    total = sum(t.nbytes for shard in shards for t in shard)
    write_json(
        folder / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": weight_map},
    )
