"""Weights of an ONNX graph: planned from shapes, streamed into one data file, read back.

An initializer holds one or more tensors of the checkpoint, row after row or with rows alternating;
which ones is recorded in its ``metadata_props``, so that a folder can be read back without the
model it was made from.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from moe2edge.numerics.grid import Quantized
from moe2edge.numerics.packing import deinterleave, interleave, pack_bytes, unpack_bytes
from moe2edge.numerics.scheme import WHOLE_ROW, Scheme

GRAPH_FILE = "model.onnx"
DATA_FILE = "model.onnx.data"
# Our keys among the metadata of the graph (positions) and of its initializers.
POSITIONS_KEY = "moe2edge.max_positions"
PARTS_KEY = "moe2edge.parts"
SCALES_KEY = "moe2edge.scales"
ZEROS_KEY = "moe2edge.zeros"
BITS_KEY = "moe2edge.bits"
# Of files without it, which are older than other numbers of bits.
USUAL_BITS = "4"
# Smaller tensors stay inside the graph file, where shape inference can see them.
INLINE_BYTES = 1024
# Tensors of many pages start on one, so that a runtime can map them.
PAGE, MANY_PAGES, ALIGNMENT = 4096, 1 << 16, 64

# Per dtype as safetensors spells it: ONNX's number, torch's dtype.
ONNX_DTYPES: Mapping[str, tuple[int, torch.dtype]] = {
    "F64": (TensorProto.DOUBLE, torch.float64),
    "F32": (TensorProto.FLOAT, torch.float32),
    "BF16": (TensorProto.BFLOAT16, torch.bfloat16),
    "F16": (TensorProto.FLOAT16, torch.float16),
    "U8": (TensorProto.UINT8, torch.uint8),
    "I8": (TensorProto.INT8, torch.int8),
}
# Of integers with 128 for zero, what makes them signed.
SIGN = 0x80


@dataclass(frozen=True)
class Source:
    """A weight and its name on disk."""

    name: str
    weight: Weight


Bytes = np.ndarray[Any, np.dtype[np.uint8]]
# Tensors that stand together: one, or two whose rows alternate. All parts of an initializer
# follow each other.
DataPart = tuple[Source, ...]


@dataclass(frozen=True)
class Slot:
    """An initializer: what it is called, its dtype as safetensors spells it, its shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of its numbers."""
        return math.prod(self.shape) * ONNX_DTYPES[self.dtype][1].itemsize


@dataclass(frozen=True)
class Batch:
    """Initializers that are filled together.

    Attributes:
        slots: the initializers.
        make: yields what comes next in which slot; together it fills all of them.
    """

    slots: tuple[Slot, ...]
    make: Callable[[], Iterator[tuple[Slot, Tensor]]]


# ---- planning -----------------------------------------------------------------------------------


def make_plain_initializer(name: str, parts: Sequence[DataPart], shape: tuple[int, ...]) -> Batch:
    """One initializer of ``shape`` with the numbers of ``parts`` as they are in the checkpoint."""
    slot = Slot(name, parts[0][0].weight.dtype, shape, {PARTS_KEY: _describe(parts)})

    def make() -> Iterator[tuple[Slot, Tensor]]:
        for part in parts:
            yield slot, _join([source.weight.load() for source in part])

    return Batch((slot,), make)


def make_quantized_initializers(
    name: str, parts: Sequence[DataPart], shape: tuple[int, ...], *, blocked: bool
) -> Batch:
    """Initializers for quantized ``parts``: integers, float32 scales, zero points if there are any.

    Args:
        name: of the matrix; ``.weight`` becomes ``.qweight``, ``.scales`` and ``.zeros``.
        parts: quantized matrices of one scheme.
        shape: of the numbers they stand for, [..., out, in].
        blocked: whether integers are [..., out, groups, bytes] as in ``MatMulNBits``, or
            [..., out, bytes] as in ``QMoE``; the bytes are the same. Zero points are packed along
            groups, [..., out, bytes].
    """
    scheme = parts[0][0].weight.scheme
    assert scheme is not None
    *lead, ins = shape
    groups, per_byte = scheme.groups(ins), 8 // scheme.bits
    last = (groups, scheme.group_size // per_byte) if blocked else (ins // per_byte,)
    stem = name.removesuffix(".weight")
    scales = Slot(f"{stem}.scales", "F32", (*lead, groups))
    zeros = Slot(f"{stem}.zeros", "U8", (*lead, -(-groups // per_byte)))
    metadata = {PARTS_KEY: _describe(parts), SCALES_KEY: scales.name, BITS_KEY: str(scheme.bits)}
    if not scheme.symmetric:
        metadata[ZEROS_KEY] = zeros.name
    integers = Slot(f"{stem}.qweight", "U8", (*lead, *last), metadata)

    def make() -> Iterator[tuple[Slot, Tensor]]:
        for part in parts:
            numbers = [source.weight.quantized() for source in part]
            yield integers, pack_bytes(_join([n.q for n in numbers]), scheme.bits)
            yield scales, _join([n.scales for n in numbers])
            if not scheme.symmetric:
                points = [n.zeros for n in numbers if n.zeros is not None]
                yield zeros, pack_bytes(_join(points), scheme.bits)

    slots = (integers, scales) if scheme.symmetric else (integers, scales, zeros)
    return Batch(slots, make)


def make_per_channel_initializers(
    name: str, parts: Sequence[DataPart], shape: tuple[int, ...]
) -> Batch:
    """Initializers for matrices of 8 bits with a scale for each row, as ``DequantizeLinear`` wants.

    Args:
        name: what ``.qweight`` (int8) and ``.scales`` (float32) follow.
        parts: such matrices.
        shape: of the numbers they stand for, [..., out, in]; scales are [..., out].
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
    """What `_parts` reads: of each part the rows of one tensor, and the names."""
    return json.dumps([[part[0].weight.shape[0], *(s.name for s in part)] for part in parts])


def _join(tensors: list[Tensor]) -> Tensor:
    return interleave(*tensors) if len(tensors) == 2 else tensors[0]


def compute_offsets(batches: Sequence[Batch]) -> tuple[dict[str, int], int]:
    """Where each initializer starts in the data file, without the small ones; its size."""
    found: dict[str, int] = {}
    end = 0
    for slot in chain.from_iterable(batch.slots for batch in batches):
        if slot.nbytes < INLINE_BYTES:
            continue
        alignment = PAGE if slot.nbytes >= MANY_PAGES else ALIGNMENT
        found[slot.name] = -(-end // alignment) * alignment
        end = found[slot.name] + slot.nbytes
    return found, end


# ---- writing ------------------------------------------------------------------------------------


def write_data(batches: Sequence[Batch], path: Path) -> list[Any]:
    """Stream all numbers into ``path``; the initializers that refer to it, as ``TensorProto``.

    Never more than one part (an expert's gate and up) is in memory.
    """
    starts, size = compute_offsets(batches)
    inline: dict[str, bytes] = {}
    with path.open("wb") as file:
        file.truncate(size)
        for batch in batches:
            done = dict.fromkeys((slot.name for slot in batch.slots), 0)
            for slot, tensor in batch.make():
                data = _bytes(tensor, slot)
                if slot.name in starts:
                    file.seek(starts[slot.name] + done[slot.name])
                    file.write(data)
                else:
                    inline[slot.name] = inline.get(slot.name, b"") + bytes(data)
                done[slot.name] += len(data)
            for slot in batch.slots:
                if done[slot.name] != slot.nbytes:
                    raise AssertionError(
                        f"{slot.name}: made {done[slot.name]} bytes, planned {slot.nbytes}"
                    )
        file.flush()
        os.fsync(file.fileno())
    slots = chain.from_iterable(batch.slots for batch in batches)
    return [_proto(slot, path.name, starts.get(slot.name), inline) for slot in slots]


def _bytes(tensor: Tensor, slot: Slot) -> memoryview:
    if tensor.dtype != ONNX_DTYPES[slot.dtype][1]:
        raise AssertionError(f"{slot.name}: made {tensor.dtype}, planned {slot.dtype}")
    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)


def _proto(slot: Slot, location: str, start: int | None, inline: Mapping[str, bytes]) -> Any:
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


def load_graph(folder: Path) -> Any:
    """``model.onnx`` of a folder as ``ModelProto``, without its external data.

    Raises:
        VerificationFailed: there is none, or it is damaged.
    """
    try:
        return onnx.load(folder / GRAPH_FILE, load_external_data=False)
    except (OSError, DecodeError) as error:
        raise VerificationFailed(f"{GRAPH_FILE} cannot be read: {error}") from error


def read_tensors(folder: Path) -> Iterator[tuple[str, Tensor | Quantized]]:
    """Every tensor by its name on disk, in the order of the graph, one part at a time.

    Raises:
        VerificationFailed: the files are damaged, or were not written by `write_data`.
    """
    protos = {proto.name: proto for proto in load_graph(folder).graph.initializer}
    data = _map(folder / DATA_FILE)
    for proto in protos.values():
        known = {p.key: p.value for p in proto.metadata_props}
        if PARTS_KEY not in known:
            continue
        parts = _parts(proto.name, known[PARTS_KEY])
        numbers = _tensors(proto, parts, data)
        if SCALES_KEY not in known:
            yield from numbers
        else:
            yield from _quantized(proto.name, known, numbers, protos, data)


def _quantized(
    owner: str,
    known: Mapping[str, str],
    numbers: Iterator[tuple[str, Tensor]],
    protos: Mapping[str, Any],
    data: Bytes,
) -> Iterator[tuple[str, Quantized]]:
    """Matrices of the initializer ``owner``, whose packed ``numbers`` are given."""
    parts, bits = _parts(owner, known[PARTS_KEY]), known.get(BITS_KEY, USUAL_BITS)
    if bits not in ("2", "4", "8"):
        raise VerificationFailed(f"{GRAPH_FILE}: {owner} has {bits} bits, expected 2, 4 or 8")

    def beside(key: str) -> Iterator[Tensor]:
        if known[key] not in protos:
            raise VerificationFailed(f"{GRAPH_FILE} lacks {known[key]}, which {owner} needs")
        return (tensor for _, tensor in _tensors(protos[known[key]], parts, data))

    symmetric = ZEROS_KEY not in known
    points: Iterator[Tensor | None] = repeat(None) if symmetric else beside(ZEROS_KEY)
    for (name, packed), scales, zeros in zip(numbers, beside(SCALES_KEY), points, strict=False):
        if packed.dtype == torch.int8:
            q = packed.view(torch.uint8) ^ SIGN
            yield name, Quantized(q, scales.view(len(q), 1), Scheme(8, WHOLE_ROW))
            continue
        q = unpack_bytes(packed, int(bits))
        scheme = Scheme(int(bits), q.shape[1] // scales.shape[1], symmetric)
        if zeros is not None:
            zeros = unpack_bytes(zeros, int(bits), scales.shape[1])
        yield name, Quantized(q, scales, scheme, zeros)


Rows = list[tuple[int, list[str]]]


def _parts(owner: str, text: str) -> Rows:
    """Rows of one tensor, and names, of each part."""
    try:
        parts = [(int(rows), [str(name) for name in names]) for rows, *names in json.loads(text)]
    except (ValueError, TypeError) as error:
        raise VerificationFailed(f"{GRAPH_FILE}: parts of {owner} are damaged: {error}") from error
    if not all(rows > 0 and len(names) in (1, 2) for rows, names in parts):
        raise VerificationFailed(f"{GRAPH_FILE}: parts of {owner} are damaged: {text[:80]}")
    return parts


def _tensors(proto: Any, parts: Rows, data: Bytes) -> Iterator[tuple[str, Tensor]]:
    """The tensors of an initializer: matrices, or vectors where it is one."""
    raw, dtype = _raw(proto, data)
    rows = sum(count * len(names) for count, names in parts)
    if raw.size % rows:
        raise VerificationFailed(
            f"{GRAPH_FILE}: {proto.name} does not hold the {rows} rows of its parts"
        )
    stride, start = raw.size // rows, 0
    for count, names in parts:
        end = start + count * len(names) * stride
        # A copy, because torch wants memory that it may write to.
        flat = torch.from_numpy(np.array(raw[start:end])).view(dtype)
        both = flat if len(proto.dims) == 1 else flat.view(count * len(names), -1)
        yield from zip(names, deinterleave(both) if len(names) == 2 else (both,), strict=True)
        start = end


def _raw(proto: Any, data: Bytes) -> tuple[Bytes, torch.dtype]:
    """Bytes of an initializer, still on disk if they are external; its dtype."""
    dtypes = dict(ONNX_DTYPES.values())
    if proto.data_type not in dtypes:
        raise VerificationFailed(
            f"{GRAPH_FILE}: {proto.name} has data type {proto.data_type}, which is not ours"
        )
    dtype = dtypes[proto.data_type]
    size = math.prod(proto.dims) * dtype.itemsize
    raw = np.frombuffer(proto.raw_data, np.uint8)
    if proto.data_location == TensorProto.EXTERNAL:
        where = {entry.key: entry.value for entry in proto.external_data}
        if where.get("location") != DATA_FILE or not where.get("offset", "0").isdecimal():
            raise VerificationFailed(f"{GRAPH_FILE}: {proto.name} is not in {DATA_FILE}")
        start = int(where.get("offset", "0"))
        raw = data[start : start + size]
    if raw.size != size:
        raise VerificationFailed(
            f"{GRAPH_FILE} or {DATA_FILE} is cut short: {proto.name} has {raw.size} bytes of {size}"
        )
    return raw, dtype


def _map(path: Path) -> Bytes:
    try:
        return np.memmap(path, np.uint8, mode="r")
    except (OSError, ValueError) as error:
        raise VerificationFailed(f"{path.name} cannot be read: {error}") from error
