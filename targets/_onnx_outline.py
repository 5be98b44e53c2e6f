"""The model of an ONNX graph: shapes and bytes of its tensors, without their numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe2edge.errors import VerificationFailed
from moe2edge.model.model import Model
from moe2edge.model.weights import HeldWeight, Weight
from moe2edge.storage.output import build_stored_model
from moe2edge.storage.text_files import read_json
from moe2edge.targets._onnx_storage import (
    GRAPH_FILE,
    ONNX_DTYPES,
    PARTS_KEY,
    SCALES_KEY,
    ZEROS_KEY,
    load_graph,
    parse_parts,
)

if TYPE_CHECKING:
    from torch import Tensor

_ITEMS = {kind: dtype.itemsize for kind, dtype in ONNX_DTYPES.values()}


def outline_graph(folder: Path, place: Path) -> Model:
    """Return the model of a folder, whose weights have the bytes of the initializers.

    Args:
        folder: folder of the config.
        place: folder of the graph.

    Raises:
        VerificationFailed: the graph is damaged, or lacks a tensor of the config.
    """
    protos = {proto.name: proto for proto in load_graph(place).graph.initializer}
    held: dict[str, int] = {}
    for proto in protos.values():
        metadata = {p.key: p.value for p in proto.metadata_props}
        if PARTS_KEY in metadata:
            held |= _divide_bytes(proto, metadata, protos)

    def take(name: str, shape: tuple[int, ...] | None) -> Weight:
        if name not in held:
            raise VerificationFailed(f"{GRAPH_FILE} lacks {name}; export it again")

        def load() -> Tensor:
            raise AssertionError(f"{name} is an outline and has no numbers")

        return HeldWeight(name, shape or (), "F32", load, held=held[name])

    return build_stored_model(read_json(folder / "config.json"), take, held)


def _divide_bytes(
    proto: Any, metadata: Mapping[str, str], protos: Mapping[str, Any]
) -> dict[str, int]:
    """Divide the bytes of an initializer, with its scales and zero points, by their rows."""
    beside = [metadata[key] for key in (SCALES_KEY, ZEROS_KEY) if key in metadata]
    if missing := [name for name in beside if name not in protos]:
        raise VerificationFailed(f"{GRAPH_FILE} lacks {missing[0]}, which {proto.name} needs")
    total = sum(_count_bytes(one) for one in (proto, *(protos[name] for name in beside)))
    parts = parse_parts(proto.name, metadata[PARTS_KEY])
    rows = sum(count * len(names) for count, names in parts)
    return {name: total * count // rows for count, names in parts for name in names}


def _count_bytes(proto: Any) -> int:
    dims: Sequence[int] = proto.dims
    return math.prod(dims) * _ITEMS.get(proto.data_type, 1)
