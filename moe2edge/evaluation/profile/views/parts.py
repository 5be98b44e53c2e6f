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
