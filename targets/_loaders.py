"""Programs that may load an output: a table of verdicts, with their evidence.

A finding holds in one case, which is a condition on the output. A program has several: the first
whose case applies gives the verdict, so exceptions stand before the rule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from moe2edge.model.model import Model, is_stock_form
from moe2edge.model.weights import DTYPES
from moe2edge.numerics.scheme import WHOLE_ROW, Scheme
from moe2edge.pipeline.target import Loader, Verdict
from moe2edge.runtime.expert_kernels import takes_grouped_mm
from moe2edge.targets._compressed_config import READ_BY_TRANSFORMERS, list_experts_schemes
from moe2edge.targets._gptq_dynamic import build_dynamic
from moe2edge.targets._module_patterns import find_main_scheme, find_split_fusion
from moe2edge.targets._tensors import TILE, has_dense_blocks

INSPECTED = "by source inspection"
# Numbers of bits, and inputs per scale, that the expert kernels of vLLM and SGLang take.
SERVED_BITS = (4, 8)
SERVED_GROUPS = (32, 64, 128, WHOLE_ROW)


@dataclass(frozen=True)
class Output:
    """A model as it was given to a target, and as the target stores it."""

    given: Model
    stored: Model

    @property
    def family(self) -> str:
        """``model_type`` of what is stored."""
        return self.stored.family.model_type

    @property
    def architecture(self) -> str:
        """Class name in transformers of what is stored."""
        return self.stored.family.architecture

    @property
    def schemes(self) -> set[Scheme]:
        """Schemes of all quantized matrices."""
        return {weight.scheme for _, _, weight in self.stored.tensors() if weight.scheme}

    @property
    def split_fusion(self) -> str | None:
        """Module that serving programs fuse, although its matrices differ in scheme."""
        return find_split_fusion(self.stored)

    @property
    def unknown_form(self) -> str:
        """Reason why a program that ignores ``per_layer_config`` cannot read the layers."""
        model = self.stored
        if model.replaced_count:
            return "it does not know replaced experts"
        if model.tied_count:
            return "it does not know tied experts, which share matrices"
        if model.skips:
            return "it does not know dynamic skipping"
        if all(is_stock_form(model, block) for block in model.blocks):
            return "it takes MoE layers of one size only"
        return "it does not know layers without a router"


Case = Callable[[Output], bool]


def _always(output: Output) -> bool:
    return True


def _uneven(output: Output) -> bool:
    """Test for a ``per_layer_config``: layers differ, or have a form that stock classes lack."""
    return not output.stored.is_uniform


def _even(output: Output) -> bool:
    return output.stored.is_uniform


def _with_dense_blocks(output: Output) -> bool:
    return has_dense_blocks(output.stored)


def _rehomed(output: Output) -> bool:
    """Test for a model that is written as one of another family."""
    return output.stored.family is not output.given.family


def _rehomed_with_head_dim(output: Output) -> bool:
    geometry = output.stored.family.geometry(output.stored.config)
    return _rehomed(output) and geometry.heads * geometry.head_dim != geometry.hidden


def _rehomed_with_window(output: Output) -> bool:
    return _rehomed(output) and output.stored.blocks[0].window is not None


def _unserved_scheme(output: Output) -> bool:
    return any(not s.symmetric or s.bits not in SERVED_BITS for s in output.schemes)


def _ordered(output: Output) -> bool:
    return any(s.ordered and s.group_size != WHOLE_ROW for s in output.schemes)


def _split_fusion(output: Output) -> bool:
    return output.split_fusion is not None


def _experts_not_in_main_scheme(output: Output) -> bool:
    main = find_main_scheme(output.stored)
    return any(layer.experts[0].up.scheme != main for _, layer in output.stored.moe_blocks)


def _other_than_w4_throughout(output: Output) -> bool:
    main = find_main_scheme(output.stored)
    symmetric4 = main is not None and (main.bits, main.symmetric) == (4, True)
    return not symmetric4 or bool(build_dynamic(output.stored))


def _asymmetric(output: Output) -> bool:
    return any(not scheme.symmetric for scheme in output.schemes)


def _unserved_group(output: Output) -> bool:
    return any(scheme.group_size not in SERVED_GROUPS for scheme in output.schemes)


def _odd_hidden(output: Output) -> bool:
    return output.stored.embedding.shape[-1] % TILE != 0


def _experts_differ(output: Output) -> bool:
    """Test for experts with several schemes, or without one, in a model that has experts."""
    found = list_experts_schemes(output.stored)
    return len(found) > 1 or found == {None}


def _is_quantized(output: Output) -> bool:
    return bool(output.schemes)


def _unread_by_transformers(output: Output) -> bool:
    return output.family not in READ_BY_TRANSFORMERS


def _per_channel(output: Output) -> bool:
    main = find_main_scheme(output.stored)
    return main is not None and main.group_size == WHOLE_ROW


def _symmetric4(output: Output) -> bool:
    return all((s.bits, s.symmetric) == (4, True) for s in output.schemes)


def _stock_needs_eager(output: Output) -> bool:
    """Test for experts that transformers' default implementation does not take."""
    layers = [layer for _, layer in output.stored.moe_blocks]
    experts = [layer.experts[0] for layer in layers if layer.experts]
    return _even(output) and any(
        not takes_grouped_mm((e.up.shape[1], e.up.shape[0]), DTYPES[e.up.dtype]) for e in experts
    )


def _three_bits(output: Output) -> bool:
    return any(scheme.bits == 3 for scheme in output.schemes)


def _generic(output: Output) -> bool:
    return output.stored.family.generic


def _family(*names: str) -> Case:
    return lambda output: output.family in names


@dataclass(frozen=True)
class Finding:
    """Verdict on a program in one case.

    Attributes:
        program: its name.
        version: the version that was run or read; empty: not recorded, or of no importance.
        verdict: see `Loader`.
        note: condition or reason; may name properties of the `Output`, as ``{o.family}``.
        evidence: how it is known; empty where the verdict or the note says so.
        case: the condition under which it holds.
    """

    program: str
    version: str
    verdict: Verdict
    note: str = ""
    evidence: str = ""
    case: Case = _always

    def judge(self, output: Output) -> Loader:
        """Return the verdict on an output in this case."""
        parts = (self.version, self.note.format(o=output), self.evidence)
        return Loader(self.program, self.verdict, "; ".join(part for part in parts if part))


VLLM = (
    Finding("vLLM", "", "no", "{o.unknown_form}", case=_uneven),
    Finding(
        "vLLM",
        "",
        "no",
        "its Qwen2-MoE does not support head_dim",
        INSPECTED,
        _rehomed_with_head_dim,
    ),
    Finding("vLLM", "", "no", "it takes symmetric 4 and 8 bits only", INSPECTED, _unserved_scheme),
    Finding("vLLM", "", "no", "it refuses desc_act with groups", INSPECTED, _ordered),
    Finding(
        "vLLM",
        "",
        "no",
        "it fuses the matrices of {o.split_fusion}, whose schemes differ",
        INSPECTED,
        _split_fusion,
    ),
    Finding(
        "vLLM", "", "not tried", "its Qwen2-MoE with a sliding window", case=_rehomed_with_window
    ),
    Finding("vLLM", "", "not tried", "with {o.family}", case=_generic),
    Finding("vLLM", "0.33", "as read", "as {o.architecture}", case=_rehomed),
    Finding("vLLM", "0.33", "as read"),
)
SGLANG_REFUSALS = (
    Finding("SGLang", "", "no", "{o.unknown_form}", case=_uneven),
    Finding("SGLang", "", "not tried", "with {o.family}", case=_generic),
    Finding(
        "SGLang",
        "0.5.23",
        "no",
        "it treats every block as an MoE layer",
        INSPECTED,
        _with_dense_blocks,
    ),
    Finding(
        "SGLang", "", "no", "it takes symmetric 4 and 8 bits only", INSPECTED, _unserved_scheme
    ),
    Finding(
        "SGLang",
        "",
        "no",
        "it fuses the matrices of {o.split_fusion}, whose schemes differ",
        INSPECTED,
        _split_fusion,
    ),
    Finding(
        "SGLang",
        "0.5.23",
        "no",
        "it uses one scheme for all experts, that of most matrices",
        INSPECTED,
        _experts_not_in_main_scheme,
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
        _uneven,
    ),
    Finding("llama.cpp", "", "not tried", "with {o.family}", case=_generic),
    Finding("llama.cpp", "", "no", "it needs a router in every block", case=_with_dense_blocks),
)
TRANSFORMERS_REFUSAL = Finding(
    "transformers", "", "no", "stock classes raise an error on per_layer_config", case=_uneven
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
            _stock_needs_eager,
        ),
        Finding(
            "transformers",
            "",
            "yes",
            "{o.architecture}",
            "every export is reopened in it",
            _even,
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
            case=_family("mixtral", "qwen3_moe"),
        ),
        Finding("llama.cpp", "", "not tried", "with {o.family}"),
    ),
    "gptq": (
        Finding(
            "moe2edge", "", "yes", "moe2edge.load(folder); weights are dequantized", case=_generic
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
        Finding("GPTQModel", "", "no", "{o.unknown_form}", case=_uneven),
        Finding("GPTQModel", "", "not tried", "with {o.family}", case=_generic),
        Finding(
            "GPTQModel",
            "7.7",
            "no",
            "it refuses the tensor names that vLLM and SGLang need",
            case=_family("mixtral"),
        ),
        Finding(
            "GPTQModel",
            "7.7",
            "no",
            "it does not load dense MLPs, and gives no warning",
            case=_with_dense_blocks,
        ),
        Finding(
            "GPTQModel",
            "7.7",
            "not tried",
            "it was run with symmetric 4 bits throughout, not with this scheme",
            case=_other_than_w4_throughout,
        ),
        Finding(
            "GPTQModel",
            "7.7",
            "not tried",
            "it was run with groups, not with per-channel scales",
            case=_per_channel,
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
    "compressed-tensors": (
        Finding("moe2edge", "", "yes", "moe2edge.load(folder)"),
        TRANSFORMERS_REFUSAL,
        Finding(
            "transformers",
            "",
            "no",
            "it has no names for single experts of {o.family}",
            case=_unread_by_transformers,
        ),
        Finding(
            "transformers",
            "",
            "no",
            "with compressed-tensors it raises an error on asymmetric integers",
            case=_asymmetric,
        ),
        Finding(
            "transformers",
            "",
            "no",
            "it takes one scheme for the experts of all layers: it raises an error on others, or "
            "reads them as noise",
            case=_experts_differ,
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
            _unserved_group,
        ),
        *VLLM[:-1],
        Finding(
            "vLLM",
            "0.33",
            "as read",
            "on a GPU, in Triton: its faster kernels take hidden sizes that 128 divides",
            case=_odd_hidden,
        ),
        Finding("vLLM", "0.33", "as read", "on a GPU; on a CPU its experts need AMX"),
        Finding(
            "SGLang",
            "",
            "no",
            "it takes groups of 32, 64 and 128, and whole rows",
            INSPECTED,
            _unserved_group,
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
        Finding("transformers", "", "no", "it refuses MLX's quantization", case=_is_quantized),
        Finding("transformers", "", "no", "it has no tensors of all experts by these names"),
    ),
    "onnx": (
        Finding(
            "onnxruntime",
            "1.32 or newer",
            "yes",
            "CPU provider; experts of 3 bits take about five times as long as those of 4",
            case=_three_bits,
        ),
        Finding("onnxruntime", "1.31 or newer", "yes", "CPU provider"),
        Finding(
            "onnxruntime-genai",
            "0.18",
            "yes",
            evidence="run on a CPU: benchmarks/genai_reader",
            case=_symmetric4,
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
    ),
}


def judge_loaders(target: str, given: Model, stored: Model) -> tuple[Loader, ...]:
    """Return the verdict on each program that may load an output of a target.

    Args:
        target: its name.
        given: the model that was to be written.
        stored: the model as the target stores it.
    """
    output = Output(given, stored)
    loaders: dict[str, Loader] = {}
    for finding in FINDINGS[target]:
        if finding.program not in loaders and finding.case(output):
            loaders[finding.program] = finding.judge(output)
    return tuple(loaders.values())
