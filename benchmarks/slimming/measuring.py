"""Wall time, processor time and peak memory of a child process and of its own children.

Imports little: Linux counts the memory of the process that starts a child as the child's peak.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil

INTERVAL = 0.02


@dataclass(frozen=True)
class Cost:
    """Time and memory of a command.

    Attributes:
        code: exit status; below 0: the signal that ended it.
        seconds: wall time.
        cpu_seconds: processor time, with that of children that it waited for.
        peak_bytes: largest resident memory, summed over the tree of processes.
    """

    code: int
    seconds: float
    cpu_seconds: float
    peak_bytes: int


def measure_tree_bytes(root: psutil.Process) -> int:
    """Return the resident memory of a process and its descendants."""
    total = 0
    try:
        for process in (root, *root.children(recursive=True)):
            total += process.memory_info().rss
    except psutil.Error:  # one has just ended
        pass
    return total


def measure(
    command: Sequence[str | Path],
    log: Path,
    cwd: Path,
    env: Mapping[str, str],
    cores: Sequence[int] = (),
) -> Cost:
    """Run a command to its end.

    Args:
        command: program and arguments.
        log: file of its output.
        cwd: its working folder.
        env: set on top of the environment.
        cores: processors that it may use; none: all.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    begun = time.perf_counter()
    with log.open("wb") as file:
        child = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=cwd,
            env={**os.environ, **env},
            preexec_fn=partial(os.sched_setaffinity, 0, cores) if cores else None,
        )
    root = psutil.Process(child.pid)
    peak = 0
    while True:
        pid, status, usage = os.wait4(child.pid, os.WNOHANG)
        if pid:
            break
        peak = max(peak, measure_tree_bytes(root))
        time.sleep(INTERVAL)
    seconds = time.perf_counter() - begun
    child.returncode = os.waitstatus_to_exitcode(status)
    cpu = usage.ru_utime + usage.ru_stime
    return Cost(child.returncode, seconds, cpu, max(peak, usage.ru_maxrss * 1024))
