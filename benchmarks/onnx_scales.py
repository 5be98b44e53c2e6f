"""Bytes of the experts in the graphs of folders, and what they would be with float32 scales.

``moe2edge export builtin:tiny-moe -t onnx --set gptq.group_size=32 -o out``, then
``python benchmarks/onnx_scales.py out``.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

from moe2edge.targets._onnx_storage import ONNX_DTYPES, load_graph

SIZES = {number: dtype.itemsize for number, dtype in ONNX_DTYPES.values()}
# Places among the inputs of QMoE: of its two matrices, their scales and zero points.
SCALES, OTHERS = (3, 6), (2, 5, 11, 12)


def main() -> None:
    """Print a line for each folder that is named."""
    for name in sys.argv[1:]:
        graph = load_graph(Path(name)).graph
        tensors = {tensor.name: tensor for tensor in graph.initializer}
        now = wide = 0
        for node in graph.node:
            for place in (*SCALES, *OTHERS) if node.op_type == "QMoE" else ():
                if place < len(node.input) and node.input[place]:
                    tensor = tensors[node.input[place]]
                    size = SIZES[tensor.data_type]
                    now += math.prod(tensor.dims) * size
                    wide += math.prod(tensor.dims) * (4 if place in SCALES else size)
        print(f"{name}: {now / 1e6:.3f} MB; with float32 scales {wide / 1e6:.3f} MB")


if __name__ == "__main__":
    main()
