"""Read the memory of this process and of those that it started, phase by phase."""

from __future__ import annotations

import dataclasses
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc/self")
LINUX_METHOD = "VmHWM after writing 5 to /proc/self/clear_refs"
_FIELDS = ("VmHWM", "VmRSS", "RssAnon", "RssFile")
OTHER_METHOD = "psutil resident set size at the end of the phase"


@dataclass(frozen=True)
class MemoryReading:
    """Memory of one process in one phase, in bytes; None where the system cannot measure it.

    Attributes:
        peak_rss: largest resident set size (RSS) during the phase.
        rss: resident set size at the end of the phase.
        rss_anon: anonymous part of ``rss``, which belongs to the process alone.
        rss_file: part of ``rss`` that is mapped from files; the system can drop it when memory
            runs short.
    """

    peak_rss: int | None
    rss: int | None
    rss_anon: int | None
    rss_file: int | None

    def merge(self, other: MemoryReading) -> MemoryReading:
        """Return the larger value of each field; None if either is None."""
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return MemoryReading(*(None if a is None or b is None else max(a, b) for a, b in pairs))


class Meter:
    """Reads the memory of this process; on Linux it resets the peak at the start of a phase.

    Attributes:
        method: method of measuring, in words.
        reason: reason why some values are None; None if all are measured.
    """

    def __init__(self) -> None:
        self.method = LINUX_METHOD
        self.reason: str | None = None
        try:
            self._reset_peak()
            self._read_proc()
        except (OSError, KeyError) as error:
            self.method = OTHER_METHOD
            self.reason = (
                f"this system cannot reset the peak memory of a process ({type(error).__name__}: "
                f"{error}), so the peak of a phase is not known"
            )

    def start(self) -> None:
        """Begin a phase."""
        if self.reason is None:
            self._reset_peak()

    def read(self) -> MemoryReading:
        """Read the memory since `start`."""
        return self._read_proc() if self.reason is None else self._read_psutil()

    def _reset_peak(self) -> None:
        # 5 resets VmHWM to the current resident set size (proc_pid_clear_refs(5)).
        (PROC / "clear_refs").write_text("5")
        for place in list_started():
            with suppress(OSError):  # it may have ended
                (place / "clear_refs").write_text("5")

    def _read_proc(self) -> MemoryReading:
        found = _read_status(PROC)
        for place in list_started():
            with suppress(OSError, KeyError):
                found = [a + b for a, b in zip(found, _read_status(place), strict=True)]
        return MemoryReading(*found)

    def _read_psutil(self) -> MemoryReading:
        import psutil

        own = psutil.Process()
        found = [one.memory_info().rss for one in (own, *own.children(recursive=True))]
        return MemoryReading(None, sum(found), None, None)


def list_started() -> list[Path]:
    """List the folders in /proc of the processes that this one started; a runtime may be one."""
    found: list[Path] = []
    for path in PROC.glob("task/*/children"):
        with suppress(OSError):  # a thread may have ended
            found += [PROC.parent / number for number in path.read_text().split()]
    return found


def _read_status(place: Path) -> list[int]:
    """Return the four values of a process, in bytes."""
    lines = (place / "status").read_text().splitlines()
    fields = {key: value for key, _, value in (line.partition(":") for line in lines)}
    return [int(fields[name].split()[0]) * 1024 for name in _FIELDS]
