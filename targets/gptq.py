"""GPTQ version 1 checkpoints: 4 bits, symmetric, no act-order, one group size.

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

from moe2edge import per_layer
from moe2edge.checkpoint import Planned, open_checkpoint, write_checkpoint, write_json
from moe2edge.errors import Unsupported, VerificationFailed
from moe2edge.loading import load
from moe2edge.model import Model, Weight, is_quantizable
from moe2edge.scheme import GROUP_SIZES, Scheme
from moe2edge.stored import gptq_parts, stored_model
from moe2edge.target import Loader, Runtime, Target
from moe2edge.targets import _layouts
from moe2edge.targets._layouts import Layout
from moe2edge.targets._tensors import file_nbytes, has_dense_blocks, plain

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.rounding import Quantized


UNQUANTIZED = "target gptq holds 4-bit weights; quantize with rtn or gptq, or export to hf"


@dataclass(frozen=True)
class Gptq(Target):
    """A GPTQ checkpoint whose experts, shared experts, attention and dense MLPs have 4 bits.

    Attributes:
        layout: how layers that differ are held: ``natural`` is for ``moe2edge.load``, ``uniform``
            and ``mlp-only`` are for serving programs as well.
    """

    summary: ClassVar[str] = "GPTQ checkpoint, 4 bits; for moe2edge.load (vLLM, SGLang: as read)"
    libraries: ClassVar[tuple[str, ...]] = ("torch", "transformers.modeling_utils")
    layout: Layout = "natural"

    def __post_init__(self) -> None:
        _layouts.check(self.layout)

    def accepts(self, model: Model) -> None:
        """Refuse what the format cannot say.

        Raises:
            Unsupported: a selected tensor is not quantized, another one is, schemes differ, a
                matrix does not fill words and groups, or the layout cannot hold the layers.
        """
        schemes: dict[Scheme, str] = {}
        for name, role, weight in self.stored(model).tensors():
            if is_quantizable(role) != (weight.scheme is not None):
                raise Unsupported(_misplaced(name, weight))
            if weight.scheme is not None:
                schemes.setdefault(weight.scheme, name)
                _check_shape(name, weight.shape, weight.scheme)
        if len(schemes) > 1:
            found = ", ".join(f"{name}: {scheme}" for scheme, name in schemes.items())
            raise Unsupported(
                f"target gptq holds one scheme per checkpoint, found {found}; give one group_size"
            )

    def stored(self, model: Model) -> Model:
        """The model as the layout holds it.

        Raises:
            Unsupported: it cannot.
        """
        return _layouts.stored(model, self.layout, "gptq")

    def nbytes(self, model: Model) -> int:
        """Bytes of the weight files."""
        return file_nbytes(_plan(self.stored(model)))

    def runtime_nbytes(self, model: Model) -> int:
        """Bytes of all parameters in float32, as the exact check loads them."""
        return 4 * self.stored(model).parameters

    def write(self, model: Model, folder: Path) -> None:
        """Write the weights, ``config.json`` and ``quantize_config.json``.

        One matrix is in memory at a time.

        Raises:
            VerificationFailed: a scale is not exact in float16 and in bfloat16.
        """
        model, scheme = self.stored(model), model.scheme
        if scheme is None:
            raise Unsupported(UNQUANTIZED)
        settings = quantization_config(scheme)
        config = {**per_layer.config_of(model), "quantization_config": settings}
        write_json(folder / "config.json", config)
        write_json(folder / "quantize_config.json", settings)
        write_checkpoint(folder, _plan(model))

    def tensors(self, folder: Path) -> Iterator[tuple[str, Tensor | Quantized]]:
        """Read everything back, integers and scales where quantized.

        Raises:
            VerificationFailed: a tensor is missing, unexpected or of another shape, or zero
                points or ``g_idx`` are not what this target writes.
        """
        for name, _, weight in stored_model(open_checkpoint(str(folder))).tensors():
            yield name, weight.load() if weight.scheme is None else weight.quantized()

    def reopen(self, folder: Path, *, exact: bool = False) -> Runtime:
        """The folder through ``moe2edge.load``: float32 if ``exact``, else bfloat16."""
        import torch

        from moe2edge.torch_runtime import TorchRuntime

        return TorchRuntime(load(folder, dtype=torch.float32 if exact else torch.bfloat16))

    def without_skipping(self, model: Model, folder: Path) -> Runtime:
        """The folder with every chosen expert run."""
        from moe2edge.torch_runtime import run_all_experts

        return run_all_experts(self.reopen(folder))

    def loaders(self, model: Model) -> tuple[Loader, ...]:
        """Which programs load the folder; what was not run is said to be read."""
        ours = Loader("moe2edge", "yes", "moe2edge.load(folder); dequantizes at load")
        held = self.stored(model)
        vllm, model = _layouts.vllm_loader(model, held), held
        if not model.is_uniform:
            others = ("transformers", "GPTQModel", "vLLM", "SGLang", "llama.cpp")
            return (ours, *_layouts.no_stock_loaders(model, *others))
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


def quantization_config(scheme: Scheme) -> dict[str, Any]:
    """What the checkpoint says of itself, as GPTQModel and vLLM read it.

    ``checkpoint_format`` ``gptq`` is version 1, which stores zero points minus one.
    """
    return {
        "quant_method": "gptq",
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "sym": True,
        "desc_act": False,
        "checkpoint_format": "gptq",
        "pack_dtype": "int32",
        "lm_head": False,
        "meta": {"quantizer": [f"moe2edge:{version('moe2edge')}"]},
    }


# ---- what the format can say -------------------------------------------------------------------


def _misplaced(name: str, weight: Weight) -> str:
    if weight.scheme is None:
        return f"{name} is not quantized; {UNQUANTIZED}"
    return f"target gptq keeps {name} in the source's precision, but it is {weight.scheme.name}"


def _check_shape(name: str, shape: tuple[int, ...], scheme: Scheme) -> None:
    """Refuse a matrix that does not fill words and groups.

    Raises:
        Unsupported: bits, group size or shape do not fit.
    """
    outs, ins = shape
    if scheme.bits != 4 or scheme.group_size not in GROUP_SIZES:
        raise Unsupported(
            f"{name} has {scheme.bits} bits in groups of {scheme.group_size}; target gptq holds "
            f"4 bits in groups of {', '.join(map(str, GROUP_SIZES))}"
        )
    if outs % 8 or ins % 8:
        raise Unsupported(
            f"{name} has shape {list(shape)}; target gptq packs eight numbers to a word, so both "
            "sizes must be divisible by 8"
        )
    if ins % scheme.group_size:
        raise Unsupported(
            f"{name} has {ins} inputs, which groups of {scheme.group_size} do not divide; choose "
            "a smaller group_size"
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
            plan.append(plain(name, weight))
            continue
        stem = name.removesuffix(".weight")
        for part, (shape, dtype) in gptq_parts(weight.shape, weight.scheme).items():
            plan.append(Planned(f"{stem}.{part}", shape, dtype, part_of(name, part)))
    return plan


def _pack(name: str, quantized: Quantized) -> dict[str, Tensor]:
    """The tensors of one matrix.

    Raises:
        VerificationFailed: a scale is not exact in float16 and in bfloat16, so that readers
            would compute with different numbers.
    """
    import torch

    from moe2edge.packing import pack_gptq

    scales = quantized.scales
    for dtype in (torch.float16, torch.bfloat16):
        if not torch.equal(scales.to(dtype).to(scales.dtype), scales):
            raise VerificationFailed(
                f"{name} has scales that {dtype} does not hold exactly; choose them with "
                "moe2edge.rounding.portable_scales before rounding"
            )
    return pack_gptq(quantized)


# ---- who reads it ------------------------------------------------------------------------------


def _gptqmodel(model: Model) -> Loader:
    if model.family.model_type == "mixtral":
        return Loader("GPTQModel", "no", "7.7 refuses the names that vLLM and SGLang want")
    if has_dense_blocks(model):
        return Loader("GPTQModel", "no", "7.7 leaves dense MLPs unfilled without a word")
    return Loader("GPTQModel", "yes", "7.7, run on a CPU for this family: benchmarks/gptq_reader")


def _sglang(model: Model) -> Loader:
    if has_dense_blocks(model):
        return Loader("SGLang", "no", "0.5.23, as read, takes every block for an MoE layer")
    return Loader("SGLang", "as read", "0.5.23; needs --quantization gptq_marlin")


def _llama_cpp(model: Model) -> Loader:
    if has_dense_blocks(model):
        return Loader("llama.cpp", "no", "it wants a router in every block")
    return Loader("llama.cpp", "not tried", "its converter; export to hf for it")
