"""Weights of an ONNX graph: planned from shapes, streamed into one data file, read back.

An initializer holds one or more tensors of the checkpoint, one after the other or with alternating
rows. Its ``metadata_props`` name them, so that a folder can be read back without the model that it
was made from.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from google.protobuf.message import DecodeError
from onnx import TensorProto
from torch import Tensor

from moe2edge.errors import VerificationFailed
from moe2edge.model.weights import Weight
from moe2edge.numerics.decoding import unpack_words
from moe2edge.numerics.grid import Quantized
from moe2edge.numerics.packing import (
    deinterleave,
    interleave,
    pack_bytes,
    pack_words,
    unpack_bytes,
)
from moe2edge.numerics.scheme import WHOLE_ROW, Scheme
from moe2edge.storage.text_files import make_read_error
from moe2edge.storage.written_files import FileDigest

GRAPH_FILE = "model.onnx"
DATA_FILE = "model.onnx.data"
# Names of such files: the usual one, and those of a web folder.
DATA_NAME = re.compile(r"model\.onnx(\.data|_data(_\d+)?)")
# Initializers with the rotary embeddings of all positions, float32 [positions, head_dim / 2].
ROTARY_TABLES = ("model.rotary_emb.cos", "model.rotary_emb.sin")
# Initializers with the scales of a cache in int8, float32 [1, kv heads, 1, head_dim].
CACHE_SCALES = "model.layers.{index}.attn.{part}_scale"
# Metadata keys of moe2edge, of the graph (positions; what computes in float16, if anything does)
# and of its initializers.
POSITIONS_KEY = "moe2edge.max_positions"
HALF_KEY = "moe2edge.float16"
PARTS_KEY = "moe2edge.parts"
SCALES_KEY = "moe2edge.scales"
ZEROS_KEY = "moe2edge.zeros"
BITS_KEY = "moe2edge.bits"
# Bits of initializers without `BITS_KEY`, which earlier versions, of 4 bits only, did not write.
USUAL_BITS = "4"
# Smaller tensors are stored in the graph file, where shape inference can read them.
INLINE_BYTES = 1024
# Tensors of many pages start at a page boundary, so that a runtime can map them.
PAGE, MANY_PAGES, ALIGNMENT = 4096, 1 << 16, 64

# ONNX's data type and torch's dtype, by the name of the dtype in safetensors.
ONNX_DTYPES: Mapping[str, tuple[int, torch.dtype]] = {
    "F64": (TensorProto.DOUBLE, torch.float64),
    "F32": (TensorProto.FLOAT, torch.float32),
    "BF16": (TensorProto.BFLOAT16, torch.bfloat16),
    "F16": (TensorProto.FLOAT16, torch.float16),
    "U8": (TensorProto.UINT8, torch.uint8),
    "I8": (TensorProto.INT8, torch.int8),
}
# Experts of this many bits take activations in float16 only.
HALF_BITS = 3
# Exclusive or with this turns unsigned integers with zero point 128 into signed ones.
SIGN = 0x80


@dataclass(frozen=True)
class Source:
    """A weight and its name on disk."""

    name: str
    weight: Weight


Array = np.ndarray[Any, Any]
Bytes = np.ndarray[Any, np.dtype[np.uint8]]
# One tensor, or two whose rows alternate. The parts of an initializer follow each other.
DataPart = tuple[Source, ...]


@dataclass(frozen=True)
class Slot:
    """An initializer: its name, its dtype as safetensors spells it, its shape and metadata."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return math.prod(self.shape) * ONNX_DTYPES[self.dtype][1].itemsize


@dataclass(frozen=True)
class Batch:
    """Initializers that are filled together.

    Attributes:
        slots: the initializers.
        make: yields slots with the next data of each, until all slots are full.
    """

    slots: tuple[Slot, ...]
    make: Callable[[], Iterator[tuple[Slot, Tensor]]]


# ---- planning -----------------------------------------------------------------------------------


def make_plain_initializer(name: str, parts: Sequence[DataPart], shape: tuple[int, ...]) -> Batch:
    """Plan one initializer of ``shape``, with ``parts`` as they are in the checkpoint."""
    slot = Slot(name, parts[0][0].weight.dtype, shape, {PARTS_KEY: _describe(parts)})

    def make() -> Iterator[tuple[Slot, Tensor]]:
        for part in parts:
            yield slot, _join([source.weight.load() for source in part])

    return Batch((slot,), make)


def make_quantized_initializers(
    name: str, parts: Sequence[DataPart], shape: tuple[int, ...], *, blocked: bool
) -> Batch:
    """Plan initializers for quantized ``parts``: integers, scales, zero points if any.

    Args:
        name: name of the matrix; ``.weight`` becomes ``.qweight``, ``.scales`` and ``.zeros``.
        parts: quantized matrices of one scheme.
        shape: shape of the dequantized matrices, [..., out, in].
        blocked: whether integers are [..., out, groups, bytes] as in ``MatMulNBits``, or
            [..., out, bytes] as in ``QMoE``; the bytes are the same. Zero points are packed along
            groups, [..., out, bytes]. Scales are float32 in the former, and in the latter float16,
            unless those of a source may need more.
    """
    scheme = parts[0][0].weight.scheme
    assert scheme is not None
    *lead, ins = shape
    groups, per_byte = scheme.groups(ins), 8 // scheme.bits
    row = ins * scheme.bits // 8
    last = (groups, row // groups) if blocked else (row,)
    stem = name.removesuffix(".weight")
    dtype = "F16" if not blocked and all(_has_half_scales(s) for p in parts for s in p) else "F32"
    scales = Slot(f"{stem}.scales", dtype, (*lead, groups))
    zeros = Slot(f"{stem}.zeros", "U8", (*lead, -(-groups // per_byte)))
    metadata = {PARTS_KEY: _describe(parts), SCALES_KEY: scales.name, BITS_KEY: str(scheme.bits)}
    if not scheme.symmetric:
        metadata[ZEROS_KEY] = zeros.name
    integers = Slot(f"{stem}.qweight", "U8", (*lead, *last), metadata)

    def make() -> Iterator[tuple[Slot, Tensor]]:
        for part in parts:
            numbers = [source.weight.quantized() for source in part]
            yield integers, pack_integers(_join([n.q for n in numbers]), scheme.bits)
            yield scales, _cast_scales(name, _join([n.scales for n in numbers]), dtype)
            if not scheme.symmetric:
                points = [n.zeros for n in numbers if n.zeros is not None]
                yield zeros, pack_bytes(_join(points), scheme.bits)

    slots = (integers, scales) if scheme.symmetric else (integers, scales, zeros)
    return Batch(slots, make)


def pack_integers(q: Tensor, bits: int) -> Tensor:
    """Pack rows into bytes; 3 bits, of which eight take three bytes, as a stream of bits."""
    return pack_words(q, bits).view(torch.uint8) if bits == HALF_BITS else pack_bytes(q, bits)


def unpack_integers(packed: Tensor, bits: int) -> Tensor:
    """Unpack rows [n, bytes] to integers: the inverse of `pack_integers`."""
    if bits != HALF_BITS:
        return unpack_bytes(packed, bits)
    return unpack_words(packed.view(torch.int32), bits, packed.shape[1] * 8 // bits)


def _has_half_scales(source: Source) -> bool:
    """Return whether float16 holds the scales of a matrix: those of passes, or of such a source."""
    return not source.weight.kept or source.weight.scale_dtype == "F16"


def _cast_scales(name: str, scales: Tensor, dtype: str) -> Tensor:
    """Convert scales to the dtype of their initializer, exactly.

    Raises:
        VerificationFailed: it cannot hold them.
    """
    cast = scales.to(ONNX_DTYPES[dtype][1])
    if not torch.equal(cast.to(scales.dtype), scales):
        raise VerificationFailed(
            f"{name} has scales that {cast.dtype} cannot represent exactly; the pass that "
            "quantizes must round scales to such values first"
        )
    return cast


def make_per_channel_initializers(
    name: str, parts: Sequence[DataPart], shape: tuple[int, ...]
) -> Batch:
    """Plan initializers for 8-bit matrices with per-channel scales, for ``DequantizeLinear``.

    Args:
        name: prefix of the names, which end in ``.qweight`` (int8) and ``.scales`` (float32).
        parts: matrices of 8 bits with one scale per row.
        shape: shape of the dequantized matrices, [..., out, in]; scales are [..., out].
    """
    scales = Slot(f"{name}.scales", "F32", shape[:-1])
    metadata = {PARTS_KEY: _describe(parts), SCALES_KEY: scales.name, BITS_KEY: "8"}
    integers = Slot(f"{name}.qweight", "I8", shape, metadata)

    def make() -> Iterator[tuple[Slot, Tensor]]:
        for (source,) in parts:
            numbers = source.weight.quantized()
            yield integers, (numbers.q ^ SIGN).view(torch.int8)
            yield scales, numbers.scales

    return Batch((integers, scales), make)


def _describe(parts: Sequence[DataPart]) -> str:
    """Encode parts for `parse_parts`: the rows of one tensor, and the names, for each part."""
    return json.dumps([[part[0].weight.shape[0], *(s.name for s in part)] for part in parts])


def _join(tensors: list[Tensor]) -> Tensor:
    """Return one tensor as it is, two with their rows alternating."""
    return interleave(*tensors) if len(tensors) == 2 else tensors[0]


def compute_offsets(batches: Sequence[Batch]) -> tuple[dict[str, int], int]:
    """Compute where each initializer but the small ones starts in the data file, and its size."""
    starts: dict[str, int] = {}
    end = 0
    for slot in chain.from_iterable(batch.slots for batch in batches):
        if slot.nbytes < INLINE_BYTES:
            continue
        alignment = PAGE if slot.nbytes >= MANY_PAGES else ALIGNMENT
        starts[slot.name] = -(-end // alignment) * alignment
        end = starts[slot.name] + slot.nbytes
    return starts, end


# ---- writing ------------------------------------------------------------------------------------


def write_data(batches: Sequence[Batch], path: Path) -> tuple[list[Any], str]:
    """Stream all weights into ``path``.

    At most one part (gate and up of an expert) is in memory, and the scales and zero points of one
    batch, which are hashed behind its integers.

    Returns:
        The initializers that refer to the file (``TensorProto``), and the SHA-256 of what was to be
        written to it.
    """
    starts, size = compute_offsets(batches)
    inline: dict[str, bytes] = {}
    digest = FileDigest()
    with path.open("wb") as file, ThreadPoolExecutor(1) as beside:
        file.truncate(size)
        for batch in batches:
            digest.settle(next((starts[s.name] for s in batch.slots if s.name in starts), 0))
            written = dict.fromkeys((slot.name for slot in batch.slots), 0)
            for slot, tensor in batch.make():
                data = _view_bytes(tensor, slot)
                if slot.name in starts:
                    place = starts[slot.name] + written[slot.name]
                    hashed = beside.submit(digest.add, place, data)
                    file.seek(place)
                    file.write(data)
                    hashed.result()
                else:
                    inline[slot.name] = inline.get(slot.name, b"") + bytes(data)
                written[slot.name] += len(data)
            for slot in batch.slots:
                if written[slot.name] != slot.nbytes:
                    raise AssertionError(
                        f"{slot.name}: made {written[slot.name]} bytes, planned {slot.nbytes}"
                    )
        file.flush()
        os.fsync(file.fileno())
    slots = chain.from_iterable(batch.slots for batch in batches)
    protos = [_make_proto(slot, path.name, starts.get(slot.name), inline) for slot in slots]
    return protos, digest.finish(size)


def make_hollow_initializers(batches: Sequence[Batch]) -> list[Any]:
    """Make the initializers that `write_data` returns, with zeros in the place of numbers."""
    starts, _ = compute_offsets(batches)
    slots = [*chain.from_iterable(batch.slots for batch in batches)]
    inline = {slot.name: bytes(slot.nbytes) for slot in slots if slot.name not in starts}
    return [_make_proto(slot, DATA_FILE, starts.get(slot.name), inline) for slot in slots]


def _view_bytes(tensor: Tensor, slot: Slot) -> memoryview:
    """View a tensor as bytes; its dtype must be that of the slot."""
    if tensor.dtype != ONNX_DTYPES[slot.dtype][1]:
        raise AssertionError(f"{slot.name}: made {tensor.dtype}, planned {slot.dtype}")
    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)


def _make_proto(slot: Slot, location: str, start: int | None, inline: Mapping[str, bytes]) -> Any:
    """Make the ``TensorProto`` of a slot, whose data is external if it has a ``start`` there."""
    proto = TensorProto(name=slot.name, data_type=ONNX_DTYPES[slot.dtype][0], dims=slot.shape)
    if start is None:
        proto.raw_data = inline[slot.name]
    else:
        proto.data_location = TensorProto.EXTERNAL
        where = {"location": location, "offset": str(start), "length": str(slot.nbytes)}
        for key, value in where.items():
            proto.external_data.add(key=key, value=value)
    for key, value in slot.metadata.items():
        proto.metadata_props.add(key=key, value=value)
    return proto


# ---- reading back -------------------------------------------------------------------------------


def _read_data(folder: Path, tensor: str, name: str, start: int, size: int) -> Bytes:
    """Map the bytes of a tensor from the file beside a graph that it says it is in.

    Only these are mapped, so that what was read takes no memory afterwards. There are fewer if the
    file ends before.

    Raises:
        VerificationFailed: it is none that moe2edge writes, or cannot be read.
    """
    if not DATA_NAME.fullmatch(name):
        raise VerificationFailed(f"{GRAPH_FILE}: {tensor} is not in {DATA_FILE}")
    path = folder / name
    try:
        there = min(size, path.stat().st_size - start)
        if there <= 0:
            return np.empty(0, np.uint8)
        return np.memmap(path, np.uint8, "r", start, there)
    except OSError as error:
        raise VerificationFailed(str(make_read_error(path, error))) from error
    except ValueError as error:
        raise VerificationFailed(f"{path.name} cannot be read: {error}") from error


def load_graph(folder: Path) -> Any:
    """Read ``model.onnx`` of a folder as ``ModelProto``, without its external data.

    Raises:
        VerificationFailed: the file is missing or damaged.
    """
    try:
        return onnx.load(folder / GRAPH_FILE, load_external_data=False)
    except OSError as error:
        raise VerificationFailed(str(make_read_error(folder / GRAPH_FILE, error))) from error
    except DecodeError as error:
        raise VerificationFailed(f"{GRAPH_FILE} cannot be read: {error}") from error


def read_tensors(folder: Path) -> Iterator[tuple[str, Tensor | Quantized]]:
    """Yield every tensor by its name on disk, in the order of the graph, one part at a time.

    Raises:
        VerificationFailed: the files are damaged, or were not written by `write_data`.
    """
    protos = {proto.name: proto for proto in load_graph(folder).graph.initializer}
    for proto in protos.values():
        metadata = {p.key: p.value for p in proto.metadata_props}
        if PARTS_KEY not in metadata:
            continue
        parts = parse_parts(proto.name, metadata[PARTS_KEY])
        tensors = _split_tensors(proto, parts, folder)
        if SCALES_KEY not in metadata:
            yield from tensors
        else:
            yield from _read_quantized(proto.name, metadata, tensors, protos, folder)


def _read_quantized(
    owner: str,
    metadata: Mapping[str, str],
    integers: Iterator[tuple[str, Tensor]],
    protos: Mapping[str, Any],
    folder: Path,
) -> Iterator[tuple[str, Quantized]]:
    """Yield the matrices of the initializer ``owner``, whose packed ``integers`` are given."""
    parts, bits = parse_parts(owner, metadata[PARTS_KEY]), metadata.get(BITS_KEY, USUAL_BITS)
    if bits not in ("2", "3", "4", "8"):
        raise VerificationFailed(f"{GRAPH_FILE}: {owner} has {bits} bits, expected 2, 3, 4 or 8")

    def read(key: str) -> Iterator[Tensor]:
        if metadata[key] not in protos:
            raise VerificationFailed(f"{GRAPH_FILE} lacks {metadata[key]}, which {owner} needs")
        return (tensor for _, tensor in _split_tensors(protos[metadata[key]], parts, folder))

    symmetric = ZEROS_KEY not in metadata
    points: Iterator[Tensor | None] = repeat(None) if symmetric else read(ZEROS_KEY)
    for (name, packed), scales, zeros in zip(integers, read(SCALES_KEY), points, strict=False):
        if packed.dtype == torch.int8:
            q = packed.view(torch.uint8) ^ SIGN
            yield name, Quantized(q, scales.view(len(q), 1), Scheme(8, WHOLE_ROW))
            continue
        q, scales = unpack_integers(packed, int(bits)), scales.float()
        scheme = Scheme(int(bits), q.shape[1] // scales.shape[1], symmetric)
        if zeros is not None:
            zeros = unpack_bytes(zeros, int(bits), scales.shape[1])
        yield name, Quantized(q, scales, scheme, zeros)


# For each part: the rows of one tensor, and the names of its one or two tensors.
Rows = list[tuple[int, list[str]]]


def parse_parts(owner: str, text: str) -> Rows:
    """Parse the parts of the initializer ``owner``, as `_describe` encodes them."""
    try:
        parts = [(int(rows), [str(name) for name in names]) for rows, *names in json.loads(text)]
    except (ValueError, TypeError) as error:
        raise VerificationFailed(f"{GRAPH_FILE}: parts of {owner} are damaged: {error}") from error
    if not all(rows > 0 and len(names) in (1, 2) for rows, names in parts):
        raise VerificationFailed(f"{GRAPH_FILE}: parts of {owner} are damaged: {text[:80]}")
    return parts


def _split_tensors(proto: Any, parts: Rows, folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of an initializer: vectors if it is a vector, matrices otherwise."""
    raw, dtype = _read_raw(proto, folder)
    rows = sum(count * len(names) for count, names in parts)
    if raw.size % rows:
        raise VerificationFailed(
            f"{GRAPH_FILE}: {proto.name} does not hold the {rows} rows of its parts"
        )
    stride, start = raw.size // rows, 0
    for count, names in parts:
        end = start + count * len(names) * stride
        # A copy, because torch needs writable memory.
        flat = torch.from_numpy(np.array(raw[start:end])).view(dtype)
        both = flat if len(proto.dims) == 1 else flat.view(count * len(names), -1)
        yield from zip(names, deinterleave(both) if len(names) == 2 else (both,), strict=True)
        start = end


def _read_raw(proto: Any, folder: Path) -> tuple[Bytes, torch.dtype]:
    """Return the bytes of an initializer, mapped from disk if external, and its dtype."""
    dtypes = dict(ONNX_DTYPES.values())
    if proto.data_type not in dtypes:
        raise VerificationFailed(
            f"{GRAPH_FILE}: {proto.name} has data type {proto.data_type}, which moe2edge does not "
            "write; export it again"
        )
    dtype = dtypes[proto.data_type]
    size = math.prod(proto.dims) * dtype.itemsize
    raw = np.frombuffer(proto.raw_data, np.uint8)
    if proto.data_location == TensorProto.EXTERNAL:
        where = {entry.key: entry.value for entry in proto.external_data}
        offset = where.get("offset", "0")
        if not offset.isdecimal():
            raise VerificationFailed(f"{GRAPH_FILE}: {proto.name} is not in {DATA_FILE}")
        raw = _read_data(folder, proto.name, where.get("location", ""), int(offset), size)
    if raw.size != size:
        raise VerificationFailed(
            f"{GRAPH_FILE} or {DATA_FILE} is cut short: {proto.name} has {raw.size} bytes of {size}"
        )
    return raw, dtype


def read_values(folder: Path, model: Any, name: str) -> Tensor:
    """Read the initializer ``name`` of a graph, as `load_graph` returned it, in its own shape.

    Raises:
        VerificationFailed: the graph has no such initializer, or the files are damaged.
    """
    proto = next((proto for proto in model.graph.initializer if proto.name == name), None)
    if proto is None:
        raise VerificationFailed(f"{GRAPH_FILE} lacks {name}; export it again")
    raw, dtype = _read_raw(proto, folder)
    return torch.from_numpy(np.array(raw)).view(dtype).view(tuple(proto.dims))
