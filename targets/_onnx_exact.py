"""The graph of a folder, changed so that its cache, or all that is rounded, is float32.

For ``MatMulNBits`` and ``QMoE`` of 4 bits, accuracy level 0 does that. ``QMoE`` of 8 bits rounds
activations to int8 unless an environment variable is set when the session opens. ``QMoE`` of 2 bits
uses lookup tables of int8 products if the group size is a multiple of 32
(https://github.com/microsoft/onnxruntime, ``moe_quantization_cpu.cc``). So groups of 2 bits are
split into groups of 16 here, each with the scale and the zero point of the group it is a part of:
the weights are the same, but the operator takes its slower float32 path. Experts of 3 bits take
activations in float16 only; their integers become integers of 4 bits, in memory.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx import TensorProto, helper, numpy_helper

from moe2edge.numerics.packing import pack_bytes, unpack_bytes
from moe2edge.targets._onnx_block import INT8_CACHE
from moe2edge.targets._onnx_storage import (
    HALF_BITS,
    ROTARY_TABLES,
    Array,
    load_graph,
    read_values,
    unpack_integers,
)

# Environment variable that selects the kernels of QMoE; it is read when a session opens.
EXPERT_KERNELS = "ORT_QMOE_CPU_QNBIT_GEMM"
# Experts of this many bits are computed by lookup tables.
REWRITTEN_BITS = 2
# The lookup tables need group sizes that this divides; the operator takes sizes from half of it.
TABLE_GROUP = 32
SMALL_GROUP = 16
# Bits that experts which take float16 only are computed with, and how far the zero points, which
# are the middles, are apart.
WIDE_BITS = 4
ZERO_POINTS_APART = (1 << WIDE_BITS - 1) - (1 << HALF_BITS - 1)
# Positions among the inputs of QMoE, for its first and its second matrix.
QMOE_INTEGERS, QMOE_SCALES, QMOE_ZEROS = (2, 5), (3, 6), (11, 12)
# Inputs of GroupQueryAttention without the scales of its cache, and the blanks before them.
UNSCALED = 9


@contextmanager
def use_float_experts() -> Iterator[None]:
    """Make experts of 8 bits use float32 activations in sessions that are opened inside."""
    before = os.environ.get(EXPERT_KERNELS)
    os.environ[EXPERT_KERNELS] = "fp32"
    try:
        yield
    finally:
        if before is None:
            del os.environ[EXPERT_KERNELS]
        else:
            os.environ[EXPERT_KERNELS] = before


def convert_to_float(
    folder: Path, data_files: Mapping[str, str], *, activations: bool = True
) -> tuple[bytes, dict[str, Array]]:
    """Return the graph of a folder, serialized, with a float32 cache, and tensors that are new.

    Args:
        folder: holds the graph.
        data_files: names of the files that the weights stay in, by those in the graph.
        activations: make all activations float32 as well.

    Returns:
        The graph, and numbers in place of those in the file, by the names of initializers.

    Raises:
        VerificationFailed: the files are damaged.
    """
    model, new = load_graph(folder), dict[str, Array]()
    _widen_cache(model.graph)
    if activations:
        for attribute in _attributes(model.graph):
            if attribute.name == "accuracy_level":
                attribute.i = 0
        _split_groups(model.graph)
        _expose_rotary_tables(model.graph)
        new = _widen_experts(folder, model)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = data_files.get(entry.value, entry.value)
    return model.SerializeToString(), new


def _widen_cache(graph: Any) -> None:
    """Let attention cache keys and values in float32."""
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type == TensorProto.INT8:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    for node in graph.node:
        if node.op_type == "GroupQueryAttention":
            del node.input[UNSCALED:]
            kept = [each for each in node.attribute if each.name not in INT8_CACHE]
            del node.attribute[:]
            node.attribute.extend(kept)


def _widen_experts(folder: Path, model: Any) -> dict[str, Array]:
    """Turn experts of 3 bits with float16 activations into such of 4 bits with float32 ones.

    Returns:
        Their integers, but those that are small enough for the graph.
    """
    initializers = {proto.name: proto for proto in model.graph.initializer}
    found: dict[str, Array] = {}
    for node in model.graph.node:
        attributes = {attribute.name: attribute for attribute in node.attribute}
        if node.op_type == "Cast" and attributes["to"].i == TensorProto.FLOAT16:
            attributes["to"].i = TensorProto.FLOAT
        if node.op_type != "QMoE" or attributes["expert_weight_bits"].i != HALF_BITS:
            continue
        attributes["expert_weight_bits"].i = WIDE_BITS
        for name in (node.input[place] for place in QMOE_INTEGERS):
            proto, wide = initializers[name], []
            for packed in read_values(folder, model, name):
                q = unpack_integers(packed, HALF_BITS) + ZERO_POINTS_APART
                wide.append(pack_bytes(q, WIDE_BITS))
            numbers = torch.stack(wide).numpy()
            proto.dims[:] = numbers.shape
            if proto.external_data:
                found[name] = numbers
            else:
                proto.raw_data = numbers.tobytes()
    return found


def _expose_rotary_tables(graph: Any) -> None:
    """Make the rotary tables inputs with a default, so that a run may replace them."""
    for proto in graph.initializer:
        if proto.name in ROTARY_TABLES:
            shape = [None, proto.dims[1]]
            graph.input.append(helper.make_tensor_value_info(proto.name, proto.data_type, shape))


def _attributes(graph: Any) -> Iterator[Any]:
    """Yield the attributes of all nodes, including those in branches."""
    for node in graph.node:
        for attribute in node.attribute:
            yield attribute
            yield from _attributes(attribute.g)


def _split_groups(graph: Any) -> None:
    """Split the groups of experts of 2 bits that would be computed by lookup tables."""
    shapes = {proto.name: tuple(proto.dims) for proto in graph.initializer}
    added: list[Any] = []
    for node in graph.node:
        attributes = {attribute.name: attribute for attribute in node.attribute}
        if node.op_type != "QMoE" or attributes["expert_weight_bits"].i != REWRITTEN_BITS:
            continue
        group_size = attributes["block_size"]
        if group_size.i % TABLE_GROUP:
            continue
        pieces = group_size.i // SMALL_GROUP
        group_size.i = SMALL_GROUP
        groups = {place: shapes[node.input[place]][-1] for place in QMOE_SCALES}
        for place, count in groups.items():
            added += _repeat_scales(graph, node, place, count, pieces)
        for place, count in zip(QMOE_ZEROS, groups.values(), strict=True):
            if place < len(node.input) and node.input[place]:
                shape = shapes[node.input[place]]
                added += _repeat_zeros(graph, node, place, shape, count, pieces)
    nodes = [*added, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


def _repeat_scales(graph: Any, user: Any, place: int, groups: int, pieces: int) -> list[Any]:
    """Make a node that repeats each scale of an input [..., groups] for the pieces of its group."""
    name = user.input[place]
    user.input[place] = f"{name}/repeated"
    each = _add_constant(graph, f"{name}/each", np.arange(groups).repeat(pieces))
    return [helper.make_node("Gather", [name, each], [user.input[place]], axis=-1)]


def _repeat_zeros(
    graph: Any, user: Any, place: int, shape: tuple[int, ...], groups: int, pieces: int
) -> list[Any]:
    """Make nodes that repeat zero points, of which a byte holds four, by a table of bytes."""
    name = user.input[place]
    user.input[place] = f"{name}/repeated"
    unpacked = unpack_bytes(torch.arange(256, dtype=torch.uint8)[:, None], REWRITTEN_BITS)
    table = pack_bytes(unpacked.repeat_interleave(pieces, dim=1), REWRITTEN_BITS).numpy()
    bytes_ = np.arange(-(-groups * pieces * REWRITTEN_BITS // 8))
    last = np.array([*shape[:-1], shape[-1] * pieces])
    return [
        helper.make_node("Cast", [name], [f"{name}/index"], to=TensorProto.INT32),
        helper.make_node(
            "Gather",
            [_add_constant(graph, f"{name}/table", table), f"{name}/index"],
            [f"{name}/bytes"],
        ),
        helper.make_node(
            "Reshape",
            [f"{name}/bytes", _add_constant(graph, f"{name}/shape", last)],
            [f"{name}/all"],
        ),
        helper.make_node(
            "Gather",
            [f"{name}/all", _add_constant(graph, f"{name}/kept", bytes_)],
            [user.input[place]],
            axis=-1,
        ),
    ]


def _add_constant(graph: Any, name: str, value: np.ndarray[Any, Any]) -> str:
    """Add an initializer and return its name."""
    graph.initializer.append(numpy_helper.from_array(value, name))
    return name
