"""Quantize by rounding each weight to its nearest grid point; looks at no data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from moe2edge.model import Block, Model, is_quantizable
from moe2edge.pipeline import Slim, Solver, selected
from moe2edge.scheme import Scheme, largest_group_size

if TYPE_CHECKING:
    from moe2edge.rounding import Quantized
    from moe2edge.walk import Seen


class Rtn(Slim):
    """Round to nearest, symmetric, one scale per group: absmax / 7.5 at 4 bits."""

    needs_tokens: ClassVar[bool] = False

    bits: Annotated[Literal[4], Field(description="bits per weight")] = 4
    group_size: Annotated[
        Literal[32, 64, 128] | None,
        Field(description="inputs per scale; none: the largest that divides every width"),
    ] = None

    def scheme(self, model: Model) -> Scheme:
        """The scheme, with the group size resolved."""
        widths = (w.shape[1] for _, role, w in model.tensors() if is_quantizable(role))
        return Scheme(self.bits, self.group_size or largest_group_size(widths))

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
