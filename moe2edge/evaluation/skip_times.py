"""What dynamic skipping saves in a runtime."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moe2edge.runtime.protocol import Runtime

# Of `measure_times`: tokens that follow the prompt, and runs of each kind.
TIMED_STEPS, TIMED_RUNS = 32, 5


@dataclass(frozen=True)
class SkipTimes:
    """What skipping saves in a runtime; medians over interleaved runs, milliseconds.

    Attributes:
        prefill: of a prompt, with skipping.
        prefill_without: with every chosen expert run.
        decode: of one further token, with skipping.
        decode_without: with every chosen expert run.
        prompt: tokens of the prompt.
        runs: of each kind.
    """

    prefill: float
    prefill_without: float
    decode: float
    decode_without: float
    prompt: int
    runs: int


def measure_times(runtime: Runtime, without: Runtime, ids: Sequence[int]) -> SkipTimes:
    """Time one text in two runtimes by turns: a prompt, and its last `TIMED_STEPS` tokens one by one."""
    steps = min(TIMED_STEPS, len(ids) - 1)
    prompt, rest = ids[:-steps], ids[-steps:]
    taken: dict[str, list[float]] = {}
    for run in range(TIMED_RUNS + 1):
        for name, one in (("", runtime), ("_without", without)):
            begun = time.perf_counter()
            one.start(prompt)
            started = time.perf_counter()
            for token in rest:
                one.step(token)
            if run:  # the first one warms up
                taken.setdefault(f"prefill{name}", []).append(started - begun)
                decode = (time.perf_counter() - started) / len(rest)
                taken.setdefault(f"decode{name}", []).append(decode)
    found = {name: round(1e3 * statistics.median(values), 4) for name, values in taken.items()}
    return SkipTimes(**found, prompt=len(prompt), runs=TIMED_RUNS)
