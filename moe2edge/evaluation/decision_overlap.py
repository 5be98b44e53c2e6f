"""Overlap of the experts that different decisions keep, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from moe2edge.errors import InputError
from moe2edge.pipeline.decisions import Decisions, describe_shape


@dataclass(frozen=True)
class LayerOverlap:
    """Experts of one MoE layer that two decisions keep.

    Attributes:
        origin: index of the block in the source.
        experts: routed experts in the source.
        a, b: number of experts that each decision keeps; 0 where the block or layer is dropped.
        both: number of experts that both keep.
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
        """Jaccard index: experts that both keep / experts that either keeps; 1 if none."""
        return _compute_jaccard(self.a, self.b, self.both)

    @property
    def identical(self) -> bool:
        """True if both keep the same experts."""
        return self.a == self.b == self.both

    def to_json(self) -> dict[str, Any]:
        """Return the fields and the derived figures as plain data."""
        derived = {key: getattr(self, key) for key in ("expected", "jaccard", "identical")}
        return {**asdict(self), **derived}


def _compute_jaccard(a: int, b: int, both: int) -> float:
    either = a + b - both
    return both / either if either else 1.0


@dataclass(frozen=True)
class Overlap:
    """Overlap of two sets of decisions, over all layers.

    Attributes:
        a_name, b_name: names of the two, as in a report.
        layers: one entry per MoE layer of the source, in order.
    """

    a_name: str
    b_name: str
    layers: tuple[LayerOverlap, ...]

    @property
    def a(self) -> int:
        """Number of experts that the first keeps, over all layers."""
        return sum(layer.a for layer in self.layers)

    @property
    def b(self) -> int:
        """Number of experts that the second keeps, over all layers."""
        return sum(layer.b for layer in self.layers)

    @property
    def both(self) -> int:
        """Number of experts that both keep, over all layers."""
        return sum(layer.both for layer in self.layers)

    @property
    def expected(self) -> float:
        """Mean overlap of sets that are random within each layer."""
        return math.fsum(layer.expected for layer in self.layers)

    @property
    def jaccard(self) -> float:
        """Jaccard index over the experts of all layers."""
        return _compute_jaccard(self.a, self.b, self.both)

    @property
    def identical(self) -> list[int]:
        """Source blocks of the layers in which both keep the same experts."""
        return [layer.origin for layer in self.layers if layer.identical]

    def to_json(self) -> dict[str, Any]:
        """Return the names, every layer and the totals as plain data."""
        keys = ("a", "b", "both", "expected", "jaccard")
        overall = {key: getattr(self, key) for key in keys}
        return {
            "a": self.a_name,
            "b": self.b_name,
            "layers": [layer.to_json() for layer in self.layers],
            "overall": {**overall, "identical_layers": self.identical},
        }


def compare(decisions: Mapping[str, Decisions]) -> list[Overlap]:
    """Compare every pair of several decisions.

    Args:
        decisions: by the name that the report gives them, such as their file.

    Raises:
        InputError: there are fewer than two, or their models differ in family or shape.
    """
    names = list(decisions)
    if len(names) < 2:
        raise InputError("only one file of decisions was given; give at least two different files")
    shapes = {
        name: describe_shape(each.source.family, each.experts_before)
        for name, each in decisions.items()
    }
    for name in names[1:]:
        if shapes[name] != shapes[names[0]]:
            raise InputError(
                f"{names[0]} is for {shapes[names[0]]}, {name} for {shapes[name]}; only "
                "decisions for models of the same shape can be compared"
            )
    return [
        Overlap(a, b, tuple(_compare_layers(decisions[a], decisions[b])))
        for n, a in enumerate(names)
        for b in names[n + 1 :]
    ]


def _compare_layers(a: Decisions, b: Decisions) -> list[LayerOverlap]:
    return [
        LayerOverlap(
            in_a.origin,
            in_a.experts_before,
            len(in_a.experts),
            len(in_b.experts),
            len(set(in_a.experts) & set(in_b.experts)),
        )
        for in_a, in_b in zip(a.blocks, b.blocks, strict=True)
        if in_a.experts_before
    ]
