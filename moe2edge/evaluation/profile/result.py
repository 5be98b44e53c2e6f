"""Results of a profile, and their JSON form."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moe2edge.evaluation.profile.memory import MemoryReading

PROFILE_VERSION = 1
PROFILE_KIND = "moe2edge.profile"
DEFINITIONS: Mapping[str, str] = {
    "import_ms": "import of the libraries that the runtime needs, in a fresh process",
    "load_ms": "opening the folder in its runtime; files may be in the cache of the system",
    "ttft_ms": "time to first token: from token ids to the first token; no tokenization",
    "prefill_tok_s": "prompt tokens / time to first token",
    "ms_per_token": "time from one token to the next, tokens 2 to n",
    "decode_tok_s": "per prompt: (n - 1) / time from the first token to the last",
    "peak_rss": "largest resident set of the process within the phase, libraries included",
    "rss": "resident set at the end of the phase",
    "rss_anon": "anonymous part of rss, which counts against a memory limit",
    "rss_file": "part of rss that is mapped from files; the system can drop and reread it",
    "memory": "largest value of each phase over all processes",
    "weights": "bytes of the files that hold weights",
    "dtype": "dtype of activations between operators, as the runtime reports it",
    "note": "how quantized matrices run; empty if there are none, or it is not known",
    "threads": "asked: null for one per core; runtime: threads of torch or of the ONNX session",
    "env": "null where the system does not report it, or the package is not installed",
}


@dataclass(frozen=True)
class Metric:
    """Samples of one measured quantity.

    Attributes:
        unit: unit of the samples, such as ``ms``.
        better: ``lower`` or ``higher``.
        samples: all samples, in the order of measurement.
        reason: reason why there are no samples.

    >>> Metric("ms", "lower", (4.0, 1.0, 2.0, 3.0)).percentile(50)
    2.5
    """

    unit: str
    better: str
    samples: tuple[float, ...]
    reason: str | None = None

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

    def to_json(self) -> dict[str, Any]:
        """Return the summary and the samples as JSON values."""
        return {
            "unit": self.unit,
            "better": self.better,
            "n": self.n,
            "median": self.median,
            "p50": self.percentile(50),
            "p90": self.percentile(90),
            "min": min(self.samples, default=None),
            "max": max(self.samples, default=None),
            "samples": list(self.samples),
            "reason": self.reason,
        }


@dataclass(frozen=True)
class Phase:
    """Memory of one phase.

    Attributes:
        name: name of the phase.
        samples: one reading per process.
    """

    name: str
    samples: tuple[MemoryReading, ...]

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
            "peak_rss_samples": [memory.peak_rss for memory in self.samples],
        }


@dataclass(frozen=True)
class Profile:
    """Measurements of one output or checkpoint.

    Attributes:
        artifact: the measured folder: path, target, hash of its manifest, model, dtype.
        workload: the work that was measured.
        env: machine and versions.
        metrics: by name, see `DEFINITIONS`.
        phases: memory of each phase, in order.
        memory_method: method of measuring memory, in words.
        memory_reason: reason why some memory values are null; None if none is.
        sizes: bytes of each class of files.
        created: time of the measurement, RFC 3339.
        warnings: reasons to distrust the figures.
    """

    artifact: Mapping[str, Any]
    workload: Mapping[str, Any]
    env: Mapping[str, Any]
    metrics: Mapping[str, Metric]
    phases: tuple[Phase, ...]
    memory_method: str
    memory_reason: str | None
    sizes: Mapping[str, int]
    created: str
    warnings: tuple[str, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """Return the profile as JSON values; unknown values are null, with a reason."""
        return {
            "schema_version": PROFILE_VERSION,
            "kind": PROFILE_KIND,
            "created": self.created,
            "warnings": list(self.warnings),
            "artifact": dict(self.artifact),
            "workload": dict(self.workload),
            "env": dict(self.env),
            "metrics": {name: metric.to_json() for name, metric in self.metrics.items()},
            "memory": {
                "unit": "bytes",
                "method": self.memory_method,
                "reason": self.memory_reason,
                "phases": [phase.to_json() for phase in self.phases],
            },
            "sizes": {
                "unit": "bytes",
                "total": sum(self.sizes.values()),
                "weights": self.sizes.get("weights", 0),
                "classes": dict(self.sizes),
            },
            "definitions": dict(DEFINITIONS),
        }


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
    return {
        "import_ms": _make_ms_metric([reply["import_s"] for reply in replies]),
        "load_ms": _make_ms_metric([reply["load_s"] for reply in replies]),
        "ttft_ms": _make_ms_metric(ttft),
        "prefill_tok_s": Metric("token/s", "higher", tuple(prompt_tokens / s for s in ttft)),
        "ms_per_token": _make_ms_metric(gaps, reason),
        "decode_tok_s": Metric("token/s", "higher", tuple(rates), reason),
    }


def collect_phases(replies: Sequence[Mapping[str, Any]]) -> tuple[Phase, ...]:
    """Collect the memory of each phase, in the order of the first reply."""
    names = replies[0]["memory"]["phases"]
    return tuple(
        Phase(name, tuple(MemoryReading(**reply["memory"]["phases"][name]) for reply in replies))
        for name in names
    )


def _make_ms_metric(seconds: Sequence[float], reason: str | None = None) -> Metric:
    return Metric("ms", "lower", tuple(s * 1000 for s in seconds), reason)
