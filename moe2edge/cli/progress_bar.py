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
from moe2edge.progress import Reporter

# Characters of the name of a step of the work.
LONGEST_LABEL = 100
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
    begin = time.perf_counter()
    # When each label was last written, and when and where it was first reported.
    last: dict[str, float] = {}
    started: dict[str, tuple[float, int]] = {}

    def log(line: str) -> None:
        check_interrupted()
        click.echo("\n".join(map(shorten, line.split("\n"))), err=True)

    def advance(label: str, done: int, total: int, detail: str = "", /) -> None:
        check_interrupted()
        now = time.perf_counter()
        since, before = started.setdefault(label, (now, done))
        text = f"[{now - begin:6.1f} s] {shorten(label, LONGEST_LABEL)}: {done} of {total}"
        if detail:
            text += f", {detail}"
        if before < done < total:
            text += f", {_format_duration((now - since) * (total - done) / (done - before))} left"
        if sys.stderr.isatty():
            bar = "=" * round(30 * done / max(total, 1))
            click.echo(f"\r{text} [{bar:<30}]\x1b[K", nl=done == total, err=True)
        elif done == total or now - last.get(label, begin) > 10:
            last[label] = now
            click.echo(text, err=True)

    return Reporter(log, advance)


def _format_duration(seconds: float) -> str:
    """Format a duration in seconds as minutes and seconds, with hours if needed.

    >>> _format_duration(75), _format_duration(4000)
    ('1:15', '1:06:40')
    """
    return f"{timedelta(seconds=round(seconds))}".removeprefix("0:").removeprefix("0")
