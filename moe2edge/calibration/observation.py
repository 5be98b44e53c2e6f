"""Traces of one batch in one block, and the observers that read them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import (
    TYPE_CHECKING,
    Any,
    Protocol,
    TypeVar,
    runtime_checkable,
)

from moe2edge.model.block import Block

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.model.stock_router import StockRouter


@dataclass(frozen=True)
class RouterTrace:
    """Inputs and choices of a router for N tokens.

    Attributes:
        inputs: input of the MoE layer, [N, hidden].
        logits: router logits, [N, rows].
        weights: gate weights, by which expert outputs are multiplied, [N, k].
        ids: the chosen rows of the router, int64 [N, k]; the number of rows for a skipped choice.
    """

    inputs: Tensor
    logits: Tensor
    weights: Tensor
    ids: Tensor


@dataclass(frozen=True)
class BlockTrace:
    """Activations of one batch in one block.

    Attributes:
        block: the block.
        inputs, outputs: residual stream before and after the block, [batch, length, hidden].
        attended: residual stream between attention and the MoE layer or MLP, same shape.
        mlp_inputs, mlp_outputs: input and output of the MoE layer or MLP, same shape.
        routing: trace of the router; None for a dense block.
        linear_inputs: inputs [N, in] of the matrices of attention, shared expert and dense MLP,
            by role.
        expert_hidden: function from a row of the router that runs a full or tied expert, and
            inputs [n, hidden], to its intermediate activations [n, width], the input of ``down``.
        expert_output: function from such a row and inputs [n, hidden] to the output of its
            expert, [n, hidden].
        rerun: function from other hidden states [batch, length, hidden] and their positions
            [length] to the trace of the block on them.
        run_bare: function that returns the output that the block would have without its MoE layer
            and the norms that belong to it, [batch, length, hidden].
        router: function that returns the router, as transformers runs it among any of its rows;
            None: its rule is that of the table of families.
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
    rerun: Callable[[Tensor, Tensor], BlockTrace]
    run_bare: Callable[[], Tensor]
    router: Callable[[], StockRouter] | None


Fact = TypeVar("Fact")
Left = TypeVar("Left")
Fact_co = TypeVar("Fact_co", covariant=True)


class Observer(Protocol[Fact_co]):
    """A visitor of a walk that gathers one fact about the model."""

    def observe(self, trace: BlockTrace) -> None:
        """Add the trace of one batch of one block."""
        ...

    def result(self) -> Fact_co:
        """Return the fact, after the walk."""
        ...


@runtime_checkable
class SeesOutputs(Protocol):
    """An observer that sees the outputs of every expert, as they are computed.

    It sees all of a batch before `Observer.observe` gets the trace.
    """

    def visit(self, block: Block, row: int, outputs: Tensor, weights: Tensor) -> None:
        """Add outputs of an expert; they are overwritten afterwards.

        Args:
            block: the block.
            row: the row of the router that runs the expert.
            outputs: float32 [n, hidden], for the tokens that chose the row; n is at least 1.
            weights: by which they are multiplied, float32 [n].
        """
        ...


class Resumable:
    """Observer, or other visitor of a walk, whose walk is kept block by block and can resume.

    What it saves is plain data, as JSON has it, and tensors of float32, float64 and int64, in lists
    and mappings with names as keys. Restored from that, it gives the same bits.
    """

    def save(self, block: Block) -> Any:
        """Return what it gathered in a block, all of whose batches it has observed."""
        raise NotImplementedError

    def restore(self, block: Block, saved: Any) -> None:
        """Take what `save` returned, in place of the batches of the block."""
        raise NotImplementedError

    def carry(self) -> Any:
        """Return what it needs of earlier blocks to observe the next one, beside what it saved."""
        return None

    def take_up(self, carried: Any) -> None:
        """Take what `carry` returned behind the last block that is restored."""


# Makes a fresh observer: the class of the observer, or a value that compares equal to every other
# that makes observers of the same fact.
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
