"""Contract of passes: declarations, work and results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    ClassVar,
    Literal,
    Self,
)

from pydantic import Field

from moe2edge.calibration.observation import Facts, ObserverFactory
from moe2edge.model.model import Model
from moe2edge.model.traits import Trait
from moe2edge.options import Options
from moe2edge.pipeline.solver import EndSolver, GroupSolver, Solver
from moe2edge.pipeline.work import BlockJournal, Store, estimate_most_new_bytes, estimate_new_bytes
from moe2edge.runtime.memory import UNLIMITED, Estimate, Memory

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from moe2edge.progress import Reporter
    from moe2edge.storage.kept_walk import KeptWalk


# Parameters of a model that takes long to score; smaller ones are scored in float32.
LONG_TO_SCORE = 10**9


@dataclass(frozen=True)
class Outcome:
    """A model after a pass, and an account of what the pass did and did not touch.

    Attributes:
        model: the new model.
        changed: parts that were changed, as a user names them (``block 3``, a tensor's name).
        skipped: parts that were selected but left unchanged, with the reason.
        notes: further remarks for the user, such as experts that fell back to rounding.
        figures: numbers for programs, as plain data.
        facts: what it leaves for later passes; of types that the pass declares in ``writes``.
    """

    model: Model
    changed: tuple[str, ...] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    figures: Mapping[str, Any] = field(default_factory=dict)
    facts: tuple[object, ...] = ()


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
        calibration: the text that passes read for calibration.
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


@dataclass(frozen=True)
class PassContext:
    """Everything that a pass can use while it runs.

    Attributes:
        source: the model as it was before the first pass.
        model: the model as it is now.
        tokens: calibration tokens, int64 [samples, length]; none where the pass needs none.
        store: keeps computed numbers.
        reporter: receives progress and cost.
        memory: the budget.
        training: tokens to train on, int64 [samples, length], for passes that do.
        keep_walk: returns the folder of a walk of the pass, by a name for it: see `KeptWalk`; None:
            walks are not kept.
        scratch: folder of a pass that trains, which outlives a killed export; None: there is none.
        journal: keeps finished blocks of a pass that computes numbers.
        facts: what a walk observed for the pass, and what earlier passes left.
    """

    source: Model
    model: Model
    tokens: Tensor
    store: Store
    reporter: Reporter
    memory: Memory = UNLIMITED
    training: Tensor | None = None
    keep_walk: Callable[[str], KeptWalk | None] = lambda _: None
    scratch: Path | None = None
    journal: BlockJournal | None = None
    facts: Facts = field(default_factory=Facts)

    @property
    def texts(self) -> TextSizes:
        """Sizes of its texts."""
        training = None if self.training is None else TextSize(*self.training.shape)
        return TextSizes(TextSize(*self.tokens.shape), training)

    def gather(
        self,
        kinds: Sequence[ObserverFactory],
        label: str,
        kept: KeptWalk | None = None,
        compute: str = "float32",
    ) -> Facts:
        """Observe the model in one walk over the calibration text; see `walk.gather`.

        Args:
            kinds: kinds of observers.
            label: name of the walk, for progress.
            kept: folder where the walk is kept; None: it is not.
            compute: dtype of products with matrices that have it.
        """
        import torch

        from moe2edge.calibration import walk

        advance, memory, dtype = self.reporter.advance, self.memory, getattr(torch, compute)
        return walk.gather(self.model, self.tokens, kinds, advance, label, memory, kept, dtype)


class Pass(Options):
    """One step of a recipe. Its fields are its options: recipe keys, validation, JSON Schema.

    The core asks a pass for what these attributes and methods say, never for its class.

    Attributes:
        name: the name of its file.
        reads: types of facts that it takes from earlier passes.
        writes: types of facts that it may leave for later passes.
        computes_numbers: whether it computes new numbers for tensors, block after block, and
            leaves the structure as it is.
        may_change_nothing: whether leaving the model alone is a result, not a fault.
        needs_training_text: whether it trains on the training text of the recipe.
        shares_walk: whether passes behind it can join its stage.
        needs: traits that blocks with experts must have; those of a new pass are known for the
            families of the table alone, until it says more.
    """

    name: ClassVar[str]
    reads: ClassVar[tuple[type, ...]] = ()
    writes: ClassVar[tuple[type, ...]] = ()
    computes_numbers: ClassVar[bool] = False
    may_change_nothing: ClassVar[bool] = False
    needs_training_text: ClassVar[bool] = False
    shares_walk: ClassVar[bool] = False
    needs: ClassVar[tuple[Trait, ...]] = (Trait.TABLE,)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.name = cls.__module__.rpartition(".")[2]

    def list_needs(self) -> tuple[Trait, ...]:
        """List the traits that blocks with experts must have for these options."""
        return self.needs

    @property
    def needs_tokens(self) -> bool:
        """True if it reads the calibration text."""
        return False

    @property
    def changes_routers(self) -> bool:
        """True if it may change the numbers of routers, which its plan does not show."""
        return False

    @property
    def joins_stage(self) -> bool:
        """True if it is scored in the walk of the passes before it, if they share theirs."""
        return False

    def observers(self) -> tuple[ObserverFactory, ...]:
        """Kinds of observers that the walk of its stage gathers facts with."""
        return ()

    def narrow_head(self, model: Model) -> Self:
        """Return the pass with a head of 8 bits if it quantizes and its options leave it open.

        Args:
            model: the source.
        """
        return self

    def resolve(self, model: Model) -> Self:
        """Return the pass with every choice made that depends on the source ``model``."""
        return self

    def check_source(self, sha256: Callable[[], str]) -> None:
        """Refuse a source whose content is not the one that the options were made for.

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
        """Return a model of the shape of the result; which parts stay is not known yet."""
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

    def run(self, context: PassContext) -> Outcome:
        """Do the work. Each kind of pass does so by the one method that its passes write."""
        raise NotImplementedError

    def check_result(self, before: Model, after: Model) -> None:
        """Prove from the result that the options were followed.

        Raises:
            Moe2EdgeError: they were not.
        """


class Trim(Pass):
    """A pass that removes structure."""

    shares_walk: ClassVar[bool] = True
    rescore: Annotated[
        bool, Field(description="begin a new stage: score on the model as trimmed so far")
    ] = False
    compute: Annotated[
        Literal["auto", "float32", "bfloat16"],
        Field(
            description="dtype of matrix products while scoring, where weights are bfloat16; auto: "
            "bfloat16 for a billion parameters or more, where the processor multiplies it natively"
        ),
    ] = "auto"

    def resolve(self, model: Model) -> Self:
        """Return the pass with the dtype of products on this machine, which affects scores."""
        from moe2edge.runtime.products import multiplies_bfloat16

        chosen = self.compute
        if chosen == "auto":
            narrow = model.parameters >= LONG_TO_SCORE and multiplies_bfloat16()
            chosen = "bfloat16" if narrow else "float32"
        return super().resolve(model).model_copy(update={"compute": chosen})

    @property
    def needs_tokens(self) -> bool:
        """True if it has observers, which read the calibration text."""
        return bool(self.observers())

    @property
    def joins_stage(self) -> bool:
        """True if it is scored on the model before the trimming passes that precede it."""
        return not self.rescore

    def run(self, context: PassContext) -> Outcome:
        """Trim the model by the facts that were observed."""
        return self.apply(context.model, context.facts)

    def apply(self, model: Model, facts: Facts) -> Outcome:
        """Trim the model; ``facts`` has what its observers gathered."""
        raise NotImplementedError


class Search(Pass):
    """A pass that decides by running text through models itself."""

    @property
    def needs_tokens(self) -> bool:
        """True: it reads the calibration text."""
        return True

    def estimate(self, planned: PlannedStep, texts: TextSizes) -> Estimate:
        """Estimate what it will take: the numbers that it may compute."""
        return Estimate(disk=estimate_most_new_bytes(planned.before, planned.after))

    def run(self, context: PassContext) -> Outcome:
        """Search, if there is the memory: the model may be another one than was planned.

        Raises:
            DoesNotFit: there is less.
        """
        # The disk was looked at before the first pass, so shapes of the result are not needed.
        shapes = PlannedStep(self, context.model, context.model)
        self.estimate(shapes, context.texts).check(context.memory.limit)
        return self.search(context)

    def search(self, context: PassContext) -> Outcome:
        """Find the changed model."""
        raise NotImplementedError


class Slim(Pass):
    """A pass that computes new numbers for tensors, one block after another."""

    computes_numbers: ClassVar[bool] = True

    @property
    def needs_tokens(self) -> bool:
        """True if it needs activations, and thus the calibration text."""
        return True

    def solver(self, model: Model) -> Solver | GroupSolver:
        """Make a fresh solver."""
        raise NotImplementedError

    def end_solver(self, model: Model) -> EndSolver:
        """Make a fresh solver of matrices outside of blocks; the usual one leaves them alone."""
        return EndSolver()

    def run(self, context: PassContext) -> Outcome:
        """Solve block after block; those that the journal has are not solved again.

        Of what is outside of blocks, the embedding comes first, and the head last.
        """
        from moe2edge.pipeline.blockwise import solve_blocks, solve_ends

        if (journal := context.journal) is None:
            raise AssertionError(f"{self.name} got no journal")
        tokens = context.tokens if self.needs_tokens and context.tokens.numel() else None
        solver, ends = self.solver(context.model), self.end_solver(context.model)
        begun, early, first = solve_ends(context.model, ends.early, ends, context.store)
        propagates = not isinstance(solver, GroupSolver) or solver.propagate
        hidden: list[Tensor] = []
        model, changed, notes = solve_blocks(
            begun if propagates else context.model,
            tokens,
            solver,
            journal,
            context.reporter.advance,
            self.name,
            context.memory,
            behind=hidden.append if ends.late and isinstance(solver, GroupSolver) else None,
        )
        model = replace(model, rest=begun.rest)
        model, late, last = solve_ends(model, ends.late, ends, context.store, *hidden)
        return Outcome(model, (*early, *changed, *late), notes=(*first, *notes, *last))

    def estimate(self, planned: PlannedStep, texts: TextSizes) -> Estimate:
        """Estimate what it will take: the largest part that is solved at once, and the numbers."""
        from moe2edge.pipeline.blockwise import estimate_largest_part

        solver = self.solver(planned.before)
        return Estimate(
            max(estimate_largest_part(planned.before, solver), self.estimate_ends(planned.before)),
            estimate_new_bytes(planned.before, planned.after),
            purpose=f"{self.name} holds the largest group of matrices of a block at once",
            remedy="raise --max-memory, or use a larger machine",
        )

    def estimate_ends(self, model: Model) -> int:
        """Estimate the bytes of memory that solving matrices outside of blocks takes."""
        ends = self.end_solver(model)
        sizes = (ends.nbytes(model.rest[name]) for name in (*ends.early, *ends.late))
        return max(sizes, default=0)

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

    needs_training_text: ClassVar[bool] = True

    @property
    def needs_tokens(self) -> bool:
        """False: it reads the training text only."""
        return False

    def run(self, context: PassContext) -> Outcome:
        """Train; the pass reports its cost before it checks the memory itself."""
        return self.search(context)
