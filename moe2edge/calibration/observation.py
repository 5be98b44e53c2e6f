"""What one batch of one block shows, and who looks at it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
        logits: router logits, [N, rows].
        weights: what expert outputs are multiplied with, [N, k].
        ids: the chosen rows of the router, int64 [N, k]; their number for what is skipped.
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
        expert_hidden: input [n, width] of ``down`` of the full or tied expert that a row of the
            router runs, for its inputs [n, hidden].
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
    """What a walk learned, keyed by the kind of observer: ``facts[RoutingObserver]``."""

    def __init__(self, facts: Mapping[ObserverFactory, object] | None = None) -> None:
        self._facts: dict[ObserverFactory, Any] = dict(facts or {})

    def __getitem__(self, kind: Callable[[], Observer[Fact]]) -> Fact:
        value: Fact = self._facts[kind]
        return value
