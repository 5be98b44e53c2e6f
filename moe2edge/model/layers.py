"""What blocks are made of: lazy tensors, experts, routers, MoE layers. Nothing reads a number."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import (
    TYPE_CHECKING,
    Any,
)

from moe2edge.errors import InputError, Moe2EdgeError
from moe2edge.numerics.scheme import Pattern, Scheme

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.numerics.grid import Quantized

DTYPE_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8}


@dataclass(frozen=True)
class Weight:
    """A handle on one tensor: name, shape and dtype now, numbers when somebody asks.

    Attributes:
        name: name of the tensor in the source checkpoint.
        shape: its shape.
        dtype: its dtype as safetensors spells it (``BF16``); of the source, if quantized.
        load: reads the numbers; a quantized weight comes back dequantized, float32.
        scheme: how it is quantized, None if it is not.
        load_quantized: reads integers and scales of a quantized weight.
        pattern: which of its numbers are zero and stay so, None for no such promise.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    load: Callable[[], Tensor] = field(compare=False, repr=False)
    scheme: Scheme | None = None
    load_quantized: Callable[[], Quantized] | None = field(default=None, compare=False, repr=False)
    pattern: Pattern | None = None

    @property
    def count(self) -> int:
        """Number of parameters."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of storage: integers, 16-bit scales and zero points if quantized."""
        if self.scheme is None:
            return self.count * DTYPE_BYTES[self.dtype]
        return self.scheme.nbytes(self.shape)

    def quantized(self) -> Quantized:
        """Integers and scales.

        Raises:
            Moe2EdgeError: the weight is not quantized.
        """
        if self.load_quantized is None:
            raise Moe2EdgeError(f"{self.name} is not quantized")
        return self.load_quantized()


@dataclass(frozen=True)
class Dense:
    """A gated MLP: ``down(silu(gate(x)) * up(x))``."""

    gate: Weight  # [width, hidden]
    up: Weight  # [width, hidden]
    down: Weight  # [hidden, width]

    @property
    def count(self) -> int:
        """Number of parameters."""
        return self.gate.count + self.up.count + self.down.count


@dataclass(frozen=True)
class Expert(Dense):
    """A routed expert; ``origin`` is its index in the source model."""

    origin: int


@dataclass(frozen=True)
class Substitute:
    """What answers in the place of a routed expert: ``constant + second @ first @ x``.

    It stays routable, and its output is multiplied with its gate weight like an expert's (MoNE's
    novices, https://arxiv.org/abs/2507.00390, are those without matrices).

    Attributes:
        origin: index in the source model of the expert.
        constant: [hidden].
        first: [rank, hidden]; None, like ``second``, where the constant is all.
        second: [hidden, rank].
    """

    origin: int
    constant: Weight
    first: Weight | None = None
    second: Weight | None = None

    @property
    def rank(self) -> int:
        """Of the linear map; 0 for a constant."""
        return 0 if self.first is None else self.first.shape[0]

    def weights(self) -> Iterator[tuple[str, Weight]]:
        """Its tensors by name."""
        yield "constant", self.constant
        if self.first is not None and self.second is not None:
            yield "first", self.first
            yield "second", self.second

    def with_weights(self, new: Mapping[str, Weight]) -> Substitute:
        """The substitute with all tensors replaced, by name."""
        return Substitute(self.origin, new["constant"], new.get("first"), new.get("second"))

    def check(self, hidden: int) -> None:
        """Prove that the shapes fit.

        Raises:
            Moe2EdgeError: one differs.
        """
        rank = self.rank
        expected = {"constant": (hidden,), "first": (rank, hidden), "second": (hidden, rank)}
        for part, weight in self.weights():
            if weight.shape != expected[part]:
                raise Moe2EdgeError(
                    f"{weight.name} has shape {list(weight.shape)}, expected {list(expected[part])}"
                )


PARTS = ("gate", "up", "down")


@dataclass(frozen=True)
class Factors:
    """A matrix of low rank, ``second @ first``.

    Attributes:
        first: [rank, in].
        second: [out, rank].
    """

    first: Weight
    second: Weight


@dataclass(frozen=True)
class Member:
    """A routed expert whose matrices are those of an expert of the layer, plus low ranks.

    Experts that share a base (LightMoE, https://arxiv.org/abs/2603.12645) are members of it, and
    so are experts that were merged while their router rows stay: those have no factors.

    Attributes:
        origin: index in the source model of the expert.
        base: position in the layer of the expert whose matrices it has; None: it has none, and
            the factors are all.
        factors: by part (gate, up, down): of all three or of none.
    """

    origin: int
    base: int | None
    factors: Mapping[str, Factors] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """Of its factors; 0 without."""
        return self.factors["gate"].first.shape[0] if self.factors else 0

    @property
    def count(self) -> int:
        """Number of parameters of its own."""
        return sum(weight.count for _, weight in self.weights())

    def weights(self) -> Iterator[tuple[str, Weight]]:
        """Its tensors by name."""
        for part, own in self.factors.items():
            yield f"{part}.first", own.first
            yield f"{part}.second", own.second

    def with_weights(self, new: Mapping[str, Weight]) -> Member:
        """The member with all tensors replaced, by name."""
        factors = {p: Factors(new[f"{p}.first"], new[f"{p}.second"]) for p in self.factors}
        return replace(self, factors=factors)

    def check(self, experts: Sequence[Expert]) -> None:
        """Prove that base and shapes fit.

        Raises:
            Moe2EdgeError: they do not.
        """
        if self.base is None and not self.factors:
            raise Moe2EdgeError(f"member {self.origin} has neither a base nor factors")
        if self.base is not None and not 0 <= self.base < len(experts):
            raise Moe2EdgeError(f"member {self.origin} of base {self.base} of {len(experts)}")
        if self.factors and set(self.factors) != set(PARTS):
            raise Moe2EdgeError(f"member {self.origin} has factors of {sorted(self.factors)} only")
        like = experts[self.base or 0]
        for part, own in self.factors.items():
            outs, ins = getattr(like, part).shape
            if own.first.shape != (self.rank, ins) or own.second.shape != (outs, self.rank):
                raise Moe2EdgeError(
                    f"member {self.origin}: {part} is {list(own.second.shape)} times "
                    f"{list(own.first.shape)}, expected [{outs}, {self.rank}] times "
                    f"[{self.rank}, {ins}]"
                )


@dataclass(frozen=True)
class Shared:
    """A shared expert: always on, times the sigmoid of its own gate."""

    mlp: Dense
    gate: Weight  # [1, hidden]


@dataclass(frozen=True)
class Router:
    """The linear scorer of an MoE layer, with everything that has one row per expert.

    Attributes:
        weight: [experts, hidden]; rows of substitutes stand behind those of experts or members.
        top_k: experts chosen per token.
        renormalize: whether the chosen weights are scaled to sum to one.
        per_expert: further tensors with one entry per expert (bias, correction bias), by suffix.
        skip_below: dynamic skipping: of the chosen experts in the order of their weights, the
            second is left out where its weight is below ``skip_below[0]`` times the first's, the
            third by ``skip_below[1]``, and so on; empty: none is.
    """

    weight: Weight
    top_k: int
    renormalize: bool
    per_expert: Mapping[str, Weight] = field(default_factory=dict)
    skip_below: tuple[float, ...] = ()


@dataclass(frozen=True)
class MoELayer:
    """Router and experts, kept in step by construction.

    Attributes:
        router: scores experts, or members, and substitutes.
        experts: the experts.
        shared: the shared expert, if there is one.
        substitutes: what answers in the place of experts that are gone.
        members: what the router chooses from where several share the matrices of an expert; an
            expert that shares nothing is a member of itself. Empty: each expert is chosen itself.
    """

    router: Router
    experts: tuple[Expert, ...]
    shared: Shared | None = None
    substitutes: tuple[Substitute, ...] = ()
    members: tuple[Member, ...] = ()

    @property
    def routed(self) -> int:
        """Experts or members, as the router sees them."""
        return len(self.members) or len(self.experts)

    @property
    def router_rows(self) -> int:
        """Experts or members, and substitutes: rows of the router."""
        return self.routed + len(self.substitutes)

    @property
    def bases(self) -> tuple[int | None, ...]:
        """Of each expert or member that the router sees, the expert whose matrices it has."""
        return tuple(m.base for m in self.members) or tuple(range(len(self.experts)))

    @property
    def sharing(self) -> tuple[int, ...]:
        """Rows of members that are not what they were: with factors, or a base that they share."""
        return tuple(
            row
            for row, member in enumerate(self.members)
            if member.factors or self.bases.count(member.base) > 1
        )

    @property
    def inactive_parameters(self) -> int:
        """Parameters of what the router chooses from that one token does not use.

        A token chooses the largest; what two members share counts for each.
        """
        own = [m.count for m in self.members] or [0] * len(self.experts)
        rows = [
            extra + (0 if base is None else self.experts[base].count)
            for base, extra in zip(self.bases, own, strict=True)
        ]
        rows += [sum(weight.count for _, weight in s.weights()) for s in self.substitutes]
        used = sum(sorted(rows, reverse=True)[: self.router.top_k])
        whole = sum(expert.count for expert in self.experts) + sum(own) + sum(rows[len(own) :])
        return max(0, whole - used)

    def chosen(self, expert: int, ids: Tensor) -> Tensor:
        """Where the matrices of an expert are used: of which of the chosen rows, bool [tokens, k].

        Args:
            expert: its position in the layer.
            ids: rows of the router that were chosen, int64 [tokens, k].
        """
        import torch

        rows = [n for n, base in enumerate(self.bases) if base == expert]
        return torch.isin(ids, torch.tensor(rows, device=ids.device))

    def check_members(self) -> None:
        """Prove that members fit, and that every expert is the base of one.

        Raises:
            Moe2EdgeError: something does not.
        """
        for member in self.members:
            member.check(self.experts)
        if unused := set(range(len(self.experts))) - set(self.bases):
            raise Moe2EdgeError(f"experts {sorted(unused)} are chosen by nobody")
        if len({member.rank for member in self.members if member.rank}) > 1:
            raise Moe2EdgeError("members of one layer have factors of several ranks")

    def keep(self, ids: Sequence[int], *, clamp_top_k: bool = False) -> MoELayer:
        """The layer with only the experts ``ids`` (positions in this layer), in that order.

        Router rows and all other per-expert tensors are sliced with the experts.

        Raises:
            InputError: an id is unknown or repeated, or fewer experts stay than top-k chooses
                and ``clamp_top_k`` is not set.
        """
        if len(set(ids)) != len(ids) or not all(0 <= i < len(self.experts) for i in ids):
            raise InputError(f"cannot keep experts {list(ids)} of {len(self.experts)}")
        top_k, count = self.router.top_k, len(ids) + len(self.substitutes)
        if count < top_k:
            if not clamp_top_k or not ids:
                raise InputError(
                    f"{count} experts would stay where the router chooses {top_k} per token; "
                    f"keep at least {top_k}, or set clamp_top_k: true"
                )
            top_k = count
        router = self._routing((*ids, *range(len(self.experts), self.router_rows)), top_k)
        return replace(self, router=router, experts=tuple(self.experts[i] for i in ids))

    def substitute(self, new: Mapping[int, Substitute]) -> MoELayer:
        """The layer with other answers in the place of some experts; what is routed stays.

        Args:
            new: by position in this layer.

        Raises:
            InputError: a position is unknown, or no expert would stay.
        """
        stay = [n for n in range(len(self.experts)) if n not in new]
        if len(stay) + len(new) != len(self.experts) or not stay:
            raise InputError(f"cannot replace experts {sorted(new)} of {len(self.experts)}")
        gone = sorted(new)
        rows = (*stay, *gone, *range(len(self.experts), self.router_rows))
        return replace(
            self,
            router=self._routing(rows, self.router.top_k),
            experts=tuple(self.experts[n] for n in stay),
            substitutes=(*(new[n] for n in gone), *self.substitutes),
        )

    def _routing(self, rows: tuple[int, ...], top_k: int) -> Router:
        """The router with only some rows, in that order."""
        return replace(
            self.router,
            weight=_rows(self.router.weight, rows),
            per_expert={k: _rows(w, rows) for k, w in self.router.per_expert.items()},
            top_k=top_k,
            skip_below=self.router.skip_below[: top_k - 1],
        )


def _rows(weight: Weight, rows: tuple[int, ...]) -> Weight:
    """Handle on some rows of ``weight``."""
    return replace(
        weight,
        shape=(len(rows), *weight.shape[1:]),
        load=lambda: weight.load()[list(rows)],
    )


@dataclass(frozen=True)
class UnroutedMLP:
    """What is left of an MoE layer with nothing to choose, in families with shared experts.

    Attributes:
        shared: the shared expert.
        expert: the one routed expert that stayed, always on with weight one; None: none stayed.
    """

    shared: Shared
    expert: Dense | None = None


def plan_weight_like(like: Weight, name: str, shape: tuple[int, ...]) -> Weight:
    """A handle on new numbers in the dtype of another one, which are not there yet."""
    plain = {"scheme": None, "load_quantized": None, "pattern": None}
    return plan_weight(replace(like, name=name, shape=shape), **plain)


def plan_weight(weight: Weight, **promised: Any) -> Weight:
    """A handle with what slimming will give it, such as a scheme; its numbers are not there yet."""

    def not_yet() -> Tensor:
        raise AssertionError(f"{weight.name} is only planned")

    return replace(weight, load=not_yet, **promised)


# Floating-point dtypes as safetensors and as torch spell them.
DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}


def cast_to_stored(tensor: Tensor, dtype: str) -> Tensor:
    """``tensor`` in a dtype as safetensors spells it."""
    import torch

    return tensor.to(getattr(torch, DTYPES[dtype]))
