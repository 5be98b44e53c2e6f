"""Gated MLPs, experts, and what the rows of a router run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

from moe2edge.errors import Moe2EdgeError
from moe2edge.model.weights import Weight

PARTS = ("gate", "up", "down")


@dataclass(frozen=True)
class Dense:
    """A gated MLP: ``down(silu(gate(x)) * up(x))``."""

    gate: Weight  # [width, hidden]; [0, hidden] in families whose experts have none
    up: Weight  # [width, hidden]
    down: Weight  # [hidden, width]

    @property
    def count(self) -> int:
        """Number of parameters."""
        return self.gate.count + self.up.count + self.down.count


@dataclass(frozen=True)
class Expert(Dense):
    """A routed expert.

    Attributes:
        origin: its index in the source model.
        biases: by part; no biases in most families.
    """

    origin: int
    biases: Mapping[str, Weight] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Number of parameters."""
        return super().count + sum(bias.count for bias in self.biases.values())


@dataclass(frozen=True)
class Factors:
    """A low-rank matrix, ``second @ first``.

    Attributes:
        first: [rank, in].
        second: [out, rank].
    """

    first: Weight
    second: Weight


# ---- rows of a router ----------------------------------------------------------------------------


@dataclass(frozen=True)
class RouterRow:
    """Base of everything that a row of a router can run.

    Attributes:
        origin: index in the source model of the expert that the row ran there.
    """

    origin: int

    @property
    def rank(self) -> int:
        """Rank of its low-rank matrices; 0 if it has none."""
        return 0

    @property
    def count(self) -> int:
        """Number of parameters, without those of a stored expert that it runs."""
        return sum(weight.count for _, weight in self.weights())

    def weights(self) -> Iterator[tuple[str, Weight]]:
        """Yield its tensors by name, without those of a stored expert."""
        return iter(())

    def with_weights(self, new: Mapping[str, Weight]) -> Self:
        """Return the row with all of its tensors replaced, by name."""
        changes: dict[str, Any] = {name: new[name] for name, _ in self.weights()}
        return replace(self, **changes)

    def check(self, experts: Sequence[Expert], hidden: int) -> None:
        """Check that it fits its layer.

        Args:
            experts: stored experts of the layer.
            hidden: width of the hidden states.

        Raises:
            Moe2EdgeError: a stored expert is missing, or a shape differs.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Full(RouterRow):
    """A row that runs a stored expert as it is.

    Several rows run the same expert where experts were merged and their router rows stayed.

    Attributes:
        expert: position of the stored expert in the layer.
    """

    expert: int

    def check(self, experts: Sequence[Expert], hidden: int) -> None:
        """See `RouterRow.check`."""
        if not 0 <= self.expert < len(experts):
            raise Moe2EdgeError(
                f"router row of expert {self.origin} runs stored expert {self.expert}, "
                f"but there are {len(experts)}"
            )


@dataclass(frozen=True)
class Tied(RouterRow):
    """A row that runs a tied expert: matrices of a stored expert plus low-rank factors.

    Experts that share a base are such rows (LightMoE, https://arxiv.org/abs/2603.12645).

    Attributes:
        base: position in the layer of the stored expert; None: there is none, and the product of
            the factors is the matrix.
        factors: by part (gate, up, down), for all three.
    """

    base: int | None
    factors: Mapping[str, Factors]

    @property
    def rank(self) -> int:
        """Rank of the factors."""
        return self.factors["gate"].first.shape[0]

    def weights(self) -> Iterator[tuple[str, Weight]]:
        """Yield the factors by name: ``gate.first``, ``gate.second``, ..."""
        for part, low in self.factors.items():
            yield f"{part}.first", low.first
            yield f"{part}.second", low.second

    def with_weights(self, new: Mapping[str, Weight]) -> Self:
        """Return the row with all of its tensors replaced, by name."""
        factors = {p: Factors(new[f"{p}.first"], new[f"{p}.second"]) for p in self.factors}
        return replace(self, factors=factors)

    def check(self, experts: Sequence[Expert], hidden: int) -> None:
        """See `RouterRow.check`."""
        name, base = f"tied expert {self.origin}", self.base
        if not self.factors:
            missing = "neither a base nor factors" if base is None else "a base but no factors"
            raise Moe2EdgeError(f"{name} has {missing}")
        if base is not None and not 0 <= base < len(experts):
            raise Moe2EdgeError(
                f"{name} has base {base}, but there are {len(experts)} stored experts"
            )
        if set(self.factors) != set(PARTS):
            raise Moe2EdgeError(
                f"{name} has factors of {sorted(self.factors)}, expected {sorted(PARTS)}"
            )
        rank = self.rank
        for part, low in self.factors.items():
            outs, ins = getattr(experts[base or 0], part).shape
            if low.first.shape != (rank, ins) or low.second.shape != (outs, rank):
                raise Moe2EdgeError(
                    f"{name}: {part} is {list(low.second.shape)} times {list(low.first.shape)}, "
                    f"expected [{outs}, {rank}] times [{rank}, {ins}]"
                )


@dataclass(frozen=True)
class Constant(RouterRow):
    """A constant vector in the place of an expert: one of MoNE's novices.

    The row stays routable, and the constant is multiplied with its gate weight like the output of
    an expert (https://arxiv.org/abs/2507.00390).

    Attributes:
        constant: [hidden].
    """

    constant: Weight

    def weights(self) -> Iterator[tuple[str, Weight]]:
        """Yield the constant with its name."""
        yield "constant", self.constant

    def check(self, experts: Sequence[Expert], hidden: int) -> None:
        """See `RouterRow.check`."""
        _check_shape(self.constant, (hidden,))


@dataclass(frozen=True)
class Linear(RouterRow):
    """A linear map in the place of an expert: ``constant + second @ first @ x``.

    Like a `Constant`, it stays routable, and its output is multiplied with its gate weight.

    Attributes:
        constant: [hidden].
        first: [rank, hidden].
        second: [hidden, rank].
    """

    constant: Weight
    first: Weight
    second: Weight

    @property
    def rank(self) -> int:
        """Rank of the map."""
        return self.first.shape[0]

    def weights(self) -> Iterator[tuple[str, Weight]]:
        """Yield constant, first and second by name."""
        yield "constant", self.constant
        yield "first", self.first
        yield "second", self.second

    def check(self, experts: Sequence[Expert], hidden: int) -> None:
        """See `RouterRow.check`."""
        _check_shape(self.constant, (hidden,))
        _check_shape(self.first, (self.rank, hidden))
        _check_shape(self.second, (hidden, self.rank))


Replacement = Linear | Constant
Row = Full | Tied | Replacement


def _check_shape(weight: Weight, shape: tuple[int, ...]) -> None:
    if weight.shape != shape:
        raise Moe2EdgeError(f"{weight.name} has shape {list(weight.shape)}, expected {list(shape)}")


def list_full_rows(experts: Sequence[Expert]) -> tuple[Full, ...]:
    """Return one row for each expert, which runs it as it is."""
    return tuple(Full(expert.origin, n) for n, expert in enumerate(experts))
