"""Output folders: written beside their final name and renamed at the end, so never incomplete."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import psutil

from moe2edge.errors import Diverged, DoesNotFit, InputError, WorkDamaged
from moe2edge.storage.manifest import MANIFEST, is_artifact, list_files
from moe2edge.storage.text_files import read_json, sync_folder, write_atomically
from moe2edge.storage.work_folder import WorkFolder

MARKER = ".moe2edge-partial"


def check_output(out: Path, *, force: bool) -> None:
    """Refuse an output name that is taken.

    Raises:
        InputError: something is there that moe2edge did not write, or that it did and not
            ``force``; or a file in it would be lost.
    """
    if not out.parent.is_dir():
        raise InputError(f"{out.parent} does not exist; make it first")
    old = _get_partial(out) / "old"
    if old.exists() and not out.exists():  # killed between the two renames at the end
        old.rename(out)
    if not os.path.lexists(out):
        return
    if out.is_symlink() or not out.is_dir() or not _is_ours(out):
        raise InputError(f"{out} exists and was not written by moe2edge; choose another name")
    if not force:
        raise InputError(f"{out} exists; choose another name, or replace it with --force")
    if unknown := _list_unknown_files(out):
        raise InputError(
            f"{out} holds files that moe2edge did not write, such as {unknown[0]}, and --force "
            "would delete them; move them away"
        )


def _get_partial(out: Path) -> Path:
    """Return the folder that an export writes to until it has finished."""
    return out.with_name(out.name + ".partial")


def _is_ours(folder: Path) -> bool:
    """Return whether a folder is an output, or holds nothing but outputs."""
    children = list(folder.iterdir())
    return is_artifact(folder) or (bool(children) and all(map(is_artifact, children)))


def _list_unknown_files(out: Path) -> list[str]:
    """List the files in an output, or in a folder of outputs, that no manifest names."""
    folders = [out] if is_artifact(out) else sorted(out.iterdir())
    return [
        str((folder / name).relative_to(out))
        for folder in folders
        for name in sorted(list_files(folder).keys() - _list_manifest_names(folder) - {MANIFEST})
    ]


def _list_manifest_names(folder: Path) -> set[str]:
    """Return the files that a manifest names, whatever version wrote it."""
    files = read_json(folder / MANIFEST).get("files")
    return set(files) if isinstance(files, dict) else set()


def check_space(out: Path, needed: int) -> None:
    """Refuse to begin an export that the disk cannot hold.

    Raises:
        DoesNotFit: less than ``needed`` bytes are free.
    """
    free = shutil.disk_usage(out.parent).free
    # The files of an unfinished export count as free: they are reused or removed.
    free += sum(path.stat().st_size for path in _get_partial(out).rglob("*") if path.is_file())
    if free < needed:
        raise DoesNotFit(
            f"{out.parent} has {free / 1e9:.2f} GB free, the export needs {needed / 1e9:.2f} GB; "
            "free some space, or write to another disk"
        )


# All that the numbers of an export depend on, by name; messages name what differs.
RunInputs = Mapping[str, str]
Resume = Literal["auto", "never", "require"]


@contextlib.contextmanager
def open_partial_folder(
    out: Path, inputs: RunInputs | None = None, resume: Resume = "auto"
) -> Iterator[tuple[Path, WorkFolder]]:
    """Yield a folder to write to and a work folder.

    At the end the first is renamed to ``out`` or removed, and the second is removed or kept.

    An export that was interrupted, killed or failed leaves its work folder behind if it has
    finished a block, and the next one with the same inputs resumes from it. What is damaged in it
    is forgotten, with what came after it. A leftover without a finished block is removed; one that
    is still being written is left alone.

    Args:
        out: the name that the folder gets at the end.
        inputs: all that the numbers depend on, by name; None: nothing is resumed or kept.
        resume: ``auto`` resumes from a leftover of the same inputs, ``never`` removes it,
            ``require`` refuses to start without one.

    Raises:
        InputError: ``OUT.partial`` was not written by moe2edge, another export is writing it, it
            was begun with other inputs, or there is none and ``resume`` requires it.
    """
    partial = _get_partial(out)
    resuming, damaged = False, list[str]()
    if os.path.lexists(partial):
        resuming, damaged = _examine(partial, inputs, resume)
        if not resuming:
            shutil.rmtree(partial)
    if resume == "require" and not resuming:
        lost = f" ({' and '.join(damaged)} is not what was written)" if damaged else ""
        raise InputError(
            f"{partial} holds no finished block to resume from{lost}; leave out --resume require"
        )
    content, work = partial / "out", partial / "work"
    partial.mkdir(exist_ok=True)
    _mark(partial, inputs, psutil.Process())
    shutil.rmtree(content, ignore_errors=True)
    content.mkdir()
    work.mkdir(exist_ok=True)
    keep = False
    try:
        work_folder = WorkFolder(work, damaged)
        try:
            yield content, work_folder
            _move_into_place(content, out, partial)
        # Whatever failed, what was computed is not wrong: a disk may be gone for a moment, and
        # another target can be packed from the same blocks.
        except BaseException as error:
            keep = inputs is not None and bool(kept := work_folder.kept)
            if keep and not isinstance(error, WorkDamaged):
                error.add_note(_describe_kept(kept, partial, error))
            raise
    finally:
        if keep:
            shutil.rmtree(content, ignore_errors=True)
            _mark(partial, inputs, None)
        else:
            shutil.rmtree(partial, ignore_errors=True)


def _describe_kept(kept: str, partial: Path, error: BaseException) -> str:
    """Say what a failed export leaves, and what it is good for."""
    verb = "are" if " blocks" in kept or " and " in kept else "is"
    if isinstance(error, Diverged):  # the same command would fail again
        return f"{kept} {verb} kept in {partial}; with other settings, add --resume never"
    return f"{kept} {verb} kept in {partial}, and the same command resumes from there"


def _mark(partial: Path, inputs: RunInputs | None, writer: psutil.Process | None) -> None:
    """Write the marker atomically: the inputs of the export, and the process that writes to it."""
    marker: dict[str, Any] = {"inputs": dict(inputs or {})}
    if writer is not None:
        marker |= {"pid": writer.pid, "started": writer.create_time()}
    write_atomically(partial / MARKER, json.dumps(marker))


def _examine(partial: Path, inputs: RunInputs | None, resume: Resume) -> tuple[bool, list[str]]:
    """Return whether a leftover can be resumed, and what is damaged; False: it can be removed.

    Raises:
        InputError: moe2edge did not write it, it is still being written, or was begun with other
            inputs.
    """
    # The export was killed before it wrote the marker.
    if partial.is_dir() and {path.name for path in partial.iterdir()} <= {MARKER + ".tmp"}:
        return False, []
    try:
        marker: dict[str, Any] = json.loads((partial / MARKER).read_text())
        pid, started = int(marker.get("pid", 0)), float(marker.get("started", 0))
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise InputError(
            f"{partial} exists and was not written by moe2edge; move it away"
        ) from error
    with contextlib.suppress(psutil.NoSuchProcess):
        if abs(psutil.Process(pid).create_time() - started) < 1:
            raise InputError(
                f"another export (process {pid}) is writing {partial}; wait until it has ended, or "
                "choose another name"
            )
    work = partial / "work"
    if resume == "never" or not work.is_dir():
        return False, []
    work_folder = WorkFolder(work)
    if not work_folder.kept and not work_folder.journal.damaged:
        return False, []
    before = marker.get("inputs") or {}
    now = dict(inputs or {})
    if changed := [key for key in {**before, **now} if before.get(key) != now.get(key)]:
        raise InputError(
            f"{partial} was begun with another {_describe_difference(changed[0], before, now)}; "
            "use the same command again, choose another name, or start over with --resume never"
        )
    work_folder.check()
    return bool(work_folder.kept), work_folder.damaged


def _describe_difference(key: str, before: RunInputs, now: RunInputs) -> str:
    """Describe an input that differs, by its first line that does."""
    old, new = before.get(key, "none"), now.get(key, "none")
    pairs = zip_longest(old.splitlines(), new.splitlines(), fillvalue="nothing")
    a, b = next((a, b) for a, b in pairs if a != b)
    return f"{key}: then {a.strip()[:80]}, now {b.strip()[:80]}"


def _move_into_place(content: Path, out: Path, partial: Path) -> None:
    """Rename the finished folder; the old one stays until the new one has its name."""
    sync_folder(content)
    old = partial / "old"
    try:
        if out.exists():
            out.rename(old)
        content.rename(out)
    except BaseException:  # an interrupt, too, must not cost the old folder
        if old.exists() and not out.exists():
            old.rename(out)
        raise
    sync_folder(out.parent)
