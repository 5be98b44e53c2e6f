"""Checkpoints of a training: weights, moments of the optimizer, the best weights, history.

Tensors are in safetensors files, named by step; ``state.json``, written after them, names those
that count, with their digests. So a checkpoint is always complete, of one step, and what was
written, even if the process is killed. Where it is not, the work folder forgets it at the start,
and the training begins again.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import TypeAdapter, ValidationError

from moe2edge.errors import WorkDamaged
from moe2edge.storage.records import STATE, find_damaged, read_records, write_records
from moe2edge.storage.safetensors_files import PlannedTensor, open_file, read_tensor, write_durably

if TYPE_CHECKING:
    from torch import Tensor

Tensors = Mapping[str, "Tensor"]


@dataclass(frozen=True)
class Line:
    """An evaluation on held-out text.

    Attributes:
        step: number of steps before it.
        loss: mean loss of the steps since the evaluation before, in nats; None: there were none.
        perplexity: perplexity of the held-out text.
        learning_rate: learning rate of the next step.
    """

    step: int
    loss: float | None
    perplexity: float
    learning_rate: float


@dataclass(frozen=True)
class Progress:
    """Progress of a training, without its tensors.

    Attributes:
        step: number of completed steps.
        best_step: the step with the lowest held-out perplexity so far.
        since: number of evaluations after that one.
        losses: losses of the steps after the last evaluation.
        history: all evaluations.
        finished: whether the training is over, and only the best weights matter.
    """

    step: int = 0
    best_step: int = 0
    since: int = 0
    losses: tuple[float, ...] = ()
    history: tuple[Line, ...] = ()
    finished: bool = False

    @property
    def best(self) -> float:
        """Lowest held-out perplexity so far; infinite before the first evaluation."""
        return min((line.perplexity for line in self.history), default=float("inf"))


@dataclass(frozen=True)
class Saved:
    """A checkpoint of a training.

    Attributes:
        progress: progress at that time.
        best: the best weights by name; empty if those before the first step are the best.
        now: weights by name, and moments by ``exp_avg.NAME`` and ``exp_avg_sq.NAME``; empty if the
            training is over.
    """

    progress: Progress
    best: Tensors = field(default_factory=dict)
    now: Tensors = field(default_factory=dict)


@dataclass
class States:
    """The folder with the checkpoint of a training.

    Attributes:
        folder: the folder.
        files: digests of the files of the checkpoint, by name.
    """

    folder: Path
    files: dict[str, str] = field(default_factory=dict)

    def progress(self) -> Progress | None:
        """Read the progress of the checkpoint; None: there is no checkpoint.

        Raises:
            WorkDamaged: the file is damaged.
        """
        path = self.folder / STATE
        if not path.exists():
            return None
        records, damaged = read_records(path)
        if damaged or len(records) != 1:
            raise describe_damage(path, "its digest differs")
        (record,) = records
        self.files = record.pop("files", {})
        try:
            return TypeAdapter(Progress).validate_json(json.dumps(record), strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise describe_damage(
                path, f"{where}: {first['msg']}" if where else first["msg"]
            ) from error

    def load(self) -> Saved | None:
        """Load the checkpoint; None: there is none. Remove files that an interruption left.

        Raises:
            WorkDamaged: a file is damaged.
        """
        progress = self.progress()
        names = [] if progress is None else _stems(progress)
        self._remove_others([f"{name}.safetensors" for name in names])
        if progress is None:
            return None
        if name := find_damaged(self.folder, self.files):
            raise describe_damage(self.folder / name, "its digest differs")
        now = {} if progress.finished else self._read(f"now-{progress.step}")
        best = self._read(f"best-{progress.best_step}") if progress.best_step else {}
        return Saved(progress, best, now)

    def save(self, saved: Saved) -> None:
        """Write a checkpoint; remove the one before it only then."""
        progress = saved.progress
        files = dict(
            self._write(stem, saved.now if stem.startswith("now") else saved.best)
            for stem in _stems(progress)
        )
        write_records(self.folder / STATE, [{**asdict(progress), "files": files}])
        self.files = files
        self._remove_others(files)

    def _remove_others(self, names: Collection[str]) -> None:
        """Remove all files of tensors but those in ``names``."""
        for path in (*self.folder.glob("now-*"), *self.folder.glob("best-*")):
            if path.name not in names:
                path.unlink()

    def _write(self, stem: str, tensors: Tensors) -> tuple[str, str]:
        """Write a file of tensors unless the checkpoint has it; return its name and digest."""
        path = self.folder / f"{stem}.safetensors"
        if path.name not in self.files:
            self.files[path.name] = write_durably(
                path,
                [PlannedTensor(name, tuple(t.shape), "F32", t.cpu) for name, t in tensors.items()],
            )
        return path.name, self.files[path.name]

    def _read(self, stem: str) -> dict[str, Tensor]:
        path = self.folder / f"{stem}.safetensors"
        # A copy, because the file is removed while the tensor is still in use.
        return {name: read_tensor(path, name).clone() for name in open_file(path)}


def describe_damage(path: Path, what: str) -> WorkDamaged:
    """Make the error for a file whose content is not what was written."""
    return WorkDamaged(f"{path} is damaged: {what}; restart the training with --resume never")


def _stems(progress: Progress) -> list[str]:
    """List the stems of the files that hold the tensors of a checkpoint."""
    best = [f"best-{progress.best_step}"] if progress.best_step else []
    return best if progress.finished else [*best, f"now-{progress.step}"]
