"""Documents of one folder and of several, read alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe2edge.evaluation.profile.views.charts import format_value

Document = Mapping[str, Any]


def list_profiles(document: Document) -> list[tuple[str, Document]]:
    """Return the profile of each folder in a document, with its name."""
    if "profiles" not in document:
        return [(document["artifact"]["path"], document)]
    return list(zip(document["labels"], document["profiles"], strict=True))


def format_interval(metric: Document) -> str:
    """Return the interval of a median as text; a dash where there is none.

    >>> format_interval({"ci95": [1.25, 1310.0]})
    '1.25 to 1,310'
    """
    ends = metric.get("ci95")
    return "-" if ends is None else " to ".join(map(format_value, ends))


def format_quality(quality: Document, name: str) -> str:
    """Return a figure of quality as text, with its standard error if it has one.

    >>> format_quality({"kl": 0.01234, "kl_error": 0.0005}, "kl")
    '0.01234 ± 0.0005'
    """
    value, error = quality[name], quality.get(f"{name}_error")
    if value is None:
        return "-"
    shown = f"{value:.4g}"
    return shown if error is None else f"{shown} ± {error:.2g}"
