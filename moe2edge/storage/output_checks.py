"""Checks of the place of an output: what --force may replace there, and what it would delete."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from moe2edge.errors import DoesNotFit, InputError
from moe2edge.storage.durable import check_name, check_writable
from moe2edge.storage.locking import name_lock
from moe2edge.storage.manifest import (
    MANIFEST,
    check_manifest_files,
    is_added_by_systems,
    is_artifact,
    open_artifact,
)
from moe2edge.storage.publishing import MARKER, PARTIAL, PartialFolder
from moe2edge.storage.text_files import read_json


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
    if outer := next(filter(is_artifact, out.absolute().parents), None):
        raise InputError(
            f"{out} is inside of the output {outer}, which would no longer be what was exported; "
            "choose another place"
        )


def check_output_early(out: Path, *, force: bool, form: OutputForm = EXPORT) -> None:
    """Refuse an output before its source is downloaded; only a claim of it is final.

    Raises:
        InputError: nothing can be written there, or the name is taken.
        DoesNotFit: the disk is full.
    """
    check_place(out)
    check_writable(name_lock(out))
    # Where a run was killed at its end, a claim finishes what it left, and looks then.
    left = (PartialFolder(out).path, name_lock(out))
    if os.path.lexists(out) and not any(map(os.path.lexists, left)):
        _check_taken(out, force=force, form=form)


def check_output(out: Path, *, force: bool, form: OutputForm = EXPORT) -> None:
    """Refuse an output name that is taken, or that cannot be.

    Raises:
        InputError: something is there that moe2edge did not write, or that it did and not
            ``force``; or a file in it would be lost.
    """
    check_place(out)
    if os.path.lexists(out):
        _check_taken(out, force=force, form=form)
        check_replaceable(out, out, form)


def _check_taken(out: Path, *, force: bool, form: OutputForm) -> None:
    """Refuse a name that is taken by anything that ``force`` does not replace, files in it aside.

    Raises:
        InputError: so.
    """
    if force and os.path.ismount(out):
        raise InputError(f"{out} is a mount point and cannot be replaced; choose a name inside")
    _check_ours(out, out, form)
    if not force:
        raise InputError(f"{out} exists; choose another name, or replace it with --force")


def check_replaceable(path: Path, out: Path, form: OutputForm) -> None:
    """Refuse to replace what is at ``path``, called ``out``, unless all of it is ours.

    Raises:
        InputError: it is not.
    """
    _check_ours(path, out, form)
    if unknown := form.list_unknown(path):
        raise InputError(
            f"{out} holds files that moe2edge did not write, such as {unknown[0]}, and --force "
            "would delete them; move them away"
        )


def _check_ours(path: Path, out: Path, form: OutputForm) -> None:
    right_kind = path.is_dir() if form.is_folder else path.is_file()
    if path.is_symlink() or not right_kind or not form.is_ours(path):
        raise InputError(f"{out} exists and {form.foreign}; choose another name")


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
        resolved = Path(os.path.realpath(path))  # a link that leads to itself stays as it is
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
