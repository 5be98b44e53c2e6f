"""Outputs: claimed, written beside their final name, renamed at the end, so never incomplete."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Literal

from moe2edge.errors import Diverged, InputError, WorkDamaged
from moe2edge.progress import Log, Reporter
from moe2edge.storage import output_checks
from moe2edge.storage.durable import hold_signals, sync_tree
from moe2edge.storage.locking import OutputLock
from moe2edge.storage.output_checks import (
    EXPORT,
    OutputForm,
    check_place,
    check_reads,
    check_replaceable,
)
from moe2edge.storage.publishing import Marker, PartialFolder, RunInputs
from moe2edge.storage.work_folder import WorkFolder

Resume = Literal["auto", "never", "require"]


@dataclass
class Claim:
    """Right to write an output, from the first look at it to the end of the cleaning up.

    Attributes:
        out: the output.
        force: replace an output of ours.
        form: kind of the output.
        lock: its lock.
        log: receives lines.
        published: the output has its name.
        pending: marker of the output that is there, if the run that wrote it was killed when it had
            its name and not all was cleaned up; else None.
    """

    out: Path
    force: bool
    form: OutputForm
    lock: OutputLock
    log: Log
    published: bool = False
    pending: Marker | None = None

    @property
    def partial(self) -> PartialFolder:
        """`OUT.partial`."""
        return PartialFolder(self.out)

    def watch(self, reporter: Reporter) -> Reporter:
        """Return a reporter that also stops the work once the lock is found to be lost."""

        def log(line: str) -> None:
            self.lock.check_quickly()
            reporter.log(line)

        def advance(label: str, done: int, total: int, detail: str = "", /) -> None:
            self.lock.check_quickly()
            reporter.advance(label, done, total, detail)

        return replace(reporter, log=log, advance=advance)

    def publish(self, marker: Marker) -> None:
        """Give the finished output its name, and remove all that was kept beside it.

        Raises:
            InputError: something has appeared at OUT.
            Moe2EdgeError: another export has taken the lock.
        """
        partial = self.partial
        sync_tree(partial.content)
        entry = os.lstat(partial.content).st_ino
        partial.mark(replace(marker, state="finished", entry=entry))
        with hold_signals():
            self.lock.check()
            replaces = os.path.lexists(self.out)
            output_checks.check_output(self.out, force=self.force, form=self.form)
            try:
                # Somebody may have put something there since.
                partial.publish(self._check_replaced if replaces else None)
            except FileExistsError as error:
                raise InputError(
                    f"{self.out} has appeared while it was being written; choose another name"
                ) from error
            self.published = True
            try:
                partial.remove()
            except (InputError, OSError) as error:
                self.log(f"warning: {self.out} is written, but {partial.path} stays: {error}")

    def settle(self, wanted: Marker | None = None) -> bool:
        """Finish the cleaning up that waited for the inputs to be known, if any did.

        Return whether the output that is there is the one that is wanted.

        Raises:
            InputError: it is not, and is not to be replaced.
        """
        if self.pending is None:
            return False
        same = wanted is not None and self.pending.is_same(wanted)
        if same and (damage := self.form.list_damage(self.out)):
            self.log(f"{self.out}, which an earlier run wrote, has changed: {damage[0]}")
            same = False
        self.partial.remove()
        self.pending = None
        if not same:
            output_checks.check_output(self.out, force=self.force, form=self.form)
        self.published = same
        return same

    def _check_replaced(self, old: Path) -> None:
        check_replaceable(old, self.out, self.form)

    def clean_up(self, error: BaseException, kept: str) -> None:
        """Remove or keep what a run that failed leaves, and say in a note of the error which.

        Whatever failed, what was computed is not wrong: a disk may be gone for a moment, and
        another target can be packed from the same blocks.

        Args:
            error: what it failed with.
            kept: the work that can be resumed, in words; empty if there is none.
        """
        partial = self.partial
        if not self.lock.is_held():
            return  # it belongs to another export now
        try:
            marker = partial.read_marker()
            if marker is not None and marker.state == "finished":
                if not self.published and os.path.lexists(partial.content):
                    error.add_note(self.describe_finished())
                return
            if kept:
                partial.discard(partial.content)
            else:
                partial.remove()
        except (InputError, OSError) as failure:
            error.add_note(f"not all of {partial.path} could be removed: {failure}")
        if kept and not isinstance(error, WorkDamaged):
            error.add_note(_describe_kept(kept, partial.path, error))

    def describe_finished(self) -> str:
        """Say where a finished output is that did not get its name."""
        return (
            f"the finished output is kept as {self.partial.content}, and the same command only "
            f"moves it to {self.out} once that is free"
        )


def _describe_kept(kept: str, partial: Path, error: BaseException) -> str:
    """Say what a failed export leaves, and what it is good for."""
    verb = "are" if " blocks" in kept or " and " in kept else "is"
    if isinstance(error, Diverged):  # the same command would fail again
        return f"{kept} {verb} kept in {partial}; with other settings, add --resume never"
    return f"{kept} {verb} kept in {partial}, and the same command resumes from there"


@contextlib.contextmanager
def claim_output(
    out: Path,
    *,
    force: bool,
    reads: Iterable[Path] = (),
    form: OutputForm = EXPORT,
    log: Log = lambda _: None,
) -> Iterator[Claim]:
    """Take the lock of an output, finish what a killed run left there, and look at it.

    Args:
        out: the output, an absolute path.
        force: replace an output of ours.
        reads: what must not be deleted; see `check_reads`.
        form: kind of the output.
        log: receives lines.

    Raises:
        InputError: somebody else is writing it, nothing can be written there, the name is taken,
            or what is read would be deleted.
        DoesNotFit: the disk is full.
    """
    check_place(out)
    lock, partial = OutputLock(out), PartialFolder(out)
    claim = Claim(out, force, form, lock, log)
    try:
        with lock.hold(log):
            check_reads(out, reads)
            claim.pending = partial.recover()
            try:
                if claim.pending is None:
                    output_checks.check_output(out, force=force, form=form)
            except InputError as error:
                if partial.is_finished:
                    error.add_note(claim.describe_finished())
                raise
            try:
                yield claim
            finally:
                if claim.pending is not None:
                    with hold_signals(), contextlib.suppress(OSError):
                        partial.remove()
    except KeyboardInterrupt as interrupt:
        if claim.published:
            interrupt.add_note(f"{out} is finished")
        elif not os.path.lexists(partial.path) and not os.path.lexists(lock.path):
            interrupt.add_note("nothing was left behind")
        elif not getattr(interrupt, "__notes__", ()):
            interrupt.add_note(
                f"the next start of the same command removes what is left beside {out}"
            )
        raise


def publish_finished(
    claim: Claim, inputs: RunInputs, outcome: RunInputs, resume: Resume = "auto"
) -> bool:
    """Publish the output that an earlier run with the same inputs finished; False: there is none.

    Such a run was killed, perhaps when OUT had its name already, or something had appeared at OUT.
    Its files are read and compared with their digests first.

    Raises:
        InputError, Moe2EdgeError: as `Claim.publish` does.
    """
    partial = claim.partial
    wanted = Marker(dict(inputs), dict(outcome))
    if resume == "never":
        return False
    if claim.settle(wanted):
        return True
    marker = partial.read_marker()
    if marker is None or not partial.is_finished or not marker.is_same(wanted):
        return False
    if damage := claim.form.list_damage(partial.content):
        claim.log(
            f"the finished output in {partial.path} is damaged ({damage[0]}): writing it again"
        )
        return False
    try:
        claim.publish(wanted)
    except BaseException as error:
        claim.clean_up(error, "")
        raise
    return True


@contextlib.contextmanager
def open_partial_folder(
    claim: Claim, inputs: RunInputs, resume: Resume = "auto", outcome: RunInputs | None = None
) -> Iterator[tuple[Path, WorkFolder]]:
    """Yield what becomes the output and a work folder.

    At the end the first is renamed to OUT or removed, and the second is removed or kept. The first
    is an empty folder, or the path of a single file, which is to be written.

    An export that was interrupted, killed or failed leaves its work folder behind if it has
    finished a block, and the next one with the same inputs resumes from it. A leftover without
    a finished block is removed. What is damaged in it is forgotten, with what came after it.

    Args:
        claim: the right to write the output.
        inputs: all that the numbers depend on, by name.
        resume: ``auto`` resumes from a leftover of the same inputs, ``never`` removes it,
            ``require`` refuses to start without one.
        outcome: all that the output depends on beside the inputs, by name.

    Raises:
        InputError: ``OUT.partial`` was not written by moe2edge, was begun with other inputs, or
            there is none and ``resume`` requires it; or something has appeared at OUT.
    """
    partial = claim.partial
    claim.settle()
    resuming, damaged = _examine(partial, inputs, resume)
    marker = Marker(dict(inputs), dict(outcome or {}))
    if not resuming and partial.read_marker() is not None:
        partial.remove()
    if resume == "require" and not resuming:
        lost = f" ({' and '.join(damaged)} is not what was written)" if damaged else ""
        raise InputError(
            f"{partial.path} holds no finished block to resume from{lost}; leave out --resume "
            "require"
        )
    work_folder = None
    try:
        partial.mark(marker)
        partial.discard(partial.content)
        if claim.form.is_folder:
            partial.content.mkdir()
        partial.work.mkdir(exist_ok=True)
        work_folder = WorkFolder(partial.work, damaged)
        yield partial.content, work_folder
        claim.publish(marker)
    except BaseException as error:
        with hold_signals():
            claim.clean_up(error, work_folder.kept if work_folder is not None else "")
        raise


def _examine(partial: PartialFolder, inputs: RunInputs, resume: Resume) -> tuple[bool, list[str]]:
    """Return whether a leftover can be resumed, and what is damaged.

    False: there is none, or it can be removed.

    Raises:
        InputError: moe2edge did not write it, or it was begun with other inputs.
    """
    marker = partial.read_marker()
    if marker is None or resume == "never":
        return False, []
    work_folder = WorkFolder(partial.work)
    has_work = bool(work_folder.kept or work_folder.journal.damaged)
    if not has_work and not partial.is_finished:
        return False, []
    before, now = marker.inputs, dict(inputs)
    if changed := [key for key in {**before, **now} if before.get(key) != now.get(key)]:
        raise InputError(
            f"{partial.path} was begun with another {_describe_difference(changed[0], before, now)}"
            "; use the same command again, choose another name, or start over with --resume never"
        )
    work_folder.check()
    return bool(work_folder.kept), work_folder.damaged


def _describe_difference(key: str, before: RunInputs, now: RunInputs) -> str:
    """Describe an input that differs, by its first line that does."""
    old, new = before.get(key, "none"), now.get(key, "none")
    pairs = zip_longest(old.splitlines(), new.splitlines(), fillvalue="nothing")
    a, b = next(((a, b) for a, b in pairs if a != b), (repr(old), repr(new)))
    return f"{key}: then {a.strip()[:80]}, now {b.strip()[:80]}"
