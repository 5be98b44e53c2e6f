#!/bin/sh
# onnxruntime 1.30: QMoE with zero points computes noise where a row of the second matrix is one group.
#
# One would expect that asymmetric experts are right with any block_size that the operator takes. Seen
# with onnxruntime 1.30.0 on a CPU (the newest on npm, where onnxruntime-web does the same; numpy 2,
# onnx 1.23), against the product with the dequantized integers: 4 bits, 32 inputs of fc2 in groups of
# 16 are right, in one group of 32 they are noise, without an error. 8 bits are right, and so is 4 bits
# without zero points. In onnxruntime 1.31.1 all are right.
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
cat > "$place/try.py" <<'P'
import sys

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

EXPERTS, HIDDEN, WIDTH = 2, 64, 32
draw = np.random.default_rng(0)


def pack(q, bits):
    """Pack integers along the last axis, the first in the lowest bits; pad with zeros."""
    per = 8 // bits
    pad = -q.shape[-1] % per
    q = np.pad(q, [(0, 0)] * (q.ndim - 1) + [(0, pad)]).reshape(*q.shape[:-1], -1, per)
    return (q << (np.arange(per) * bits)).sum(-1).astype(np.uint8)


def matrix(outs, ins, group, bits, asymmetric):
    q = draw.integers(0, 1 << bits, (EXPERTS, outs, ins))
    scales = draw.uniform(0.01, 0.02, (EXPERTS, outs, ins // group)).astype(np.float32)
    shape = (EXPERTS, outs, ins // group)
    zeros = draw.integers(0, 1 << bits, shape) if asymmetric else np.full(shape, 1 << bits - 1)
    each = lambda a: a.repeat(group, -1)
    return (pack(q, bits), scales, pack(zeros, bits)), (q - each(zeros)) * each(scales)


def error(bits, group, asymmetric):
    first, w1 = matrix(2 * WIDTH, HIDDEN, group, bits, asymmetric)
    second, w2 = matrix(HIDDEN, WIDTH, group, bits, asymmetric)
    names = ["w1", "s1", "", "w2", "s2", "", "", "", ""] + (["z1", "z2"] if asymmetric else [])
    node = helper.make_node(
        "QMoE", ["x", "scores", *names], ["y"], domain="com.microsoft", k=1, activation_type="swiglu",
        swiglu_fusion=1, activation_alpha=1.0, activation_beta=0.0, normalize_routing_weights=1,
        expert_weight_bits=bits, block_size=group, weights_prepacked=0,
    )
    arrays = dict(zip(("w1", "s1", "z1", "w2", "s2", "z2"), (*first, *second)))
    held = [numpy_helper.from_array(arrays[n], n) for n in names if n]
    value = lambda name, shape: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
    inputs = [value("x", [3, HIDDEN]), value("scores", [3, EXPERTS])]
    graph = helper.make_graph([node], "g", inputs, [value("y", [3, HIDDEN])], held)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    x = draw.normal(size=(3, HIDDEN)).astype(np.float32)
    scores = np.array([[4, 0], [0, 4], [4, 0]], np.float32)
    (found,) = session.run(None, {"x": x, "scores": scores})
    expected = []
    for row, expert in zip(x, scores.argmax(1)):
        both = w1[expert] @ row
        gate, up = both[::2], both[1::2]
        expected.append(w2[expert] @ (gate / (1 + np.exp(-gate)) * up))
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


print("onnxruntime", ort.__version__, "onnx", onnx.__version__)
wrong = []
for bits, group, asymmetric in ((4, 16, True), (4, 32, True), (8, 32, True), (4, 32, False)):
    found = error(bits, group, asymmetric)
    kind = "asymmetric" if asymmetric else "symmetric"
    print(f"  {bits} bits, {kind}, groups of {group}, {WIDTH} inputs: relative error {found:.1e}")
    if found > 0.2:
        wrong.append((bits, group, asymmetric))
sys.exit(wrong != ([(4, 32, True)] if sys.argv[1] == "wrong" else []))
P
for case in "1.30.0 wrong" "1.31.1 right"; do
    set -- $case
    python3 -m venv "$place/$1"
    "$place/$1/bin/pip" install --quiet "onnxruntime==$1" "onnx>=1.21,<2" numpy
    "$place/$1/bin/python" "$place/try.py" "$2"
done
