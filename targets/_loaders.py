"""Programs that may load an output: a table of verdicts, with their evidence.

A finding holds in one case, which is a condition on the output. A program has several: the first
whose case applies gives the verdict, so exceptions stand before the rule.
"""

from __future__ import annotations

from collections.abc import Mapping

from moe2edge.model.model import Model
from moe2edge.pipeline.target import Loader
from moe2edge.targets._loader_cases import (
    INSPECTED,
    Finding,
    Output,
    has_experts_beside_main_scheme,
    has_experts_that_differ,
    has_odd_hidden,
    has_ordered_inputs,
    has_quantized_experts,
    has_three_bits,
    has_unserved_group,
    has_unserved_scheme,
    is_asymmetric,
    is_even,
    is_generic,
    is_other_than_w4_throughout,
    is_per_channel,
    is_quantized_output,
    is_rehomed,
    is_rehomed_with_head_dim,
    is_rehomed_with_window,
    is_symmetric_in_4_bits,
    is_uneven,
    is_unread_by_transformers,
    make_family_case,
    mixes_dense_blocks,
    needs_eager_in_stock,
    splits_fusion,
)
from moe2edge.targets._web_layout import UNKNOWN_TYPES

VLLM = (
    Finding("vLLM", "", "no", "{o.unknown_form}", case=is_uneven),
    Finding(
        "vLLM",
        "",
        "no",
        "its Qwen2-MoE does not support head_dim",
        INSPECTED,
        is_rehomed_with_head_dim,
    ),
    Finding(
        "vLLM", "", "no", "it takes symmetric 4 and 8 bits only", INSPECTED, has_unserved_scheme
    ),
    Finding("vLLM", "", "no", "it refuses desc_act with groups", INSPECTED, has_ordered_inputs),
    Finding(
        "vLLM",
        "",
        "no",
        "it fuses the matrices of {o.split_fusion}, whose schemes differ",
        INSPECTED,
        splits_fusion,
    ),
    Finding(
        "vLLM", "", "not tried", "its Qwen2-MoE with a sliding window", case=is_rehomed_with_window
    ),
    Finding("vLLM", "", "not tried", "with {o.family}", case=is_generic),
    Finding("vLLM", "0.33", "as read", "as {o.architecture}", case=is_rehomed),
    Finding("vLLM", "0.33", "as read"),
)
SGLANG_REFUSALS = (
    Finding("SGLang", "", "no", "{o.unknown_form}", case=is_uneven),
    Finding("SGLang", "", "not tried", "with {o.family}", case=is_generic),
    Finding(
        "SGLang",
        "0.5.23",
        "no",
        "it treats every block as an MoE layer",
        INSPECTED,
        mixes_dense_blocks,
    ),
    Finding(
        "SGLang", "", "no", "it takes symmetric 4 and 8 bits only", INSPECTED, has_unserved_scheme
    ),
    Finding(
        "SGLang",
        "",
        "no",
        "it fuses the matrices of {o.split_fusion}, whose schemes differ",
        INSPECTED,
        splits_fusion,
    ),
    Finding(
        "SGLang",
        "0.5.23",
        "no",
        "it uses one scheme for all experts, that of most matrices",
        INSPECTED,
        has_experts_beside_main_scheme,
    ),
)
LLAMA_CPP_REFUSALS = (
    Finding(
        "llama.cpp",
        "",
        "no",
        # The converter falls back to the bare file where transformers refuses it.
        "{o.unknown_form}; its converter ignores per_layer_config",
        INSPECTED,
        is_uneven,
    ),
    Finding("llama.cpp", "", "not tried", "with {o.family}", case=is_generic),
    Finding("llama.cpp", "", "no", "it needs a router in every block", case=mixes_dense_blocks),
)
TRANSFORMERS_REFUSAL = Finding(
    "transformers", "", "no", "stock classes raise an error on per_layer_config", case=is_uneven
)

# By target, and layout where readers differ. A report lists programs in the order of the findings
# that apply.
FINDINGS: Mapping[str, tuple[Finding, ...]] = {
    "hf": (
        Finding(
            "transformers",
            "",
            "yes",
            "{o.architecture}, with experts_implementation='eager' in from_pretrained: its default "
            "takes float32, bfloat16 and float16, and rows of a multiple of 16 bytes",
            "every export is reopened in it",
            needs_eager_in_stock,
        ),
        Finding(
            "transformers",
            "",
            "yes",
            "{o.architecture}",
            "every export is reopened in it",
            is_even,
        ),
        Finding("moe2edge", "", "yes", "moe2edge.load(folder)"),
        TRANSFORMERS_REFUSAL,
        *VLLM,
        *SGLANG_REFUSALS,
        Finding("SGLang", "0.5.23", "as read"),
        *LLAMA_CPP_REFUSALS,
        Finding(
            "llama.cpp",
            "",
            "as read",
            "it ran GGUF files with as few experts and blocks; its converter was not run",
            case=make_family_case("mixtral", "qwen3_moe"),
        ),
        Finding("llama.cpp", "", "not tried", "with {o.family}"),
    ),
    "gptq": (
        Finding(
            "moe2edge", "", "yes", "moe2edge.load(folder); weights are dequantized", case=is_generic
        ),
        Finding(
            "moe2edge", "", "yes", "moe2edge.load(folder); symmetric 4-bit weights stay in 4 bits"
        ),
        TRANSFORMERS_REFUSAL,
        Finding(
            "transformers",
            "",
            "no",
            "it loads experts as random numbers and only prints a report; use moe2edge.load",
        ),
        Finding("GPTQModel", "", "no", "{o.unknown_form}", case=is_uneven),
        Finding("GPTQModel", "", "not tried", "with {o.family}", case=is_generic),
        Finding(
            "GPTQModel",
            "7.7",
            "no",
            "it refuses the tensor names that vLLM and SGLang need",
            case=make_family_case("mixtral"),
        ),
        Finding(
            "GPTQModel",
            "7.7",
            "no",
            "it does not load dense MLPs, and gives no warning",
            case=mixes_dense_blocks,
        ),
        Finding(
            "GPTQModel",
            "7.7",
            "not tried",
            "it was run with symmetric 4 bits throughout, not with this scheme",
            case=is_other_than_w4_throughout,
        ),
        Finding(
            "GPTQModel",
            "7.7",
            "not tried",
            "it was run with groups, not with per-channel scales",
            case=is_per_channel,
        ),
        Finding(
            "GPTQModel",
            "7.7",
            "yes",
            evidence="run on a CPU for this family: benchmarks/gptq_reader",
        ),
        *VLLM,
        *SGLANG_REFUSALS,
        Finding("SGLang", "0.5.23", "as read", "needs --quantization gptq_marlin"),
        *LLAMA_CPP_REFUSALS,
        Finding("llama.cpp", "", "not tried", "its converter on GPTQ; export to hf for it"),
    ),
    "gguf": (
        Finding(
            "llama.cpp",
            "as in xllamacpp 2026.10.11549",
            "yes",
            "llama-server -m model.gguf",
            "every export is run in it",
        ),
        Finding("ollama", "", "not tried", "FROM ./model.gguf; it runs llama.cpp"),
        Finding("LM Studio", "", "not tried", "it runs llama.cpp"),
        Finding(
            "mistralrs",
            "0.9.5",
            "not tried",
            "it ran files of other programs, in F16; it reads the config beside the file first",
            case=make_family_case("mixtral", "qwen3_moe"),
        ),
        Finding("mistralrs", "0.9.5", "no", "it does not know {o.family} in GGUF", INSPECTED),
        Finding("transformers", "", "not tried", "it dequantizes GGUF files of few families"),
    ),
    "compressed-tensors": (
        Finding("moe2edge", "", "yes", "moe2edge.load(folder)"),
        TRANSFORMERS_REFUSAL,
        Finding(
            "transformers",
            "",
            "no",
            "it has no names for single experts of {o.family}",
            case=is_unread_by_transformers,
        ),
        Finding(
            "transformers",
            "",
            "no",
            "with compressed-tensors it raises an error on asymmetric integers",
            case=is_asymmetric,
        ),
        Finding(
            "transformers",
            "",
            "no",
            "it takes one scheme for the experts of all layers: it raises an error on others, or "
            "reads them as noise",
            case=has_experts_that_differ,
        ),
        Finding(
            "transformers",
            "5.23",
            "yes",
            "{o.architecture}, with compressed-tensors installed; it dequantizes the experts",
            "run for this family: benchmarks/readers",
        ),
        Finding(
            "vLLM",
            "",
            "no",
            "it takes groups of 32, 64 and 128, and whole rows",
            INSPECTED,
            has_unserved_group,
        ),
        *VLLM[:-1],
        Finding(
            "vLLM",
            "0.33",
            "as read",
            "on a GPU, in Triton: its faster kernels take hidden sizes that 128 divides",
            case=has_odd_hidden,
        ),
        Finding("vLLM", "0.33", "as read", "on a GPU; on a CPU its experts need AMX"),
        Finding(
            "SGLang",
            "",
            "no",
            "it takes groups of 32, 64 and 128, and whole rows",
            INSPECTED,
            has_unserved_group,
        ),
        *SGLANG_REFUSALS,
        Finding("SGLang", "0.5.23", "as read"),
        Finding(
            "mlx-lm",
            "0.32",
            "no",
            "it takes packed experts of a few families only, in groups of 32; export to mlx",
        ),
    ),
    "mlx": (
        Finding(
            "mlx-lm",
            "0.32",
            "yes",
            evidence="run on a CPU for this family: benchmarks/readers; not on a Mac",
        ),
        Finding(
            "transformers", "", "no", "it refuses MLX's quantization", case=is_quantized_output
        ),
        Finding("transformers", "", "no", "it has no tensors of all experts by these names"),
    ),
    "onnx": (
        Finding(
            "onnxruntime",
            "1.32 or newer",
            "yes",
            "CPU provider; experts of 3 bits take about five times as long as those of 4",
            case=has_three_bits,
        ),
        Finding("onnxruntime", "1.31 or newer", "yes", "CPU provider"),
        Finding(
            "onnxruntime-genai",
            "0.18",
            "yes",
            evidence="run on a CPU: benchmarks/genai_reader",
            case=is_symmetric_in_4_bits,
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
            "onnxruntime-web, onnxruntime-node, transformers.js",
            "",
            "no",
            "npm has 1.30 and a build of 1.31, which know no accuracy_level of QMoE; export to "
            "onnx:layout=web",
            "run: benchmarks/readers/web",
            has_quantized_experts,
        ),
    ),
    "onnx:layout=web": (
        Finding(
            "onnxruntime-web",
            "1.30, and the build of 1.31 in transformers.js 4.3.2",
            "yes",
            "in wasm",
            "run in Node and Chromium: benchmarks/readers/web",
        ),
        Finding(
            "transformers.js",
            "4.3.2",
            "yes",
            "it does not know {o.family}: give it the config with model_type qwen3_moe, as in the "
            "card",
            "run in Node and Chromium: benchmarks/readers/web",
            make_family_case(*UNKNOWN_TYPES),
        ),
        Finding(
            "transformers.js",
            "4.3.2",
            "yes",
            "{o.family}",
            "run in Node: benchmarks/readers/web",
        ),
        Finding("onnxruntime-node", "1.30", "yes", evidence="run: benchmarks/readers/web"),
        Finding(
            "onnxruntime-web, WebGPU",
            "1.31 build in transformers.js 4.3.2",
            "not tried",
            "it opens the graph; its QMoE asks for shader-f16, which the adapter in software that "
            "was tried has not",
        ),
        Finding("onnxruntime", "1.31 or newer", "yes", "for Python, CPU provider"),
        Finding("onnxruntime-genai", "", "no", "the folder has no genai_config.json"),
    ),
}


def judge_loaders(target: str, given: Model, stored: Model) -> tuple[Loader, ...]:
    """Return the verdict on each program that may load an output of a target.

    Args:
        target: its name, or another key of `FINDINGS`.
        given: the model that was to be written.
        stored: the model as the target stores it.
    """
    output = Output(given, stored)
    loaders: dict[str, Loader] = {}
    for finding in FINDINGS[target]:
        if finding.program not in loaders and finding.case(output):
            loaders[finding.program] = finding.judge(output)
    return tuple(loaders.values())
