"""What the targets that write safetensors share: planning a file and its size."""

from __future__ import annotations

import json
from collections.abc import Iterable

from moe2edge.checkpoint import Planned
from moe2edge.model import Model, MoELayer, Weight


def plain(name: str, weight: Weight) -> Planned:
    """A tensor that is written as it is in the source."""
    return Planned(name, weight.shape, weight.dtype, weight.load)


def file_nbytes(tensors: Iterable[Planned]) -> int:
    """Bytes of the safetensors file that will hold ``tensors``, with its header.

    In small models the header counts: a GPTQ checkpoint has four tensors per matrix.
    """
    data = header = 0
    for t in tensors:
        offsets = [data, data + t.nbytes]
        entry = {t.name: {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": offsets}}
        header += len(json.dumps(entry, separators=(",", ":"))) - 1
        data += t.nbytes
    return data + header


def has_dense_blocks(model: Model) -> bool:
    """Whether some block has a dense MLP where others have an MoE layer."""
    return any(not isinstance(block.mlp, MoELayer) for block in model.blocks)
