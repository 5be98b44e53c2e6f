"""Checkpoints of a training: weights, moments of the optimizer, the best weights, history.

Tensors are in safetensors files, named by step; ``state.json``, written after them, names those
that count. So whatever is there is whole, and of one step.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import TypeAdapter, ValidationError

from moe2edge.errors import InputError
from moe2edge.storage.safetensors_files import Planned, open_file, read_tensor, write_durably
from moe2edge.storage.text_files import sync_folder, write_whole

if TYPE_CHECKING:
    from torch import Tensor

STATE = "state.json"
Tensors = Mapping[str, "Tensor"]


@dataclass(frozen=True)
class Line:
    """An evaluation: the mean loss of the steps before it, None before any; held-out perplexity."""

    step: int
    loss: float | None
    perplexity: float
    learning_rate: float


@dataclass(frozen=True)
class Progress:
    """Progress of a training, without its tensors.

    Attributes:
        step: steps that were made.
        best_step: the step with the lowest held-out perplexity so far.
        since: evaluations after that one.
        losses: losses of the steps after the last line of the history.
        history: one line for each evaluation.
        finished: whether it is over, and only the best weights matter.
    """

    step: int = 0
    best_step: int = 0
    since: int = 0
    losses: tuple[float, ...] = ()
    history: tuple[Line, ...] = ()
    finished: bool = False

    @property
    def best(self) -> float:
        """The lowest held-out perplexity so far; infinite before the first evaluation."""
        return min((line.perplexity for line in self.history), default=float("inf"))


@dataclass(frozen=True)
class Saved:
    """A training as it was saved.

    Attributes:
        progress: where it stood.
        best: the best weights by name; empty if those from before the first step are.
        now: weights by name, and moments by ``exp_avg.NAME`` and ``exp_avg_sq.NAME``; empty if the
            training is over.
    """

    progress: Progress
    best: Tensors = field(default_factory=dict)
    now: Tensors = field(default_factory=dict)


@dataclass(frozen=True)
class States:
    """The folder of a training."""

    folder: Path

    def progress(self) -> Progress | None:
        """Read the progress that was saved last; None if none was.

        Raises:
            InputError: the file is damaged.
        """
        path = self.folder / STATE
        if not path.exists():
            return None
        try:
            return TypeAdapter(Progress).validate_json(path.read_bytes(), strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise describe_damage(
                path, f"{where}: {first['msg']}" if where else first["msg"]
            ) from error

    def load(self) -> Saved | None:
        """Read the last checkpoint; None if there is none. Leftovers of a kill are removed.

        Raises:
            InputError: a file is damaged.
        """
        progress = self.progress()
        names = [] if progress is None else _stems(progress)
        self._keep([f"{name}.safetensors" for name in names])
        if progress is None:
            return None
        now = {} if progress.finished else self._read(f"now-{progress.step}")
        best = self._read(f"best-{progress.best_step}") if progress.best_step else {}
        return Saved(progress, best, now)

    def save(self, saved: Saved) -> None:
        """Write down; what was saved before is gone only then."""
        progress = saved.progress
        names = [
            self._write(stem, saved.now if stem.startswith("now") else saved.best)
            for stem in _stems(progress)
        ]
        write_whole(self.folder / STATE, json.dumps(asdict(progress)))
        sync_folder(self.folder)
        self._keep(names)

    def _keep(self, names: Collection[str]) -> None:
        """Remove all tensors but those in some files."""
        for path in (*self.folder.glob("now-*"), *self.folder.glob("best-*")):
            if path.name not in names:
                path.unlink()

    def _write(self, stem: str, tensors: Tensors) -> str:
        """Write a file that is not there yet; its name."""
        path = self.folder / f"{stem}.safetensors"
        if not path.exists():
            write_durably(
                path,
                [Planned(name, tuple(t.shape), "F32", t.cpu) for name, t in tensors.items()],
            )
        return path.name

    def _read(self, stem: str) -> dict[str, Tensor]:
        path = self.folder / f"{stem}.safetensors"
        try:
            entries = open_file(path)
        except InputError as error:
            raise describe_damage(path, str(error.__cause__).partition("\n")[0]) from error
        # A copy, as the file goes before the tensor does.
        return {name: read_tensor(path, name).clone() for name in entries}


def describe_damage(path: Path, what: str) -> InputError:
    """Describe a file that is not as it was written."""
    return InputError(f"{path} is damaged: {what}; begin the training anew with --resume never")


def _stems(progress: Progress) -> list[str]:
    """Return the names of the tensor files of a training at this step."""
    best = [f"best-{progress.best_step}"] if progress.best_step else []
    return best if progress.finished else [*best, f"now-{progress.step}"]
