"""Run a command, and print its peak of memory between the lines that it writes to stderr.

Use it before any command of moe2edge::

    python -m benchmarks.plan.stages moe2edge export MODEL -t onnx -o out
"""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

POLL = 0.01
# Turns after which new children are looked for.
CHILDREN_EVERY = 10


@dataclass
class Stage:
    """A line of the command, and what came behind it: seconds, and the peak resident set."""

    line: str
    begun: float
    seconds: float = 0.0
    peak: int = 0


def run_in_stages(command: list[str]) -> tuple[list[Stage], int]:
    """Run a command; return its stages and its exit code.

    The memory is that of the command and of all that it starts, read every 10 ms.
    """
    begun = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    stages = [Stage("start", begun)]
    watch = threading.Thread(target=_watch, args=(process, stages))
    watch.start()
    assert process.stderr is not None
    for raw in process.stderr:
        stages.append(Stage(raw.decode(errors="replace").rstrip()[:100], time.perf_counter()))
    code = process.wait()
    watch.join()
    ends = [*(stage.begun for stage in stages[1:]), time.perf_counter()]
    for stage, end in zip(stages, ends, strict=True):
        stage.seconds = end - stage.begun
    return stages, code


def _watch(process: subprocess.Popen[bytes], stages: list[Stage]) -> None:
    """Keep the largest resident set of the process and its children in the latest stage."""
    top, children = psutil.Process(process.pid), list[psutil.Process]()
    own = Path(f"/proc/{top.pid}/cmdline")
    for turn in itertools.count():
        if process.poll() is not None:
            return
        # Looking through all processes takes longer than reading the memory of some.
        if turn % CHILDREN_EVERY == 0:
            with suppress(psutil.Error):
                children = top.children(recursive=True)
        used = 0
        for each in (top, *children):
            place = Path(f"/proc/{each.pid}")
            with suppress(OSError, IndexError):  # it has ended
                # A process that was just forked shares all memory with the one that forked it.
                if each.pid == top.pid or (place / "cmdline").read_bytes() != own.read_bytes():
                    used += int((place / "statm").read_text().split()[1]) * 4096
        stages[-1].peak = max(stages[-1].peak, used)
        time.sleep(POLL)


if __name__ == "__main__":
    found, code = run_in_stages(sys.argv[1:])
    for stage in found:
        print(f"{stage.seconds:8.1f} s {stage.peak / 1e6:8.0f} MB  {stage.line}")
    sys.exit(code)
