"""Protocols through which long work reports its progress."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

Log = Callable[[str], None]


class Advance(Protocol):
    """Callback for progress: a label, units done, units in total, and a detail.

    The caller chooses the unit. The detail says where the work is at present.
    """

    def __call__(self, label: str, done: int, total: int, detail: str = "", /) -> None: ...


@dataclass(frozen=True)
class TimeLeft:
    """Estimate of the time that is left.

    Attributes:
        stage: name of the stage that runs.
        seconds: of this stage.
        whole: seconds of all that is still to come, this stage included.
    """

    stage: str
    seconds: float
    whole: float


def _ignore(_: object) -> None:
    """Take progress, and do nothing about it."""


@dataclass(frozen=True)
class Reporter:
    """Receiver of progress.

    Attributes:
        log: takes one line of text.
        advance: takes a count of work done.
        begin: takes the name of a stage that begins.
        left: takes the time that is left, before each stage and each count, where it is known.
    """

    log: Log
    advance: Advance
    begin: Callable[[str], None] = _ignore
    left: Callable[[TimeLeft], None] = _ignore


QUIET = Reporter(lambda _: None, lambda *_: None)


def format_time(seconds: float) -> str:
    """Format a time roughly.

    >>> format_time(0.2), format_time(48), format_time(500), format_time(9000)
    ('1 s', '48 s', '8 min', '2.5 h')
    """
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def format_bytes(size: float) -> str:
    """Format a size with three digits.

    >>> format_bytes(4_999_999), format_bytes(0.3e9), format_bytes(68.86e9), format_bytes(12)
    ('5.00 MB', '300 MB', '68.9 GB', '12 B')
    """
    for unit, width in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= width:
            digits = max(0, 2 - len(str(int(size / width))) + 1)
            return f"{size / width:.{digits}f} {unit}"
    return f"{size:.0f} B"
