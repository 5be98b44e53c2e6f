"""Files and names that a loss of power leaves whole: synced, renamed without replacing, removed."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import secrets
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

from moe2edge.errors import DiskFailed, DoesNotFit, InputError, Moe2EdgeError
from moe2edge.storage.text_files import sync_folder

# Linux has them in <fcntl.h> and <linux/fs.h>.
_AT_FDCWD = -100
_RENAME_NOREPLACE = 1
# What a system or file system answers that cannot do so.
_NOT_SUPPORTED = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}
FULL = {errno.ENOSPC, errno.EDQUOT}


def make_place_error(path: Path, error: OSError) -> Moe2EdgeError:
    """Make the error for a place where nothing can be written."""
    reason = error.strerror or str(error)
    if error.errno in FULL:
        return DoesNotFit(f"nothing can be written to {path} ({reason}); free some space")
    if error.errno == errno.EIO:
        return DiskFailed(f"nothing can be written to {path} ({reason}); look after its disk")
    if error.errno == errno.ENAMETOOLONG:
        return InputError(f"{str(path)[:100]}... ({reason}); choose a shorter one")
    return InputError(f"nothing can be written to {path} ({reason}); choose another place")


def check_name(path: Path, *, longer: int = 0) -> None:
    """Refuse a name that the system cannot hold, or that no output can have.

    Args:
        path: the name of a file or folder, which need not exist.
        longer: bytes by which names that are derived from it are longer.

    Raises:
        InputError: there is no folder for it, it is too long, or it names no entry of a folder.
    """
    if path.name in ("", ".."):
        raise InputError(f"{path} exists and was not written by moe2edge; choose another name")
    if "\0" in str(path):
        raise InputError(f"{str(path)!r} has a zero byte; choose another name")
    limit = 255
    try:
        if not path.parent.is_dir():
            if os.path.lexists(path.parent):
                raise InputError(f"{path.parent} is not a folder; choose another place")
            raise InputError(f"{path.parent} does not exist; make it first")
        if hasattr(os, "pathconf"):
            limit = os.pathconf(path.parent, "PC_NAME_MAX")
    except OSError as error:
        raise make_place_error(path, error) from error
    if len(os.fsencode(path.name)) + longer > limit:
        raise InputError(
            f"the name {path.name[:50]}... is longer than the {limit - longer} bytes that there "
            "are for it; choose a shorter one"
        )


def check_writable(path: Path) -> None:
    """Try, before any work, whether a file can be written under a name; nothing is left there.

    Raises:
        InputError: it cannot.
        DoesNotFit: the disk is full.
    """
    check_name(path)
    path = Path(os.path.realpath(path))
    if path.is_dir():
        raise InputError(f"{path} is a folder; name a file in it")
    try:
        os.lstat(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise make_place_error(path, error) from error
    try:
        if not _write_unnamed(path.parent):
            _write_beside(path, b"\0").unlink()
    except OSError as error:
        raise make_place_error(path.parent, error) from error


def write_file(path: Path, data: bytes) -> None:
    """Write a file whole and durably; what was there stays until the new one is complete."""
    path = Path(os.path.realpath(path))  # the file behind a link, as opening it would
    temporary = _write_beside(path, data)
    try:
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def _write_unnamed(folder: Path) -> bool:
    """Write a file without a name in a folder, of which a kill leaves nothing.

    Returns:
        Whether system and file system have such files.

    Raises:
        OSError: it cannot be written.
    """
    try:
        handle = os.open(folder, os.O_TMPFILE | os.O_WRONLY, 0o600)
    except AttributeError:  # a system without them
        return False
    except OSError as error:
        if error.errno in {*_NOT_SUPPORTED, errno.EISDIR}:
            return False
        raise
    try:
        os.write(handle, b"\0")
        os.fsync(handle)
    finally:
        os.close(handle)
    return True


def _write_beside(path: Path, data: bytes) -> Path:
    """Write a file under a name of nobody else in the folder of ``path``, and sync it."""
    temporary = path.with_name(f".moe2edge-{secrets.token_hex(8)}")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def sync_tree(path: Path) -> None:
    """Make a file, or everything below a folder, durable, from the inside out."""
    if not path.is_dir():
        _sync_file(path)
        return
    for folder, _, names in os.walk(path, topdown=False):
        for name in sorted(names):
            _sync_file(Path(folder, name))
        sync_folder(Path(folder))


def _sync_file(path: Path) -> None:
    if path.is_file() and not path.is_symlink():
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def rename_new(source: Path, target: Path) -> None:
    """Rename a file or folder to a name that is free; never replace anything.

    Both folders are durable afterwards.

    Raises:
        FileExistsError: the name is taken.
        OSError: it cannot be renamed.
    """
    if not rename_exclusively(source, target):
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
        # A folder replaces nothing but an empty one.
        source.rename(target)
    sync_folder(target.parent)
    if source.parent != target.parent:
        sync_folder(source.parent)


def rename_exclusively(source: Path, target: Path) -> bool:
    """Rename in one step that fails if the name is taken; False: the system has none."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    done = rename(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), _RENAME_NOREPLACE)
    if done == 0:
        return True
    number = ctypes.get_errno()
    if number in _NOT_SUPPORTED:
        return False
    raise OSError(number, os.strerror(number), str(source), None, str(target))


def remove(path: Path) -> None:
    """Remove a file or a folder with all that is in it; nothing is there: do nothing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def hold_signals() -> Iterator[list[int]]:
    """Let signals that end the process wait; yield the list of those that arrived.

    Outside of the main thread, which is the only one that they interrupt, this does nothing.
    """
    arrived: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield arrived
        return
    names = ("SIGINT", "SIGTERM", "SIGHUP")
    before = {}
    try:
        for number in (getattr(signal, name) for name in names if hasattr(signal, name)):
            handler = signal.getsignal(number)
            if callable(handler):  # one that is ignored stays so; the system's ends at once
                before[number] = handler
                signal.signal(number, lambda number, _: arrived.append(number))
        yield arrived
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
