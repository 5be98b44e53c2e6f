"""Forms of a tied embedding in an ONNX graph: exactness and resident bytes of each.

A graph of two operators around one matrix [vocabulary, width], as in a decoder with tied weights:
rows are looked up, and the head multiplies by the transposed matrix. Every form runs in a process
of its own, and so does a session without any matrix, whose memory is subtracted.

    python benchmarks/onnx_head/measure.py > benchmarks/onnx_head/results.md
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import TensorProto, helper

from moe2edge.evaluation.profile.memory import Meter

VOCABULARY, WIDTH, LENGTH, STEPS = 32768, 512, 128, 30
NO_FOLDING = {"optimization.disable_specified_optimizers": "ConstantFolding"}
KINDS = {
    "bfloat16": (TensorProto.BFLOAT16, torch.bfloat16),
    "float16": (TensorProto.FLOAT16, torch.float16),
    "float32": (TensorProto.FLOAT, torch.float32),
}


@dataclass(frozen=True)
class Form:
    """One way to store the matrix, and the session options it is run with."""

    title: str
    dtype: str
    session: Mapping[str, str] = field(default_factory=dict)
    plain_matmul: bool = False


FORMS = {
    "none": Form("no matrix", ""),
    "bf16": Form("bfloat16 + Cast + FusedMatMul", "bfloat16"),
    "bf16-prepack": Form(
        "the same, `session.disable_prepacking`", "bfloat16", {"session.disable_prepacking": "1"}
    ),
    "bf16-nofold": Form("the same, constant folding disabled", "bfloat16", NO_FOLDING),
    "bf16-limit": Form(
        "the same, folding limited to 1 MiB",
        "bfloat16",
        {"optimization.constant_folding_max_output_size_in_bytes": str(1 << 20)},
    ),
    "bf16-transpose": Form("bfloat16 + Cast + Transpose + MatMul", "bfloat16", {}, True),
    "fp16": Form("float16 + Cast + FusedMatMul", "float16"),
    "fp32": Form("float32 + FusedMatMul", "float32"),
    "fp32-prepack": Form(
        "the same, `session.disable_prepacking`", "float32", {"session.disable_prepacking": "1"}
    ),
}


def matrix() -> torch.Tensor:
    """Make the weights, bfloat16; as in trained embeddings, some rows are very small."""
    generator = torch.Generator().manual_seed(0)
    scale = 0.2 * 10 ** (-8 * torch.rand(VOCABULARY, 1, generator=generator) ** 4)
    return (torch.randn(VOCABULARY, WIDTH, generator=generator) * scale).to(torch.bfloat16)


def write(form: Form, path: Path) -> None:
    """Write the graph of ``form`` with external data."""
    nodes, stored = [], []
    if form.dtype:
        code, dtype = KINDS[form.dtype]
        data = matrix().to(dtype).view(torch.uint8).numpy()
        path.with_suffix(".data").write_bytes(data.tobytes())
        tensor = TensorProto(name="table", data_type=code, dims=[VOCABULARY, WIDTH])
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=path.with_suffix(".data").name)
        stored.append(tensor)
        wide = "table" if form.dtype == "float32" else "table_wide"
        nodes.append(helper.make_node("Gather", ["table", "ids"], ["rows"]))
        nodes.append(helper.make_node("Cast", ["rows"], ["x"], to=TensorProto.FLOAT))
        if wide != "table":
            nodes.append(helper.make_node("Cast", ["table"], [wide], to=TensorProto.FLOAT))
        if form.plain_matmul:
            nodes.append(helper.make_node("Transpose", [wide], ["turned"], perm=[1, 0]))
            nodes.append(helper.make_node("MatMul", ["x", "turned"], ["logits"]))
        else:
            nodes.append(
                helper.make_node(
                    "FusedMatMul", ["x", wide], ["logits"], transB=1, domain="com.microsoft"
                )
            )
    else:
        nodes.append(helper.make_node("Cast", ["ids"], ["logits"], to=TensorProto.FLOAT))
    graph = helper.make_graph(
        nodes,
        "head",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["length"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)],
        stored,
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=11), path)


def child(name: str, path: Path) -> dict[str, Any]:
    """Open the graph and run it; only onnxruntime and numpy have done any work in this process."""
    form = FORMS[name]
    meter = Meter()
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    for key, value in form.session.items():
        options.add_session_config_entry(key, value)
    start = time.perf_counter()
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    seconds = time.perf_counter() - start
    created = asdict(meter.read())
    ids = np.arange(LENGTH) * (VOCABULARY // LENGTH)
    logits = session.run(None, {"ids": ids[:1]})[0]
    times = []
    for step in range(STEPS):
        start = time.perf_counter()
        session.run(None, {"ids": ids[step : step + 1]})
        times.append(time.perf_counter() - start)
    ran = asdict(meter.read())
    logits = session.run(None, {"ids": ids})[0]
    np.save(path.with_suffix(".npy"), logits)
    return {"open_s": seconds, "created": created, "ran": ran, "ms": float(np.median(times)) * 1e3}


def error(path: Path) -> float:
    """Return the largest difference of logits to a float64 product of the bfloat16 numbers.

    The logits reach 22.
    """
    ids = torch.arange(LENGTH) * (VOCABULARY // LENGTH)
    table = matrix().double()
    found = torch.from_numpy(np.load(path.with_suffix(".npy"))).double()
    return float((found - table[ids] @ table.T).abs().max())


def measure() -> dict[str, dict[str, Any]]:
    """Measure all forms, each in a fresh process."""
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, form in FORMS.items():
            path = Path(folder) / f"{name}.onnx"
            write(form, path)
            command = [sys.executable, __file__, "--child", name, str(path)]
            text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            results[name] = {**json.loads(text), **asdict(form)}
            if form.dtype:
                results[name]["error"] = error(path)
                stored = matrix().to(KINDS[form.dtype][1])
                altered = (stored.float() != matrix().float()).float().mean()
                results[name]["altered"] = float(altered)
                results[name]["disk"] = path.with_suffix(".data").stat().st_size
    return results


def table(results: dict[str, dict[str, Any]]) -> str:
    """Return the results as Markdown."""
    base = results.pop("none")

    def mib(number: int) -> str:
        return str(round(number / 2**20))

    rows = [
        "| form | disk | after opening | after a token: resident | of it anonymous | highest "
        "| open s | ms/token | max logit difference | numbers altered |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in results.values():
        figures = [
            mib(r["disk"]),
            mib(r["created"]["rss"] - base["created"]["rss"]),
            mib(r["ran"]["rss"] - base["ran"]["rss"]),
            mib(r["ran"]["rss_anon"] - base["ran"]["rss_anon"]),
            mib(r["ran"]["peak_rss"] - base["ran"]["peak_rss"]),
            f"{r['open_s']:.2f}",
            f"{r['ms']:.1f}",
            f"{r['error']:.1e}",
            f"{r['altered']:.1%}",
        ]
        rows.append(" | ".join(["| " + r["title"], *figures]) + " |")
    return "\n".join(rows)


def main() -> None:
    """Measure, or run as the child that is measured."""
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(child(sys.argv[2], Path(sys.argv[3]))))
        return
    print(
        f"# Forms of a tied embedding: vocabulary {VOCABULARY}, width {WIDTH}\n\n"
        f"MiB; memory above that of a session without a matrix. onnxruntime {ort.__version__}, "
        f"CPU provider, 1 thread, one token median of {STEPS}; the difference is that of {LENGTH} "
        "tokens, whose logits reach 22, from a float64 product of the same bfloat16 numbers.\n"
    )
    print(table(measure()))
    print(
        "\nThe graph that `targets/onnx.py` writes has the first form: the smallest file, no "
        "number altered, and after the fold only the packed float32 copy stays in memory beside "
        "the rows that were looked up. Without folding, the copy is made again for every token."
    )


if __name__ == "__main__":
    main()
