"""Lazy handles on tensors: name, shape and dtype now, numbers when they are needed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self

from moe2edge.errors import Moe2EdgeError
from moe2edge.numerics.scheme import Pattern, Scheme

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.numerics.grid import Quantized

DTYPE_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8}
# Those of tensors that are only carried along as well.
BYTES = DTYPE_BYTES | {
    "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I8": 1, "I16": 2, "I32": 4,
    "I64": 8, "U8": 1, "U32": 4,
}  # fmt: skip
# Floating-point dtypes as safetensors and as torch spell them.
DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}


@dataclass(frozen=True)
class Weight:
    """A handle on one tensor: name, shape and dtype now, numbers when they are needed.

    Attributes:
        name: name of the tensor in the source checkpoint.
        shape: its shape.
        dtype: its dtype as safetensors spells it (``BF16``); of the source, if quantized.
        load: reads the numbers; those of a quantized weight dequantized, in float32.
        scheme: how it is quantized, None if it is not.
        load_quantized: reads integers and scales of a quantized weight.
        pattern: the numbers that are zero and stay so; None for no such promise.
        kept: its integers are those of a quantized source, which nothing has changed.
        load_slice: reads one entry of the first axis alone, where that is less work.
        scale_dtype: dtype that holds the scales of kept integers exactly: that of the source.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    load: Callable[[], Tensor] = field(compare=False, repr=False)
    scheme: Scheme | None = None
    load_quantized: Callable[[], Quantized] | None = field(default=None, compare=False, repr=False)
    pattern: Pattern | None = None
    kept: bool = False
    load_slice: Callable[[int], Tensor] | None = field(default=None, compare=False, repr=False)
    scale_dtype: str = ""

    # Bytes in files, where only these count: see `HeldWeight`.
    held: ClassVar[int] = 0

    @property
    def count(self) -> int:
        """Number of parameters."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of storage: integers, 16-bit scales and zero points if quantized."""
        if self.scheme is None:
            return self.count * BYTES[self.dtype]
        return self.scheme.nbytes(self.shape)

    def change(self, **changes: Any) -> Self:
        """Return the handle with other attributes, as `dataclasses.replace`, but in a tenth of it.

        A large model has tens of thousands of handles, which every pass changes.
        """
        new = object.__new__(type(self))
        new.__dict__.update(self.__dict__, **changes)
        return new

    def quantized(self) -> Quantized:
        """Return integers and scales.

        Raises:
            Moe2EdgeError: the weight is not quantized.
        """
        if self.load_quantized is None:
            raise Moe2EdgeError(f"{self.name} is not quantized")
        return self.load_quantized()


@dataclass(frozen=True)
class HeldWeight(Weight):
    """A handle on a tensor in a folder of which only shape and bytes count.

    Attributes:
        held: its bytes in the files: integers, scales in whatever dtype, and zero points.
    """

    held: int = 0  # type: ignore[misc]

    @property
    def nbytes(self) -> int:
        """Bytes in the files."""
        return self.held


@dataclass(frozen=True)
class SourceBlocks:
    """Reads numbers that a source holds as blocks of floats; a weight with others has no such.

    Attributes:
        read: reads them.
        format: the format of the blocks (``MXFP4``).
    """

    read: Callable[[], Tensor]
    format: str

    def __call__(self) -> Tensor:
        """Read the numbers."""
        return self.read()


def is_in_blocks(weight: Weight, name: str) -> bool:
    """Return whether the numbers are those of a source that holds them in blocks of a format."""
    return isinstance(weight.load, SourceBlocks) and weight.load.format == name


def hide_integers(weight: Weight) -> Weight:
    """Return a quantized weight as a plain one, with the same numbers, in float32."""
    return weight.change(scheme=None, load_quantized=None, kept=False)


def dequantize_weight(weight: Weight) -> Weight:
    """Return a quantized weight as a plain one, rounded to its dtype."""

    def load() -> Tensor:
        return cast_to_stored(weight.load(), weight.dtype)

    return hide_integers(weight).change(load=load)


def plan_weight_like(like: Weight, name: str, shape: tuple[int, ...]) -> Weight:
    """Return a handle on numbers that are not there yet, in the dtype of another one."""
    plain = {"scheme": None, "load_quantized": None, "pattern": None}
    return plan_weight(like, name=name, shape=shape, **plain)


def plan_weight(weight: Weight, **promised: Any) -> Weight:
    """Return a handle with properties of numbers that are not there yet, such as a scheme."""
    name = promised.get("name", weight.name)

    def not_yet() -> Tensor:
        raise AssertionError(f"{name} is only planned")

    return weight.change(load=not_yet, **promised)


def cast_to_stored(tensor: Tensor, dtype: str) -> Tensor:
    """Convert ``tensor`` to a dtype as safetensors spells it."""
    import torch

    return tensor.to(getattr(torch, DTYPES[dtype]))
