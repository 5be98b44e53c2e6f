"""Read the memory of this process and of those that it started, phase by phase."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

PROC = Path("/proc/self")
LINUX_METHOD = "VmHWM after writing 5 to /proc/self/clear_refs"
_FIELDS = ("VmHWM", "VmRSS", "RssAnon", "RssFile")
_SHARES = ("Pss", "Private_Dirty")
# Place of the count of major faults in /proc/PID/stat behind the name (proc_pid_stat(5)).
_MAJOR_FAULTS = 9
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
        pss: proportional set size: a page that n processes map counts as 1/n of it.
        private_dirty: what only this process maps and has written.
        major_faults: times in the phase that the process waited for a page to be read from a disk;
            a count, not bytes.
    """

    peak_rss: int | None
    rss: int | None
    rss_anon: int | None
    rss_file: int | None
    pss: int | None = None
    private_dirty: int | None = None
    major_faults: int | None = None

    def merge(self, other: MemoryReading) -> MemoryReading:
        """Return the larger value of each field; None if either is None."""
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return MemoryReading(*(None if a is None or b is None else max(a, b) for a, b in pairs))


class Meter:
    """Reads the memory of this process; on Linux it resets the peak at the start of a phase.

    Attributes:
        method: method of measuring, in words.
        reason: reason why some values are None; None if all of `read` are measured.
        shares_reason: reason why those of `add_shares` are None; None if they are measured.
    """

    def __init__(self) -> None:
        self.method = LINUX_METHOD
        self.reason: str | None = None
        self.shares_reason: str | None = None
        self._faults: dict[str, int] = {}
        try:
            self._reset_peak()
            self._read_proc()
        except (OSError, KeyError) as error:
            self.method = OTHER_METHOD
            self.reason = (
                f"this system cannot reset the peak memory of a process ({type(error).__name__}: "
                f"{error}), so peak, parts and page faults of a phase are not known"
            )
        try:
            _read_shares(PROC)
        except (OSError, KeyError) as error:
            self.shares_reason = (
                f"this system has no smaps_rollup ({type(error).__name__}: {error})"
            )

    def start(self) -> None:
        """Begin a phase."""
        if self.reason is None:
            self._reset_peak()
            self._faults = count_faults()

    def read(self) -> MemoryReading:
        """Read the memory since `start`."""
        return self._read_proc() if self.reason is None else self._read_psutil()

    def add_shares(self, reading: MemoryReading) -> MemoryReading:
        """Add what takes time to read, in proportion to the memory in use, to a reading."""
        if self.shares_reason is not None:
            return reading
        pss, dirty = _read_shares(PROC)
        for place in list_started():
            with suppress(OSError, KeyError):  # it may have ended
                more = _read_shares(place)
                pss, dirty = pss + more[0], dirty + more[1]
        return replace(reading, pss=pss, private_dirty=dirty)

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
        faults = subtract_faults(count_faults(), self._faults)
        return replace(MemoryReading(*found), major_faults=faults)

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


def read_rollup(place: Path, names: Sequence[str]) -> list[int]:
    """Return the bytes of a process in smaps_rollup, by the names that it has for them.

    Args:
        place: its folder in /proc.
        names: such as ``Rss``.

    Raises:
        OSError, KeyError: the system does not tell them.
    """
    return _read_fields((place / "smaps_rollup").read_text().splitlines()[1:], names)


def _read_status(place: Path) -> list[int]:
    """Return the four values of a process, in bytes."""
    return _read_fields((place / "status").read_text().splitlines(), _FIELDS)


def _read_shares(place: Path) -> list[int]:
    return read_rollup(place, _SHARES)


def _read_fields(lines: Iterable[str], names: Sequence[str]) -> list[int]:
    fields = {key: value for key, _, value in (line.partition(":") for line in lines)}
    return [int(fields[name].split()[0]) * 1024 for name in names]


def count_faults() -> dict[str, int]:
    """Return the major faults of this process and of those that it started, by the number.

    Nothing where the system does not tell.
    """
    found = {}
    for place in (PROC, *list_started()):
        with suppress(OSError, IndexError):  # it may have ended
            fields = (place / "stat").read_text().rpartition(")")[2].split()
            found[place.name] = int(fields[_MAJOR_FAULTS])
    return found


def subtract_faults(after: Mapping[str, int], before: Mapping[str, int]) -> int | None:
    """Return the faults between two counts; None where the system does not tell them."""
    return sum(n - before.get(name, 0) for name, n in after.items()) if after else None
