"""Quantization schemes and sparsity patterns: how numbers are stored, without the numbers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from moe2edge.errors import Unsupported

BITS = (2, 3, 4, 8)
GROUP_SIZES: tuple[Literal[128], Literal[64], Literal[32]] = (128, 64, 32)
WHOLE_ROW = -1


@dataclass(frozen=True)
class Scheme:
    """Weights in ``bits`` bits with one scale per group of inputs; activations in 16 bits.

    A weight is ``(q - zero_point) * scale``, with ``q`` in ``0 .. 2**bits - 1``.

    Attributes:
        bits: bits per weight.
        group_size: inputs that share a scale; -1: all of a row (per-channel).
        symmetric: the zero point is the middle of the integers; otherwise each group has its own.
        ordered: inputs belong to groups in the order of their activations (``desc_act``), which
            each matrix stores; only quantized sources are so.

    >>> Scheme(group_size=64)
    Scheme(bits=4, group_size=64, symmetric=True)
    >>> Scheme().name, Scheme(symmetric=False).name, Scheme().zero_point
    ('w4a16', 'w4a16_asym', 8)
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    ordered: bool = field(default=False, repr=False)

    @property
    def name(self) -> str:
        """Name in the field's spelling, as in compressed-tensors."""
        return f"w{self.bits}a16" + ("" if self.symmetric else "_asym")

    @property
    def zero_point(self) -> int:
        """Integer that stands for zero, if symmetric."""
        return 1 << (self.bits - 1)

    @property
    def largest(self) -> int:
        """Largest integer."""
        return (1 << self.bits) - 1

    def width(self, inputs: int) -> int:
        """Return the number of inputs that share a scale in a matrix of ``inputs`` columns.

        >>> Scheme(group_size=64).width(256), Scheme(group_size=-1).width(256)
        (64, 256)
        """
        return inputs if self.group_size == WHOLE_ROW else self.group_size

    def groups(self, inputs: int) -> int:
        """Return the number of groups in a row of ``inputs`` columns."""
        return inputs // self.width(inputs)

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Return the bytes of a matrix [out, in]: integers, 16-bit scales, zero points if any.

        >>> Scheme().nbytes((256, 128)), Scheme(symmetric=False).nbytes((256, 128))
        (16896, 17024)
        """
        outs, ins = shape
        per_group = 16 + (0 if self.symmetric else self.bits)
        return (outs * ins * self.bits + outs * self.groups(ins) * per_group + 7) // 8

    def __str__(self) -> str:
        """Format for reports, such as ``w4a16, groups of 128``."""
        groups = "per channel" if self.group_size == WHOLE_ROW else f"groups of {self.group_size}"
        return f"{self.name}, {groups}{', desc_act' if self.ordered else ''}"


# Scheme of factors and linear maps, where they are quantized: per-channel, since their rows may be
# as short as their rank.
LOW_RANK = Scheme(8, WHOLE_ROW)


@dataclass(frozen=True)
class Pattern:
    """Sparsity pattern: which fraction of the weights is zero, and how regularly.

    Attributes:
        zeros: number of zeros in each run of ``of`` inputs; or, with ``of`` None, the fraction of
            all weights.
        of: length of a run; None: zeros may be anywhere.

    >>> str(Pattern(2, 4)), str(Pattern(0.5))
    ('2:4', '50 %')
    """

    zeros: float
    of: int | None = None

    def __str__(self) -> str:
        """Format as the field does: weights kept per run, or zeros in percent."""
        if self.of is None:
            return f"{100 * self.zeros:.4g} %"
        return f"{self.of - round(self.zeros)}:{self.of}"


def find_largest_group_size(in_features: Iterable[int]) -> Literal[32, 64, 128]:
    """Find the largest group size of 128, 64, 32 that divides each of ``in_features``.

    Raises:
        Unsupported: none of them does.

    >>> find_largest_group_size([256, 192])
    64
    """
    widths = sorted(set(in_features))
    for size in GROUP_SIZES:
        if all(width % size == 0 for width in widths):
            return size
    small = "group_size: 16 for onnx, " if all(width % 16 == 0 for width in widths) else ""
    raise Unsupported(
        f"no group size of 128, 64, 32 divides every in_features of the selected weights "
        f"({', '.join(map(str, widths))}); set {small}group_size: -1, one scale per row, for gptq, "
        "or a rule that leaves the others in 16 bits, such as {match: experts, bits: 16}"
    )
