"""Time of one ``QMoE`` on one thread, by the bits of its experts."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

EXPERTS, TOP_K, HIDDEN, WIDTH, GROUP = 32, 4, 1024, 512, 32
TOKENS, RUNS = (1, 128), (40, 4)
# Bits, and the dtype of activations.
FORMS = ((2, "float32"), (3, "float16"), (4, "float32"), (8, "float32"))
DTYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16}


def open_session(bits: int, dtype: str) -> Any:
    """Open a graph with one operator and random numbers."""
    random = np.random.default_rng(0)
    inputs = {}
    for n, (outs, ins) in enumerate([(2 * WIDTH, HIDDEN), (HIDDEN, WIDTH)]):
        inputs[f"w{n}"] = random.integers(0, 256, (EXPERTS, outs, ins * bits // 8)).astype(np.uint8)
        inputs[f"s{n}"] = (random.random((EXPERTS, outs, ins // GROUP)) * 0.02).astype(np.float16)
    node = helper.make_node(
        "QMoE", ["x", "p", "w0", "s0", "", "w1", "s1"], ["y"], domain="com.microsoft", k=TOP_K,
        activation_type="swiglu", swiglu_fusion=1, activation_alpha=1.0, activation_beta=0.0,
        normalize_routing_weights=1, expert_weight_bits=bits, block_size=GROUP,
        weights_prepacked=0, accuracy_level=4,
    )  # fmt: skip
    x, p, y = (
        helper.make_tensor_value_info(name, DTYPES[dtype], [None, size])
        for name, size in (("x", HIDDEN), ("p", EXPERTS), ("y", HIDDEN))
    )
    stored = [numpy_helper.from_array(value, name) for name, value in inputs.items()]
    graph = helper.make_graph([node], "experts", [x, p], [y], stored)
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    model = helper.make_model(graph, opset_imports=opsets, ir_version=11).SerializeToString()
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def measure(session: Any, dtype: str, tokens: int, runs: int) -> float:
    """Return the best of some runs, in milliseconds."""
    random = np.random.default_rng(1)
    feeds = {
        name: random.standard_normal((tokens, size)).astype(dtype)
        for name, size in (("x", HIDDEN), ("p", EXPERTS))
    }
    times = []
    for _ in range(runs + 1):
        begun = time.perf_counter()
        session.run(None, feeds)
        times.append(time.perf_counter() - begun)
    return 1e3 * min(times[1:])


def main() -> None:
    """Print a line for each form."""
    print("onnxruntime", onnxruntime.__version__)
    for bits, dtype in FORMS:
        session = open_session(bits, dtype)
        found = [measure(session, dtype, *each) for each in zip(TOKENS, RUNS, strict=True)]
        print(f"{bits} bits, {dtype}: 1 token {found[0]:.2f} ms, 128 tokens {found[1]:.0f} ms")


if __name__ == "__main__":
    main()
