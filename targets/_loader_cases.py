"""Conditions on an output that verdicts on programs depend on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from moe2edge.model.model import Model, is_stock_form
from moe2edge.model.weights import DTYPES
from moe2edge.numerics.scheme import WHOLE_ROW, Scheme
from moe2edge.pipeline.target import Loader, Verdict
from moe2edge.runtime.expert_kernels import takes_grouped_mm
from moe2edge.storage.output import AUTO_ROUND
from moe2edge.targets._compressed_config import READ_BY_TRANSFORMERS, list_experts_schemes
from moe2edge.targets._gguf_layouts import LAYOUTS_BY_FAMILY
from moe2edge.targets._gguf_model import find_uncomputed
from moe2edge.targets._gptq_dynamic import build_dynamic
from moe2edge.targets._module_patterns import find_main_scheme, find_split_fusion
from moe2edge.targets._tensors import TILE, has_dense_blocks

INSPECTED = "by source inspection"
# Where what was run is, with its output.
SCRIPTS = "benchmarks/readers"
# Numbers of bits, and inputs per scale, that the expert kernels of vLLM and SGLang take.
SERVED_BITS = (4, 8)
SERVED_GROUPS = (32, 64, 128, WHOLE_ROW)


@dataclass(frozen=True)
class Output:
    """A model as it was given to a target, as the target stores it, and the target's options."""

    given: Model
    stored: Model
    options: Mapping[str, object]

    @property
    def family(self) -> str:
        """``model_type`` of what is stored."""
        return self.stored.family.model_type

    @property
    def architecture(self) -> str:
        """Class name in transformers of what is stored."""
        return self.stored.family.architecture

    @property
    def schemes(self) -> frozenset[Scheme]:
        """Schemes of all quantized matrices."""
        return self.stored.schemes

    @property
    def split_fusion(self) -> str | None:
        """Module that serving programs fuse, although its matrices differ in scheme."""
        return find_split_fusion(self.stored)

    @property
    def uncomputed(self) -> str:
        """Setting that llama.cpp ignores or has otherwise; empty: there is none."""
        layout = LAYOUTS_BY_FAMILY.get(self.family)
        return "" if layout is None else find_uncomputed(self.stored, layout)

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


def is_any_output(output: Output) -> bool:
    return True


def is_uneven(output: Output) -> bool:
    """Test for layers that differ, or have a form that stock classes lack."""
    return not output.stored.is_uniform


def is_even(output: Output) -> bool:
    """Test for layers of one size, all with routers."""
    return output.stored.is_uniform


def mixes_dense_blocks(output: Output) -> bool:
    """Test for dense blocks between MoE layers."""
    return has_dense_blocks(output.stored)


def is_rehomed(output: Output) -> bool:
    """Test for a model that is written as one of another family."""
    return output.stored.family is not output.given.family


def is_rehomed_with_head_dim(output: Output) -> bool:
    """Test for a model that is written as Qwen2-MoE, with heads of its own size."""
    geometry = output.stored.family.geometry(output.stored.config)
    return is_rehomed(output) and geometry.heads * geometry.head_dim != geometry.hidden


def is_rehomed_with_window(output: Output) -> bool:
    """Test for a model that is written as Qwen2-MoE, with a sliding window."""
    return is_rehomed(output) and output.stored.blocks[0].window is not None


def has_unserved_scheme(output: Output) -> bool:
    """Test for schemes other than symmetric 4 and 8 bits."""
    return any(not s.symmetric or s.bits not in SERVED_BITS for s in output.schemes)


def has_ordered_inputs(output: Output) -> bool:
    """Test for `desc_act` with groups."""
    return any(s.ordered and s.group_size != WHOLE_ROW for s in output.schemes)


def splits_fusion(output: Output) -> bool:
    """Test for several schemes in modules that serving programs fuse."""
    return output.split_fusion is not None


def has_experts_beside_main_scheme(output: Output) -> bool:
    """Test for experts in another scheme than most matrices."""
    main = find_main_scheme(output.stored)
    return any(layer.experts[0].up.scheme != main for _, layer in output.stored.moe_blocks)


def is_other_than_w4_throughout(output: Output) -> bool:
    """Test for schemes other than symmetric 4 bits throughout."""
    main = find_main_scheme(output.stored)
    symmetric4 = main is not None and (main.bits, main.symmetric) == (4, True)
    return not symmetric4 or bool(build_dynamic(output.stored))


def is_asymmetric(output: Output) -> bool:
    """Test for asymmetric integers."""
    return any(not scheme.symmetric for scheme in output.schemes)


def has_unserved_group(output: Output) -> bool:
    """Test for groups other than 32, 64, 128 and whole rows."""
    return any(scheme.group_size not in SERVED_GROUPS for scheme in output.schemes)


def has_odd_hidden(output: Output) -> bool:
    """Test for hidden sizes that 128 does not divide."""
    return output.stored.embedding.shape[-1] % TILE != 0


def has_experts_that_differ(output: Output) -> bool:
    """Test for experts with several schemes, or without one."""
    found = list_experts_schemes(output.stored)
    return len(found) > 1 or found == {None}


def is_quantized_output(output: Output) -> bool:
    """Test for quantized numbers."""
    return bool(output.schemes)


def is_unread_by_transformers(output: Output) -> bool:
    """Test for families of which transformers has no names for single experts."""
    return output.family not in READ_BY_TRANSFORMERS


def is_per_channel(output: Output) -> bool:
    """Test for per-channel scales."""
    main = find_main_scheme(output.stored)
    return main is not None and main.group_size == WHOLE_ROW


def is_symmetric_in_4_bits(output: Output) -> bool:
    """Test for no other scheme than symmetric 4 bits in blocks; the ends may be in 8."""
    weights = (weight for block in output.stored.blocks for _, weight in block.weights())
    schemes = {weight.scheme for weight in weights if weight.scheme}
    return all((s.bits, s.symmetric) == (4, True) for s in schemes)


def needs_eager_in_stock(output: Output) -> bool:
    """Test for experts that transformers' default implementation does not take."""
    layers = [layer for _, layer in output.stored.moe_blocks]
    experts = [layer.experts[0] for layer in layers if layer.experts]
    return is_even(output) and any(
        not takes_grouped_mm((e.up.shape[1], e.up.shape[0]), DTYPES[e.up.dtype]) for e in experts
    )


def has_quantized_experts(output: Output) -> bool:
    """Test for quantized experts."""
    layers = (layer for _, layer in output.stored.moe_blocks)
    return any(expert.up.scheme for layer in layers for expert in layer.experts)


def has_three_bits(output: Output) -> bool:
    """Test for experts of 3 bits."""
    return any(scheme.bits == 3 for scheme in output.schemes)


def is_generic(output: Output) -> bool:
    """Test for families without a row of their own."""
    return output.stored.family.generic


def make_family_case(*names: str) -> Case:
    """Make the case of some families."""

    def is_of(output: Output) -> bool:
        return output.family in names

    is_of.__doc__ = f"Test for {', '.join(names)}."
    return is_of


def is_uncomputed_by_llama_cpp(output: Output) -> bool:
    """Test for settings that llama.cpp ignores: other `norm_topk_prob`, windows, scaled rope."""
    return bool(output.uncomputed)


def is_for_auto_round(output: Output) -> bool:
    """Test for `config=auto-round`."""
    return output.options.get("config") == AUTO_ROUND


def suits_kt_kernel(output: Output) -> bool:
    """Test for olmoe, qwen2_moe, qwen3_moe with experts in symmetric 4 bits, groups from 32 on."""
    schemes = list_experts_schemes(output.stored)
    return output.family in ("olmoe", "qwen2_moe", "qwen3_moe") and all(
        s is not None and (s.bits, s.symmetric, s.ordered) == (4, True, False) and s.group_size > 16
        for s in schemes
    )


def describe_case(case: Case) -> str:
    """Return which outputs a case is for; empty: all that no other rule is for."""
    return (case.__doc__ or "").removeprefix("Test for ").rstrip(".")


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
        script: file or folder in ``benchmarks/readers`` that was run; a ``yes`` has one.
        command, snippet: see `Loader`.
    """

    program: str
    version: str
    verdict: Verdict
    note: str = ""
    evidence: str = ""
    case: Case = is_any_output
    script: str = ""
    command: str = ""
    snippet: str = ""

    def judge(self, output: object) -> Loader:
        """Return the verdict on an output in this case.

        Args:
            output: the `Output`, or what stands for outputs in general.
        """
        script = f"{SCRIPTS}/{self.script}" if self.script else ""
        evidence = ": ".join(part for part in (self.evidence or "run", script) if part)
        parts = (self.version, self.note.format(o=output), evidence if script else self.evidence)
        return Loader(
            self.program,
            self.verdict,
            "; ".join(part for part in parts if part),
            self.version,
            script,
            self.command,
            self.snippet,
        )
