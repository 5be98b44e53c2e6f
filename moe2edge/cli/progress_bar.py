"""Progress of long work, told to whoever watches; on the command line that is stderr.

Where progress is told, an interrupt is looked for as well: Python drops an exception that a signal
raises inside a destructor or a callback, and the work would go on.
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

from moe2edge.progress import Reporter

Item = TypeVar("Item")

_interrupted = threading.Event()


def listen() -> None:
    """Turn SIGINT and SIGTERM into ``KeyboardInterrupt``."""
    _interrupted.clear()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)


def _interrupt(*_: object) -> NoReturn:
    _interrupted.set()
    raise KeyboardInterrupt


def check_interrupted() -> None:
    """Stop if a signal came.

    Raises:
        KeyboardInterrupt: it did.
    """
    if _interrupted.is_set():
        raise KeyboardInterrupt


def iterate_until_interrupted(items: Iterable[Item]) -> Iterator[Item]:
    """The items, until a signal comes."""
    for item in items:
        check_interrupted()
        yield item


def make_reporter(*, quiet: bool) -> Reporter:
    """Progress on stderr: a bar on a terminal, a line every few seconds elsewhere."""
    if quiet:
        return Reporter(lambda _: check_interrupted(), lambda *_: check_interrupted())
    begun = time.perf_counter()
    last: dict[str, float] = {}

    def log(line: str) -> None:
        check_interrupted()
        click.echo(line, err=True)

    started: dict[str, tuple[float, int]] = {}

    def advance(label: str, done: int, total: int, detail: str = "", /) -> None:
        check_interrupted()
        now = time.perf_counter()
        since, before = started.setdefault(label, (now, done))
        text = f"[{now - begun:6.1f} s] {label}: {done} of {total}"
        if detail:
            text += f", {detail}"
        if before < done < total:
            text += f", {_clock((now - since) * (total - done) / (done - before))} left"
        if sys.stderr.isatty():
            bar = "=" * round(30 * done / max(total, 1))
            click.echo(f"\r{text} [{bar:<30}]\x1b[K", nl=done == total, err=True)
        elif done == total or now - last.get(label, begun) > 10:
            last[label] = now
            click.echo(text, err=True)

    return Reporter(log, advance)


def _clock(seconds: float) -> str:
    """Time to go, as one says it.

    >>> _clock(75), _clock(4000)
    ('1:15', '1:06:40')
    """
    return f"{timedelta(seconds=round(seconds))}".removeprefix("0:").removeprefix("0")
