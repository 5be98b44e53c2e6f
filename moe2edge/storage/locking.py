"""The lock of an output: one writer at a time, across processes, containers and hosts.

The lock is a hidden file beside OUT. Who writes OUT holds a lock of the system on it (``flock``),
which also excludes other containers of the machine, and which the system releases when the process
ends, however it does. Other hosts on a shared file system may not see that lock: for them the
writer renews a line in the file every few seconds. A line that nobody renews any more stands for a
writer that is gone.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import socket
import stat
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from moe2edge.errors import InputError, Moe2EdgeError
from moe2edge.progress import Log
from moe2edge.storage.durable import hold_signals, make_place_error

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

SUFFIX = ".moe2edge-lock"
# Seconds between two renewals, and without one until a writer counts as gone. A writer on a
# loaded machine may be late by far more than one renewal.
BEAT = 5.0
GONE = 60.0
# Seconds after which a line that was written is still there, or somebody else's.
SETTLE = 0.5
_LINE = 512
_KEYS = {"host", "boot", "namespace", "pid", "started", "token", "beat"}
_START = b'{"host": '
_BUSY = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES}


def name_lock(out: Path) -> Path:
    """Return the lock file of an output."""
    name = f".{out.name}{SUFFIX}"
    if len(os.fsencode(name)) > 255:
        name = f".{hashlib.sha256(os.fsencode(out.name)).hexdigest()[:32]}{SUFFIX}"
    return out.with_name(name)


class OutputLock:
    """Right of this process to write an output.

    Attributes:
        out: the output.
        path: the lock file.
    """

    def __init__(self, out: Path) -> None:
        self.out, self.path = out, name_lock(out)
        self._handle, self._flocked = -1, False
        self._token = secrets.token_hex(16)
        self._process = _describe_process()
        self._beats = 0
        self._beaten = (0.0, 0.0)
        self._lost = threading.Event()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    @contextlib.contextmanager
    def hold(self, log: Log) -> Iterator[OutputLock]:
        """Hold the lock; at the end its file is gone.

        Args:
            log: is told while it is not sure yet whether another host still writes.

        Raises:
            InputError: somebody else holds it, or nothing can be written beside the output.
            DoesNotFit: the disk is full.
        """
        self._acquire(log)
        try:
            yield self
        finally:
            with hold_signals():
                self._release()

    def is_held(self) -> bool:
        """Return whether the lock is still this process's; see `check`."""
        try:
            self.check()
        except Moe2EdgeError:
            return False
        return True

    def check(self) -> None:
        """Check that the lock is still held; a process may have been suspended for long.

        Raises:
            Moe2EdgeError: somebody else took it.
        """
        if not self._lost.is_set() and self._seconds_since_beat() > GONE / 2:
            # Somebody else may be about to take it.
            self._beat()
            time.sleep(SETTLE)
        if self._lost.is_set() or not self._is_mine():
            self._lost.set()
            raise Moe2EdgeError(
                f"{self.path} is gone or belongs to another export now, so this one no longer has "
                f"the right to write {self.out} (it was suspended for long, or the file was "
                "deleted); nothing was renamed: run the command again"
            )

    def check_quickly(self) -> None:
        """Check that no renewal has found the lock taken; this looks at no file.

        Raises:
            Moe2EdgeError: one has.
        """
        if self._lost.is_set():
            self.check()

    def _acquire(self, log: Log) -> None:
        for _ in range(1000):
            try:
                self._handle = os.open(
                    self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666
                )
            except OSError as error:
                raise make_place_error(self.path.parent, error) from error
            try:
                self._flocked = self._lock_handle()
                if self._is_at_its_name():
                    self._take(self._flocked, log)
                    return
            except BaseException as error:
                self._forget()
                if isinstance(error, OSError):
                    raise make_place_error(self.path, error) from error
                raise
            self._close()  # its holder had just finished and removed it
        raise self._make_busy_error({})

    def _lock_handle(self) -> bool:
        """Take the system's lock; False: there is none for this file system.

        Raises:
            InputError: somebody else has it.
        """
        if fcntl is None:
            return False
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _BUSY:
                raise self._make_busy_error(_read(self.path)) from error
            return False
        return True

    def _is_at_its_name(self) -> bool:
        """Return whether the file that was opened is still the one of that name."""
        try:
            return os.path.samestat(os.fstat(self._handle), os.lstat(self.path))
        except FileNotFoundError:
            return False

    def _take(self, flocked: bool, log: Log) -> None:
        """Write this process's line, unless the writer of the line that is there is alive."""
        owner = _read(self.path)
        if owner and self._is_alive(owner, flocked, log):
            raise self._make_busy_error(owner)
        self._write_line()
        if not flocked:
            # Another process may have read the same old line; the last to write is the one.
            time.sleep(SETTLE)
            if not self._is_mine():
                raise self._make_busy_error(_read(self.path))
        self._thread = threading.Thread(target=self._renew, name="output lock", daemon=True)
        self._thread.start()

    def _is_alive(self, owner: dict[str, Any], flocked: bool, log: Log) -> bool:
        """Return whether the writer of a line still writes; this may take `GONE` seconds."""
        here = self._process
        if owner.get("boot") == here["boot"]:
            if flocked:
                return False  # the system releases the lock of a process that ended
            if owner.get("namespace") == here["namespace"]:
                return _is_running(owner)
        if self._measure_age() > GONE:
            return False
        log(
            f"{self.out} was being written on {owner.get('host')}; waiting for up to {GONE:.0f} "
            "seconds to see if it still is"
        )
        end = time.monotonic() + GONE
        while time.monotonic() < end:
            time.sleep(min(1.0, BEAT))
            if not self._is_at_its_name() or _read(self.path) != owner:
                return True
        return False

    def _measure_age(self) -> float:
        """Return the seconds since the file was written, by the clock of the file system."""
        with tempfile.TemporaryFile(dir=self.path.parent) as file:
            file.write(b"\0")
            file.flush()
            return os.fstat(file.fileno()).st_mtime - os.stat(self.path).st_mtime

    def _write_line(self) -> None:
        line = {**self._process, "token": self._token, "beat": self._beats}
        self._beats += 1
        # One write of one length, so that nobody reads half of it.
        os.pwrite(self._handle, json.dumps(line).ljust(_LINE - 1).encode() + b"\n", 0)
        os.fsync(self._handle)
        self._beaten = (time.monotonic(), time.time())

    def _seconds_since_beat(self) -> float:
        # One of the clocks may stand still while a machine sleeps.
        return max(time.monotonic() - self._beaten[0], time.time() - self._beaten[1])

    def _is_mine(self) -> bool:
        return self._is_at_its_name() and _read(self.path).get("token") == self._token

    def _beat(self) -> None:
        """Renew the line, unless it is somebody else's."""
        try:
            if self._is_mine():
                self._write_line()
            else:
                self._lost.set()
        except OSError:  # a full disk, or a server that does not answer: the next one may
            return

    def _renew(self) -> None:
        while not self._ended.wait(BEAT) and not self._lost.is_set():
            self._beat()

    def _release(self) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        try:
            if self._is_mine():
                self.path.unlink()
        except (OSError, InputError):  # the next start takes what is left of the lock
            pass
        finally:
            self._close()

    def _forget(self) -> None:
        """Close a file that was not taken; one without a line is of no other writer."""
        try:
            if self._flocked and self._is_at_its_name() and not _read(self.path):
                self.path.unlink()
        except (OSError, InputError):
            pass
        finally:
            self._close()

    def _close(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def _make_busy_error(self, owner: dict[str, Any]) -> InputError:
        process = f" (process {owner['pid']} on {owner['host']})" if owner else ""
        return InputError(
            f"another export{process} is writing {self.out}; wait until it has ended, or choose "
            "another name"
        )


def _read(path: Path) -> dict[str, Any]:
    """Read the line of a lock file; empty if there is none, or a loss of power took it.

    Raises:
        InputError: moe2edge did not write it.
    """
    foreign = InputError(f"{path} was not written by moe2edge; move it away")
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise foreign
        with path.open("rb") as file:  # opened anew: what another host wrote is seen
            data = file.read(2 * _LINE)
    except FileNotFoundError:
        return {}
    if not data.strip(b"\0 \n"):
        return {}
    try:
        line: dict[str, Any] = json.loads(data)
        if set(line) == _KEYS:
            return line
    except (ValueError, TypeError):
        if data.startswith(_START):  # half of it was written before a loss of power
            return {}
    raise foreign


def _describe_process() -> dict[str, Any]:
    """Describe this process so that other hosts and containers recognize it."""
    return {
        "host": socket.gethostname(),
        "boot": read_boot(),
        "namespace": read_namespace(),
        "pid": os.getpid(),
        "started": psutil.Process().create_time(),
    }


def read_boot() -> str:
    """Return what tells this run of this system's kernel from any other."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    return f"{socket.gethostname()} {psutil.boot_time():.0f}"


def read_namespace() -> str:
    """Return the namespace in which the numbers of processes count."""
    with contextlib.suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""


def _is_running(owner: dict[str, Any]) -> bool:
    try:
        return bool(abs(psutil.Process(owner["pid"]).create_time() - owner["started"]) < 1)
    except (psutil.Error, TypeError, ValueError, OverflowError):
        return False
