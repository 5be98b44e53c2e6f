"""FP8 checkpoints with their own names of scales: DeepSeek, Qwen, MiniMax, Mistral, fbgemm.

The scales called ``weight_scale_inv`` multiply like all others. Experts of DeepSeek-V4 are pairs of
E2M1 in signed bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from moe2edge.errors import InputError
from moe2edge.storage.source_formats.scaled import FLOATS, ScaleBlock, make_paired, make_scaled
from moe2edge.storage.source_formats.source_format import QuantizedTensor, SourceFormat, get_stem

SCALE_PARTS = ("weight_scale_inv", "weight_scale", "scale", "qscale_weight")
PAIRED = ("I8", "U8")
PAIR_GROUP = 32


@dataclass(frozen=True)
class Fp8Source(SourceFormat):
    """Matrices F8_E4M3 times a scale of each block, row or matrix."""

    PARTS: ClassVar[tuple[str, ...]] = ("weight", *SCALE_PARTS)
    FUSED: ClassVar[tuple[str, ...]] = ("", "_scale_inv", "_scale")

    @property
    def name(self) -> str:
        """Name of the format for reports."""
        block = self.block
        return "FP8" if block is None else f"FP8 in blocks of {block[0]} x {block[1]}"

    @property
    def block(self) -> ScaleBlock | None:
        """Rows and columns of a block."""
        return read_block(self.settings, "weight_block_size")

    @property
    def notes(self) -> tuple[str, ...]:
        """Say what becomes of activations."""
        return (ROUNDED_ACTIVATIONS.format("FP8"),)

    def find(self, name: str, shape: tuple[int, ...]) -> QuantizedTensor | None:
        """Find a matrix, or a fused tensor, by dtype."""
        weight = self.tensors.get(name)
        if weight is None or weight.dtype not in (*FLOATS, *PAIRED):
            return None
        stem = get_stem(name)
        parts = [f"{stem}.{part}" for part in SCALE_PARTS]
        if not name.endswith(".weight"):
            parts = [f"{name}{part}" for part in self.FUSED[1:]]
        found = [self.tensors[part] for part in parts if part in self.tensors]
        if len(found) != 1:
            raise InputError(
                f"{name} is {weight.dtype} and has {len(found)} scales, expected one of "
                f"{', '.join(part.removeprefix(stem) for part in parts)}; download the checkpoint "
                "again"
            )
        if len(weight.shape) not in (2, 3):
            raise InputError(f"{name} is {weight.dtype} {list(weight.shape)}, expected a matrix")
        if weight.dtype in PAIRED:
            return make_paired(weight, found[0], PAIR_GROUP)
        return make_scaled(weight, found[0], self.block)


ROUNDED_ACTIVATIONS = (
    "programs that run it as it is round activations to {}; here they are not rounded"
)


def read_block(settings: Mapping[str, Any], key: str) -> ScaleBlock | None:
    """Read rows and columns of a block.

    Raises:
        InputError: they are not two positive numbers.
    """
    block = settings.get(key)
    if block is None:
        return None
    sizes = list(block) if isinstance(block, list | tuple) else []
    if len(sizes) != 2 or not all(type(size) is int and size > 0 for size in sizes):
        raise InputError(f"config.json: {key} is {block!r}, expected two numbers, such as 128, 128")
    return sizes[0], sizes[1]
