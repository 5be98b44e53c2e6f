"""Progress of long work, told to whoever watches; on the command line that is stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import click

Log = Callable[[str], None]
Advance = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Watcher:
    """Who is told about progress: lines, and work done of work to do."""

    log: Log
    advance: Advance


def watcher(*, quiet: bool) -> Watcher:
    """Progress on stderr: a bar on a terminal, a line every few seconds elsewhere."""
    if quiet:
        return Watcher(lambda _: None, lambda *_: None)
    begun = time.perf_counter()
    last: dict[str, float] = {}

    def log(line: str) -> None:
        click.echo(line, err=True)

    def advance(label: str, done: int, total: int) -> None:
        now = time.perf_counter()
        text = f"[{now - begun:6.1f} s] {label}: {done} of {total}"
        if sys.stderr.isatty():
            bar = "=" * round(30 * done / max(total, 1))
            click.echo(f"\r{text} [{bar:<30}]\x1b[K", nl=done == total, err=True)
        elif done == total or now - last.get(label, begun) > 10:
            last[label] = now
            click.echo(text, err=True)

    return Watcher(log, advance)
