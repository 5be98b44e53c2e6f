"""Peak memory of this process, phase by phase."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc/self")
LINUX_METHOD = "VmHWM after writing 5 to /proc/self/clear_refs"
OTHER_METHOD = "psutil resident set size at the end of the phase"


@dataclass(frozen=True)
class MemoryReading:
    """Memory of one process in one phase, in bytes; None where it cannot be known.

    Attributes:
        peak_rss: largest resident set during the phase.
        rss: resident set at its end.
        rss_anon: of that, what is the process's own.
        rss_file: of that, what is mapped from files and can be dropped under pressure.
    """

    peak_rss: int | None
    rss: int | None
    rss_anon: int | None
    rss_file: int | None

    def merge(self, other: MemoryReading) -> MemoryReading:
        """The larger of both, field by field; unknown if either is."""
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return MemoryReading(*(None if a is None or b is None else max(a, b) for a, b in pairs))


class Meter:
    """Reads the memory of this process; on Linux the peak can be set back between phases.

    Attributes:
        method: how it is measured.
        reason: why some values are unknown, None if all are known.
    """

    def __init__(self) -> None:
        self.method = LINUX_METHOD
        self.reason: str | None = None
        try:
            self._set_back()
            self._from_proc()
        except (OSError, KeyError) as error:
            self.method = OTHER_METHOD
            self.reason = (
                f"this system cannot set back the peak of a process ({type(error).__name__}: "
                f"{error}), so a peak within a phase cannot be told"
            )

    def start(self) -> None:
        """Begin a phase."""
        if self.reason is None:
            self._set_back()

    def read(self) -> MemoryReading:
        """Memory since `start`."""
        return self._from_proc() if self.reason is None else self._from_psutil()

    def _set_back(self) -> None:
        # 5 sets VmHWM back to the present resident set size (proc_pid_clear_refs(5)).
        (PROC / "clear_refs").write_text("5")

    def _from_proc(self) -> MemoryReading:
        lines = (PROC / "status").read_text().splitlines()
        fields = {key: value for key, _, value in (line.partition(":") for line in lines)}
        names = ("VmHWM", "VmRSS", "RssAnon", "RssFile")
        return MemoryReading(*(int(fields[name].split()[0]) * 1024 for name in names))

    def _from_psutil(self) -> MemoryReading:
        import psutil

        return MemoryReading(None, psutil.Process().memory_info().rss, None, None)
