#!/bin/sh
# onnxruntime-web: its build for WebGPU has no Cast from bfloat16 in wasm; the other builds have it.
#
# One would expect that a graph which runs with executionProviders ["wasm"] does so whichever entry of
# the package is imported. Seen with onnxruntime-web 1.30.0 in Node 20: a Cast from bfloat16 to float32
# (as weights that are stored in bfloat16 need) runs with "onnxruntime-web" and "onnxruntime-web/wasm".
# With "onnxruntime-web/webgpu" the session is refused, "Could not find an implementation for Cast",
# though float16 is cast there. transformers.js imports that entry in every browser, also for device
# "wasm", and onnxruntime-node in Node: so a model that was tried in Node may not open in a page.
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet "onnx>=1.21,<2" numpy
"$place/venv/bin/python" - "$place" <<'P'
import sys

from onnx import TensorProto, helper, save

for name, kind, two in (("bfloat16", TensorProto.BFLOAT16, b"\x00\x40"), ("float16", TensorProto.FLOAT16, b"\x00\x40")):
    weight = TensorProto(name="w", data_type=kind, dims=[2], raw_data=two * 2)
    nodes = [
        helper.make_node("Gather", ["w", "i"], ["x"], axis=0),
        helper.make_node("Cast", ["x"], ["y"], to=TensorProto.FLOAT),
    ]
    i = helper.make_tensor_value_info("i", TensorProto.INT64, [1])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    graph = helper.make_graph(nodes, "g", [i], [y], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    save(model, f"{sys.argv[1]}/{name}.onnx")
P
cd "$place"
npm install --silent --ignore-scripts onnxruntime-web@1.30.0
cat > try.mjs <<'J'
import { readFileSync } from "node:fs";

const found = [];
for (const entry of ["onnxruntime-web", "onnxruntime-web/wasm", "onnxruntime-web/webgpu"]) {
  const module = await import(entry), ort = module.default ?? module;
  ort.env.wasm.numThreads = 1;
  for (const dtype of ["bfloat16", "float16"]) {
    let said;
    try {
      const options = { executionProviders: ["wasm"], logSeverityLevel: 4 };
      const session = await ort.InferenceSession.create(readFileSync(`${dtype}.onnx`), options);
      const { y } = await session.run({ i: new ort.Tensor("int64", [1n], [1]) });
      said = y.data[0] === 2 ? "right" : "wrong";
    } catch (error) {
      said = /Could not find an implementation for Cast/.test(error.message) ? "no Cast" : "failed";
    }
    console.log(`  ${entry}, ${dtype}: ${said}`);
    found.push(said);
  }
}
process.exit(found.join() === "right,right,right,right,no Cast,right" ? 0 : 1);
J
echo "onnxruntime-web 1.30.0, Node $(node --version)"
node try.mjs
