"""An export that kills itself, or lists what it solves: run by tests in a process of its own.

It is run by ``runpy.run_path`` with ``KIND``, ``COUNT``, ``SOLVED``, ``FOLDER`` and ``ARGUMENTS``
given, and ``WALKED`` if blocks of walks are to be listed.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moe2edge.cli.main import main
from moe2edge.storage import durable, journal, kept_walk


def die() -> None:
    """Be gone at once, with nothing flushed or cleaned up."""
    os.kill(os.getpid(), signal.SIGKILL)


class Countdown:
    """True once, after so many times."""

    def __init__(self, count: int) -> None:
        self._left = count

    def __call__(self) -> bool:
        """Whether it is time."""
        self._left -= 1
        return self._left < 0


def in_a_write(over: Countdown, folder: str = "work") -> None:
    """Die when half of a piece of a weights file is written, of those in a folder of that name."""
    opened: Callable[..., Any] = Path.open

    class Half(io.FileIO):
        def write(self, data: Any) -> int:
            if over():
                super().write(bytes(data)[: len(data) // 2])
                die()
            return super().write(data)

    def opening(self: Path, mode: str = "r", *more: Any, **named: Any) -> Any:
        if mode == "wb" and ".safetensors" in self.name and self.parent.name == folder:
            return Half(self, "w")
        return opened(self, mode, *more, **named)

    setattr(Path, "open", opening)  # noqa: B010


def in_a_shard(over: Countdown) -> None:
    """Die when half of a piece of the target's own weights is written."""
    in_a_write(over, "out")


def _before(over: Countdown, method: str) -> None:
    """Die when a method of paths is called that gives a new name."""
    original: Callable[..., Any] = getattr(Path, method)

    def renaming(self: Path, target: Any) -> Any:
        if over():
            die()
        return original(self, target)

    setattr(Path, method, renaming)


def before_the_end(over: Countdown) -> None:
    """Die when the output is whole and has not got its name."""
    original = durable.rename_exclusively

    def renaming(source: Path, target: Path) -> bool:
        if over():
            die()
        return original(source, target)

    setattr(durable, "rename_exclusively", renaming)  # noqa: B010


def before_a_rename(over: Countdown) -> None:
    """Die when a file is whole and has not got its name."""
    _before(over, "replace")


def in_the_journal(over: Countdown) -> None:
    """Die when half of a line is written."""
    added = journal.Journal.add

    def adding(self: journal.Journal, unit: journal.JournalEntry) -> None:
        if over():
            with (self.folder / journal.JOURNAL).open("ab") as file:
                file.write(b'{"step": 1, "blo')
            die()
        added(self, unit)

    setattr(journal.Journal, "add", adding)  # noqa: B010


def before_the_journal(over: Countdown) -> None:
    """Die when the files of a block are there and its line is not."""
    added = journal.Journal.add

    def adding(self: journal.Journal, unit: journal.JournalEntry) -> None:
        if over():
            die()
        added(self, unit)

    setattr(journal.Journal, "add", adding)  # noqa: B010


def behind_a_walk(over: Countdown) -> None:
    """Die when so many blocks of walks were kept."""
    added = kept_walk.KeptWalk.add

    def adding(self: kept_walk.KeptWalk, *more: Any) -> None:
        if over():
            die()
        added(self, *more)

    setattr(kept_walk.KeptWalk, "add", adding)  # noqa: B010


def listing_walks(path: Path) -> None:
    """Write down which blocks of which walks are kept."""
    added = kept_walk.KeptWalk.add
    path.touch()

    def adding(self: kept_walk.KeptWalk, origins: Any, *more: Any) -> None:
        added(self, origins, *more)
        with path.open("a") as file:
            file.writelines(f"{self.folder.name} {own[0]}\n" for own in origins)

    setattr(kept_walk.KeptWalk, "add", adding)  # noqa: B010


def listing(path: Path) -> None:
    """Write down which blocks are solved."""
    added = journal.Journal.add
    path.touch()

    def adding(self: journal.Journal, unit: journal.JournalEntry) -> None:
        added(self, unit)
        with path.open("a") as file:
            file.write(json.dumps([unit.step, unit.block]) + "\n")

    setattr(journal.Journal, "add", adding)  # noqa: B010


KINDS = {
    "write": in_a_write,
    "shard": in_a_shard,
    "end": before_the_end,
    "rename": before_a_rename,
    "journal": in_the_journal,
    "between": before_the_journal,
    "walk": behind_a_walk,
}

if __name__ == "killed":
    given = globals()
    os.chdir(given["FOLDER"])
    if given["KIND"]:
        KINDS[given["KIND"]](Countdown(given["COUNT"]))
    if given["SOLVED"]:
        listing(Path(given["SOLVED"]))
    if given.get("WALKED"):
        listing_walks(Path(given["WALKED"]))
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        main(given["ARGUMENTS"])
