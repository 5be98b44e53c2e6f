"""Form of the JSON documents of a profile, which is published as a JSON Schema."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from moe2edge.errors import InputError
from moe2edge.evaluation.profile.result import PROFILE_KIND, PROFILE_VERSION

MEASURE_AGAIN = "measure it again: moe2edge profile FOLDER --json"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class MetricPart(_Part):
    """A measured quantity: summary and samples; null, with the reason, where there are none."""

    unit: str
    better: Literal["lower", "higher"]
    n: int
    median: float | None
    p50: float | None
    p90: float | None
    p95: float | None = None
    p99: float | None
    min: float | None
    max: float | None
    mean: float | None = None
    sd: float | None = None
    mad: float | None = None
    ci95: list[float] | None = None
    ci95_reason: str | None = None
    processes: int | None = None
    samples: list[float]
    reason: str | None


class AboveFloorPart(_Part):
    """Bytes above those of the same process without a model."""

    peak_rss: int | None
    rss_anon: int | None
    rss_file: int | None


class PhasePart(_Part):
    """Memory of one phase, in bytes; ``major_faults`` is a count."""

    phase: str
    peak_rss: int | None
    rss: int | None
    rss_anon: int | None
    rss_file: int | None
    pss: int | None = None
    private_dirty: int | None = None
    major_faults: int | None = None
    peak_rss_samples: list[int | None]
    above_floor: AboveFloorPart


class TimelineSamplePart(_Part):
    """Resident memory at one time."""

    t_s: float
    phase: str
    rss: int
    rss_anon: int
    rss_file: int


class TimelinePart(_Part):
    """Resident memory over time."""

    reason: str | None
    method: str | None = None
    interval_s: float | None = None
    samples: list[TimelineSamplePart] = []


class MemoryPart(_Part):
    """Memory by phase and over time."""

    unit: Literal["bytes"]
    method: str
    reason: str | None
    shares_reason: str | None = None
    phases: list[PhasePart]
    timeline: TimelinePart


class ColdLoadPart(_Part):
    """Load of files that were dropped from the cache of the system."""

    reason: str | None
    ms: float | None = None
    page_cache: Literal["evicted", "partly", "unknown"] | None = None
    resident: float | None = None
    major_faults: int | None = None


class LoadPart(_Part):
    """Loads; warm ones are the metric ``load_ms``."""

    cold: ColdLoadPart


class SizesPart(_Part):
    """Bytes on the disk."""

    unit: Literal["bytes"]
    total: int
    weights: int
    classes: dict[str, int]


class TokenBytesPart(_Part):
    """Bytes that one token reads."""

    unit: Literal["bytes"]
    total: int | None
    kinds: dict[str, int | None] | None
    context: int


class BandwidthPart(_Part):
    """Rate at which memory is read."""

    unit: Literal["bytes/s"]
    median: float | None
    samples: list[float]
    threads: int | None
    array_bytes: int | None


class RooflinePart(_Part):
    """The bound by memory."""

    bytes_per_token: TokenBytesPart
    bandwidth: BandwidthPart
    achieved_bytes_s: float | None
    ceiling_tok_s: float | None
    reached_pct: float | None
    reason: str | None


class LayerUsePart(_Part):
    """Use of the experts of one layer."""

    block: int
    experts: int
    hit: int
    max_over_mean: float
    coefficient_of_variation: float
    router_entropy: float | None = None
    load_entropy: float | None = None
    counts: list[int]
    hit_per_token: float | None = None
    new_per_token: float | None = None
    last_tokens: list[list[int]] = []


class ExpertsPart(_Part):
    """Use of experts by one text."""

    reason: str | None
    tokens: int | None = None
    coverage_pct: float | None = None
    load_imbalance: float | None = None
    router_entropy: float | None = None
    load_entropy: float | None = None
    layers: list[LayerUsePart] = []


class OperatorPart(_Part):
    """Time of one operator."""

    op: str
    calls: int
    ms: float


class CallPart(_Part):
    """One call of an operator."""

    op: str
    kind: str
    layer: int | None
    begin_ms: float
    ms: float


class LayerTimePart(_Part):
    """Time of one block."""

    layer: int
    ms: float


class PhaseTimesPart(_Part):
    """Times of one phase by kind, operator and layer."""

    phase: Literal["prefill", "decode"]
    tokens: int
    ms: float
    by_kind: dict[str, float]
    by_operator: list[OperatorPart]
    by_layer: list[LayerTimePart]
    last_token: list[CallPart]


class FallbackPart(_Part):
    """A node that ran on another provider than the first that was asked for."""

    node: str
    op: str
    wanted_ep: str
    got_ep: str
    pct: float


class BreakdownPart(_Part):
    """Times of operators."""

    reason: str | None
    phases: list[PhaseTimesPart] = []
    fallback_nodes: list[FallbackPart] | None = None
    fallback_reason: str | None = None


class QualityPart(_Part):
    """Quality of an output on a text, taken over from its report or measured."""

    reason: str | None
    origin: Literal["report", "measured"] | None = None
    text: str | None = None
    sha256: str | None = None
    tokens: int | None = None
    perplexity: float | None = None
    kl: float | None = None
    top1: float | None = None
    perplexity_error: float | None = None
    kl_error: float | None = None
    top1_error: float | None = None
    error_reason: str | None = None
    kl_reason: str | None = None


class SensorsPart(_Part):
    """Readings of one process, at begin and end."""

    mhz: list[float | None]
    mhz_reason: str | None
    celsius: list[float | None]
    celsius_reason: str | None
    throttled: int | None
    energy_of: list[str] = []


class ProfileDocument(_Part):
    """A profile of one folder; definitions of all names are in the document itself."""

    ok: Literal[True] = True
    schema_version: Literal[2]
    kind: Literal["moe2edge.profile"]
    id: str | None = None
    created: str
    verdict: Literal["stable", "noisy", "throttled", "invalid"] | None = None
    warnings: list[str]
    artifact: dict[str, Any]
    workload: dict[str, Any]
    env: dict[str, Any]
    metrics: dict[str, MetricPart]
    memory: MemoryPart
    load: LoadPart
    sizes: SizesPart
    roofline: RooflinePart
    experts: ExpertsPart
    breakdown: BreakdownPart
    quality: QualityPart
    sensors: list[SensorsPart | None]
    definitions: dict[str, str]


class RatioPart(_Part):
    """Ratio to the first folder, round by round."""

    median: float
    min: float
    max: float
    samples: list[float]


class ProfileSetDocument(_Part):
    """Profiles of folders that were measured in turns."""

    ok: Literal[True] = True
    schema_version: Literal[2]
    kind: Literal["moe2edge.profiles"]
    created: str
    labels: list[str]
    rounds: list[list[str]]
    ratios: dict[str, dict[str, RatioPart]]
    profiles: list[ProfileDocument]


_DOCUMENT: TypeAdapter[ProfileDocument | ProfileSetDocument] = TypeAdapter(
    ProfileDocument | ProfileSetDocument
)


def build_profile_schema() -> dict[str, Any]:
    """Build the JSON Schema of both documents."""
    schema = _DOCUMENT.json_schema()
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "moe2edge profile",
        **schema,
    }


def parse_profile(document: Any, name: str) -> ProfileDocument:
    """Check a document of one folder.

    Args:
        document: JSON values.
        name: of the file, for messages.

    Raises:
        InputError: it is no profile, of another version, or does not fit the schema.
    """
    if not isinstance(document, Mapping) or document.get("kind") != PROFILE_KIND:
        raise InputError(f"{name} is not the profile of one folder; {MEASURE_AGAIN}")
    if (version := document.get("schema_version")) != PROFILE_VERSION:
        raise InputError(
            f"{name} has schema_version {version!r}, this moe2edge reads {PROFILE_VERSION}; "
            f"{MEASURE_AGAIN}"
        )
    try:
        # Through text, in which whole numbers are floats too.
        return ProfileDocument.model_validate_json(json.dumps(document))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise InputError(f"{name} is damaged: {place}: {first['msg']}; {MEASURE_AGAIN}") from error
