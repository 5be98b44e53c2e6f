"""What one batch of one block shows, and who looks at it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import (
    TYPE_CHECKING,
    Any,
    Protocol,
    TypeVar,
)

from moe2edge.model.model import Block

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class RouterTrace:
    """What the router of a block did with N tokens.

    Attributes:
        inputs: input of the MoE layer, [N, hidden].
        logits: router logits, [N, experts].
        weights: what expert outputs are multiplied with, [N, k].
        ids: the chosen experts, int64 [N, k].
    """

    inputs: Tensor
    logits: Tensor
    weights: Tensor
    ids: Tensor


@dataclass(frozen=True)
class BlockTrace:
    """What one batch of one block showed.

    Attributes:
        block: the block.
        inputs, outputs: its residual stream, [batch, length, hidden].
        attended: the stream between attention and what follows it.
        mlp_inputs, mlp_outputs: of the MoE layer or MLP, [batch, length, hidden].
        routing: what its router did, None for a dense block.
        linear_inputs: inputs [N, in] of the matrices of attention, shared expert and dense MLP,
            by role.
        expert_hidden: input [n, width] of ``down`` of an expert, or of a member, for its inputs
            [n, hidden].
        expert_output: output [n, hidden] of one for its inputs [n, hidden].
    """

    block: Block
    inputs: Tensor
    outputs: Tensor
    attended: Tensor
    mlp_inputs: Tensor
    mlp_outputs: Tensor
    routing: RouterTrace | None
    linear_inputs: Mapping[str, Tensor]
    expert_hidden: Callable[[int, Tensor], Tensor]
    expert_output: Callable[[int, Tensor], Tensor]


Fact = TypeVar("Fact")
Left = TypeVar("Left")
Fact_co = TypeVar("Fact_co", covariant=True)


class Observer(Protocol[Fact_co]):
    """A visitor of a walk that gathers one fact about the model."""

    def observe(self, trace: BlockTrace) -> None:
        """Take in what one batch of one block showed."""
        ...

    def result(self) -> Fact_co:
        """What was learned, after the walk."""
        ...


# Makes a fresh observer: its class, or a value that compares equal if it would gather the same.
ObserverFactory = Callable[[], Observer[Any]]


class Facts:
    """Facts for a pass: what a walk observed, and what earlier passes left.

    ``facts[RoutingObserver]`` is what the walk of its stage observed, by the kind of observer;
    ``facts.get(UntiedModel)`` is what an earlier pass left, by type.
    """

    def __init__(
        self,
        facts: Mapping[ObserverFactory, object] | None = None,
        left: Mapping[type, object] | None = None,
        readable: Collection[type] | None = None,
    ) -> None:
        """Hold facts.

        Args:
            facts: those of the walk.
            left: those of earlier passes, by their type.
            readable: types that the pass may ask for; None: all.
        """
        self._facts: dict[ObserverFactory, Any] = dict(facts or {})
        self._left: dict[type, Any] = dict(left or {})
        self._readable = readable

    def __getitem__(self, kind: Callable[[], Observer[Fact]]) -> Fact:
        value: Fact = self._facts[kind]
        return value

    def get(self, kind: type[Left]) -> Left | None:
        """Return the last fact of a type that an earlier pass left; None: none did.

        Raises:
            AssertionError: the pass does not declare that it reads this type.
        """
        if self._readable is not None and kind not in self._readable:
            raise AssertionError(f"a pass reads {kind.__name__}, which is not in its reads")
        value: Left | None = self._left.get(kind)
        return value

    def for_pass(self, left: Mapping[type, object], readable: Collection[type]) -> Facts:
        """Return the facts of the walk with those that earlier passes left for a pass."""
        return Facts(self._facts, left, readable)
