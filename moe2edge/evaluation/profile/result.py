"""What a profile holds, and its JSON form."""

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
    "load_ms": "opening the folder in its runtime; files as the system has them cached",
    "ttft_ms": "time to first token: token ids given -> first token chosen; no tokenization",
    "prefill_tok_s": "prompt tokens / time to first token",
    "ms_per_token": "from one token chosen to the next, tokens 2 to n",
    "decode_tok_s": "per prompt: (n - 1) / time from the first token to the last",
    "peak_rss": "largest resident set of the process within the phase, libraries included",
    "rss": "resident set at the end of the phase",
    "rss_anon": "of that, the process's own; what counts against a limit",
    "rss_file": "of that, mapped from files; the system can drop and reread it",
    "memory": "of each phase the largest over all processes",
    "weights": "bytes of the files that hold weights",
    "dtype": "of activations between operators, as the runtime says",
    "note": "how quantized matrices run; empty if there are none, or it is not known",
    "threads": "asked: null for one per core; runtime: of torch, or of the ONNX session",
    "env": "null where the system does not tell, or the package is not installed",
}


@dataclass(frozen=True)
class Metric:
    """Samples of one quantity.

    Attributes:
        unit: such as ``ms``.
        better: ``lower`` or ``higher``.
        samples: all of them, in the order of measuring.
        reason: why there are none.

    >>> Metric("ms", "lower", (4.0, 1.0, 2.0, 3.0)).percentile(50)
    2.5
    """

    unit: str
    better: str
    samples: tuple[float, ...]
    reason: str | None = None

    def percentile(self, p: float) -> float | None:
        """The value that ``p`` percent of the samples do not exceed, linearly interpolated."""
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
        """The middle of the samples."""
        return statistics.median(self.samples) if self.samples else None

    def to_json(self) -> dict[str, Any]:
        """Summary and samples."""
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
    """Memory of one phase, once per process."""

    name: str
    samples: tuple[MemoryReading, ...]

    @property
    def largest(self) -> MemoryReading:
        """Largest values over the processes."""
        first, *others = self.samples
        for other in others:
            first = first.merge(other)
        return first

    def to_json(self) -> dict[str, Any]:
        """Largest values, and the peak of each process."""
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
    """One output, measured.

    Attributes:
        artifact: what was measured (path, target, hash of its manifest, model, dtype).
        workload: how much work was given.
        env: machine and versions.
        metrics: by name, see `DEFINITIONS`.
        phases: memory, in order.
        memory_method: how memory was measured.
        memory_reason: why some of its values are null, None if none is.
        sizes: bytes of each class of files.
        created: when, RFC 3339.
        warnings: what makes these figures less trustworthy.
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
        """The profile as JSON values; unknown values are null, with a reason."""
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


def collect_metrics(answers: Sequence[Mapping[str, Any]], prompt_tokens: int) -> dict[str, Metric]:
    """Metrics of what the child processes answered (see `moe2edge.evaluation.profile.child.measure_once`)."""
    runs = [run for a in answers for run in a["runs"]]
    ttft = [run["ttft_s"] for run in runs]
    gaps = [gap for run in runs for gap in run["gaps_s"]]
    rates = [len(run["gaps_s"]) / sum(run["gaps_s"]) for run in runs if run["gaps_s"]]
    why = None if gaps else "one token per prompt was generated; it takes at least two"
    return {
        "import_ms": _milliseconds([a["import_s"] for a in answers]),
        "load_ms": _milliseconds([a["load_s"] for a in answers]),
        "ttft_ms": _milliseconds(ttft),
        "prefill_tok_s": Metric("token/s", "higher", tuple(prompt_tokens / s for s in ttft)),
        "ms_per_token": _milliseconds(gaps, why),
        "decode_tok_s": Metric("token/s", "higher", tuple(rates), why),
    }


def collect_phases(answers: Sequence[Mapping[str, Any]]) -> tuple[Phase, ...]:
    """Memory phases of what the child processes answered, in the order of the first."""
    names = answers[0]["memory"]["phases"]
    return tuple(
        Phase(name, tuple(MemoryReading(**a["memory"]["phases"][name]) for a in answers))
        for name in names
    )


def _milliseconds(seconds: Sequence[float], reason: str | None = None) -> Metric:
    return Metric("ms", "lower", tuple(s * 1000 for s in seconds), reason)
