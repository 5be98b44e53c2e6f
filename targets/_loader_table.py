"""Verdicts on programs that may load an output: the one table of reports, cards and documents.

A finding holds in one case, which is a condition on the output. A program has several: the first
whose case applies gives the verdict, so exceptions stand before the rule.
"""

from __future__ import annotations

from collections.abc import Mapping

from moe2edge.targets._loader_cases import (
    INSPECTED,
    Finding,
    has_experts_beside_main_scheme,
    has_experts_that_differ,
    has_odd_hidden,
    has_ordered_inputs,
    has_unserved_group,
    has_unserved_scheme,
    is_asymmetric,
    is_even,
    is_for_auto_round,
    is_generic,
    is_other_than_w4_throughout,
    is_per_channel,
    is_quantized_output,
    is_rehomed,
    is_rehomed_with_head_dim,
    is_rehomed_with_window,
    is_uncomputed_by_llama_cpp,
    is_uneven,
    is_unread_by_transformers,
    make_family_case,
    mixes_dense_blocks,
    needs_eager_in_stock,
    splits_fusion,
    suits_kt_kernel,
)
from moe2edge.targets._loader_table_onnx import ONNX_FINDINGS

AUTO_MODEL = (
    "from transformers import AutoModelForCausalLM\n"
    'model = AutoModelForCausalLM.from_pretrained(".", dtype="auto")'
)
OWN_LOAD = 'import moe2edge\nmodel = moe2edge.load(".")'


def _refuse_scheme(program: str) -> Finding:
    """Return the verdict on integers that the expert kernels of a program do not take."""
    note = "it takes symmetric 4 and 8 bits only"
    return Finding(program, "", "no", note, INSPECTED, has_unserved_scheme)


def _refuse_fusion(program: str) -> Finding:
    """Return the verdict on matrices that a program fuses, although their schemes differ."""
    note = "it fuses the matrices of {o.split_fusion}, whose schemes differ"
    return Finding(program, "", "no", note, INSPECTED, splits_fusion)


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
    _refuse_scheme("vLLM"),
    Finding("vLLM", "", "no", "it refuses desc_act with groups", INSPECTED, has_ordered_inputs),
    _refuse_fusion("vLLM"),
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
    _refuse_scheme("SGLang"),
    _refuse_fusion("SGLang"),
    Finding(
        "SGLang",
        "0.5.23",
        "no",
        "it uses one scheme for all experts, that of most matrices",
        INSPECTED,
        has_experts_beside_main_scheme,
    ),
)
MOE2EDGE = Finding(
    "moe2edge",
    "",
    "yes",
    "moe2edge.load(folder)",
    script="read_transformers.py",
    snippet=OWN_LOAD,
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
    Finding(
        "llama.cpp",
        "",
        "no",
        "it does not compute {o.uncomputed}, and its converter may not say so",
        INSPECTED,
        is_uncomputed_by_llama_cpp,
    ),
)
TRANSFORMERS_REFUSAL = Finding(
    "transformers", "", "no", "stock classes raise an error on per_layer_config", case=is_uneven
)

# By target. A report lists programs in the order of the findings that apply.
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
            script="read_transformers.py",
        ),
        Finding(
            "transformers",
            "",
            "yes",
            "{o.architecture}",
            "every export is reopened in it",
            is_even,
            script="read_transformers.py",
            snippet=AUTO_MODEL,
        ),
        MOE2EDGE,
        TRANSFORMERS_REFUSAL,
        Finding("transformers 4", "", "no", "{o.unknown_form}", case=is_uneven),
        Finding(
            "transformers 4",
            "4.57.6",
            "yes",
            evidence="run for this family",
            case=make_family_case("mixtral", "olmoe", "qwen2_moe", "qwen3_moe"),
            script="transformers_4",
        ),
        Finding("transformers 4", "", "not tried", "with {o.family}"),
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
            "moe2edge",
            "",
            "yes",
            "moe2edge.load(folder); weights are dequantized",
            case=is_generic,
            script="read_transformers.py",
            snippet=OWN_LOAD,
        ),
        Finding(
            "moe2edge",
            "",
            "yes",
            "moe2edge.load(folder); symmetric 4-bit weights stay in 4 bits",
            script="read_transformers.py",
            snippet=OWN_LOAD,
        ),
        TRANSFORMERS_REFUSAL,
        Finding(
            "transformers",
            "5.23",
            "yes",
            "{o.architecture}, with auto-round 0.16.1 installed, in 16-bit floats; weights stay "
            "packed",
            "run for this family",
            is_for_auto_round,
            "read_auto_round.py",
            "pip install auto-round==0.16.1",
            AUTO_MODEL,
        ),
        Finding(
            "transformers",
            "",
            "no",
            "it loads experts as random numbers and only prints a report; use moe2edge.load, or "
            "export with gptq:config=auto-round",
            script="read_transformers.py",
        ),
        *(
            Finding(
                program, "", "not tried", "with the config of auto-round", "", is_for_auto_round
            )
            for program in ("GPTQModel", "kt-kernel", "vLLM", "SGLang")
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
            evidence="run on a CPU for this family",
            script="gptqmodel",
        ),
        Finding("kt-kernel", "", "not tried", "with layers that differ", case=is_uneven),
        Finding(
            "kt-kernel",
            "0.7.2",
            "yes",
            "method GPTQ_INT4 of KTMoEWrapper, for MoE layers alone",
            "run on a CPU",
            suits_kt_kernel,
            "kt_kernel",
        ),
        Finding(
            "kt-kernel",
            "0.7.2",
            "not tried",
            "it was run with symmetric 4 bits in groups, and names as of olmoe and qwen3_moe",
        ),
        *VLLM,
        *SGLANG_REFUSALS,
        Finding("SGLang", "0.5.23", "as read", "needs --quantization gptq_marlin"),
        Finding(
            "llama.cpp",
            "",
            "no",
            "its converter refuses the folder at the tokenizer; export to gguf for it",
        ),
        Finding(
            "mlx-lm",
            "0.32.2",
            "no",
            "it refuses or misreads the packing of GPTQ; export to mlx",
            script="refusals.py",
        ),
    ),
    "gguf": (
        Finding(
            "llama.cpp",
            "as in xllamacpp 2026.10.11549",
            "yes",
            "llama-server -m model.gguf",
            "every export is run in it",
            script="llama_cpp",
            command="llama-server -m model.gguf",
        ),
        Finding(
            "ollama",
            "",
            "not tried",
            "FROM ./model.gguf; it runs llama.cpp",
            command="echo 'FROM ./model.gguf' > Modelfile && ollama create my-model -f Modelfile",
        ),
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
        MOE2EDGE,
        TRANSFORMERS_REFUSAL,
        Finding(
            "transformers",
            "",
            "no",
            "it has no names for single experts of {o.family}",
            case=is_unread_by_transformers,
            script="read_compressed.py",
        ),
        Finding(
            "transformers",
            "",
            "no",
            "with compressed-tensors it raises an error on asymmetric integers",
            case=is_asymmetric,
            script="read_compressed.py",
        ),
        Finding(
            "transformers",
            "",
            "no",
            "it takes one scheme for the experts of all layers: it raises an error on others, or "
            "reads them as noise",
            case=has_experts_that_differ,
            script="read_compressed.py",
        ),
        Finding(
            "transformers",
            "5.23",
            "yes",
            "{o.architecture}, with compressed-tensors installed; it dequantizes the experts",
            "run for this family",
            script="read_compressed.py",
            snippet=AUTO_MODEL,
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
            evidence="run on a CPU for this family, not on a Mac",
            script="read_mlx.py",
            command="mlx_lm.generate --model . --prompt 'Once upon a time'",
        ),
        Finding("LM Studio", "", "not tried", "it runs mlx-lm on Macs"),
        Finding(
            "transformers", "", "no", "it refuses MLX's quantization", case=is_quantized_output
        ),
        Finding("transformers", "", "no", "it has no tensors of all experts by these names"),
    ),
    **ONNX_FINDINGS,
}
