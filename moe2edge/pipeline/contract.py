"""Passes: what they declare, and what they return."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
    Self,
)

from moe2edge.calibration.observation import Facts, ObserverFactory
from moe2edge.model.model import Model
from moe2edge.options import Options
from moe2edge.pipeline.solver import GroupSolver, Solver
from moe2edge.pipeline.work import Store, estimate_most_new_bytes, estimate_new_bytes
from moe2edge.runtime.memory import UNLIMITED, Estimate, Memory

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from moe2edge.progress import Reporter


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
    """One step of a recipe. Its fields are its options: recipe keys, validation, JSON Schema.

    Attributes:
        name: the name of its file.
    """

    name: ClassVar[str]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.name = cls.__module__.rpartition(".")[2]

    def resolve(self, model: Model) -> Self:
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

    def check_text(self, text: TextSize) -> None:
        """Refuse a training text that is too short for the options.

        Raises:
            InputError: it is.
        """

    def estimate(self, planned: PlannedStep, texts: TextSizes) -> Estimate:
        """Estimate, from shapes alone, what it will take beside a walk over the model."""
        return Estimate()

    def describe(self, planned: PlannedStep) -> str:
        """Describe in a line for the log what it will do; empty: nothing to say before."""
        return ""


@dataclass(frozen=True)
class TextSize:
    """Size of a text that was cut into samples.

    Attributes:
        samples: how many.
        length: tokens of each.
    """

    samples: int
    length: int

    @property
    def tokens(self) -> int:
        """Number of tokens in all."""
        return self.samples * self.length


@dataclass(frozen=True)
class TextSizes:
    """Sizes of the texts that a recipe gives to its passes.

    Attributes:
        calibration: the text that passes look at.
        training: the text that passes train on; None: there is none.
    """

    calibration: TextSize
    training: TextSize | None = None


@dataclass(frozen=True)
class PlannedStep:
    """A pass of a recipe, with the shapes of models around it; no numbers are known yet.

    Attributes:
        step: the pass, which was checked on the model before.
        before: the model that it will get.
        after: the model that it will make of it.
    """

    step: Pass
    before: Model
    after: Model


class Trim(Pass):
    """A pass that removes structure.

    Attributes:
        rescore: begin a new stage, so that this pass is scored on the already trimmed model.
    """

    rescore: bool = False

    def observers(self) -> tuple[ObserverFactory, ...]:
        """Kinds of observers whose facts `apply` reads."""
        return ()

    def apply(self, model: Model, facts: Facts) -> Outcome:
        """The trimmed model."""
        raise NotImplementedError


@dataclass(frozen=True)
class PassContext:
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
    reporter: Reporter
    memory: Memory = UNLIMITED
    training: Tensor | None = None
    scratch: Path | None = None
    unshared: Model | None = None

    @property
    def texts(self) -> TextSizes:
        """Sizes of its texts."""
        training = None if self.training is None else TextSize(*self.training.shape)
        return TextSizes(TextSize(*self.tokens.shape), training)


class Search(Pass):
    """A pass that drives walks of its own, to try out what it decides.

    Attributes:
        may_change_nothing: whether leaving the model alone is a result, not a fault.
        needs_tokens: whether it looks at the calibration text.
    """

    may_change_nothing: ClassVar[bool] = False
    needs_tokens: ClassVar[bool] = True

    def estimate(self, planned: PlannedStep, texts: TextSizes) -> Estimate:
        """Estimate what it will take: the numbers that it may compute."""
        return Estimate(disk=estimate_most_new_bytes(planned.before, planned.after))

    def search(self, context: PassContext) -> Outcome:
        """The changed model."""
        raise NotImplementedError


class Slim(Pass):
    """A pass that computes new numbers for tensors, one block after another."""

    @property
    def needs_tokens(self) -> bool:
        """Whether it looks at activations."""
        return True

    def solver(self, model: Model) -> Solver | GroupSolver:
        """A fresh solver."""
        raise NotImplementedError

    def estimate(self, planned: PlannedStep, texts: TextSizes) -> Estimate:
        """Estimate what it will take: the largest part that is solved at once, and the numbers."""
        from moe2edge.pipeline.blockwise import estimate_largest_part

        return Estimate(
            estimate_largest_part(planned.before, self.solver(planned.before)),
            estimate_new_bytes(planned.before, planned.after),
            purpose=f"{self.name} solves a part of a block at once",
            remedy="allow more",
        )

    def check_result(self, before: Model, after: Model) -> None:
        """Prove that every tensor that the options select was changed as they say.

        Raises:
            Moe2EdgeError: one was not.
        """
        raise NotImplementedError

    def describe(self, planned: PlannedStep) -> str:
        """Describe in a line for the log what it will do."""
        raise NotImplementedError


class Train(Search):
    """A search that trains on the training text of the recipe, and looks at no other."""

    needs_tokens: ClassVar[bool] = False


def needs_training_text(passes: Sequence[Pass]) -> bool:
    """Whether a pass wants the training text."""
    return any(isinstance(step, Train) for step in passes)
