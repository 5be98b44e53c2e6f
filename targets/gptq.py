"""GPTQ version 1 checkpoints: 2, 4 or 8 bits; several schemes by ``dynamic``.

Act-order with ``g_idx`` is only kept from quantized sources.

The layout is that of AutoGPTQ and its successor GPTQModel, with the tensor names that each family
has on disk. This target only stores quantized weights; any pass that quantizes may choose them.
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
from moe2edge.model.block import is_low_rank, is_quantizable
from moe2edge.model.model import Model
from moe2edge.model.older_spellings import add_older_spellings
from moe2edge.model.stored_layout import list_stored_integers
from moe2edge.numerics.scheme import Scheme
from moe2edge.pipeline.target import Loader, Target
from moe2edge.runtime.load import load
from moe2edge.runtime.memory import Estimate
from moe2edge.runtime.protocol import Runtime
from moe2edge.storage.checkpoint import open_checkpoint
from moe2edge.storage.output import GPTQ_BITS, GPTQ_GROUPS, open_stored_model, plan_gptq_tensors
from moe2edge.storage.safetensors_files import PlannedTensor, check_index, write_checkpoint
from moe2edge.storage.text_files import read_json, write_json
from moe2edge.targets import _layouts
from moe2edge.targets._gptq_dynamic import build_dynamic, encode_scheme
from moe2edge.targets._holders import refuse_ends
from moe2edge.targets._layouts import Layout
from moe2edge.targets._loaders import judge_loaders
from moe2edge.targets._module_patterns import find_main_scheme
from moe2edge.targets._tensors import estimate_file_bytes, plan_plain

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.model.weights import Weight
    from moe2edge.numerics.grid import Quantized

# The same settings as in config.json, for programs that look here.
SETTINGS_FILE = "quantize_config.json"
UNQUANTIZED = "target gptq holds quantized weights; quantize with rtn or gptq, or export to hf"


@dataclass(frozen=True)
class Gptq(Target):
    """A GPTQ checkpoint: experts, shared experts, attention and dense MLPs in few bits.

    Attributes:
        layout: how layers that differ are stored: ``natural`` is for ``moe2edge.load``,
            ``uniform`` and ``mlp-only`` are for serving programs as well.
    """

    summary: ClassVar[str] = (
        "GPTQ checkpoint for moe2edge.load (vLLM, SGLang: by source inspection)"
    )
    streams: ClassVar[bool] = True
    any_family: ClassVar[bool] = True
    libraries: ClassVar[tuple[str, ...]] = ("torch", "transformers.modeling_utils")
    layout: Layout = "natural"

    def __post_init__(self) -> None:
        _layouts.check_layout(self.layout)

    def accepts(self, model: Model) -> None:
        """Refuse what the format cannot express.

        Raises:
            Unsupported: nothing is quantized; a tensor is quantized that the format stores in full
                precision; a matrix does not fill words and groups; or the layout cannot hold the
                layers.
        """
        refuse_ends(model, self.name)
        stored = self.stored(model)
        for name, role, weight in stored.tensors():
            if weight.scheme is None:
                continue
            if not is_quantizable(role) and not is_low_rank(role):
                raise Unsupported(
                    f"target gptq keeps {name} in the source's precision, but it is {weight.scheme}"
                )
            remedy = "give it more bits, or leave it unquantized with a rule with bits: 16"
            if is_low_rank(role):
                remedy = f"choose a rank that {32 // weight.scheme.bits} divides, or factors: 16"
            _check_shape(name, weight.shape, weight.scheme, remedy)
        if stored.scheme is None:
            name = next(name for name, role, _ in stored.tensors() if is_quantizable(role))
            raise Unsupported(f"{name} is not quantized, nor is any other weight; {UNQUANTIZED}")

    def stored(self, model: Model) -> Model:
        """Return the model as the layout holds it.

        Raises:
            Unsupported: the layout cannot hold it.
        """
        return _layouts.convert_layout(model, self.layout, "gptq")

    def find_dtype(self, model: Model) -> str:
        """Return the dtype in which `reopen` runs a folder."""
        return "bfloat16"

    def estimate(self, model: Model) -> Estimate:
        """Estimate the weight files, and in memory what runs in 4 bits, the rest in bfloat16."""
        import torch

        from moe2edge.runtime.int4 import plan_packing

        held = self.stored(model)
        packed = set(plan_packing(held, torch.bfloat16).packed)
        memory = sum(w.nbytes if n in packed else 2 * w.count for n, _, w in held.tensors())
        return Estimate(memory, estimate_file_bytes(_plan(held)))

    def write(self, model: Model, folder: Path) -> dict[str, str]:
        """Write the weights, ``config.json`` and ``quantize_config.json``.

        At most one matrix is in memory at a time.

        Raises:
            VerificationFailed: a scale is not exact in float16 and in bfloat16.
            Unsupported: nothing is quantized.
        """
        model = self.stored(model)
        settings = build_quantization_config(model)
        config = add_older_spellings(hf_config.build_transformers_dict(model))
        config["quantization_config"] = settings
        configs = {"config.json": config, SETTINGS_FILE: settings}
        written = {name: write_json(folder / name, data) for name, data in configs.items()}
        return written | write_checkpoint(folder, _plan(model))

    def tensors(self, folder: Path) -> Iterator[tuple[str, Tensor | Quantized]]:
        """Read everything back, quantized matrices as integers and scales.

        Raises:
            VerificationFailed: a tensor is missing, unexpected or of another shape, or zero
                points or ``g_idx`` are not what this target writes.
        """
        for name, _, weight in self.streamed(folder).tensors():
            yield name, weight.load() if weight.scheme is None else weight.quantized()

    def check_derived(self, folder: Path) -> None:
        """Compare ``quantize_config.json`` with ``config.json``, and the index with the shards.

        Raises:
            VerificationFailed: names the file.
        """
        if read_json(folder / SETTINGS_FILE) != read_json(folder / "config.json").get(
            "quantization_config"
        ):
            raise VerificationFailed(
                f"{SETTINGS_FILE} is not the quantization_config of config.json; export it again"
            )
        check_index(folder)

    def streamed(self, folder: Path) -> Model:
        """Open the folder as a model."""
        return open_stored_model(open_checkpoint(str(folder)))

    def reopen(self, folder: Path, *, exact: bool = False) -> Runtime:
        """Open the folder by ``moe2edge.load``: in float32 if ``exact``, else in bfloat16."""
        import torch

        from moe2edge.runtime.torch_runtime import TorchRuntime

        return TorchRuntime(load(folder, dtype=torch.float32 if exact else torch.bfloat16))

    def without_skipping(self, model: Model, folder: Path) -> Runtime:
        """Open the folder so that every chosen expert runs."""
        from moe2edge.runtime.torch_runtime import run_all_experts

        return run_all_experts(self.reopen(folder))

    def loaders(self, model: Model) -> tuple[Loader, ...]:
        """Return the verdict on each program that may load the folder."""
        return judge_loaders("gptq", model, self.stored(model))


def build_quantization_config(model: Model) -> dict[str, Any]:
    """Build the ``quantization_config`` of the checkpoint, as GPTQModel and vLLM read it.

    ``checkpoint_format`` ``gptq`` is version 1, which stores zero points minus one.

    Raises:
        Unsupported: nothing is quantized.
    """
    scheme = find_main_scheme(model)
    if scheme is None:
        raise Unsupported(UNQUANTIZED)
    dynamic = build_dynamic(model)
    return {
        "quant_method": "gptq",
        **encode_scheme(scheme),
        **({"dynamic": dynamic} if dynamic else {}),
        "desc_act": scheme.ordered,
        "checkpoint_format": "gptq",
        "pack_dtype": "int32",
        "lm_head": False,
        "meta": {"quantizer": [f"moe2edge:{version('moe2edge')}"]},
    }


# ---- limits of the format ----------------------------------------------------------------------


def _check_shape(name: str, shape: tuple[int, ...], scheme: Scheme, remedy: str) -> None:
    """Refuse a matrix that does not fill words and groups; ``remedy`` is for words.

    Raises:
        Unsupported: bits, group size or shape do not fit.
    """
    outs, ins = shape
    if scheme.bits not in GPTQ_BITS or scheme.group_size not in GPTQ_GROUPS:
        raise Unsupported(
            f"{name} is {scheme}; target gptq holds {', '.join(map(str, GPTQ_BITS))} bits in "
            f"groups of {', '.join(map(str, GPTQ_GROUPS))} (-1: whole rows); choose one of these, "
            "or export to hf:dequantize=true, which takes any scheme"
        )
    per_word = 32 // scheme.bits
    if outs % per_word or ins % per_word:
        raise Unsupported(
            f"{name} has shape {list(shape)}; target gptq packs {per_word} numbers of "
            f"{scheme.bits} bits to a word, so both sizes must be divisible by {per_word}; {remedy}"
        )
    if ins % scheme.width(ins):
        raise Unsupported(
            f"{name} has {ins} inputs, which groups of {scheme.group_size} do not divide; set "
            "group_size to a smaller number, or to -1 for whole rows"
        )


# ---- writing -----------------------------------------------------------------------------------


def _plan(model: Model) -> list[PlannedTensor]:
    """Plan all tensors of the checkpoint; a matrix is packed once, when its first part is read."""
    weights = {name: weight for name, _, weight in list_stored_integers(model)}

    @lru_cache(maxsize=1)
    def packed(name: str) -> dict[str, Tensor]:
        return _pack(name, weights[name])

    def part_of(name: str, part: str) -> Callable[[], Tensor]:
        return lambda: packed(name)[part]

    plan = []
    for name, weight in weights.items():
        if weight.scheme is None:
            plan.append(plan_plain(name, weight))
            continue
        stem = name.removesuffix(".weight")
        for part, (shape, dtype) in plan_gptq_tensors(weight.shape, weight.scheme).items():
            plan.append(PlannedTensor(f"{stem}.{part}", shape, dtype, part_of(name, part)))
    return plan


def _pack(name: str, weight: Weight) -> dict[str, Tensor]:
    """Pack one matrix into the tensors that store it.

    Raises:
        VerificationFailed: a scale is not exact in float16 and in bfloat16, so that readers
            would compute with different values; scales of a source are as they were, and only
            have to be exact in float16.
    """
    import torch

    from moe2edge.numerics.packing import pack_gptq

    quantized = weight.quantized()
    scales = quantized.scales
    for dtype in (torch.float16,) if weight.kept else (torch.float16, torch.bfloat16):
        if not torch.equal(scales.to(dtype).to(scales.dtype), scales):
            raise VerificationFailed(
                f"{name} has scales that {dtype} cannot represent exactly; "
                + (
                    "target gptq cannot hold these integers of the source: quantize it anew in "
                    "the recipe, or export to hf"
                    if weight.kept
                    else "the pass that quantizes must round scales to such values first"
                )
            )
    return pack_gptq(quantized)
