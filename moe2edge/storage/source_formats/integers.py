"""Matrices of small integers with scales of groups, whichever program packed them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moe2edge.errors import InputError, Unsupported
from moe2edge.numerics.scheme import BITS, WHOLE_ROW, Scheme
from moe2edge.storage.patterns import compile_pattern
from moe2edge.storage.source_formats.source_format import QuantizedTensor

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.numerics.grid import Quantized

SCALE_DTYPES = ("F16", "BF16", "F32")


@dataclass(frozen=True)
class Integers:
    """One matrix of integers.

    Attributes:
        name: of its module.
        shape: outputs and inputs.
        bits: bits per weight.
        group_size: inputs that share a scale; -1: all.
        symmetric: the zero point is the middle of the integers throughout.
        scale_dtype: dtype of the scales in the file.
        read_q: reads the integers, uint8 [out, in].
        read_scales: reads the scales, [out, groups].
        read_zeros: reads the zero points, uint8 [out, groups]; None: there are none.
        read_order: reads the group of each input, [in]; None: they are in order.
    """

    name: str
    shape: tuple[int, int]
    bits: int
    group_size: int
    symmetric: bool
    scale_dtype: str
    read_q: Callable[[], Tensor]
    read_scales: Callable[[], Tensor]
    read_zeros: Callable[[], Tensor] | None = None
    read_order: Callable[[], Tensor] | None = None

    @property
    def groups(self) -> int:
        """Number of groups of a row; the last may be short."""
        return 1 if self.group_size == WHOLE_ROW else math.ceil(self.shape[1] / self.group_size)

    @property
    def problem(self) -> str:
        """Say why the integers cannot be kept; empty if they can."""
        if self.bits not in BITS:
            return f"it has {self.bits} bits"
        if self.groups > 1 and self.shape[1] % self.group_size:
            return f"groups of {self.group_size} do not divide its {self.shape[1]} inputs"
        if self.scale_dtype == "F32":
            return "its scales are float32"
        return ""

    def make_source(self) -> QuantizedTensor:
        """Make the source of the matrix; it keeps the integers where they can be."""
        if self.problem:
            return QuantizedTensor(self.shape, lambda _: self.dequantize(), problem=self.problem)
        group = WHOLE_ROW if self.group_size > self.shape[1] else self.group_size
        scheme = Scheme(self.bits, group, self.symmetric, self.read_order is not None)

        def load_quantized() -> Quantized:
            import torch

            from moe2edge.numerics.grid import Quantized

            zeros = self._read_checked_zeros()
            scales = self.read_scales().float().contiguous()
            order = None if self.read_order is None else self._read_groups().to(torch.int32)
            return Quantized(
                self.read_q(), scales, scheme, None if self.symmetric else zeros, order
            )

        return QuantizedTensor(
            self.shape,
            lambda _: load_quantized().dequantize(),
            scheme,
            load_quantized,
            scale_dtype=self.scale_dtype,
        )

    def dequantize(self) -> Tensor:
        """Compute the numbers by the definition, float32 [out, in]."""
        import torch

        from moe2edge.numerics.decoding import dequantize_in_order

        groups = self._read_groups()
        scales, zeros = self.read_scales().float(), self._read_checked_zeros()
        if zeros is None:
            zeros = torch.full(scales.shape, 1 << (self.bits - 1), dtype=torch.uint8)
        return dequantize_in_order(self.read_q(), scales, zeros, groups)

    def _read_groups(self) -> Tensor:
        """Return the group of each input, int64 [in].

        Raises:
            InputError: a group does not exist.
        """
        import torch

        ins = self.shape[1]
        if self.read_order is None:
            return torch.arange(ins) // (ins if self.groups == 1 else self.group_size)
        order = self.read_order().long()
        if len(order) != ins or int(order.min()) < 0 or int(order.max()) >= self.groups:
            raise InputError(
                f"g_idx of {self.name} names groups {int(order.min())} to {int(order.max())}, but "
                f"there are {self.groups}; download the checkpoint again"
            )
        return order

    def _read_checked_zeros(self) -> Tensor | None:
        """Read the zero points; of a symmetric matrix, refuse others than the middle.

        Raises:
            InputError: so.
        """
        zeros = None if self.read_zeros is None else self.read_zeros()
        middle = 1 << (self.bits - 1)
        if self.symmetric and zeros is not None and bool((zeros != middle).any()):
            raise InputError(
                f"{self.name} has zero points from {int(zeros.min())} to {int(zeros.max())}, but "
                f"config.json says symmetric, which is {middle}; correct sym (or checkpoint_format)"
                " in its quantization_config"
            )
        return zeros


def read_number(
    settings: Mapping[str, Any], key: str, allowed: tuple[int, ...] | range, where: str
) -> int:
    """Read a number of a ``quantization_config``.

    Raises:
        Unsupported: it is none that is read.
    """
    value = settings.get(key)
    if type(value) is not int or value not in allowed:
        shown = ", ".join(map(str, allowed))
        if len(allowed) > 12:
            shown = f"{allowed[0]} (a whole row), or 1 to {allowed[-1]}"
        raise Unsupported(f"{where}: {key} is {value!r}; read are {shown}")
    return value


# Group sizes that are read; a whole row is -1.
GROUP_RANGE = (WHOLE_ROW, *range(1, 65537))


def describe_groups(size: int) -> str:
    """Describe a group size for reports."""
    return "whole rows" if size == WHOLE_ROW else f"groups of {size}"


def match_pattern(pattern: str, names: tuple[str, ...], where: str) -> bool:
    """Return whether a regular expression matches the start of one of some names.

    Raises:
        Unsupported: it is none that can be matched in linear time.
    """
    try:
        compiled = compile_pattern(pattern)
    except ValueError as error:
        raise Unsupported(f"{where}: {pattern!r}: {error}") from error
    return any(compiled.match(name) is not None for name in names)
