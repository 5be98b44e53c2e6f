"""Reading and writing GGUF files: a header of metadata and shapes, then the numbers.

The library ``gguf`` writes headers. Its reader makes an array of every token and does not know all
types that llama.cpp has, so the reader here is one of our own.
"""

from __future__ import annotations

import hashlib
import io
import math
import mmap
import os
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe2edge.errors import Unsupported, VerificationFailed
from moe2edge.targets._gguf_types import BLOCK_TYPES, BlockType

if TYPE_CHECKING:
    from torch import Tensor

# One command for both libraries: every export is also run.
_INSTALL_GGUF = "pip install 'gguf>=0.19' 'xllamacpp>=2026.10'"
_MAGIC, GGUF_VERSION, GGUF_ALIGNMENT = b"GGUF", 3, 32
# Kinds of values by their number in files: letter of `struct`, or what they are.
_NUMBERS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9
# More entries than any model has: a damaged number must not ask for all memory.
_MOST_ENTRIES, _MOST_DIMENSIONS = 1 << 24, 4

Metadata = Mapping[str, Any]


@dataclass(frozen=True)
class PlannedGguf:
    """A tensor to write.

    Attributes:
        name: its name in the file.
        shape: its shape, the inputs of matrices last.
        kind: its type.
        load: returns its bytes in pieces, each uint8 [bytes].
    """

    name: str
    shape: tuple[int, ...]
    kind: BlockType
    load: Callable[[], Iterable[Tensor]]

    @property
    def nbytes(self) -> int:
        """Bytes of its numbers."""
        return self.kind.measure(self.shape)


def write_gguf(path: Path, metadata: Metadata, tensors: Sequence[PlannedGguf]) -> str:
    """Write a file, tensor by tensor.

    Args:
        path: the file.
        metadata: values by key, in order; ``general.architecture`` is among them.
        tensors: in order.

    Returns:
        The SHA-256 of what was to be written.

    Raises:
        Unsupported: the library ``gguf`` is not installed.
    """
    digest = hashlib.sha256()
    with path.open("wb") as file:

        def put(data: bytes | memoryview) -> None:
            digest.update(data)
            file.write(data)

        put(build_header(metadata, tensors))
        for tensor in tensors:
            size = 0
            for piece in tensor.load():
                put(piece.numpy().data)
                size += len(piece)
            assert size == tensor.nbytes, f"{tensor.name} has {size} bytes, not {tensor.nbytes}"
            put(bytes(-size % GGUF_ALIGNMENT))
    return digest.hexdigest()


def write_outline(path: Path, metadata: Metadata, tensors: Sequence[PlannedGguf]) -> None:
    """Write a file with holes in the place of numbers, which take no room on the disk."""
    header = build_header(metadata, tensors)
    path.write_bytes(header)
    padded = (one.nbytes + -one.nbytes % GGUF_ALIGNMENT for one in tensors)
    os.truncate(path, len(header) + sum(padded))


def build_header(metadata: Metadata, tensors: Sequence[PlannedGguf]) -> bytes:
    """Build all that stands before the numbers.

    Raises:
        Unsupported: the library ``gguf`` is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise Unsupported(
            f"target gguf needs the library gguf, which is not installed: {_INSTALL_GGUF}"
        ) from error
    import numpy as np

    buffer = io.BytesIO()

    class Writer(gguf.GGUFWriter):  # type: ignore[misc]
        def open_output_file(self, path: Path | None = None) -> None:
            self.fout, self.state = [buffer], gguf.gguf_writer.WriterState.EMPTY

    writer = Writer(None, metadata["general.architecture"])
    for key, value in metadata.items():
        if key != "general.architecture":
            _add_value(writer, key, value)
    for one in tensors:
        # This dtype is taken as it is, also with types that the library does not know.
        writer.add_tensor_info(one.name, one.shape, np.dtype(np.int8), one.nbytes, one.kind.code)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    data = buffer.getvalue()
    return data + bytes(-len(data) % GGUF_ALIGNMENT)


def _add_value(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


# ---- reading -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FoundTensor:
    """A tensor in a file.

    Attributes:
        shape: its shape, the inputs of matrices last.
        kind: its type.
        start: where its bytes begin in the file.
    """

    shape: tuple[int, ...]
    kind: BlockType
    start: int


@dataclass(frozen=True)
class GgufFile:
    """A file whose header was read.

    Attributes:
        path: the file.
        metadata: values by key; arrays as lists.
        tensors: by name, in order.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, FoundTensor]

    def read(self, name: str, first: int = 0, count: int | None = None) -> Tensor:
        """Return the bytes of a tensor, or of some entries of its first axis, uint8 [bytes].

        Raises:
            VerificationFailed: there is no such tensor, or the file ends before it does.
        """
        import numpy as np
        import torch

        found = self.tensors.get(name)
        if found is None:
            raise VerificationFailed(f"{self.path} has no tensor {name}; export it again")
        whole = found.kind.measure(found.shape)
        each = whole if count is None else whole // found.shape[0]
        size = each if count is None else each * count
        data = np.fromfile(self.path, np.uint8, size, offset=found.start + first * each)
        if len(data) != size:
            raise _make_damage(self.path, f"it ends in {name}")
        return torch.from_numpy(data)


def read_gguf(path: Path) -> GgufFile:
    """Read the header of a file.

    Raises:
        VerificationFailed: it cannot be read, is damaged, ends too early, or has a type of tensors
            that this target does not write.
    """
    try:
        with path.open("rb") as file:
            if path.stat().st_size < 4 * len(_MAGIC):
                raise _make_damage(path, "it ends in its header")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Reader(path, data).read()
    except OSError as error:
        raise VerificationFailed(
            f"{path} cannot be read: {error.strerror or error}; export or download it again"
        ) from error


class _Reader:
    """Reads a header from a map of the file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path, self._data, self._at = path, data, 0

    def read(self) -> GgufFile:
        """Read all of it."""
        if self._take(4) != _MAGIC:
            raise _make_damage(self._path, "it does not begin as a GGUF file does")
        version, count, keys = self._unpack("I"), self._unpack("Q"), self._unpack("Q")
        if version != GGUF_VERSION:
            raise _make_damage(self._path, f"it is of version {version}, expected {GGUF_VERSION}")
        self._check_count(count)
        self._check_count(keys)
        metadata: dict[str, Any] = {}
        for _ in range(keys):
            key = self._read_string()
            metadata[key] = self._read_value(self._unpack("I"))
        headers = [self._read_tensor() for _ in range(count)]
        start = self._at + -self._at % GGUF_ALIGNMENT
        tensors = {}
        for name, shape, kind, offset in headers:
            if name in tensors or start + offset + kind.measure(shape) > len(self._data):
                raise _make_damage(self._path, f"{name} is there twice, or the file ends in it")
            tensors[name] = FoundTensor(shape, kind, start + offset)
        return GgufFile(self._path, metadata, tensors)

    def _take(self, size: int) -> bytes:
        data = self._data[self._at : self._at + size]
        if len(data) != size:
            raise _make_damage(self._path, "it ends in its header")
        self._at += size
        return data

    def _unpack(self, letter: str) -> Any:
        return struct.unpack(f"<{letter}", self._take(struct.calcsize(f"<{letter}")))[0]

    def _check_count(self, count: int) -> None:
        if count > _MOST_ENTRIES:
            raise _make_damage(self._path, f"its header names {count:,} entries")

    def _read_string(self) -> str:
        size = self._unpack("Q")
        try:
            return self._take(min(size, len(self._data))).decode()
        except UnicodeDecodeError as error:
            raise _make_damage(self._path, "its header has text that is not UTF-8") from error

    def _read_value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._read_string()
        if kind in _NUMBERS:
            return self._unpack(_NUMBERS[kind])
        if kind != _ARRAY:
            raise _make_damage(self._path, f"its header has a value of the unknown kind {kind}")
        inner, count = self._unpack("I"), self._unpack("Q")
        self._check_count(count)
        if inner in _NUMBERS:
            form = f"<{count}{_NUMBERS[inner]}"
            return list(struct.unpack(form, self._take(struct.calcsize(form))))
        if inner != _STRING:
            raise _make_damage(self._path, f"its header has a list of the unknown kind {inner}")
        return [self._read_string() for _ in range(count)]

    def _read_tensor(self) -> tuple[str, tuple[int, ...], BlockType, int]:
        name, axes = self._read_string(), self._unpack("I")
        if axes > _MOST_DIMENSIONS:
            raise _make_damage(self._path, f"{name} has {axes} axes")
        shape = tuple(self._unpack("Q") for _ in range(axes))[::-1]
        code, offset = self._unpack("I"), self._unpack("Q")
        kind = BLOCK_TYPES.get(code)
        if kind is None or not shape or shape[-1] % kind.block or math.prod(shape) >> 48:
            raise _make_damage(self._path, f"{name} has shape {list(shape)} and the type {code}")
        return name, shape, kind, offset


def _make_damage(path: Path, reason: str) -> VerificationFailed:
    return VerificationFailed(f"{path} is damaged: {reason}; export or download it again")
