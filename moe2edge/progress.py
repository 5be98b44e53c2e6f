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
class Reporter:
    """Receiver of progress.

    Attributes:
        log: takes one line of text.
        advance: takes a count of work done.
    """

    log: Log
    advance: Advance


QUIET = Reporter(lambda _: None, lambda *_: None)
