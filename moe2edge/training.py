"""Passes that train: what they need to know before any work, and what they cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from moe2edge import memory
from moe2edge.model import Model
from moe2edge.pipeline import Pass, Search


@dataclass(frozen=True)
class Cost:
    """What training takes.

    Attributes:
        memory: bytes of memory of the machine.
        disk: bytes of checkpoints and of what else is kept until the export ends.
        gpu: bytes of memory of the GPU; 0 if it has no part in it.
    """

    memory: int
    disk: int
    gpu: int = 0

    def check(self, name: str, within: int | None = None) -> None:
        """Refuse to begin what memory could not hold.

        Args:
            name: of the pass.
            within: bytes for the whole process; None: what the machine has.

        Raises:
            DoesNotFit: it has less.
        """
        purpose, remedy = f"{name} trains", "set batch to fewer samples, or train less: see train"
        memory.check(self.memory, purpose, remedy, within)
        if self.gpu:
            memory.check_gpu(self.gpu, purpose, f"{remedy}; or set device: cpu")


class Train(Search):
    """A search that trains on the training text of the recipe, and looks at no other."""

    needs_tokens: ClassVar[bool] = False

    def check_text(self, samples: int, length: int) -> None:
        """Refuse a text of so many samples of so many tokens that is too short for the options.

        Raises:
            InputError: it is.
        """

    def cost(self, model: Model, samples: int, length: int) -> Cost:
        """What it will take on ``model``, from shapes alone."""
        raise NotImplementedError


def training(passes: Sequence[Pass], model: Model) -> Iterator[tuple[Train, Model]]:
    """The passes that train, each with the shape of the model that it will get."""
    for step in passes:
        if isinstance(step, Train):
            yield step, model
        model = step.plan(model)


def trains(passes: Sequence[Pass]) -> bool:
    """Whether a pass wants the training text."""
    return any(isinstance(step, Train) for step in passes)
