"""MXFP4 as gpt-oss stores it: fused experts, four bits E2M1, an exponent for 32 inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from moe2edge.errors import InputError
from moe2edge.storage.source_formats.source_format import QuantizedTensor, SourceFormat, check_part

if TYPE_CHECKING:
    from torch import Tensor

MXFP4_BLOCK = 32  # inputs that share an exponent; 16 bytes


@dataclass(frozen=True)
class Mxfp4Source(SourceFormat):
    """Blocks uint8 [experts, out, in / 32, 16], low half first, times ``2 ** (scale - 127)``.

    The dequantized tensor is that of transformers' class, [experts, in, out].
    """

    PARTS: ClassVar[tuple[str, ...]] = ()
    FUSED: ClassVar[tuple[str, ...]] = ("_blocks", "_scales")
    BLOCKS: ClassVar[str] = "MXFP4"

    @property
    def name(self) -> str:
        """Name of the format for reports."""
        return "MXFP4"

    def find(self, name: str, shape: tuple[int, ...]) -> QuantizedTensor | None:
        """Find a fused tensor of experts."""
        blocks, scales = (self.tensors.get(f"{name}{part}") for part in self.FUSED)
        if blocks is None and scales is None:
            return None
        if blocks is None or scales is None:
            lacking = "_blocks" if blocks is None else "_scales"
            raise InputError(f"there is no {name}{lacking}; download the checkpoint again")
        if len(blocks.shape) != 4:
            raise InputError(
                f"{blocks.name} has shape {list(blocks.shape)}, expected 4 dimensions; this is not "
                "MXFP4 as gpt-oss stores it"
            )
        experts, outs, groups, _ = blocks.shape
        check_part(blocks, (experts, outs, groups, MXFP4_BLOCK // 2), ("U8",))
        check_part(scales, (experts, outs, groups), ("U8", "F8_E8M0"))

        def decode(index: int | None) -> Tensor:
            from moe2edge.numerics.decoding import decode_e2m1, decode_e8m0

            numbers = decode_e2m1(blocks.read_slice(index))
            numbers *= decode_e8m0(scales.read_slice(index)).unsqueeze(-1)
            return numbers.flatten(-2).transpose(-1, -2).contiguous()

        return QuantizedTensor((experts, groups * MXFP4_BLOCK, outs), decode)


def plan_mxfp4(name: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors uint8 that store a tensor, by name; none if it is plain.

    >>> plan_mxfp4("mlp.experts.down_proj", (2, 64, 8))
    {'mlp.experts.down_proj_blocks': (2, 8, 2, 16), 'mlp.experts.down_proj_scales': (2, 8, 2)}
    """
    if not name.endswith("_proj") or len(shape) != 3 or shape[1] % MXFP4_BLOCK:
        return {}
    experts, ins, outs = shape
    groups = (experts, outs, ins // MXFP4_BLOCK)
    blocks, scales = (f"{name}{part}" for part in Mxfp4Source.FUSED)
    return {blocks: (*groups, MXFP4_BLOCK // 2), scales: groups}
