"""Progress lines, and interrupts that Python drops."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from moe2edge import progress


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    progress.listen()
    yield
    progress.listen()  # forgets the signal of the test
    for number, handler in before:
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("quiet", [False, True])
def test_an_interrupt_that_was_dropped_is_raised_again(number: signal.Signals, quiet: bool) -> None:
    watcher = progress.watcher(quiet=quiet)
    watcher.log("begun")
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), number)
    with pytest.raises(KeyboardInterrupt):
        watcher.advance("work", 1, 9)
    with pytest.raises(KeyboardInterrupt):
        watcher.log("more")
    with pytest.raises(KeyboardInterrupt):
        next(progress.watched([1]))


def test_lines_elsewhere_than_on_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    watcher = progress.watcher(quiet=False)
    for done in range(4):
        watcher.advance("work", done, 3)
    assert capsys.readouterr().err.endswith("work: 3 of 3\n")
    assert capsys.readouterr().out == ""
