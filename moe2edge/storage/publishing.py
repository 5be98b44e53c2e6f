"""`OUT.partial`: where an output is written, published from, and cleaned up.

::

    OUT.partial/
        .moe2edge-partial   marker: the folder is ours, what it was begun with, how far it is
        out                 what becomes OUT: a folder, or a single file
        work/               what can be resumed
        old                 what was at OUT, between the two renames of a replacement
        trash-N             what is being deleted

Every step leaves a state that the next start understands, whatever is killed or loses power: what
is to be deleted first gets the name of trash, so that ``out``, ``work`` and ``old`` are whole or
not there; the marker is written before anything else and removed behind it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from moe2edge.errors import InputError
from moe2edge.storage.durable import remove, rename_new
from moe2edge.storage.text_files import LARGEST_JSON, read_bytes, sync_folder, write_atomically

MARKER = ".moe2edge-partial"
PARTIAL = ".partial"
TRASH = "trash-"
_OWN_NAMES = re.compile(rf"{re.escape(MARKER)}(\.tmp)?|out|work|old|{TRASH}\d+")
# What passes and the journal keep; hidden states have names that begin with "stream-".
_WORK_SUFFIXES = {".json", ".jsonl", ".safetensors", ".tmp"}

# All that the numbers of an export depend on, by name; messages name what differs.
RunInputs = Mapping[str, str]
# working: being written, or kept to be resumed. finished: ``out`` is whole and synced, or was
# renamed to OUT. removing: nothing of it is needed any more.
State = Literal["working", "finished", "removing"]


@dataclass(frozen=True)
class Marker:
    """Content of the marker.

    Attributes:
        inputs: all that the numbers depend on.
        outcome: all that the output depends on beside them, such as the targets.
        state: how far it is.
        entry: number of the file system for ``out`` when it was finished; a rename keeps it.
    """

    inputs: RunInputs = field(default_factory=dict)
    outcome: RunInputs = field(default_factory=dict)
    state: State = "working"
    entry: int = 0

    def is_same(self, other: Marker) -> bool:
        """Return whether both are of the same output."""
        return (self.inputs, self.outcome) == (other.inputs, other.outcome)


def _parse_marker(text: str) -> Marker:
    """Parse a marker.

    Raises:
        ValueError: it is none.
    """
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError("not a mapping")
    inputs, outcome = found.get("inputs") or {}, found.get("outcome") or {}
    for mapping in (inputs, outcome):
        if not isinstance(mapping, dict) or not all(isinstance(v, str) for v in mapping.values()):
            raise ValueError("not a mapping of texts")
    # Older versions wrote neither state nor entry.
    state, entry = found.get("state", "working"), found.get("entry", 0)
    if state not in get_args(State) or not isinstance(entry, int):
        raise ValueError("not a state")
    return Marker(inputs, outcome, state, entry)


class PartialFolder:
    """`OUT.partial`; whoever calls this holds the lock of OUT.

    Attributes:
        out: the output.
        path: the folder itself.
        content: what becomes OUT.
        work: what can be resumed.
        old: what was at OUT.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.path = out.with_name(out.name + PARTIAL)
        self.content, self.work, self.old = (self.path / n for n in ("out", "work", "old"))

    def read_marker(self) -> Marker | None:
        """Read the marker; None: there is no folder.

        Raises:
            InputError: moe2edge did not make the folder, or it holds something of somebody else.
        """
        if not os.path.lexists(self.path):
            return None
        foreign = InputError(f"{self.path} exists and was not written by moe2edge; move it away")
        if self.path.is_symlink() or not self.path.is_dir():
            raise foreign
        names = {path.name for path in self.path.iterdir()}
        if names <= {f"{MARKER}.tmp"}:  # killed before it wrote the marker, or behind that
            return Marker(state="removing")
        try:
            marker = _parse_marker(read_bytes(self.path / MARKER, LARGEST_JSON).decode())
        except (InputError, ValueError, RecursionError) as error:
            raise foreign from error
        if strange := self._find_foreign():
            raise self._make_foreign_error(strange)
        return marker

    def _find_foreign(self) -> str:
        """Return the name of something that moe2edge did not write; empty if there is none.

        What is in ``out`` belongs to the output, whoever wrote it.
        """
        for path in sorted(self.path.iterdir()):
            if not _OWN_NAMES.fullmatch(path.name):
                return path.name
        for path in sorted(self.work.rglob("*")):
            own = path.suffix in _WORK_SUFFIXES or path.name.startswith("stream-")
            if path.is_symlink() or not (path.is_dir() or (own and path.is_file())):
                return str(path.relative_to(self.path))
        return ""

    def _make_foreign_error(self, name: str) -> InputError:
        return InputError(f"{self.path} holds {name}, which moe2edge did not write; move it away")

    def mark(self, marker: Marker) -> None:
        """Write the marker, durably; the folder is made if it is not there."""
        if not self.path.exists():
            self.path.mkdir()
            sync_folder(self.path.parent)
        write_atomically(self.path / MARKER, json.dumps(vars(marker)))
        sync_folder(self.path)

    @property
    def is_finished(self) -> bool:
        """It holds an output that is whole and has not got its name."""
        marker = self.read_marker() if os.path.lexists(self.content) else None
        return marker is not None and marker.state == "finished"

    def recover(self) -> Marker | None:
        """Finish or undo what a killed run was doing when it published or cleaned up.

        Return the marker of an output that has its name, while nothing else is left of the run.

        Raises:
            InputError: the folder is not ours, or OUT has appeared since what was there was moved
                aside.
        """
        marker = self.read_marker()
        if marker is None:
            return None
        self.empty_trash()
        if marker.state == "finished" and not os.path.lexists(self.content):
            self.discard(self.old, self.work)
            if os.path.lexists(self.out) and os.lstat(self.out).st_ino == marker.entry:
                return marker
            self.remove()
        elif marker.state == "removing":
            self.remove()
        elif os.path.lexists(self.old):
            self.put_back()
        elif not os.path.lexists(self.content) and not self._has_work():
            self.remove()
        return None

    def _has_work(self) -> bool:
        return self.work.is_dir() and any(self.work.iterdir())

    def put_back(self) -> None:
        """Give what was at OUT its name again.

        Raises:
            InputError: something else has it.
        """
        try:
            rename_new(self.old, self.out)
        except FileExistsError as error:
            raise InputError(
                f"{self.out} has appeared while it was being replaced; what was there before is "
                f"{self.old}: move one of the two away"
            ) from error

    def publish(self, check_old: Callable[[Path], None] | None) -> None:
        """Rename the finished output to OUT; what is there stays until then as ``old``.

        Args:
            check_old: raises where what was moved aside must not be deleted; None: nothing is at
                OUT, or must not be moved.

        Raises:
            FileExistsError: something has appeared at OUT.
        """
        try:
            if check_old is not None:
                rename_new(self.out, self.old)
                check_old(self.old)
            rename_new(self.content, self.out)
        except BaseException:
            if os.path.lexists(self.old) and not os.path.lexists(self.out):
                self.put_back()
            raise

    def discard(self, *paths: Path) -> None:
        """Delete parts of the folder; each has the name of trash before anything in it goes."""
        for path in paths:
            if os.path.lexists(path):
                path.rename(self._name_trash())
        sync_folder(self.path)
        self.empty_trash()

    def _name_trash(self) -> Path:
        n = 0
        while os.path.lexists(path := self.path / f"{TRASH}{n}"):
            n += 1
        return path

    def empty_trash(self) -> None:
        """Delete what has the name of trash."""
        for path in sorted(self.path.glob(f"{TRASH}*")):
            remove(path)

    def remove(self) -> None:
        """Delete all of the folder; the marker goes last.

        Raises:
            InputError: something of somebody else is in it, and so nothing was deleted.
        """
        if (self.path / MARKER).exists():
            if strange := self._find_foreign():
                raise self._make_foreign_error(strange)
            marker = self.read_marker()
            # That ``out`` has its name says as much. On a full disk nothing can be marked, and it
            # is most important to delete.
            if marker is not None and (marker.state != "finished" or self.content.exists()):
                with contextlib.suppress(OSError):
                    self.mark(Marker(state="removing"))
            self.discard(self.content, self.work, self.old)
            sync_folder(self.path)
        (self.path / f"{MARKER}.tmp").unlink(missing_ok=True)
        (self.path / MARKER).unlink(missing_ok=True)
        # Something of somebody else, which has appeared here, keeps the folder.
        with contextlib.suppress(OSError):
            self.path.rmdir()
        sync_folder(self.path.parent)
