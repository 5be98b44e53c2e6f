#!/bin/sh
# onnxruntime: of equal router scores, the MoE operator takes the highest row, TopK the lowest.
#
# Upcycled models have experts with equal router rows. Which of them run is then decided by how a
# runtime breaks ties. One would expect that a runtime does so in one way. Seen with onnxruntime
# 1.31.1 on a CPU (numpy 2.4, onnx 1.21): com.microsoft.MoE with k = 2 and four equal scores takes
# experts 3 and 2; ONNX TopK, which an unfused graph of the same router uses, takes 0 and 1.
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet onnxruntime==1.31.1 "onnx>=1.21,<2" numpy
"$place/venv/bin/python" - <<'P'
import sys

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

EXPERTS, HIDDEN, WIDTH = 4, 8, 8


def run(node, inputs, outputs, initializers, feeds):
    """Run a graph of one node."""
    graph = helper.make_graph([node], "g", inputs, outputs, initializers)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def value(name, shape, kind=TensorProto.FLOAT):
    return helper.make_tensor_value_info(name, kind, shape)


scores = np.zeros((1, EXPERTS), np.float32)
node = helper.make_node("TopK", ["scores", "k"], ["values", "ids"], axis=-1)
k = numpy_helper.from_array(np.array([2], np.int64), "k")
outputs = [value("values", [1, 2]), value("ids", [1, 2], TensorProto.INT64)]
_, ids = run(node, [value("scores", [1, EXPERTS])], outputs, [k], {"scores": scores})
by_top_k = sorted(ids[0].tolist())

# Expert n adds 10 ** n to the output: its second bias tells that it ran.
zero = np.zeros((EXPERTS, WIDTH, HIDDEN), np.float32)
arrays = {
    "w1": zero,
    "b1": np.zeros((EXPERTS, WIDTH), np.float32),
    "w2": np.zeros((EXPERTS, HIDDEN, WIDTH), np.float32),
    "b2": np.repeat(10.0 ** np.arange(EXPERTS, dtype=np.float32)[:, None], HIDDEN, 1),
}
node = helper.make_node(
    "MoE", ["x", "scores", "w1", "b1", "w2", "b2"], ["y"], domain="com.microsoft",
    k=2, activation_type="relu", normalize_routing_weights=1,
)
inputs = [value("x", [1, HIDDEN]), value("scores", [1, EXPERTS])]
held = [numpy_helper.from_array(array.astype(np.float32), name) for name, array in arrays.items()]
feeds = {"x": np.ones((1, HIDDEN), np.float32), "scores": scores}
(y,) = run(node, inputs, [value("y", [1, HIDDEN])], held, feeds)
total = 2 * float(y[0, 0])  # each of the two has weight one half
by_moe = [n for n in range(EXPERTS) if int(total / 10**n) % 10]

print("onnxruntime", ort.__version__, "onnx", onnx.__version__)
print("  four equal scores, k = 2: TopK takes", by_top_k, "- MoE takes", by_moe)
sys.exit((by_top_k, by_moe) != ([0, 1], [2, 3]))
P
