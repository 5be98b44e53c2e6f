"""Results of a profile, and their JSON form."""

from __future__ import annotations

import secrets
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moe2edge.evaluation.profile.definitions import DEFINITIONS
from moe2edge.evaluation.profile.metrics import Metric, Phase
from moe2edge.evaluation.profile.roofline import Roofline

PROFILE_VERSION = 2
PROFILE_KIND = "moe2edge.profile"
# Base 32 by Douglas Crockford.
_DIGITS = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
SET_KIND = "moe2edge.profiles"


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
        shares_reason: reason why pss and private_dirty are null.
        sizes: bytes of each class of files.
        created: time of the measurement, RFC 3339.
        id: name of the measurement, see `make_id`.
        roofline: bytes that a token reads, and the rate that memory allows.
        explanation: cold load, memory over time, use of experts, times of operators; see
            `make_explanation`.
        quality: perplexity, KL and top-1 agreement, and where they come from.
        sensors: frequency and temperature of each process; None where they were not read.
        warnings: reasons to distrust the figures.
        verdict: see `DEFINITIONS`.
    """

    artifact: Mapping[str, Any]
    workload: Mapping[str, Any]
    env: Mapping[str, Any]
    metrics: Mapping[str, Metric]
    phases: tuple[Phase, ...]
    memory_method: str
    memory_reason: str | None
    shares_reason: str | None
    sizes: Mapping[str, int]
    created: str
    id: str
    roofline: Roofline
    explanation: Mapping[str, Any]
    quality: Mapping[str, Any]
    sensors: Sequence[Mapping[str, Any] | None] = ()
    warnings: tuple[str, ...] = field(default=())
    verdict: str = "stable"

    def to_json(self) -> dict[str, Any]:
        """Return the profile as JSON values; unknown values are null, with a reason."""
        return {
            "schema_version": PROFILE_VERSION,
            "kind": PROFILE_KIND,
            "id": self.id,
            "created": self.created,
            "verdict": self.verdict,
            "warnings": list(self.warnings),
            "artifact": dict(self.artifact),
            "workload": dict(self.workload),
            "env": dict(self.env),
            "metrics": {name: metric.to_json() for name, metric in self.metrics.items()},
            "memory": {
                "unit": "bytes",
                "method": self.memory_method,
                "reason": self.memory_reason,
                "shares_reason": self.shares_reason,
                "phases": [phase.to_json() for phase in self.phases],
                "timeline": self.explanation["timeline"],
            },
            "load": {"cold": self.explanation["cold_load"]},
            "sizes": {
                "unit": "bytes",
                "total": sum(self.sizes.values()),
                "weights": self.sizes.get("weights", 0),
                "classes": dict(self.sizes),
            },
            "roofline": self.roofline.to_json(),
            "experts": self.explanation["experts"],
            "breakdown": self.explanation["breakdown"],
            "quality": dict(self.quality),
            "sensors": list(self.sensors),
            "definitions": dict(DEFINITIONS),
        }


def make_id(seconds: float) -> str:
    """Make a name that no other measurement has; names sort by time.

    Its form is that of a ULID (github.com/ulid/spec): milliseconds and 80 random bits.

    Args:
        seconds: since 1970, UTC.

    >>> make_id(0.001)[:10], len(make_id(0.001))
    ('0000000001', 26)
    """
    number = int(seconds * 1000) << 80 | secrets.randbits(80)
    return "".join(_DIGITS[number >> shift & 31] for shift in range(125, -1, -5))


NOT_EXPLAINED = "it is measured in a process of its own, with --explain"


def make_explanation(reply: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return what `moe2edge.evaluation.profile.explain.explain_once` found, or why nothing.

    Args:
        reply: its reply; None: it did not run.
    """
    if reply is None:
        return {
            name: {"reason": NOT_EXPLAINED}
            for name in ("cold_load", "timeline", "experts", "breakdown")
        }
    cold = reply["cold_load"]
    return {
        "cold_load": {
            "ms": cold["seconds"] * 1000,
            "page_cache": cold["state"],
            "resident": cold["resident"],
            "major_faults": cold.get("major_faults"),
            "reason": None,
        },
        **{name: reply[name] for name in ("timeline", "experts", "breakdown")},
    }


@dataclass(frozen=True)
class Ratio:
    """Ratios of a quantity of one folder to that of the first, round by round.

    Attributes:
        samples: one ratio of each round.

    >>> Ratio((1.1, 1.3, 1.2)).median
    1.2
    """

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median over the rounds."""
        return statistics.median(self.samples)

    def to_json(self) -> dict[str, Any]:
        """Return median, ends and samples as JSON values."""
        return {
            "median": self.median,
            "min": min(self.samples),
            "max": max(self.samples),
            "samples": list(self.samples),
        }


@dataclass(frozen=True)
class ProfileSet:
    """Profiles of folders that were measured in turns.

    Attributes:
        labels: a name for each folder.
        profiles: the profile of each, in the same order.
        rounds: names in the order of running, of each round.
    """

    labels: tuple[str, ...]
    profiles: tuple[Profile, ...]
    rounds: tuple[tuple[str, ...], ...]

    def compute_ratios(self, number: int) -> dict[str, Ratio]:
        """Compute the ratios of a folder to the first one, by the name of the quantity.

        Args:
            number: place of the folder.
        """
        first, other = (list_by_round(self.profiles[n]) for n in (0, number))
        return {
            name: Ratio(tuple(b / a for a, b in zip(first[name], values, strict=True)))
            for name, values in other.items()
            if name in first and all(first[name])
        }

    def to_json(self) -> dict[str, Any]:
        """Return profiles, order and ratios as JSON values."""
        return {
            "schema_version": PROFILE_VERSION,
            "kind": SET_KIND,
            "created": self.profiles[0].created,
            "labels": list(self.labels),
            "rounds": [list(order) for order in self.rounds],
            "ratios": {
                label: {name: ratio.to_json() for name, ratio in self.compute_ratios(n).items()}
                for n, label in enumerate(self.labels)
            },
            "profiles": [profile.to_json() for profile in self.profiles],
        }


def list_by_round(profile: Profile) -> dict[str, list[float]]:
    """Return one number for each round of every quantity that has ratios."""
    rounds = profile.workload["processes"]
    found = {
        name: metric.median_by_process()
        for name, metric in profile.metrics.items()
        if metric.samples
    }
    for phase in profile.phases:
        peaks = [reading.peak_rss for reading in phase.samples]
        found[f"peak_rss_{phase.name}"] = [float(peak) for peak in peaks if peak is not None]
    total = profile.roofline.bytes_per_token
    found["bytes_per_token"] = [] if total is None else [float(total)] * rounds
    found["weights"] = [float(profile.sizes.get("weights", 0))] * rounds
    return {name: values for name, values in found.items() if len(values) == rounds}
