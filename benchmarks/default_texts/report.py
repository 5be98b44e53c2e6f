"""The report of the study: tables of perplexity by text, domain and seed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks._study import Row

TEXTS = ("own", "builtin-old", "builtin", "self", "self-plain", "self-1.0")
METHODS = ("reap", "search")


def write(rows: Sequence[Row], path: Path) -> None:
    """Write the report."""
