"""Checkpoints of compressed-tensors in ``pack-quantized``: 2, 3, 4 or 8 bits, schemes by module.

The layout and the config are those of the library, which vLLM, SGLang and transformers read it
with. This target only stores quantized weights; any pass that quantizes may choose them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from moe2edge.errors import Unsupported
from moe2edge.model import hf_config
from moe2edge.model.block import is_low_rank, is_quantizable
from moe2edge.model.family import Family
from moe2edge.model.model import Model
from moe2edge.model.older_spellings import add_older_spellings
from moe2edge.model.stored_layout import list_stored_integers
from moe2edge.model.weights import DTYPES
from moe2edge.numerics.scheme import Scheme
from moe2edge.pipeline.target import Loader, Target
from moe2edge.runtime.load import load
from moe2edge.runtime.memory import Estimate
from moe2edge.runtime.protocol import Runtime
from moe2edge.storage.checkpoint import open_checkpoint
from moe2edge.storage.compressed_form import plan_compressed_tensors
from moe2edge.storage.output import open_stored_model
from moe2edge.storage.safetensors_files import PlannedTensor, check_index, write_checkpoint
from moe2edge.storage.text_files import write_json
from moe2edge.targets import _layouts
from moe2edge.targets._compressed_config import READ_BY_TRANSFORMERS, build_compressed_config
from moe2edge.targets._holders import refuse_ends
from moe2edge.targets._layouts import Layout
from moe2edge.targets._loaders import judge_loaders
from moe2edge.targets._tensors import estimate_file_bytes, plan_plain

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.model.weights import Weight
    from moe2edge.numerics.grid import Quantized


@dataclass(frozen=True)
class CompressedTensors(Target):
    """A checkpoint of compressed-tensors: experts, attention and dense MLPs in few bits.

    Attributes:
        layout: how layers that differ are stored: ``uniform`` and ``mlp-only`` are for serving
            programs and stock transformers, ``natural`` is for ``moe2edge.load``.
    """

    summary: ClassVar[str] = (
        "compressed-tensors (pack-quantized) for transformers with that library and moe2edge.load"
    )
    streams: ClassVar[bool] = True
    any_family: ClassVar[bool] = True
    libraries: ClassVar[tuple[str, ...]] = ("torch", "transformers.modeling_utils")
    layout: Layout = "uniform"

    def __post_init__(self) -> None:
        _layouts.check_layout(self.layout)

    def supports(self, family: Family) -> bool:
        """Return whether transformers reads single experts of a family, or need not."""
        return family.model_type in READ_BY_TRANSFORMERS or self.layout == "natural"

    def accepts(self, model: Model) -> None:
        """Refuse what the format cannot express.

        Raises:
            Unsupported: nothing is quantized; a tensor is quantized that the format stores in full
                precision; inputs are not in order; or the layout cannot hold the layers.
        """
        refuse_ends(model, self.name)
        stored = self.stored(model)
        for name, role, weight in stored.tensors():
            if weight.scheme is not None:
                _accept(name, role, weight.shape, weight.scheme)
        if stored.scheme is None:
            name = next(name for name, role, _ in stored.tensors() if is_quantizable(role))
            raise Unsupported(
                f"{name} is not quantized, nor is any other weight; target {self.name} holds "
                "quantized weights; quantize with rtn or gptq, or export to hf"
            )

    def stored(self, model: Model) -> Model:
        """Return the model as the layout holds it.

        Raises:
            Unsupported: the layout cannot hold it.
        """
        return _layouts.convert_layout(model, self.layout, self.name)

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
        """Write the weights and ``config.json``, at most one matrix in memory at a time.

        Raises:
            Unsupported: nothing is quantized.
        """
        model = self.stored(model)
        settings = build_compressed_config(model)
        config = add_older_spellings(hf_config.build_transformers_dict(model))
        config["quantization_config"] = settings
        written = {"config.json": write_json(folder / "config.json", config)}
        return written | write_checkpoint(folder, _plan(model))

    def tensors(self, folder: Path) -> Iterator[tuple[str, Tensor | Quantized]]:
        """Read everything back, quantized matrices as integers and scales.

        Raises:
            InputError: parts of a matrix are missing or do not fit.
            VerificationFailed: a tensor is missing, unexpected or of another shape.
        """
        for name, _, weight in self.streamed(folder).tensors():
            yield name, weight.load() if weight.scheme is None else weight.quantized()

    def check_derived(self, folder: Path) -> None:
        """Compare the index with the shards.

        Raises:
            VerificationFailed: names the tensor.
        """
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
        return judge_loaders(self.name, model, self.stored(model))


def _accept(name: str, role: str, shape: tuple[int, ...], scheme: Scheme) -> None:
    """Refuse a matrix that the format does not hold.

    Raises:
        Unsupported: so, with what to choose instead.
    """
    if not is_quantizable(role) and not is_low_rank(role):
        raise Unsupported(
            f"target compressed-tensors keeps {name} in the source's precision, but it is {scheme}"
        )
    if scheme.ordered:
        raise Unsupported(
            f"{name} is {scheme}, and target compressed-tensors has groups of neighbouring inputs "
            "only; quantize it anew in the recipe (rtn or gptq), or export to gptq, which keeps "
            "it, or to hf:dequantize=true"
        )
    if shape[1] % scheme.width(shape[1]):
        raise Unsupported(
            f"{name} has {shape[1]} inputs, which groups of {scheme.group_size} do not divide; set "
            "group_size to a smaller number, or to -1 for whole rows"
        )


# ---- writing -------------------------------------------------------------------------------------


def find_scale_dtype(weight: Weight) -> str:
    """Return the dtype that scales are stored in, as safetensors spells it: that of the model.

    Scales of a source are stored in the dtype that they had, which alone may hold them exactly.
    """
    if weight.kept and weight.scale_dtype:
        return weight.scale_dtype
    return "BF16" if weight.dtype == "BF16" else "F16"


def _plan(model: Model) -> list[PlannedTensor]:
    """Plan all tensors of the checkpoint; a matrix is packed once, when its first part is read."""
    weights = {name: weight for name, _, weight in list_stored_integers(model)}

    @lru_cache(maxsize=1)
    def packed(name: str) -> dict[str, Tensor]:
        import torch

        from moe2edge.numerics.packing import pack_compressed

        weight = weights[name]
        return pack_compressed(weight.quantized(), getattr(torch, DTYPES[find_scale_dtype(weight)]))

    def part_of(name: str, part: str) -> Callable[[], Tensor]:
        return lambda: packed(name)[part]

    plan = []
    for name, weight in weights.items():
        if weight.scheme is None:
            plan.append(plan_plain(name, weight))
            continue
        stem = name.removesuffix(".weight")
        parts = plan_compressed_tensors(weight.shape, weight.scheme, find_scale_dtype(weight))
        for part, (shape, dtype) in parts.items():
            plan.append(PlannedTensor(f"{stem}.{part}", shape, dtype, part_of(name, part)))
    return plan
