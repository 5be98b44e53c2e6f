"""Show the progress of long work on stderr, and stop the work after an interrupt.

Every report of progress also checks for an interrupt, because Python drops an exception that a
signal raises inside a destructor or a callback, and the work would continue.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import NoReturn, TypeVar

import click

from moe2edge.cli.failures import shorten
from moe2edge.progress import Reporter, TimeLeft

# Characters of the name of a step of the work.
LONGEST_LABEL = 100
# Seconds from which on a stage is announced.
LONG_STAGE = 10
Item = TypeVar("Item")

_interrupted = threading.Event()


def listen() -> None:
    """Turn SIGINT, SIGTERM and SIGHUP (a closed terminal) into ``KeyboardInterrupt``."""
    _interrupted.clear()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    # nohup lets a process ignore it.
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signal.signal(signal.SIGHUP, _interrupt)


def _interrupt(*_: object) -> NoReturn:
    _interrupted.set()
    raise KeyboardInterrupt


def check_interrupted() -> None:
    """Stop the work if a signal arrived.

    Raises:
        KeyboardInterrupt: a signal arrived.
    """
    if _interrupted.is_set():
        raise KeyboardInterrupt


def iterate_until_interrupted(items: Iterable[Item]) -> Iterator[Item]:
    """Yield the items; raises KeyboardInterrupt once a signal arrived."""
    for item in items:
        check_interrupted()
        yield item


def make_reporter(*, quiet: bool) -> Reporter:
    """Make a reporter that writes to stderr: a bar on a terminal, else a line every 10 seconds.

    A quiet reporter writes nothing, and only checks for interrupts.
    """
    if quiet:
        return Reporter(lambda _: check_interrupted(), lambda *_: check_interrupted())
    lines = _Lines()
    return Reporter(lines.log, lines.advance, left=lines.take_left)


class _Lines:
    """Writes lines of progress to stderr."""

    def __init__(self) -> None:
        self._begun = time.perf_counter()
        # When each label was last written; when and where its count began, and where it is.
        self._last: dict[str, float] = {}
        self._counts: dict[str, tuple[float, int, int]] = {}
        self._left: TimeLeft | None = None

    def log(self, line: str) -> None:
        check_interrupted()
        click.echo("\n".join(map(shorten, line.split("\n"))), err=True)

    def take_left(self, left: TimeLeft) -> None:
        begins = self._left is None or self._left.stage != left.stage
        self._left = left
        if begins and left.seconds >= LONG_STAGE:
            self.log(f"{self._stamp(time.perf_counter(), left.stage)}: {_describe_left(left)}")

    def advance(self, label: str, done: int, total: int, detail: str = "", /) -> None:
        check_interrupted()
        now = time.perf_counter()
        since, before, last = self._counts.get(label, (now, done, done))
        if done < last:  # it is counted again
            since, before = now, done
        self._counts[label] = since, before, done
        text = f"{self._stamp(now, label)}: {done} of {total}"
        if detail:
            text += f", {detail}"
        if done < total and self._left is not None and self._left.whole >= 1:
            text += f", {_describe_left(self._left)}"
        elif before < done < total:
            text += f", {_format_duration((now - since) * (total - done) / (done - before))} left"
        if sys.stderr.isatty():
            bar = "=" * round(30 * done / max(total, 1))
            click.echo(f"\r{text} [{bar:<30}]\x1b[K", nl=done == total, err=True)
        elif done == total or now - self._last.get(label, self._begun) > 10:
            self._last[label] = now
            click.echo(text, err=True)

    def _stamp(self, now: float, label: str) -> str:
        """Return the beginning of a line: the time since the start, and a label."""
        return f"[{now - self._begun:6.1f} s] {shorten(label, LONGEST_LABEL)}"


def _describe_left(left: TimeLeft) -> str:
    """Describe the time that is left of a stage, unless that is over its time, and of all.

    >>> _describe_left(TimeLeft("gptq", 75, 4000)), _describe_left(TimeLeft("gptq", 0, 9))
    ('1:15 left of this stage, 1:06:40 of all', '0:09 left of all')
    """
    whole = f"{_format_duration(left.whole)} of all"
    if left.seconds < 1:
        return whole.replace(" of", " left of")
    return f"{_format_duration(left.seconds)} left of this stage, {whole}"


def _format_duration(seconds: float) -> str:
    """Format a duration in seconds as minutes and seconds, with hours if needed.

    >>> _format_duration(75), _format_duration(4000)
    ('1:15', '1:06:40')
    """
    return f"{timedelta(seconds=round(seconds))}".removeprefix("0:").removeprefix("0")
