"""What two sets of decisions have in common, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from moe2edge.errors import InputError
from moe2edge.pipeline.decisions import Decisions, describe_shape


@dataclass(frozen=True)
class LayerOverlap:
    """What two decisions keep of one MoE layer of the source.

    Attributes:
        origin: block of the source.
        experts: routed experts in the source.
        a, b: how many either keeps; none where block or layer are gone.
        both: how many both keep.
    """

    origin: int
    experts: int
    a: int
    b: int
    both: int

    @property
    def expected(self) -> float:
        """Mean overlap of random sets of these sizes (hypergeometric): ``a b / experts``."""
        return self.a * self.b / self.experts

    @property
    def jaccard(self) -> float:
        """Kept by both, of those kept by either; 1 where neither keeps any."""
        return _jaccard(self.a, self.b, self.both)

    @property
    def identical(self) -> bool:
        """Whether both keep the same experts."""
        return self.a == self.b == self.both

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        own = {key: getattr(self, key) for key in ("expected", "jaccard", "identical")}
        return {**asdict(self), **own}


def _jaccard(a: int, b: int, both: int) -> float:
    either = a + b - both
    return both / either if either else 1.0


@dataclass(frozen=True)
class Overlap:
    """What two sets of decisions have in common.

    Attributes:
        a_name, b_name: of the two.
        layers: the MoE layers of the source, in order.
    """

    a_name: str
    b_name: str
    layers: tuple[LayerOverlap, ...]

    @property
    def a(self) -> int:
        """Experts that the first keeps, over all layers."""
        return sum(own.a for own in self.layers)

    @property
    def b(self) -> int:
        """Experts that the second keeps, over all layers."""
        return sum(own.b for own in self.layers)

    @property
    def both(self) -> int:
        """Experts that both keep, over all layers."""
        return sum(own.both for own in self.layers)

    @property
    def expected(self) -> float:
        """Mean overlap of sets that are random within each layer."""
        return math.fsum(own.expected for own in self.layers)

    @property
    def jaccard(self) -> float:
        """As of a layer, over all layers."""
        return _jaccard(self.a, self.b, self.both)

    @property
    def identical(self) -> list[int]:
        """Layers of which both keep the same experts, by the block of the source."""
        return [own.origin for own in self.layers if own.identical]

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        keys = ("a", "b", "both", "expected", "jaccard")
        overall = {key: getattr(self, key) for key in keys}
        return {
            "a": self.a_name,
            "b": self.b_name,
            "layers": [own.to_json() for own in self.layers],
            "overall": {**overall, "identical_layers": self.identical},
        }


def compare(found: Mapping[str, Decisions]) -> list[Overlap]:
    """Overlap of every two of several decisions.

    Raises:
        InputError: fewer than two, or of models of different family or shape.
    """
    names = list(found)
    if len(names) < 2:
        raise InputError("give two different files of decisions or more, to compare them")
    shapes = {
        name: describe_shape(own.source.family, own.experts_before) for name, own in found.items()
    }
    for name in names[1:]:
        if shapes[name] != shapes[names[0]]:
            raise InputError(
                f"{names[0]} is about {shapes[names[0]]}, {name} about {shapes[name]}; only "
                "decisions about models of one shape can be compared"
            )
    return [
        Overlap(a, b, tuple(_overlaps(found[a], found[b])))
        for n, a in enumerate(names)
        for b in names[n + 1 :]
    ]


def _overlaps(a: Decisions, b: Decisions) -> list[LayerOverlap]:
    return [
        LayerOverlap(
            one.origin,
            one.experts_before,
            len(one.experts),
            len(other.experts),
            len(set(one.experts) & set(other.experts)),
        )
        for one, other in zip(a.blocks, b.blocks, strict=True)
        if one.experts_before
    ]
