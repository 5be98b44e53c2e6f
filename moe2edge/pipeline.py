"""Passes, what they declare, and running them in order under one contract.

A pass either *trims* (returns a model with fewer experts or blocks; computes no number), *slims*
(computes new numbers, one block at a time) or *searches* (drives walks of its own). Adjacent
trimming passes form one stage: what they need to know about activations is gathered in one walk
over the model as it stood when the stage began. The pipeline, not the pass, enforces the contract.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    ClassVar,
    Protocol,
    Self,
    TypeVar,
    runtime_checkable,
)

from pydantic import Field

from moe2edge.errors import Moe2EdgeError
from moe2edge.layers import Weight
from moe2edge.memory import UNLIMITED, Memory, Need
from moe2edge.model import Block, Model, is_quantizable
from moe2edge.options import Options

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import Tensor

    from moe2edge.progress import Watcher
    from moe2edge.rounding import Quantized
    from moe2edge.scheme import Pattern
    from moe2edge.walk import Seen

Fact = TypeVar("Fact")
Fact_co = TypeVar("Fact_co", covariant=True)


class Observer(Protocol[Fact_co]):
    """A visitor of a walk that gathers one fact about the model."""

    def see(self, seen: Seen) -> None:
        """Take in what one batch of one block showed."""
        ...

    def fact(self) -> Fact_co:
        """What was learned, after the walk."""
        ...


# Makes a fresh observer: its class, or a value that compares equal if it would gather the same.
Kind = Callable[[], Observer[Any]]


class Facts:
    """What a walk learned, keyed by the kind of observer: ``facts[RoutingObserver]``."""

    def __init__(self, facts: Mapping[Kind, object] | None = None) -> None:
        self._facts: dict[Kind, Any] = dict(facts or {})

    def __getitem__(self, kind: Callable[[], Observer[Fact]]) -> Fact:
        value: Fact = self._facts[kind]
        return value


@dataclass(frozen=True)
class Outcome:
    """A model after a pass, and an account of what the pass did and did not touch.

    Attributes:
        model: the new model.
        changed: what was changed, in words of the user (``block 3``, a tensor's name).
        skipped: what was selected but left alone, with the reason.
        notes: what a user should know besides, such as experts that fell back to rounding.
        figures: numbers for programs, as plain data.
        originals: the model before, with neurons in the order of what experts became part of;
            None: that order was theirs.
    """

    model: Model
    changed: tuple[str, ...] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    figures: Mapping[str, Any] = field(default_factory=dict)
    originals: Model | None = None


class Pass(Options):
    """One step of a recipe. Its fields are its options: recipe keys, validation, JSON Schema."""

    def resolved(self, model: Model) -> Self:
        """The same pass with every choice made that it leaves to the source ``model``."""
        return self

    def check_source(self, sha256: Callable[[], str]) -> None:
        """Refuse a source with other content than the options are about.

        Args:
            sha256: computes its digest, which reads all of it.

        Raises:
            InputError: it is another one.
        """

    def check(self, model: Model) -> None:
        """Refuse, from shapes alone, a model on which this pass cannot do its work.

        Raises:
            InputError: an option does not fit this model.
            Unsupported: the model has something that this pass does not handle.
        """

    def plan(self, model: Model) -> Model:
        """A model of the shape that the result will have; which parts stay is not known yet."""
        raise NotImplementedError


class Trim(Pass):
    """A pass that removes structure.

    Attributes:
        rescore: begin a new stage, so that this pass is scored on the already trimmed model.
    """

    rescore: bool = False

    def observers(self) -> tuple[Kind, ...]:
        """Kinds of observers whose facts `apply` reads."""
        return ()

    def apply(self, model: Model, facts: Facts) -> Outcome:
        """The trimmed model."""
        raise NotImplementedError


@dataclass(frozen=True)
class Lab:
    """What a pass has at hand that decides by running text through models.

    Attributes:
        source: the model as it was before the first pass.
        model: the model as it is now.
        tokens: calibration tokens, int64 [samples, length]; none where the pass needs none.
        store: keeps computed numbers.
        watcher: told about progress and cost.
        memory: what it may take.
        training: tokens to train on, int64 [samples, length], for passes that do.
        scratch: folder of the pass that outlives a killed export; None: there is none.
        unshared: the model as it was last while no experts shared matrices; None: the source.
    """

    source: Model
    model: Model
    tokens: Tensor
    store: Store
    watcher: Watcher
    memory: Memory = UNLIMITED
    training: Tensor | None = None
    scratch: Path | None = None
    unshared: Model | None = None


class Search(Pass):
    """A pass that drives walks of its own, to try out what it decides.

    Attributes:
        may_change_nothing: whether leaving the model alone is a result, not a fault.
        needs_tokens: whether it looks at the calibration text.
    """

    may_change_nothing: ClassVar[bool] = False
    needs_tokens: ClassVar[bool] = True

    def need(self, model: Model, tokens: int) -> Need | None:
        """Memory that it takes for a text of so many tokens, by shapes; None: hardly any."""
        return None

    def search(self, lab: Lab) -> Outcome:
        """The changed model."""
        raise NotImplementedError


class Store(Protocol):
    """Where solved numbers go: the work folder of an export."""

    def put(self, block: Block, numbers: Mapping[str, Quantized | Tensor]) -> Block:
        """Save the numbers of a block by role; return the block with handles on them."""
        ...

    def put_rest(
        self, rest: Mapping[str, Weight], numbers: Mapping[str, Tensor]
    ) -> dict[str, Weight]:
        """Save numbers of tensors outside of blocks by name; all of them, with new handles."""
        ...


@dataclass(frozen=True)
class Done:
    """What there is to tell of a block that was solved.

    Attributes:
        changed: names on disk of the tensors that were solved.
        notes: what a user should know.
        loss: squared error of outputs on the tokens seen, and what it is relative to.
    """

    changed: tuple[str, ...]
    notes: tuple[str, ...] = ()
    loss: tuple[float, float] = (0.0, 0.0)


class Ledger(Protocol):
    """The finished blocks of one slimming pass, kept so that a killed run can be gone on with."""

    def restore(self, block: Block) -> tuple[Block, Done] | None:
        """A block as it was solved before, with what there is to tell; None if it was not."""
        ...

    def stream(self) -> Tensor | None:
        """Hidden states behind the last block that was restored, float32."""
        ...

    def finish(
        self,
        block: Block,
        numbers: Mapping[str, Quantized | Tensor],
        done: Done,
        hidden: Tensor | None,
    ) -> Block:
        """Save a solved block and the stream behind it; the block with handles on its numbers."""
        ...


class Work(Store, Protocol):
    """The work folder of an export."""

    def ledger(self, step: int) -> Ledger:
        """The finished blocks of the pass at position ``step``."""
        ...

    def scratch(self, step: int, name: str) -> Path:
        """A folder for the pass ``name`` at position ``step``: see `Lab`."""
        ...


class Solver(Protocol):
    """The work of a slimming pass during its walk."""

    def see(self, seen: Seen) -> None:
        """Take in what one batch of the current block showed."""
        ...

    def solve(self, block: Block) -> Solved:
        """New numbers of the current block; then forget the block."""
        ...


@dataclass(frozen=True)
class Group:
    """Matrices of a block that share their input.

    Attributes:
        weights: by role, unquantized.
        batches: yields inputs [n, in] with the weight of each token in its expert's output [n],
            None where there is no router; a group is asked for them as often as one likes.
        tokens: number of tokens of all batches; 0 if the walk has none.
        everyone: like ``batches``, of all tokens, whether or not they are routed here; None where
            that is the same.
    """

    weights: Mapping[str, Weight]
    batches: Callable[[], Iterator[tuple[Tensor, Tensor | None]]]
    tokens: int
    everyone: Callable[[], Iterator[tuple[Tensor, Tensor | None]]] | None = None

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of the matrices."""
        return tuple(weight.shape for weight in self.weights.values())

    def is_starved(self, least: int) -> bool:
        """Whether it is an expert's, and saw fewer than ``least`` tokens."""
        return self.everyone is not None and self.tokens < least

    def starved_note(self, block: Block, least: int, what: str) -> list[str]:
        """What is told of a starved expert, once: with the first of its groups."""
        kind, _, part = next(iter(self.weights)).rpartition(".")
        if part != "gate":
            return []
        return [
            f"block {block.index}: expert {kind.partition('.')[2]} saw {self.tokens} tokens, fewer "
            f"than {least}: {what}"
        ]


@dataclass(frozen=True)
class Solved:
    """What a solver found for some groups.

    Attributes:
        numbers: by role.
        notes: what a user should know.
        loss: squared error of the outputs on the tokens that were seen, or of the weights where
            none are looked at, and what it is relative to; zeros if nothing is known.
        pattern: which of the numbers are zero and stay so; None: what was promised before holds.
    """

    numbers: Mapping[str, Quantized | Tensor]
    notes: tuple[str, ...] = ()
    loss: tuple[float, float] = (0.0, 0.0)
    pattern: Pattern | None = None


@runtime_checkable
class GroupSolver(Protocol):
    """Solves groups of matrices in the order of computation.

    The inputs of a group come from what is before it as solved, in earlier blocks and in its own.

    Attributes:
        propagate: whether that is so; otherwise inputs come from the model as it was.
        device: where inputs of groups lie, and the work is done; numbers are wanted on the CPU.
        dtype: that of outputs of matrices of experts and MLPs, by which the walk goes on; those of
            attention are float32.
    """

    propagate: bool

    @property
    def device(self) -> torch.device:
        """The processor, for those who say nothing else."""
        import torch

        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """Full precision, for those who say nothing else."""
        import torch

        return torch.float32

    def alone(self, block: Block) -> Mapping[str, Quantized]:
        """Numbers, by role, of what is in no group and needs no inputs; computed before groups."""
        return {}

    def nbytes(self, shapes: Sequence[tuple[int, ...]]) -> int:
        """Memory of solving one group of matrices of these shapes."""
        ...

    def solve(self, block: Block, groups: Sequence[Group]) -> Solved:
        """Solve groups of equal shapes, together if that is faster."""
        ...


# Options of passes that look at the tokens of each expert.
GateWeighted = Annotated[
    bool, Field(description="tokens count by their weight in the expert's output")
]
MinTokens = Annotated[int, Field(ge=0, description="an expert with fewer routed tokens is starved")]


class Slim(Pass):
    """A pass that computes new numbers for tensors, one block after another."""

    @property
    def needs_tokens(self) -> bool:
        """Whether it looks at activations."""
        return True

    def solver(self, model: Model) -> Solver | GroupSolver:
        """A fresh solver."""
        raise NotImplementedError

    def check_result(self, before: Model, after: Model) -> None:
        """Prove that every tensor that the options select was changed as they say.

        Raises:
            Moe2EdgeError: one was not.
        """
        raise NotImplementedError

    def describe(self, model: Model) -> str:
        """What it will do to ``model``, in a line for the log."""
        raise NotImplementedError


def selected(block: Block) -> Iterator[tuple[str, Weight]]:
    """The tensors of a block that slimming selects, with their roles."""
    return ((role, weight) for role, weight in block.weights() if is_quantizable(role))


def planned_like(like: Weight, name: str, shape: tuple[int, ...]) -> Weight:
    """A handle on new numbers in the dtype of another one, which are not there yet."""
    plain = {"scheme": None, "load_quantized": None, "pattern": None}
    return planned(replace(like, name=name, shape=shape), **plain)


def planned(weight: Weight, **promised: Any) -> Weight:
    """A handle with what slimming will give it, such as a scheme; its numbers are not there yet."""

    def not_yet() -> Tensor:
        raise AssertionError(f"{weight.name} is only planned")

    return replace(weight, load=not_yet, **promised)


def plan(passes: Sequence[Pass], model: Model) -> Model:
    """The shape of the result, after a check of every pass; nothing is read.

    Raises:
        InputError, Unsupported: a pass cannot do its work on this model.
    """
    for step in passes:
        step.check(model)
        model = step.plan(model)
        model.verify()
    return model


@dataclass(frozen=True)
class Stage:
    """Passes that share a walk: any number of trimming passes, or one of another kind."""

    passes: tuple[Pass, ...]

    @property
    def needs_tokens(self) -> bool:
        """Whether it looks at activations."""
        last = self.passes[-1]
        if isinstance(last, Slim | Search):
            return last.needs_tokens
        return bool(self.observers)

    @property
    def observers(self) -> tuple[Kind, ...]:
        """The kinds of observers that its passes need, each once."""
        kinds = (kind for p in self.passes if isinstance(p, Trim) for kind in p.observers())
        return tuple(dict.fromkeys(kinds))


def stages(passes: Sequence[Pass]) -> list[Stage]:
    """Group passes into stages."""
    groups: list[list[Pass]] = []
    for step in passes:
        joins = isinstance(step, Trim) and not step.rescore
        if joins and groups and isinstance(groups[-1][-1], Trim):
            groups[-1].append(step)
        else:
            groups.append([step])
    return [Stage(tuple(group)) for group in groups]


@dataclass(frozen=True)
class Step:
    """A line of the report: one pass that was run."""

    name: str
    options: Mapping[str, Any]
    changed: tuple[str, ...]
    skipped: Mapping[str, str]
    notes: tuple[str, ...]
    seconds: float
    parameters: int
    nbytes: int
    figures: Mapping[str, Any] = field(default_factory=dict)


def enforce(step: Pass, name: str, before: Model, outcome: Outcome) -> None:
    """Hold an outcome against the contract.

    Raises:
        Moe2EdgeError: the pass changed nothing, or left out something that it selected, or the
            result is not sound.
    """
    idle = isinstance(step, Search) and step.may_change_nothing
    if not idle and (not outcome.changed or outcome.model is before):
        reasons = "; ".join(f"{k}: {v}" for k, v in outcome.skipped.items())
        raise Moe2EdgeError(f"{name} changed nothing ({reasons or 'nothing matched'})")
    if outcome.skipped:
        first, reason = next(iter(outcome.skipped.items()))
        raise Moe2EdgeError(f"{name} left {len(outcome.skipped)} parts alone: {first}: {reason}")
    outcome.model.verify()
    if isinstance(step, Slim):
        step.check_result(before, outcome.model)
