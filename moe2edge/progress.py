"""Progress of long work: what is told, and to whom."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

Log = Callable[[str], None]


class Advance(Protocol):
    """Told about work done of work to do, in whatever unit, and where it is at present."""

    def __call__(self, label: str, done: int, total: int, detail: str = "", /) -> None: ...


@dataclass(frozen=True)
class Reporter:
    """Who is told about progress: lines, and work done of work to do."""

    log: Log
    advance: Advance
