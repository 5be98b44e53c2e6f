"""Quantize by rounding each weight to its nearest grid point; looks at no data."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from moe2edge.model import Block, Model
from moe2edge.pipeline import Slim, Solver, selected
from moe2edge.scheme import Scheme

if TYPE_CHECKING:
    from moe2edge.rounding import Quantized
    from moe2edge.walk import Seen


class Rtn(Slim):
    """Round to nearest, symmetric, one scale per group: absmax / 7.5 at 4 bits."""

    needs_tokens: ClassVar[bool] = False

    def solver(self, model: Model) -> Solver:
        """Rounds one block after another."""
        return _Rounding(self.scheme(model))


class _Rounding:
    def __init__(self, scheme: Scheme) -> None:
        self._scheme = scheme

    def see(self, seen: Seen) -> None:
        """Rounding looks at no activations."""

    def solve(self, block: Block) -> tuple[dict[str, Quantized], list[str]]:
        """Round every selected tensor of the block."""
        from moe2edge.rounding import round_to_nearest

        return {r: round_to_nearest(w.load(), self._scheme) for r, w in selected(block)}, []
