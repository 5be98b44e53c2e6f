"""Verdicts on programs that may load a graph, see `_loader_table`."""

from __future__ import annotations

from collections.abc import Mapping

from moe2edge.targets._loader_cases import (
    Finding,
    has_quantized_experts,
    has_three_bits,
    is_symmetric_in_4_bits,
    make_family_case,
)
from moe2edge.targets._web_layout import UNKNOWN_TYPES

# It takes the sizes of a cache from the list of families that it knows.
OPTIMUM = """\
from optimum.onnxruntime import ORTModelForCausalLM
model = ORTModelForCausalLM.from_pretrained(".")
model.num_key_value_heads = model.config.num_key_value_heads
model.embed_size_per_head = model.config.head_dim"""
ONNX_FINDINGS: Mapping[str, tuple[Finding, ...]] = {
    "onnx": (
        Finding(
            "onnxruntime",
            "1.32 or newer",
            "yes",
            "CPU provider; experts of 3 bits take about five times as long as those of 4",
            case=has_three_bits,
            script="read_onnxruntime.py",
        ),
        Finding(
            "onnxruntime", "1.31 or newer", "yes", "CPU provider", script="read_onnxruntime.py"
        ),
        Finding(
            "onnxruntime-genai",
            "0.18",
            "yes",
            evidence="run on a CPU, also with a cache in int8",
            case=is_symmetric_in_4_bits,
            script="onnxruntime_genai",
            snippet='import onnxruntime_genai\nmodel = onnxruntime_genai.Model(".")',
        ),
        Finding(
            "onnxruntime-genai",
            "0.18",
            "not tried",
            "it was run with symmetric 4 bits, not with this scheme",
        ),
        Finding(
            "onnxruntime, CUDA",
            "",
            "no",
            "its QMoE takes 16-bit activations, and the graph has float32 ones",
        ),
        Finding(
            "optimum-onnx",
            "0.1.0",
            "yes",
            "ORTModelForCausalLM, with transformers 4.57.6, without position_ids; it has to "
            "be told the sizes of keys and values",
            "run on a CPU, also with a cache in int8",
            is_symmetric_in_4_bits,
            "optimum_onnx",
            snippet=OPTIMUM,
        ),
        Finding(
            "optimum-onnx",
            "0.1.0",
            "not tried",
            "it was run with symmetric 4 bits, not with this scheme",
        ),
        Finding(
            "OpenVINO", "2026.4.1", "no", "it has no QMoE or MoE operator", script="refusals.py"
        ),
        Finding(
            "onnxruntime-web, onnxruntime-node, transformers.js",
            "",
            "no",
            "npm has 1.30 and a build of 1.31, which know no accuracy_level of QMoE; export to "
            "onnx:layout=web",
            case=has_quantized_experts,
            script="web",
        ),
    ),
    "onnx:layout=web": (
        Finding(
            "onnxruntime-web",
            "1.30, and the build of 1.31 in transformers.js 4.3.2",
            "yes",
            "in wasm",
            "run in Node and Chromium",
            script="web",
        ),
        Finding(
            "transformers.js",
            "4.3.2",
            "yes",
            "it does not know {o.family}: give it the config with model_type qwen3_moe, as in the "
            "card",
            "run in Node and Chromium",
            make_family_case(*UNKNOWN_TYPES),
            "web",
        ),
        Finding("transformers.js", "4.3.2", "yes", "{o.family}", "run in Node", script="web"),
        Finding("onnxruntime-node", "1.30", "yes", evidence="run on a CPU", script="web"),
        Finding(
            "onnxruntime-web, WebGPU",
            "1.31 build in transformers.js 4.3.2",
            "not tried",
            "it opens the graph; its QMoE asks for shader-f16, which the adapter in software that "
            "was tried has not",
        ),
        Finding(
            "onnxruntime",
            "1.31 or newer",
            "yes",
            "for Python, CPU provider",
            script="read_onnxruntime.py",
        ),
        Finding("onnxruntime-genai", "", "no", "the folder has no genai_config.json"),
    ),
}
