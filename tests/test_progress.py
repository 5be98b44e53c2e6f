"""Progress lines, and interrupts that Python drops."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from moe2edge.cli import progress_bar
from moe2edge.progress import TimeLeft


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    progress_bar.listen()
    yield
    progress_bar.listen()  # forgets the signal of the test
    for number, handler in before:
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("quiet", [False, True])
def test_an_interrupt_that_was_dropped_is_raised_again(number: signal.Signals, quiet: bool) -> None:
    reporter = progress_bar.make_reporter(quiet=quiet)
    reporter.log("begun")
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), number)
    with pytest.raises(KeyboardInterrupt):
        reporter.advance("work", 1, 9)
    with pytest.raises(KeyboardInterrupt):
        reporter.log("more")
    with pytest.raises(KeyboardInterrupt):
        next(progress_bar.iterate_until_interrupted([1]))


def test_lines_elsewhere_than_on_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = progress_bar.make_reporter(quiet=False)
    for done in range(4):
        reporter.advance("work", done, 3)
    assert capsys.readouterr().err.endswith("work: 3 of 3\n")
    assert capsys.readouterr().out == ""


def test_work_that_is_counted_again_begins_anew(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 1.0, 1001.0, 1002.0, 1102.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    reporter = progress_bar.make_reporter(quiet=False)
    for done in (0, 15, 1, 8):
        reporter.advance("measure", done, 15)
    # Seven took 100 s, whatever the fifteen before them took.
    assert capsys.readouterr().err.splitlines() == [
        "[1001.0 s] measure: 15 of 15",
        "[1102.0 s] measure: 8 of 15, 1:40 left",
    ]


def test_lines_say_where_the_work_is_and_how_long_it_takes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 1.0, 101.0, 201.0, 301.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    reporter = progress_bar.make_reporter(quiet=False)
    for done in (0, 10, 20, 300):
        reporter.advance("gptq", done, 300, f"block {done}")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "[ 101.0 s] gptq: 10 of 300, block 10, 48:20 left",
        "[ 201.0 s] gptq: 20 of 300, block 20, 46:40 left",
        "[ 301.0 s] gptq: 300 of 300, block 300",
    ]


def test_lines_say_how_long_the_whole_takes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 5.0, 16.0, 40.0, 50.0, 61.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    reporter = progress_bar.make_reporter(quiet=False)
    reporter.left(TimeLeft("gptq", 75.0, 4000.0))
    reporter.left(TimeLeft("gptq", 70.0, 3995.0))
    reporter.advance("gptq", 10, 300, "block 1")
    reporter.left(TimeLeft("writing onnx", 9.0, 3000.0))  # short: it is not announced
    reporter.advance("gptq", 300, 300)
    reporter.left(TimeLeft("running onnx", 0.0, 20.0))  # over its time
    reporter.advance("evaluation: onnx", 0, 9)
    reporter.left(TimeLeft("finishing", 0.0, 0.0))
    reporter.advance("evaluation: onnx", 3, 9)
    assert capsys.readouterr().err.splitlines() == [
        "[   5.0 s] gptq: 1:15 left of this stage, 1:06:40 of all",
        "[  16.0 s] gptq: 10 of 300, block 1, 1:10 left of this stage, 1:06:35 of all",
        "[  40.0 s] gptq: 300 of 300",
        "[  50.0 s] evaluation: onnx: 0 of 9, 0:20 left of all",
        "[  61.0 s] evaluation: onnx: 3 of 9, 0:22 left",
    ]
    quiet = progress_bar.make_reporter(quiet=True)
    quiet.left(TimeLeft("gptq", 75.0, 4000.0))
    quiet.begin("gptq")
    assert capsys.readouterr().err == ""
