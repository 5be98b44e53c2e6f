"""Sample the memory of this process and of those that it started while something runs."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from typing import Any

from moe2edge.evaluation.profile.memory import PROC, list_started, read_rollup

METHOD = "smaps_rollup of /proc, sampled in a thread"
_INTERVAL_S = 0.02
# Beyond this number every other sample goes, and the interval doubles.
_MOST = 1000
_FIELDS = ("Rss", "Anonymous")


class Timeline:
    """Samples memory between ``with`` and its end; phases are named as they begin."""

    def __init__(self, interval_s: float = _INTERVAL_S) -> None:
        self.samples: list[dict[str, Any]] = []
        self.reason: str | None = None
        self._interval, self._phase = interval_s, "import"
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._begin = time.perf_counter()

    def __enter__(self) -> Timeline:
        try:
            read_rollup(PROC, _FIELDS)
        except (OSError, KeyError) as error:
            self.reason = f"this system has no smaps_rollup ({type(error).__name__}: {error})"
            return self
        self._begin = time.perf_counter()
        self._sample()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        if self.reason is None:
            self._thread.join()
            self._sample()

    def begin(self, phase: str) -> None:
        """Name the phase that begins now."""
        self._phase = phase
        if self.reason is None:
            self._sample()

    def to_json(self) -> dict[str, Any]:
        """Return the samples: seconds, phase, and bytes that are resident, by kind."""
        return {
            "method": METHOD,
            "reason": self.reason,
            "interval_s": self._interval,
            "samples": sorted(self.samples, key=lambda sample: sample["t_s"]),
        }

    def _run(self) -> None:
        while not self._done.wait(self._interval):
            self._sample()
            if len(self.samples) > _MOST:
                self.samples, self._interval = self.samples[::2], 2 * self._interval

    def _sample(self) -> None:
        phase, now = self._phase, time.perf_counter() - self._begin
        rss, anonymous = read_rollup(PROC, _FIELDS)
        for place in list_started():
            with suppress(OSError, KeyError):  # it may have ended
                more = read_rollup(place, _FIELDS)
                rss, anonymous = rss + more[0], anonymous + more[1]
        self.samples.append(
            {"t_s": now, "phase": phase, "rss": rss, "rss_anon": anonymous,
             "rss_file": rss - anonymous}
        )  # fmt: skip
