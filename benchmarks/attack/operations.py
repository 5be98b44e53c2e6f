"""File operations of a command: counted, recorded, and made to fail or to be the last one.

`Operations` replaces the functions through which Python changes files, below one folder. At a
chosen operation the process can be killed before it, in the middle of it or after it, or the
operation can fail as on a full or broken disk. With a record, the state of the disk after a loss of
power can be built: see `benchmarks.attack.power`.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Fate = Literal["before", "middle", "after", "full", "broken"]
ERRORS = {"full": errno.ENOSPC, "broken": errno.EIO}
# Modules of the product that rename through the system itself, without Python's functions.
NAMED = ("rename", "replace", "unlink", "remove", "mkdir", "rmdir", "link", "symlink", "truncate")


@dataclass
class Operations:
    """Operations below ``root``, in the process that calls `install`.

    Attributes:
        root: the folder.
        at: number of the operation that meets ``fate``; None: none does.
        fate: what happens to it.
        record: called for each operation with its name, the paths, and bytes of a file.
        count: operations so far.
        names: a description of each operation.
    """

    root: Path
    at: int | None = None
    fate: Fate = "before"
    record: Callable[[str, tuple[str, ...], bytes | None], None] | None = None
    count: int = 0
    names: list[str] = field(default_factory=list)
    _open: Any = builtins.open
    _real: dict[str, Any] = field(default_factory=dict)

    def install(self) -> None:
        """Replace the functions of this process."""
        for name in NAMED:
            self._real[name] = getattr(os, name)
            setattr(os, name, self._wrap(name))
        for name in ("fsync", "fdatasync", "ftruncate"):
            self._real[name] = getattr(os, name)
            setattr(os, name, self._wrap_handle(name))
        self._real["open"] = os.open
        os.open = self._open_handle  # type: ignore[assignment]
        builtins.open = io.open = self._open_file  # type: ignore[assignment]
        self._install_exclusive_rename()

    def _install_exclusive_rename(self) -> None:
        """Wrap the rename that never replaces, which goes to the system through ctypes."""
        try:
            from moe2edge.storage import durable as module
        except ImportError:
            return
        real = getattr(module, "rename_exclusively", None)
        if real is not None:
            module.rename_exclusively = self._wrap_call("rename", real)

    # ---- one operation ------------------------------------------------------------------------

    def inside(self, path: Any) -> bool:
        """Return whether a path lies below the folder."""
        if not isinstance(path, str | bytes | os.PathLike):
            return False
        return os.path.abspath(os.fsdecode(path)).startswith(str(self.root))

    def run(
        self, name: str, paths: tuple[Any, ...], act: Callable[[], Any], half: Any = None
    ) -> Any:
        """Count an operation and carry it out, unless its fate is another."""
        found = tuple(os.path.abspath(os.fsdecode(path)) for path in paths)
        number = self.count
        self.count += 1
        shown = " ".join(path.removeprefix(str(self.root)).lstrip("/") for path in found)
        self.names.append(f"{name} {shown}")
        if number == self.at:
            if self.fate in ("middle", *ERRORS) and half is not None:
                half()
            if self.fate in ERRORS:
                code = ERRORS[self.fate]
                raise OSError(code, os.strerror(code), found[0] if found else None)
            if self.fate in ("before", "middle"):
                os.kill(os.getpid(), signal.SIGKILL)
        result = act()
        if self.record is not None:
            self.record(name, found, None)
        if number == self.at and self.fate == "after":
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    # ---- functions ----------------------------------------------------------------------------

    def _wrap(self, name: str) -> Callable[..., Any]:
        return self._wrap_call(name, self._real[name])

    def _wrap_call(self, name: str, real: Any) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            paths = [a for a in arguments[:2] if isinstance(a, str | bytes | os.PathLike)]
            if (folder := more.get("dir_fd")) is not None and paths:
                paths[0] = os.path.join(
                    os.readlink(f"/proc/self/fd/{folder}"), os.fsdecode(paths[0])
                )
            if not any(map(self.inside, paths)):
                return real(*arguments, **more)
            return self.run(name, tuple(paths), lambda: real(*arguments, **more))

        return call

    def _wrap_handle(self, name: str) -> Callable[..., Any]:
        real = self._real[name]

        def call(handle: Any, *arguments: Any) -> Any:
            number = handle if isinstance(handle, int) else handle.fileno()
            path = os.readlink(f"/proc/self/fd/{number}")
            if not self.inside(path):
                return real(handle, *arguments)
            result = self.run(name, (path,), lambda: real(handle, *arguments))
            if self.record is not None and name != "ftruncate":
                self.record("sync", (path,), self.read(path))
            return result

        return call

    def read(self, path: str) -> bytes | None:
        """Return the bytes of a file; None for a folder."""
        if os.path.isdir(path):
            return None
        with self._open(path, "rb") as file:
            return bytes(file.read())

    def _open_handle(self, path: Any, flags: int, *arguments: Any, **more: Any) -> Any:
        real = self._real["open"]
        if not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) or not self.inside(path):
            return real(path, flags, *arguments, **more)
        return self.run("create", (path,), lambda: real(path, flags, *arguments, **more))

    def _open_file(self, path: Any, mode: str = "r", *arguments: Any, **more: Any) -> Any:
        if not set(mode) & set("wxa+") or not self.inside(path):
            return self._open(path, mode, *arguments, **more)
        file = self.run("create", (path,), lambda: self._open(path, mode, *arguments, **more))
        return File(self, os.path.abspath(os.fsdecode(path)), file)


class File:
    """A file that is written, whose writes are operations."""

    def __init__(self, operations: Operations, path: str, file: Any) -> None:
        self._operations, self._path, self._file = operations, path, file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> File:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Any:
        return iter(self._file)

    def write(self, data: Any) -> Any:
        """Write, as one operation; in the middle of it half of the data is there."""

        def half() -> None:
            self._file.write(data[: len(data) // 2])
            self._file.flush()

        return self._operations.run("write", (self._path,), lambda: self._file.write(data), half)

    def truncate(self, *arguments: Any) -> Any:
        """Set the size, as one operation."""
        act = lambda: self._file.truncate(*arguments)  # noqa: E731
        return self._operations.run("truncate", (self._path,), act)

    def close(self) -> None:
        """Close the file, and record its content."""
        closed = self._file.closed
        self._file.close()
        record = self._operations.record
        if record is not None and not closed and os.path.exists(self._path):
            record("close", (self._path,), self._operations.read(self._path))
