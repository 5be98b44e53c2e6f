"""Safetensors files: headers, single tensors, and a streaming writer."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from moe2edge.errors import InputError, Unsupported, VerificationFailed, get_first_line
from moe2edge.model.weights import BYTES, DTYPE_BYTES, DTYPES, Weight
from moe2edge.storage.text_files import make_read_error, read_json, sync_folder, write_json

if TYPE_CHECKING:
    from torch import Tensor

# Every dtype that is written, and those that only quantized sources have.
_WRITTEN = DTYPES | {"I32": "int32", "U32": "uint32", "U8": "uint8", "I64": "int64"}
_TORCH_NAMES = _WRITTEN | {
    "BOOL": "bool",
    "I8": "int8",
    "I16": "int16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
}

SHARD_BYTES = 4 << 30
INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True)
class TensorEntry:
    """Place of one tensor in a safetensors file.

    Attributes:
        shape: its shape.
        dtype: its dtype as the file spells it.
        start: position of its first byte in the file.
        nbytes: its size in bytes.
    """

    shape: tuple[int, ...]
    dtype: str
    start: int
    nbytes: int


def open_file(path: Path) -> Mapping[str, TensorEntry]:
    """Read the header of a safetensors file; it is cached.

    Raises:
        InputError: the file is missing or damaged, no regular file, or cannot be read.
    """
    try:
        state = path.stat()
        if not stat.S_ISREG(state.st_mode):  # the library would wait for the other end of a pipe
            raise InputError(f"{path} is not a regular file; put a file in its place")
        return _read_entries(path, state.st_mtime_ns, state.st_size)
    except OSError as error:
        raise make_read_error(path, error) from error
    except SafetensorError as error:
        raise InputError(
            f"{path.name} is damaged or cut short ({get_first_line(error)}); download it again"
        ) from error


@lru_cache(maxsize=256)
def _read_entries(path: Path, changed: int, size: int) -> Mapping[str, TensorEntry]:
    """Read the header of a file; a file that was written again has another cache key.

    The library checks all of it, but does not tell where tensors are.
    """
    # Opened here first: the library calls a file that must not be read one that does not exist.
    with path.open("rb") as file, safe_open(path, framework="np"):
        (length,) = struct.unpack("<Q", file.read(8))
        header: dict[str, Any] = json.loads(file.read(length))
    header.pop("__metadata__", None)
    entries = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        shape = tuple(entry["shape"])
        entries[name] = TensorEntry(shape, entry["dtype"], 8 + length + start, end - start)
    return entries


def make_weight(path: Path, name: str, *, any_dtype: bool = False) -> Weight:
    """Make a handle on one tensor of a safetensors file.

    Args:
        path: the file.
        name: the tensor.
        any_dtype: take every dtype that can be read, such as integers.

    Raises:
        Unsupported: its dtype is not a supported floating-point type.
    """
    shape, dtype = read_header(path, name)
    if dtype not in DTYPE_BYTES and not (any_dtype and dtype in _TORCH_NAMES):
        raise Unsupported(
            f"{name} has dtype {dtype}; supported: {', '.join(DTYPE_BYTES)}; get the checkpoint "
            "in one of these"
        )
    return Weight(name, shape, dtype, load=lambda: read_tensor(path, name))


def read_header(path: Path, name: str) -> tuple[tuple[int, ...], str]:
    """Return shape and dtype of one tensor of a safetensors file, as the file spells them."""
    entry = open_file(path)[name]
    return entry.shape, entry.dtype


def read_tensor(path: Path, name: str, rows: tuple[int, int] | None = None) -> Tensor:
    """Read one tensor of a safetensors file, through a memory map of nothing else.

    A map of the whole file would count as memory of the process, page by page as it is read; this
    one is released with the tensor. Writing to the tensor does not change the file.

    Args:
        path: the file.
        name: the tensor.
        rows: its first row to read, and the one after the last; None: all.
    """
    import numpy as np
    import torch

    entry = open_file(path)[name]
    shape, start, nbytes = entry.shape, entry.start, entry.nbytes
    if rows is not None:
        width = nbytes // shape[0]
        shape = (rows[1] - rows[0], *shape[1:])
        start, nbytes = start + rows[0] * width, shape[0] * width
    dtype = getattr(torch, _TORCH_NAMES[entry.dtype])
    if not nbytes:
        return torch.empty(shape, dtype=dtype)
    mapped = np.memmap(path, np.uint8, "c", start, nbytes)
    return torch.from_numpy(mapped).view(dtype).view(shape)


def read_all(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of the safetensors files of a folder, one at a time, in file order.

    Hidden files, such as the attributes that macOS keeps beside a file, hold no tensors.
    """
    for path in sorted(folder.glob("[!.]*.safetensors")):
        for name in open_file(path).keys():  # noqa: SIM118
            yield name, read_tensor(path, name)


def check_index(folder: Path) -> None:
    """Compare the index of a checkpoint, if it has one, with the tensors of its shards.

    Raises:
        InputError: a file cannot be read.
        VerificationFailed: the index says otherwise.
    """
    path = folder / INDEX_FILE
    if not path.exists():
        return
    found: dict[str, str] = {}
    index, total = read_json(path), 0
    for shard in sorted(folder.glob("[!.]*.safetensors")):
        entries = open_file(shard)
        found |= dict.fromkeys(entries, shard.name)
        total += sum(entry.nbytes for entry in entries.values())
    if index != _make_index(found, total):
        raise VerificationFailed(
            f"{INDEX_FILE} does not say which tensor is in which file; export it again"
        )


def _make_index(files: Mapping[str, str], total: int) -> dict[str, Any]:
    """Make the content of an index from the file of each tensor, and the bytes of all."""
    return {"metadata": {"total_size": total}, "weight_map": dict(files)}


# ---- writing ----------------------------------------------------------------------------------

_SPELLING = {f"torch.{name}": spelling for spelling, name in _WRITTEN.items()}


@dataclass(frozen=True)
class PlannedTensor:
    """Tensor that is to be written: shape and dtype now, numbers when its turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        width = BYTES[self.dtype]
        for size in self.shape:
            width *= size
        return width


def write_safetensors(path: Path, tensors: Iterable[PlannedTensor], *, durable: bool = True) -> str:
    """Write one safetensors file with a single tensor in memory at a time; return its SHA-256.

    The digest is that of the bytes that were to be written, and is computed beside the writing. The
    library's own writer needs all tensors of a file at once. The format is the length of the
    header in 8 bytes, the header as JSON, then the tensors without gaps
    (https://huggingface.co/docs/safetensors).
    """
    tensors = list(tensors)
    digest = hashlib.sha256(start := _encode_header(tensors))
    with path.open("wb") as file, ThreadPoolExecutor(1) as beside:
        file.write(start)
        for t in tensors:
            data = encode_tensor(t.make(), t)
            hashed = beside.submit(digest.update, data)
            file.write(data)
            hashed.result()
        if durable:
            file.flush()
            os.fsync(file.fileno())
    return digest.hexdigest()


def refuse_numbers() -> Tensor:
    """Stand for the numbers of a tensor of which only shape and dtype are known."""
    raise AssertionError("a tensor without numbers has none to read")


def write_hollow_safetensors(path: Path, tensors: Iterable[PlannedTensor]) -> None:
    """Write a safetensors file of zeros, which take no room on disks that know holes in files."""
    tensors = list(tensors)
    with path.open("wb") as file:
        file.write(start := _encode_header(tensors))
        file.truncate(len(start) + sum(t.nbytes for t in tensors))


def _encode_header(tensors: Iterable[PlannedTensor]) -> bytes:
    """Return the first bytes of a file: the length of its header, and that."""
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
    return struct.pack("<Q", len(text)) + text


def encode_tensor(tensor: Tensor, planned: PlannedTensor) -> memoryview:
    """Return the bytes of a tensor, after a check that it is the one that was planned."""
    import torch

    header = (tuple(tensor.shape), _SPELLING[str(tensor.dtype)])
    if header != (planned.shape, planned.dtype):
        raise AssertionError(
            f"{planned.name}: made {header}, planned {(planned.shape, planned.dtype)}"
        )
    # Flatten first: a matrix of one column may have any stride and still count as contiguous.
    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)


def write_checkpoint(folder: Path, tensors: Iterable[PlannedTensor]) -> dict[str, str]:
    """Write tensors as ``model.safetensors``, or as shards with an index beyond 4 GiB.

    Return the SHA-256 of each file, by name.
    """
    shards: list[list[PlannedTensor]] = [[]]
    size = 0
    for t in tensors:
        if shards[-1] and size + t.nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(t)
        size += t.nbytes
    if len(shards) == 1:
        return {"model.safetensors": write_safetensors(folder / "model.safetensors", shards[0])}
    weight_map, written = {}, {}
    for n, shard in enumerate(shards, start=1):
        name = f"model-{n:05}-of-{len(shards):05}.safetensors"
        written[name] = write_safetensors(folder / name, shard)
        weight_map.update({t.name: name for t in shard})
    total = sum(t.nbytes for shard in shards for t in shard)
    written[INDEX_FILE] = write_json(folder / INDEX_FILE, _make_index(weight_map, total))
    return written


def write_durably(path: Path, tensors: list[PlannedTensor]) -> str:
    """Write a safetensors file that gets its name only when it is complete and on the disk.

    Return its SHA-256.
    """
    temporary = path.with_name(path.name + ".tmp")
    digest = write_safetensors(temporary, tensors)
    temporary.replace(path)
    sync_folder(path.parent)
    return digest
