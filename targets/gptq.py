"""GPTQ version 1 checkpoints: 2, 4 or 8 bits, no act-order; several schemes by ``dynamic``.

The layout is that of AutoGPTQ and its successor GPTQModel, with the tensor names that each family
has on disk. Solving is not done here: any pass that quantizes will do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from moe2edge.errors import Unsupported, VerificationFailed
from moe2edge.model import hf_config
from moe2edge.model.model import Model, is_low_rank, is_quantizable
from moe2edge.numerics.scheme import WHOLE_ROW, Scheme
from moe2edge.pipeline.target import Loader, Target
from moe2edge.runtime.load import load
from moe2edge.runtime.memory import Estimate
from moe2edge.runtime.protocol import Runtime
from moe2edge.storage.checkpoint import open_checkpoint
from moe2edge.storage.output import GPTQ_BITS, GPTQ_GROUPS, open_stored_model, plan_gptq_tensors
from moe2edge.storage.safetensors_files import Planned, write_checkpoint
from moe2edge.storage.text_files import write_json
from moe2edge.targets import _layouts
from moe2edge.targets._gptq_dynamic import (
    build_dynamic,
    encode_scheme,
    find_main_scheme,
    find_split_fusion,
)
from moe2edge.targets._layouts import Layout
from moe2edge.targets._tensors import estimate_file_bytes, has_dense_blocks, plan_plain

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.numerics.grid import Quantized

# Of the kernels that vLLM and SGLang have for experts.
SERVED_BITS = (4, 8)
UNQUANTIZED = "target gptq holds quantized weights; quantize with rtn or gptq, or export to hf"


@dataclass(frozen=True)
class Gptq(Target):
    """A GPTQ checkpoint: experts, shared experts, attention and dense MLPs in few bits.

    Attributes:
        layout: how layers that differ are held: ``natural`` is for ``moe2edge.load``, ``uniform``
            and ``mlp-only`` are for serving programs as well.
    """

    summary: ClassVar[str] = "GPTQ checkpoint for moe2edge.load (vLLM, SGLang: as read)"
    streams: ClassVar[bool] = True
    libraries: ClassVar[tuple[str, ...]] = ("torch", "transformers.modeling_utils")
    layout: Layout = "natural"

    def __post_init__(self) -> None:
        _layouts.check_layout(self.layout)

    def accepts(self, model: Model) -> None:
        """Refuse what the format cannot say.

        Raises:
            Unsupported: nothing is quantized, or a tensor that the format keeps in full; a matrix
                does not fill words and groups, or the layout cannot hold the layers.
        """
        held = self.stored(model)
        for name, role, weight in held.tensors():
            if weight.scheme is None:
                continue
            if not is_quantizable(role) and not is_low_rank(role):
                raise Unsupported(
                    f"target gptq keeps {name} in the source's precision, but it is {weight.scheme}"
                )
            other = "give it more bits, or leave it out by a rule with bits: 16"
            if is_low_rank(role):
                other = "choose such a rank, or factors: 16"
            _check_shape(name, weight.shape, weight.scheme, other)
        if held.scheme is None:
            name = next(name for name, role, _ in held.tensors() if is_quantizable(role))
            raise Unsupported(f"{name} is not quantized, nor is another; {UNQUANTIZED}")

    def stored(self, model: Model) -> Model:
        """The model as the layout holds it.

        Raises:
            Unsupported: it cannot.
        """
        return _layouts.convert_layout(model, self.layout, "gptq")

    def estimate(self, model: Model) -> Estimate:
        """Estimate the weight files, and in memory what runs in 4 bits, the rest in bfloat16."""
        import torch

        from moe2edge.runtime.int4 import plan_packing

        held = self.stored(model)
        packed = set(plan_packing(held, torch.bfloat16).packed)
        memory = sum(w.nbytes if n in packed else 2 * w.count for n, _, w in held.tensors())
        return Estimate(memory, estimate_file_bytes(_plan(held)))

    def write(self, model: Model, folder: Path) -> None:
        """Write the weights, ``config.json`` and ``quantize_config.json``.

        One matrix is in memory at a time.

        Raises:
            VerificationFailed: a scale is not exact in float16 and in bfloat16.
            Unsupported: nothing is quantized.
        """
        model = self.stored(model)
        settings = build_quantization_config(model)
        config = {**hf_config.build_transformers_dict(model), "quantization_config": settings}
        write_json(folder / "config.json", config)
        write_json(folder / "quantize_config.json", settings)
        write_checkpoint(folder, _plan(model))

    def tensors(self, folder: Path) -> Iterator[tuple[str, Tensor | Quantized]]:
        """Read everything back, integers and scales where quantized.

        Raises:
            VerificationFailed: a tensor is missing, unexpected or of another shape, or zero
                points or ``g_idx`` are not what this target writes.
        """
        for name, _, weight in self.streamed(folder).tensors():
            yield name, weight.load() if weight.scheme is None else weight.quantized()

    def streamed(self, folder: Path) -> Model:
        """The folder as a model."""
        return open_stored_model(open_checkpoint(str(folder)))

    def reopen(self, folder: Path, *, exact: bool = False) -> Runtime:
        """The folder through ``moe2edge.load``: float32 if ``exact``, else bfloat16."""
        import torch

        from moe2edge.runtime.torch_runtime import TorchRuntime

        return TorchRuntime(load(folder, dtype=torch.float32 if exact else torch.bfloat16))

    def without_skipping(self, model: Model, folder: Path) -> Runtime:
        """The folder with every chosen expert run."""
        from moe2edge.runtime.torch_runtime import run_all_experts

        return run_all_experts(self.reopen(folder))

    def loaders(self, model: Model) -> tuple[Loader, ...]:
        """Which programs load the folder; what was not run is said to be read."""
        ours = Loader("moe2edge", "yes", "moe2edge.load(folder); symmetric 4 bits run packed")
        held = self.stored(model)
        vllm, model = _vllm(model, held), held
        if not model.is_uniform:
            others = ("transformers", "GPTQModel", "vLLM", "SGLang", "llama.cpp")
            return (ours, *_layouts.list_refusing_loaders(model, *others))
        return (
            ours,
            Loader(
                "transformers",
                "no",
                "alone, it leaves experts as random numbers and only prints a report",
            ),
            _gptqmodel(model),
            vllm,
            _sglang(model),
            _llama_cpp(model),
        )


def build_quantization_config(model: Model) -> dict[str, Any]:
    """What the checkpoint says of itself, as GPTQModel and vLLM read it.

    ``checkpoint_format`` ``gptq`` is version 1, which stores zero points minus one.

    Raises:
        Unsupported: nothing is quantized.
    """
    scheme = find_main_scheme(model)
    if scheme is None:
        raise Unsupported(UNQUANTIZED)
    own = build_dynamic(model)
    return {
        "quant_method": "gptq",
        **encode_scheme(scheme),
        **({"dynamic": own} if own else {}),
        "desc_act": False,
        "checkpoint_format": "gptq",
        "pack_dtype": "int32",
        "lm_head": False,
        "meta": {"quantizer": [f"moe2edge:{version('moe2edge')}"]},
    }


# ---- what the format can say -------------------------------------------------------------------


def _check_shape(name: str, shape: tuple[int, ...], scheme: Scheme, other: str) -> None:
    """Refuse a matrix that does not fill words and groups; ``other`` is what to do about words.

    Raises:
        Unsupported: bits, group size or shape do not fit.
    """
    outs, ins = shape
    if scheme.bits not in GPTQ_BITS or scheme.group_size not in GPTQ_GROUPS:
        raise Unsupported(
            f"{name} is {scheme}; target gptq holds {', '.join(map(str, GPTQ_BITS))} bits in "
            f"groups of {', '.join(map(str, GPTQ_GROUPS))} (-1: whole rows); choose such ones, or "
            "export to hf:dequantize=true, which holds any"
        )
    per_word = 32 // scheme.bits
    if outs % per_word or ins % per_word:
        raise Unsupported(
            f"{name} has shape {list(shape)}; target gptq packs {per_word} numbers of "
            f"{scheme.bits} bits to a word, so both sizes must be divisible by {per_word}; {other}"
        )
    if ins % scheme.width(ins):
        raise Unsupported(
            f"{name} has {ins} inputs, which groups of {scheme.group_size} do not divide; choose "
            "a smaller group_size, or -1 for whole rows"
        )


# ---- writing -----------------------------------------------------------------------------------


def _plan(model: Model) -> list[Planned]:
    """All tensors of the checkpoint; the parts of a matrix are packed once, at the first."""
    weights = {name: weight for name, _, weight in model.tensors()}

    @lru_cache(maxsize=1)
    def packed(name: str) -> dict[str, Tensor]:
        return _pack(name, weights[name].quantized())

    def part_of(name: str, part: str) -> Callable[[], Tensor]:
        return lambda: packed(name)[part]

    plan = []
    for name, weight in weights.items():
        if weight.scheme is None:
            plan.append(plan_plain(name, weight))
            continue
        stem = name.removesuffix(".weight")
        for part, (shape, dtype) in plan_gptq_tensors(weight.shape, weight.scheme).items():
            plan.append(Planned(f"{stem}.{part}", shape, dtype, part_of(name, part)))
    return plan


def _pack(name: str, quantized: Quantized) -> dict[str, Tensor]:
    """The tensors of one matrix.

    Raises:
        VerificationFailed: a scale is not exact in float16 and in bfloat16, so that readers
            would compute with different numbers.
    """
    import torch

    from moe2edge.numerics.packing import pack_gptq

    scales = quantized.scales
    for dtype in (torch.float16, torch.bfloat16):
        if not torch.equal(scales.to(dtype).to(scales.dtype), scales):
            raise VerificationFailed(
                f"{name} has scales that {dtype} does not hold exactly; choose them with "
                "moe2edge.numerics.grid.portable_scales before rounding"
            )
    return pack_gptq(quantized)


# ---- who reads it ------------------------------------------------------------------------------


def _gptqmodel(model: Model) -> Loader:
    if model.family.model_type == "mixtral":
        return Loader("GPTQModel", "no", "7.7 refuses the names that vLLM and SGLang want")
    if has_dense_blocks(model):
        return Loader("GPTQModel", "no", "7.7 leaves dense MLPs unfilled without a word")
    scheme = find_main_scheme(model)
    if scheme is None or (scheme.bits, scheme.symmetric) != (4, True) or build_dynamic(model):
        note = "7.7 with this scheme; it was run with symmetric 4 bits throughout"
        return Loader("GPTQModel", "not tried", note)
    if scheme.group_size == WHOLE_ROW:
        return Loader("GPTQModel", "not tried", "7.7 with whole rows; it was run with groups")
    return Loader("GPTQModel", "yes", "7.7, run on a CPU for this family: benchmarks/gptq_reader")


def _vllm(model: Model, held: Model) -> Loader:
    known = _layouts.judge_vllm(model, held)
    reason = _unserved(held)
    return known if reason is None or known.verdict == "no" else Loader("vLLM", "no", reason)


def _sglang(model: Model) -> Loader:
    if has_dense_blocks(model):
        return Loader("SGLang", "no", "0.5.23, as read, takes every block for an MoE layer")
    if (reason := _unserved(model)) is not None:
        return Loader("SGLang", "no", reason)
    main = find_main_scheme(model)
    if any(layer.experts[0].gate.scheme != main for _, layer in model.moe_blocks):
        note = "0.5.23, as read, knows one scheme for all experts, the one of most matrices"
        return Loader("SGLang", "no", note)
    return Loader("SGLang", "as read", "0.5.23; needs --quantization gptq_marlin")


def _unserved(model: Model) -> str | None:
    """Why serving programs, as read, do not take the schemes; None if they do."""
    schemes = {weight.scheme for _, _, weight in model.tensors() if weight.scheme}
    if any(not scheme.symmetric or scheme.bits not in SERVED_BITS for scheme in schemes):
        return "as read, it takes symmetric 4 and 8 bits only"
    apart = find_split_fusion(model)
    return apart and f"as read, it keeps parts of {apart} as one, and they differ in scheme"


def _llama_cpp(model: Model) -> Loader:
    if has_dense_blocks(model):
        return Loader("llama.cpp", "no", "it wants a router in every block")
    return Loader("llama.cpp", "not tried", "its converter; export to hf for it")
