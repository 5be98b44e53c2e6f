"""Measured quantities, and their collection from the replies of processes."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from moe2edge.evaluation.profile.memory import MemoryReading

NO_PROCESS = "it is measured once, in the process that starts the others"
ONE_PROCESS = "an interval takes samples of two or more processes (--repeats)"


@dataclass(frozen=True)
class Metric:
    """Samples of one measured quantity.

    Attributes:
        unit: unit of the samples, such as ``ms``.
        better: ``lower`` or ``higher``.
        samples: all samples, in the order of measurement.
        reason: reason why there are no samples.
        processes: processes that took the samples, one after the other and as many each; 0: the
            one that started the others.

    >>> Metric("ms", "lower", (4.0, 1.0, 2.0, 3.0)).percentile(50)
    2.5
    """

    unit: str
    better: str
    samples: tuple[float, ...]
    reason: str | None = None
    processes: int = 1

    def percentile(self, p: float) -> float | None:
        """Return the value that ``p`` percent of the samples do not exceed, interpolated linearly.

        Returns None if there are no samples.
        """
        if not self.samples:
            return None
        import numpy as np

        return float(np.percentile(self.samples, p))

    @property
    def n(self) -> int:
        """Number of samples."""
        return len(self.samples)

    @property
    def median(self) -> float | None:
        """Median of the samples; None if there are none."""
        return statistics.median(self.samples) if self.samples else None

    @property
    def mad(self) -> float | None:
        """Median of the distances from the median, which single outliers do not change.

        >>> Metric("ms", "lower", (1.0, 2.0, 9.0)).mad
        1.0
        """
        middle = self.median
        if middle is None:
            return None
        return statistics.median(abs(sample - middle) for sample in self.samples)

    def list_by_process(self) -> list[tuple[float, ...]]:
        """Return the samples of each process.

        >>> Metric("ms", "lower", (4.0, 1.0, 2.0, 3.0), processes=2).list_by_process()
        [(4.0, 1.0), (2.0, 3.0)]
        """
        size = self.n // max(1, self.processes)
        return [self.samples[n * size : (n + 1) * size] for n in range(self.processes)]

    def median_by_process(self) -> list[float]:
        """Return the median of the samples of each process."""
        return [statistics.median(samples) for samples in self.list_by_process()]

    def compute_interval(self) -> tuple[float, float] | None:
        """Compute the 95 % interval of the median, see ``ci95`` of `DEFINITIONS`.

        None where samples are of fewer than two processes.
        """
        if self.processes < 2 or not self.samples:
            return None
        from moe2edge.numerics.bootstrap import compute_median_interval

        return compute_median_interval(self.list_by_process(), seed=0)

    def _explain_interval(self) -> str | None:
        """Return why there is no interval; None where there is one."""
        if not self.samples:
            return self.reason
        if self.processes > 1:
            return None
        return ONE_PROCESS if self.processes else NO_PROCESS

    def to_json(self) -> dict[str, Any]:
        """Return the summary and the samples as JSON values."""
        interval = self.compute_interval()
        return {
            "unit": self.unit,
            "better": self.better,
            "n": self.n,
            "median": self.median,
            "p50": self.percentile(50),
            "p90": self.percentile(90),
            "p95": self.percentile(95),
            "p99": self.percentile(99),
            "min": min(self.samples, default=None),
            "max": max(self.samples, default=None),
            "mean": statistics.fmean(self.samples) if self.samples else None,
            "sd": statistics.stdev(self.samples) if self.n > 1 else None,
            "mad": self.mad,
            "ci95": None if interval is None else list(interval),
            "ci95_reason": self._explain_interval(),
            "processes": self.processes,
            "samples": list(self.samples),
            "reason": self.reason,
        }


@dataclass(frozen=True)
class Phase:
    """Memory of one phase.

    Attributes:
        name: name of the phase.
        samples: one reading per process.
        floor: the reading of the same process before it opened the folder; nothing: none.
    """

    name: str
    samples: tuple[MemoryReading, ...]
    floor: tuple[MemoryReading, ...] = ()

    @property
    def largest(self) -> MemoryReading:
        """Largest value of each field over the processes."""
        first, *others = self.samples
        for other in others:
            first = first.merge(other)
        return first

    def to_json(self) -> dict[str, Any]:
        """Return the largest values, and the peak of each process, as JSON values."""
        largest = self.largest
        return {
            "phase": self.name,
            "peak_rss": largest.peak_rss,
            "rss": largest.rss,
            "rss_anon": largest.rss_anon,
            "rss_file": largest.rss_file,
            "pss": largest.pss,
            "private_dirty": largest.private_dirty,
            "major_faults": largest.major_faults,
            "peak_rss_samples": [memory.peak_rss for memory in self.samples],
            "above_floor": {
                "peak_rss": self.subtract_floor("peak_rss"),
                "rss_anon": self.subtract_floor("rss_anon"),
                "rss_file": self.subtract_floor("rss_file"),
            },
        }

    def subtract_floor(self, name: str) -> int | None:
        """Return the largest bytes above those of the same process without a model.

        Args:
            name: field of a reading; of the peak, the floor is the resident set.
        """
        floor = "rss" if name == "peak_rss" else name
        found: list[int] = []
        for one, bare in zip(self.samples, self.floor, strict=False):
            value, without = getattr(one, name), getattr(bare, floor)
            if value is None or without is None:
                return None
            found.append(value - without)
        return max(found, default=None)


def collect_metrics(replies: Sequence[Mapping[str, Any]], prompt_tokens: int) -> dict[str, Metric]:
    """Collect the metrics from the replies of the child processes.

    Args:
        replies: as `moe2edge.evaluation.profile.child.measure_once` returns them, one per process.
        prompt_tokens: length of each prompt.
    """
    runs = [run for reply in replies for run in reply["runs"]]
    ttft = [run["ttft_s"] for run in runs]
    gaps = [gap for run in runs for gap in run["gaps_s"]]
    rates = [len(run["gaps_s"]) / sum(run["gaps_s"]) for run in runs if run["gaps_s"]]
    reason = None if gaps else "one token per prompt was generated; it takes at least two"
    found = {
        "import_ms": _make_ms_metric([reply["import_s"] for reply in replies]),
        "load_ms": _make_ms_metric([reply["load_s"] for reply in replies]),
        "first_token_ms": _make_first_metric(replies),
        "ttft_ms": _make_ms_metric(ttft),
        "prefill_tok_s": Metric("token/s", "higher", tuple(prompt_tokens / s for s in ttft)),
        "e2e_ms": _make_ms_metric([run["ttft_s"] + sum(run["gaps_s"]) for run in runs]),
        "ms_per_token": _make_ms_metric(gaps, reason),
        "decode_tok_s": Metric("token/s", "higher", tuple(rates), reason),
        "joules_per_token": _make_energy_metric(replies, reason),
    }
    return {name: replace(metric, processes=len(replies)) for name, metric in found.items()}


def _make_first_metric(replies: Sequence[Mapping[str, Any]]) -> Metric:
    """Make the time to the first token of the first prompt, which reads what a load left out."""
    known = [reply["first_s"] for reply in replies if reply.get("first_s") is not None]
    return _make_ms_metric(known, None if known else "it was not measured")


def _make_energy_metric(replies: Sequence[Mapping[str, Any]], reason: str | None) -> Metric:
    """Make the energy of a token of each prompt, if the system tells it and there are gaps."""
    runs = [run for reply in replies for run in reply["runs"] if run["gaps_s"]]
    joules = [run.get("joules") for run in runs]
    known = tuple(
        value / len(run["gaps_s"])
        for value, run in zip(joules, runs, strict=True)
        if value is not None
    )
    if len(known) == len(joules):
        return Metric("J", "lower", known, reason)
    return Metric("J", "lower", (), replies[0].get("energy_reason"))


def collect_phases(replies: Sequence[Mapping[str, Any]]) -> tuple[Phase, ...]:
    """Collect the memory of each phase, in the order of the first reply."""
    names = replies[0]["memory"]["phases"]
    read = {
        name: tuple(MemoryReading(**reply["memory"]["phases"][name]) for reply in replies)
        for name in names
    }
    return tuple(Phase(name, found, read.get("import", ())) for name, found in read.items())


def _make_ms_metric(seconds: Sequence[float], reason: str | None = None) -> Metric:
    return Metric("ms", "lower", tuple(s * 1000 for s in seconds), reason)
