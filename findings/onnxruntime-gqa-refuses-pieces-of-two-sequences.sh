#!/bin/sh
# onnxruntime: GroupQueryAttention takes two sequences whole or by single tokens, but not in pieces.
#
# Long prompts are often run in pieces of some hundred tokens, to bound memory. The operator of most
# exported decoders takes a past and new tokens of any number, so one would expect that a batch
# can be run so, all the more as both sequences have one length. Seen with onnxruntime 1.31.1 on a
# CPU (numpy 2.4, onnx 1.23), with a cache in float32 and in int8: for one sequence whole, pieces and
# steps agree; for two, pieces are refused with "batch_size must be 1 when sequence_length > 1 and
# past context is given". ONNX's own Attention (opset 23) with a past runs pieces of both.
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet onnxruntime==1.31.1 onnx==1.23.2 numpy==2.4.6
"$place/venv/bin/python" - <<'P'
import sys

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper

HEADS, KEYS, SIZE, LENGTH = 4, 2, 16, 24
CUTS = {"whole": [24], "pieces": [8, 16, 24], "steps": [8, *range(9, 25)]}
FLOAT, INT8 = TensorProto.FLOAT, TensorProto.INT8
ort.set_default_logger_severity(4)


def open_operator(operator, cache):
    """Return a session of one operator, with a cache of a type."""
    def name(text, kind, shape):
        return helper.make_tensor_value_info(text, kind, shape)

    past = [name(text, cache, ["batch", KEYS, "past", SIZE]) for text in ("past_k", "past_v")]
    inputs = [name("q", FLOAT, ["batch", "new", HEADS * SIZE])]
    inputs += [name(text, FLOAT, ["batch", "new", KEYS * SIZE]) for text in "kv"]
    outputs = [name("y", FLOAT, ["batch", "new", HEADS * SIZE])]
    outputs += [name(text, cache, ["batch", KEYS, "total", SIZE]) for text in ("all_k", "all_v")]
    given, more, domain = ["q", "k", "v", "past_k", "past_v", "last", "total"], {}, "com.microsoft"
    if operator == "GroupQueryAttention":
        inputs += [*past, name("last", TensorProto.INT32, ["batch"]), name("total", TensorProto.INT32, [])]
        more = dict(num_heads=HEADS, kv_num_heads=KEYS)
        if cache == INT8:
            inputs += [name(text, FLOAT, [1]) for text in ("scale_k", "scale_v")]
            given += ["", "", "", "", "", "scale_k", "scale_v"]
            more |= dict(k_quant_type="PER_TENSOR", v_quant_type="PER_TENSOR", kv_cache_bit_width=8)
    else:
        inputs += past
        given, domain = ["q", "k", "v", "", "past_k", "past_v"], ""
        more = dict(q_num_heads=HEADS, kv_num_heads=KEYS, is_causal=1)
    node = helper.make_node(operator, given, ["y", "all_k", "all_v"], domain=domain, **more)
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph([node], "g", inputs, outputs)
    model = helper.make_model(graph, opset_imports=opsets, ir_version=11)
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def run(session, operator, cache, batch, ends):
    """Run sequences in parts that end where told, and return the outputs of all tokens."""
    random = np.random.default_rng(0)
    q, k, v = (
        random.standard_normal((batch, LENGTH, heads * SIZE)).astype(np.float32)
        for heads in (HEADS, KEYS, KEYS)
    )
    kind = np.int8 if cache == INT8 else np.float32
    past, found, first = [np.zeros((batch, KEYS, 0, SIZE), kind)] * 2, [], 0
    for end in ends:
        feeds = {"q": q[:, first:end], "k": k[:, first:end], "v": v[:, first:end]}
        feeds |= dict(zip(("past_k", "past_v"), past))
        if operator == "GroupQueryAttention":
            feeds |= {"last": np.full(batch, end - 1, np.int32), "total": np.array(end, np.int32)}
        if cache == INT8:
            feeds |= {text: np.full(1, 5 / 127, np.float32) for text in ("scale_k", "scale_v")}
        part, *past = session.run(None, feeds)
        found.append(part)
        first = end
    return np.concatenate(found, 1)


print("onnxruntime", ort.__version__, "numpy", np.__version__, "onnx", onnx.__version__)
refused = set()
for operator, cache, text in (
    ("Attention", FLOAT, "float32"),
    ("GroupQueryAttention", FLOAT, "float32"),
    ("GroupQueryAttention", INT8, "int8"),
):
    session = open_operator(operator, cache)
    for batch in (1, 2):
        whole = run(session, operator, cache, batch, CUTS["whole"])
        for how in ("pieces", "steps"):
            try:
                error = abs(run(session, operator, cache, batch, CUTS[how]) - whole).max()
                result = f"{error:.0e} off whole"
                assert error < 1e-4
            except Exception as error:
                if "must be 1" not in str(error):
                    raise
                refused.add((operator, text, batch, how))
                result = f"refused, {str(error).rpartition('Message: ')[2].strip()}"
            print(f"  {operator}, {text} cache, {batch} sequences, {how}: {result}")
sys.exit(refused != {("GroupQueryAttention", text, 2, "pieces") for text in ("float32", "int8")})
P
