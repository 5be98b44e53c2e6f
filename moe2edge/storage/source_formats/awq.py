"""AWQ checkpoints in the layout ``gemm``: AutoAWQ, GPTQModel, and auto-round with its packing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from moe2edge.errors import InputError, Unsupported
from moe2edge.storage.source_formats.integers import (
    GROUP_RANGE,
    SCALE_DTYPES,
    Integers,
    describe_groups,
    read_number,
)
from moe2edge.storage.source_formats.source_format import (
    QuantizedTensor,
    SourceFormat,
    check_part,
    get_stem,
    make_shape_error,
)

if TYPE_CHECKING:
    from torch import Tensor

AWQ_BITS = (2, 3, 4, 8)
AUTO_ROUND_AWQ = ("auto_round:auto_awq", "auto_round:awq")


@dataclass(frozen=True)
class AwqSource(SourceFormat):
    """Integers and zero points packed along the outputs, with 4 bits in an order of their own.

    ``qweight`` int32 [in, out * bits / 32], ``qzeros`` int32 [groups, out * bits / 32], ``scales``
    [groups, out]; zero points are stored as they are.
    """

    PARTS: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales")

    def __post_init__(self) -> None:
        _ = self.bits, self.group_size
        _check_awq_layout(self.settings)

    @property
    def name(self) -> str:
        """Name of the format for reports."""
        return f"AWQ, {self.bits} bits in {describe_groups(self.group_size)}"

    @cached_property
    def bits(self) -> int:
        """Bits per weight."""
        return read_number(_rename(self.settings), "bits", AWQ_BITS, "quantization_config")

    @cached_property
    def group_size(self) -> int:
        """Inputs that share a scale; -1: all."""
        return read_number(_rename(self.settings), "group_size", GROUP_RANGE, "quantization_config")

    def find(self, name: str, shape: tuple[int, ...]) -> QuantizedTensor | None:
        """Find a matrix by its integers."""
        stem = get_stem(name)
        if stem == name or f"{stem}.qweight" not in self.tensors:
            return None
        words, zeros, scales = self.take_parts(name, ("qweight", "qzeros", "scales"))
        ins, outs, bits = words.shape[0], words.shape[-1] * 32 // self.bits, self.bits
        if (outs, ins) != shape:
            if len(shape) == 2 and words.shape == (shape[1] * bits // 32, shape[0]):
                raise InputError(
                    f"{name} is packed along the inputs, as GPTQ does it, but quantization_config "
                    "says quant_method awq; correct quant_method to gptq"
                )
            raise make_shape_error(name, "AWQ", (outs, ins), shape)
        matrix = Integers(
            stem, (outs, ins), bits, self.group_size, False, scales.dtype,
            read_q=lambda: _unpack(words.read(), bits, outs),
            read_scales=lambda: scales.read().T,
            read_zeros=lambda: _unpack(zeros.read(), bits, outs),
        )  # fmt: skip
        check_part(words, words.shape, ("I32",))
        check_part(zeros, (matrix.groups, outs * bits // 32), ("I32",))
        check_part(scales, (matrix.groups, outs), SCALE_DTYPES)
        return matrix.make_source()


def _unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """Unpack integers along the outputs, and turn them: uint8 [out, rows]."""
    from moe2edge.numerics.decoding import unpack_awq

    return unpack_awq(words, bits, count).T.contiguous()


def _rename(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return settings with the names of AutoAWQ replaced by the usual ones."""
    other = {"w_bit": "bits", "q_group_size": "group_size"}
    return {other.get(key, key): value for key, value in settings.items()}


def _list_layouts(settings: Mapping[str, Any]) -> Iterator[str]:
    """List what settings say of the layout."""
    if settings.get("quant_method") == "auto-round":
        if settings.get("packing_format") not in AUTO_ROUND_AWQ:
            yield str(settings.get("packing_format"))
        return
    for key in ("version", "format", "checkpoint_format"):
        if (value := settings.get(key)) is not None and str(value).lower() != "gemm":
            yield str(value)


def _check_awq_layout(settings: Mapping[str, Any]) -> None:
    """Refuse other layouts than ``gemm``.

    Raises:
        Unsupported: so.
    """
    layout = next(_list_layouts(settings), None)
    if layout is not None:
        raise Unsupported(
            f"quantization_config: AWQ in layout {layout!r} is not read, only 'gemm'; quantize it "
            "again with version: gemm, or start from the unquantized checkpoint"
        )
