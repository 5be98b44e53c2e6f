"""Checkpoints of compressed-tensors in ``pack-quantized``: 2, 3, 4 or 8 bits, schemes by module.

The layout and the config are those of the library, which vLLM, SGLang and transformers read it
with. This target only stores quantized weights; any pass that quantizes may choose them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from moe2edge.errors import Unsupported
from moe2edge.model import hf_config
from moe2edge.model.block import is_low_rank, is_quantizable
from moe2edge.model.family import Family
from moe2edge.model.model import Model
from moe2edge.model.older_spellings import add_older_spellings
from moe2edge.model.weights import DTYPES
from moe2edge.numerics.scheme import Scheme
from moe2edge.pipeline.holders import refuse_ends
from moe2edge.storage.compressed_form import plan_compressed_tensors
from moe2edge.storage.safetensors_files import write_checkpoint
from moe2edge.storage.text_files import write_json
from moe2edge.targets._compressed_config import READ_BY_TRANSFORMERS, build_compressed_config
from moe2edge.targets._layouts import Layout
from moe2edge.targets._packed_checkpoint import PackedCheckpoint, StoredParts
from moe2edge.targets._tensors import check_group_size

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.model.weights import Weight


@dataclass(frozen=True)
class CompressedTensors(PackedCheckpoint):
    """A checkpoint of compressed-tensors: experts, attention and dense MLPs in few bits.

    Attributes:
        layout: how layers that differ are stored: ``uniform`` and ``mlp-only`` are for serving
            programs and stock transformers, ``natural`` is for ``moe2edge.load``.
    """

    summary: ClassVar[str] = (
        "compressed-tensors (pack-quantized) for transformers with that library and moe2edge.load"
    )
    layout: Layout = "uniform"

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
        return written | write_checkpoint(folder, self.plan_tensors_of(model))

    def plan_parts(self, weight: Weight) -> StoredParts:
        """Return the tensors that store a quantized matrix, by the end of their names."""
        assert weight.scheme is not None, "the matrix is not quantized"
        return plan_compressed_tensors(weight.shape, weight.scheme, find_scale_dtype(weight))

    def pack(self, name: str, weight: Weight) -> dict[str, Tensor]:
        """Pack one matrix into the tensors that store it."""
        import torch

        from moe2edge.numerics.packing import pack_compressed

        return pack_compressed(weight.quantized(), getattr(torch, DTYPES[find_scale_dtype(weight)]))


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
    check_group_size(name, shape[1], scheme, whole_rows=True)


# ---- writing -------------------------------------------------------------------------------------


def find_scale_dtype(weight: Weight) -> str:
    """Return the dtype that scales are stored in, as safetensors spells it: that of the model.

    Scales of a source are stored in the dtype that they had, which alone may hold them exactly.
    """
    if weight.kept and weight.scale_dtype:
        return weight.scale_dtype
    return "BF16" if weight.dtype == "BF16" else "F16"
