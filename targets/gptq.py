"""GPTQ version 1 checkpoints: 2, 4 or 8 bits; several schemes by ``dynamic``.

Act-order with ``g_idx`` is only kept from quantized sources.

The layout is that of AutoGPTQ and its successor GPTQModel, with the tensor names that each family
has on disk. This target only stores quantized weights; any pass that quantizes may choose them.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from moe2edge.errors import InputError, Unsupported, VerificationFailed
from moe2edge.model import hf_config
from moe2edge.model.block import is_low_rank, is_quantizable
from moe2edge.model.model import Model
from moe2edge.model.older_spellings import add_older_spellings
from moe2edge.numerics.scheme import Scheme
from moe2edge.pipeline.holders import refuse_ends
from moe2edge.storage.output import (
    AUTO_ROUND,
    GPTQ_BITS,
    GPTQ_GROUPS,
    ORDER_PART,
    plan_gptq_tensors,
)
from moe2edge.storage.safetensors_files import write_checkpoint
from moe2edge.storage.source_formats.aliases import name_by_class
from moe2edge.storage.text_files import read_json, write_json
from moe2edge.targets._auto_round import (
    AUTO_ROUND_SETTINGS_FILE,
    build_auto_round_config,
    check_auto_round,
)
from moe2edge.targets._gptq_dynamic import build_dynamic, encode_scheme
from moe2edge.targets._module_patterns import find_main_scheme
from moe2edge.targets._packed_checkpoint import PackedCheckpoint, StoredParts
from moe2edge.targets._tensors import check_group_size

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.model.weights import Weight

# The same settings as in config.json, for programs that look here.
SETTINGS_FILE = "quantize_config.json"
UNQUANTIZED = "target gptq holds quantized weights; quantize with rtn or gptq, or export to hf"


@dataclass(frozen=True)
class Gptq(PackedCheckpoint):
    """A GPTQ checkpoint: experts, shared experts, attention and dense MLPs in few bits.

    Attributes:
        layout: how layers that differ are stored: ``natural`` is for ``moe2edge.load``,
            ``uniform`` and ``mlp-only`` are for serving programs as well.
        config: the library whose config is written: with that of auto-round, and auto-round
            installed, transformers runs the folder packed.
    """

    summary: ClassVar[str] = (
        "GPTQ checkpoint for moe2edge.load (vLLM, SGLang: by source inspection)"
    )
    config: Literal["gptq", "auto-round"] = "gptq"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.config not in ("gptq", AUTO_ROUND):
            raise InputError(f"config is gptq or {AUTO_ROUND}, not {self.config}")

    def accepts(self, model: Model) -> None:
        """Refuse what the format cannot express.

        Raises:
            Unsupported: nothing is quantized; a tensor is quantized that the format stores in full
                precision; a matrix does not fill words and groups; or the layout cannot hold the
                layers.
        """
        refuse_ends(model, self.name)
        stored, known = self.stored(model), set()
        for name, role, weight in stored.tensors():
            kind = weight.shape, id(weight.scheme), is_quantizable(role), is_low_rank(role)
            if weight.scheme is None or kind in known:
                continue
            known.add(kind)
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
        if self.config == AUTO_ROUND:
            check_auto_round(stored)

    def write(self, model: Model, folder: Path) -> dict[str, str]:
        """Write the weights, ``config.json``, and the settings in a file of their own.

        At most one matrix is in memory at a time.

        Raises:
            VerificationFailed: a scale is not exact in float16 and in bfloat16.
            Unsupported: nothing is quantized.
        """
        model = self.stored(model)
        if auto_round := self.config == AUTO_ROUND:
            settings = build_auto_round_config(model)
        else:
            settings = build_quantization_config(model)
        config = add_older_spellings(hf_config.build_transformers_dict(model))
        config["quantization_config"] = settings
        own = AUTO_ROUND_SETTINGS_FILE if auto_round else SETTINGS_FILE
        configs = {"config.json": config, own: settings}
        written = {name: write_json(folder / name, data) for name, data in configs.items()}
        return written | write_checkpoint(folder, self.plan_tensors_of(model))

    def check_derived(self, folder: Path) -> None:
        """Compare the settings with ``config.json``, and the index with the shards.

        Raises:
            VerificationFailed: names the file.
        """
        settings = read_json(folder / "config.json").get("quantization_config") or {}
        auto_round = settings.get("quant_method") == AUTO_ROUND
        own = AUTO_ROUND_SETTINGS_FILE if auto_round else SETTINGS_FILE
        if read_json(folder / own) != settings:
            raise VerificationFailed(
                f"{own} is not the quantization_config of config.json; export it again"
            )
        super().check_derived(folder)

    def plan_parts(self, weight: Weight) -> StoredParts:
        """Return the tensors that store a quantized matrix, by the end of their names."""
        assert weight.scheme is not None, "the matrix is not quantized"
        parts = plan_gptq_tensors(weight.shape, weight.scheme)
        if self.config == AUTO_ROUND:  # the library has no order of inputs
            del parts[ORDER_PART]
        return parts

    def name_part(self, name: str) -> str:
        """Return the name of a tensor by which the reader of the config asks for it."""
        return name_by_class(name) if self.config == AUTO_ROUND else name

    def pack(self, name: str, weight: Weight) -> dict[str, Tensor]:
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
    check_group_size(name, ins, scheme, whole_rows=True)
