"""The graph of a folder with float32 activations throughout, whatever it allows.

Accuracy level 0 does it for ``MatMulNBits`` and for ``QMoE`` of 4 bits. ``QMoE`` of 8 bits rounds
activations to int8 unless an environment variable says otherwise when the session opens; that of 2
bits looks products up in tables of int8 wherever groups are multiples of 32
(https://github.com/microsoft/onnxruntime, ``moe_quantization_cpu.cc``). So groups of 2 bits are
taken as groups of 16 here, each with the scale and the zero point of the group it is a part of:
the same numbers, computed in the operator's slow way.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx import TensorProto, helper, numpy_helper

from moe2edge.numerics.packing import pack_bytes, unpack_bytes
from moe2edge.targets._onnx_storage import load_graph

# Of QMoE: which kernels experts may use. It is read when a session opens.
EXPERT_KERNELS = "ORT_QMOE_CPU_QNBIT_GEMM"
# Of experts that are computed by a table.
REWRITTEN_BITS = 2
# The table kernel wants groups that this divides; the operator takes groups from half of it.
TABLE_GROUP = 32
SMALL_GROUP = 16
QMOE_SCALES, QMOE_ZEROS = (
    (3, 6),
    (11, 12),
)  # among the inputs of QMoE, of its first and second matrix


@contextmanager
def use_float_experts() -> Iterator[None]:
    """While a session opens: experts of 8 bits compute with float32 activations."""
    before = os.environ.get(EXPERT_KERNELS)
    os.environ[EXPERT_KERNELS] = "fp32"
    try:
        yield
    finally:
        if before is None:
            del os.environ[EXPERT_KERNELS]
        else:
            os.environ[EXPERT_KERNELS] = before


def convert_to_float_activations(folder: Path, data_file: str) -> bytes:
    """The graph of a folder, changed so; its weights stay in the file ``data_file``.

    Raises:
        VerificationFailed: the files are damaged.
    """
    model = load_graph(folder)
    for attribute in _attributes(model.graph):
        if attribute.name == "accuracy_level":
            attribute.i = 0
    _split_groups(model.graph)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = data_file
    data: bytes = model.SerializeToString()
    return data


def _attributes(graph: Any) -> Iterator[Any]:
    """Of all nodes, those in branches too."""
    for node in graph.node:
        for attribute in node.attribute:
            yield attribute
            yield from _attributes(attribute.g)


def _split_groups(graph: Any) -> None:
    """Give experts of 2 bits groups of `SMALL_GROUP` where the table kernel would take them."""
    shapes = {proto.name: tuple(proto.dims) for proto in graph.initializer}
    added: list[Any] = []
    for node in graph.node:
        known = {attribute.name: attribute for attribute in node.attribute}
        if node.op_type != "QMoE" or known["expert_weight_bits"].i != REWRITTEN_BITS:
            continue
        if known["block_size"].i % TABLE_GROUP:
            continue
        pieces = known["block_size"].i // SMALL_GROUP
        known["block_size"].i = SMALL_GROUP
        groups = {place: shapes[node.input[place]][-1] for place in QMOE_SCALES}
        for place, count in groups.items():
            added += _repeated_scales(graph, node, place, count, pieces)
        for place, count in zip(QMOE_ZEROS, groups.values(), strict=True):
            if place < len(node.input) and node.input[place]:
                shape = shapes[node.input[place]]
                added += _repeated_zeros(graph, node, place, shape, count, pieces)
    nodes = [*added, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


def _repeated_scales(graph: Any, user: Any, place: int, groups: int, pieces: int) -> list[Any]:
    """A node that repeats each scale of an input [..., groups] as often as a group has pieces."""
    name = user.input[place]
    user.input[place] = f"{name}/repeated"
    each = _constant(graph, f"{name}/each", np.arange(groups).repeat(pieces))
    return [helper.make_node("Gather", [name, each], [user.input[place]], axis=-1)]


def _repeated_zeros(
    graph: Any, user: Any, place: int, shape: tuple[int, ...], groups: int, pieces: int
) -> list[Any]:
    """Nodes that do the same to zero points, which stand in bytes of four: by a table of bytes."""
    name = user.input[place]
    user.input[place] = f"{name}/repeated"
    whole = unpack_bytes(torch.arange(256, dtype=torch.uint8)[:, None], REWRITTEN_BITS)
    table = pack_bytes(whole.repeat_interleave(pieces, dim=1), REWRITTEN_BITS).numpy()
    bytes_ = np.arange(-(-groups * pieces * REWRITTEN_BITS // 8))
    last = np.array([*shape[:-1], shape[-1] * pieces])
    return [
        helper.make_node("Cast", [name], [f"{name}/index"], to=TensorProto.INT32),
        helper.make_node(
            "Gather", [_constant(graph, f"{name}/table", table), f"{name}/index"], [f"{name}/bytes"]
        ),
        helper.make_node(
            "Reshape", [f"{name}/bytes", _constant(graph, f"{name}/shape", last)], [f"{name}/all"]
        ),
        helper.make_node(
            "Gather",
            [f"{name}/all", _constant(graph, f"{name}/kept", bytes_)],
            [user.input[place]],
            axis=-1,
        ),
    ]


def _constant(graph: Any, name: str, value: np.ndarray[Any, Any]) -> str:
    """Add an initializer; its name."""
    graph.initializer.append(numpy_helper.from_array(value, name))
    return name
