"""Documents of one folder and of several, read alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Document = Mapping[str, Any]


def list_profiles(document: Document) -> list[tuple[str, Document]]:
    """Return the profile of each folder in a document, with its name."""
    if "profiles" not in document:
        return [(document["artifact"]["path"], document)]
    return list(zip(document["labels"], document["profiles"], strict=True))


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
