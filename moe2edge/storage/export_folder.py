"""Outputs: claimed, written beside their final name, renamed at the end, so never incomplete."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Literal

from moe2edge.errors import Diverged, DoesNotFit, InputError, WorkDamaged
from moe2edge.progress import Log, Reporter
from moe2edge.storage.durable import check_name, hold_signals, sync_tree
from moe2edge.storage.locking import OutputLock
from moe2edge.storage.manifest import (
    MANIFEST,
    check_manifest_files,
    is_added_by_systems,
    is_artifact,
    open_artifact,
)
from moe2edge.storage.publishing import MARKER, PARTIAL, Marker, PartialFolder, RunInputs
from moe2edge.storage.text_files import read_json
from moe2edge.storage.work_folder import WorkFolder

Resume = Literal["auto", "never", "require"]


@dataclass(frozen=True)
class OutputForm:
    """Kind of an output: what may be replaced, and what is whole.

    Attributes:
        is_folder: it is a folder, not a single file.
        is_ours: returns whether what is at a path was written by moe2edge, so that it may be
            replaced.
        foreign: what to say about anything else.
        list_unknown: returns what is in it that moe2edge did not write.
        list_damage: returns in words what is wrong with a finished output.
    """

    is_folder: bool
    is_ours: Callable[[Path], bool]
    foreign: str
    list_unknown: Callable[[Path], list[str]]
    list_damage: Callable[[Path], list[str]]


def _is_ours(folder: Path) -> bool:
    """Return whether a folder is an output, or holds nothing but outputs."""
    children = [path for path in folder.iterdir() if not is_added_by_systems(path.name)]
    return is_artifact(folder) or (bool(children) and all(map(is_artifact, children)))


def _list_outputs(out: Path) -> list[Path]:
    """List the outputs in a folder, or the folder itself if it is one."""
    if is_artifact(out):
        return [out]
    return sorted(path for path in out.iterdir() if path.is_dir() and is_artifact(path))


def _list_unknown(out: Path) -> list[str]:
    """List what is in an output, or in a folder of outputs, that no manifest names."""
    known: set[str] = set()
    folders = [out]
    for output in _list_outputs(out):
        listed = read_json(output / MANIFEST).get("files")
        names = [MANIFEST, *(listed if isinstance(listed, dict) else ())]
        folders.append(output)
        for path in (output / name for name in names):
            known.add(str(path.relative_to(out)))
            folders += path.parents
    folders_known = {path for path in folders if path.is_relative_to(out)}
    unknown = []
    for folder, below, names in os.walk(out):
        relative = Path(folder).relative_to(out)
        links = [name for name in below if Path(folder, name).is_symlink()]
        # A folder that is not in the way of a file of ours and has nothing in it.
        empty = [""] if not (below or names) and Path(folder) not in folders_known else []
        for name in (*names, *links, *empty):
            found = (relative / name).as_posix()
            if found not in known and not _is_of_a_system(found, out):
                unknown.append(found)
    return sorted(unknown)


def _is_of_a_system(name: str, out: Path) -> bool:
    """Return whether the hub or a system adds such a file to an output, or to one inside of it."""
    first, _, rest = name.partition("/")
    return is_added_by_systems(name) or bool(
        rest and is_artifact(out / first) and is_added_by_systems(rest)
    )


def _list_damage(out: Path) -> list[str]:
    """Compare a finished output, or each in a folder of outputs, with its manifest."""
    outputs = _list_outputs(out)
    found = [line for output in outputs for line in check_manifest_files(open_artifact(output))]
    return found if outputs else ["it has no manifest"]


EXPORT = OutputForm(True, _is_ours, "was not written by moe2edge", _list_unknown, _list_damage)


def check_place(out: Path) -> None:
    """Refuse a name that no output can have.

    Raises:
        InputError: it is one.
    """
    check_name(out, longer=len(PARTIAL))
    if out.name.endswith(PARTIAL):
        raise InputError(
            f"{out}: an export to {out.name.removesuffix(PARTIAL)} keeps its work in a folder of "
            "that name; choose another name"
        )
    if inside := next((path for path in out.absolute().parents if (path / MARKER).exists()), None):
        raise InputError(f"{out} is inside of {inside}, which an export removes; choose another")


def check_output(out: Path, *, force: bool, form: OutputForm = EXPORT) -> None:
    """Refuse an output name that is taken, or that cannot be.

    Raises:
        InputError: something is there that moe2edge did not write, or that it did and not
            ``force``; or a file in it would be lost.
    """
    check_place(out)
    if not os.path.lexists(out):
        return
    right_kind = out.is_dir() if form.is_folder else out.is_file()
    if out.is_symlink() or not right_kind or not form.is_ours(out):
        raise InputError(f"{out} exists and {form.foreign}; choose another name")
    if not force:
        raise InputError(f"{out} exists; choose another name, or replace it with --force")
    if os.path.ismount(out):
        raise InputError(f"{out} is a mount point and cannot be replaced; choose a name inside")
    if unknown := form.list_unknown(out):
        raise InputError(
            f"{out} holds files that moe2edge did not write, such as {unknown[0]}, and --force "
            "would delete them; move them away"
        )


def check_reads(out: Path, reads: Iterable[Path]) -> None:
    """Refuse an output that would delete what it is made from.

    Args:
        out: the output.
        reads: files and folders that are read, and their files that may be links.

    Raises:
        InputError: one is inside of what is at OUT, or of its work.
    """
    partial = PartialFolder(out).path
    for path in reads:
        resolved = path.resolve()
        for place, what in ((out, "replacing it"), (partial, "the work there is removed, which")):
            if os.path.lexists(place) and resolved.is_relative_to(place.resolve()):
                raise InputError(
                    f"{path} is read and lies in {place}; {what} would delete it: choose another "
                    "name for the output"
                )


def check_space(out: Path, needed: int) -> None:
    """Refuse to begin an export that the disk cannot hold.

    Raises:
        DoesNotFit: less than ``needed`` bytes are free.
    """
    free = shutil.disk_usage(out.parent).free
    # The files of an unfinished export count as free: they are reused or removed.
    partial = PartialFolder(out).path
    free += sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
    if free < needed:
        raise DoesNotFit(
            f"{out.parent} has {free / 1e9:.2f} GB free, the export needs {needed / 1e9:.2f} GB; "
            "free some space, or write to another disk"
        )


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
    """

    out: Path
    force: bool
    form: OutputForm
    lock: OutputLock
    log: Log
    published: bool = False

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

        return Reporter(log, advance)

    def publish(self, marker: Marker) -> None:
        """Give the finished output its name, and remove all that was kept beside it.

        Raises:
            InputError: something has appeared at OUT.
            Moe2EdgeError: another export has taken the lock.
        """
        partial = self.partial
        sync_tree(partial.content)
        partial.mark(replace(marker, state="finished"))
        with hold_signals():
            self.lock.check()
            check_output(self.out, force=self.force, form=self.form)
            try:
                partial.publish()
            except FileExistsError as error:
                raise InputError(
                    f"{self.out} has appeared while it was being written; choose another name"
                ) from error
            self.published = True
            try:
                partial.remove()
            except (InputError, OSError) as error:
                self.log(f"warning: {self.out} is written, but {partial.path} stays: {error}")

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
            partial.recover()
            try:
                check_output(out, force=force, form=form)
            except InputError as error:
                if partial.is_finished:
                    error.add_note(claim.describe_finished())
                raise
            yield claim
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

    Such a run was killed, or something had appeared at OUT. Its files are read and compared with
    their digests first.

    Raises:
        InputError, Moe2EdgeError: as `Claim.publish` does.
    """
    partial = claim.partial
    wanted = Marker(dict(inputs), dict(outcome), "finished")
    if resume == "never" or not partial.is_finished or partial.read_marker() != wanted:
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
    a, b = next((a, b) for a, b in pairs if a != b)
    return f"{key}: then {a.strip()[:80]}, now {b.strip()[:80]}"
