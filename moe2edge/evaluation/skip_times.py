"""Time with and without dynamic skipping in a runtime."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moe2edge.runtime.protocol import Runtime

# Decoded tokens that are timed after the prompt, and timed runs with and without skipping.
TIMED_STEPS, TIMED_RUNS = 32, 5


@dataclass(frozen=True)
class SkipTimes:
    """Times with and without skipping: medians over interleaved runs, in milliseconds.

    Attributes:
        prefill: time of the prompt, with skipping.
        prefill_without: time of the prompt when every chosen expert runs.
        decode: time of one further token, with skipping.
        decode_without: time of one further token when every chosen expert runs.
        prompt: number of tokens in the prompt.
        runs: number of timed runs of each kind.
    """

    prefill: float
    prefill_without: float
    decode: float
    decode_without: float
    prompt: int
    runs: int


def measure_times(runtime: Runtime, without: Runtime, ids: Sequence[int]) -> SkipTimes:
    """Time one text in two runtimes in turn: the prompt, then `TIMED_STEPS` single tokens.

    The timed tokens are the last ones of the text; the prompt is all before them.

    Args:
        runtime: skips experts.
        without: the same output, but every chosen expert runs.
        ids: the tokens of the text; at least 2.
    """
    steps = min(TIMED_STEPS, len(ids) - 1)
    prompt, rest = ids[:-steps], ids[-steps:]
    seconds: dict[str, list[float]] = {}
    for run in range(TIMED_RUNS + 1):
        for name, timed in (("", runtime), ("_without", without)):
            begin = time.perf_counter()
            timed.start(prompt)
            prefilled = time.perf_counter()
            for token in rest:
                timed.step(token)
            if run:  # the first run is a warm-up
                seconds.setdefault(f"prefill{name}", []).append(prefilled - begin)
                decode = (time.perf_counter() - prefilled) / len(rest)
                seconds.setdefault(f"decode{name}", []).append(decode)
    medians = {name: round(1e3 * statistics.median(s), 4) for name, s in seconds.items()}
    return SkipTimes(**medians, prompt=len(prompt), runs=TIMED_RUNS)
