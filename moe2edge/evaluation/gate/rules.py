"""Rules of the gate: tolerances of metrics, read from a YAML file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from moe2edge.errors import InputError, suggest
from moe2edge.options import Options
from moe2edge.storage.text_files import read_bytes, read_yaml

DEFAULT_GATE = Path(__file__).with_name("gate.yaml")
LARGEST_GATE = 1 << 20

# Names that a rule may have.
SIZE_METRICS = ("folder", "weights", "bytes_per_token")
QUALITY = ("perplexity", "kl", "top1")
WATCHED_PHASES = ("load", "prefill", "decode")
# The whole process with its libraries, and what came on top of them.
PROCESS_MEMORY = tuple(f"{k}_{phase}" for k in ("peak_rss", "rss_anon") for phase in WATCHED_PHASES)
MEMORY = (*PROCESS_MEMORY, *(f"above_floor_{phase}" for phase in WATCHED_PHASES))
TIMINGS = ("load_ms", "ttft_ms", "ms_per_token")
METRICS = (*SIZE_METRICS, *MEMORY, *QUALITY, *TIMINGS)
# Those of which more is better.
HIGHER = ("top1",)


class MetricRule(Options):
    """Tolerance of one metric, and the consequence of a regression."""

    tolerance: Annotated[
        float, Field(ge=0, le=10, description="fraction by which it may get worse")
    ] = 0.0
    absolute: Annotated[
        float, Field(ge=0, description="difference up to which nothing counts, in its unit")
    ] = 0.0
    gate: Annotated[
        Literal["fail", "advice"],
        Field(description="fail: a regression ends with exit code 3; advice: it is only told"),
    ] = "fail"


class Gate(Options):
    """Rules of metrics; a metric without a rule is not compared.

    Attributes:
        metrics: rule of each metric, by its name in `METRICS`.
        pairs: pairs of runs in a round, where two folders are compared.
    """

    schema_version: Literal[1] = 1
    metrics: dict[str, MetricRule]
    pairs: Annotated[int, Field(ge=5, le=1000, description="pairs of runs in a round")] = 10


def read_gate(path: Path = DEFAULT_GATE) -> Gate:
    """Read a file of rules.

    Raises:
        InputError: it cannot be read, or a rule is wrong; names it.
    """
    try:
        text = read_bytes(path.expanduser(), LARGEST_GATE).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"gate {path} cannot be read: {str(error)[:100]}") from error
    data = read_yaml(text, str(path))
    if not isinstance(data, Mapping):
        raise InputError(
            f"{path} holds no rules; a gate is a mapping with metrics, see docs/compare.md"
        )
    named = data.get("metrics")
    for name in named if isinstance(named, Mapping) else ():
        if name not in METRICS:
            raise InputError(f"{path}: {suggest('metric', str(name), METRICS)}")
    try:
        return Gate.model_validate(dict(data))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise InputError(f"{path}: {place}: {first['msg']}") from error
