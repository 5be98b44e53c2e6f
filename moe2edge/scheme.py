"""Quantization schemes: how numbers are stored, without the numbers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from moe2edge.errors import Unsupported

GROUP_SIZES = (128, 64, 32)


@dataclass(frozen=True)
class Scheme:
    """Weights in ``bits`` bits with one scale per ``group_size`` inputs; activations in 16 bits.

    A weight is ``(q - zero_point) * scale``, with ``q`` in ``0 .. 2**bits - 1`` and a fixed
    zero point in the middle (symmetric).

    >>> Scheme(group_size=64)
    Scheme(bits=4, group_size=64)
    >>> Scheme().name, Scheme().zero_point, round(Scheme().bits_per_weight, 3)
    ('w4a16', 8, 4.125)
    """

    bits: int = 4
    group_size: int = 128

    @property
    def name(self) -> str:
        """Name in the field's spelling, as in compressed-tensors."""
        return f"w{self.bits}a16"

    @property
    def zero_point(self) -> int:
        """The integer that stands for zero."""
        return 1 << (self.bits - 1)

    @property
    def bits_per_weight(self) -> float:
        """Bits of storage per weight, with a 16-bit scale per group."""
        return self.bits + 16 / self.group_size


def largest_group_size(in_features: Iterable[int]) -> int:
    """Largest group size of 128, 64, 32 that divides every one of ``in_features``.

    Raises:
        Unsupported: none of them does.

    >>> largest_group_size([256, 192])
    64
    """
    widths = sorted(set(in_features))
    for size in GROUP_SIZES:
        if all(width % size == 0 for width in widths):
            return size
    raise Unsupported(
        f"no group size of 128, 64, 32 divides every in_features of the selected weights "
        f"({', '.join(map(str, widths))}); this model cannot be quantized in groups"
    )
