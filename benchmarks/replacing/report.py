"""Tables and plots of ``results.jsonl``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read(path: Path) -> list[dict[str, Any]]:
    """All lines that were written whole."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(rows: list[dict[str, Any]], folder: Path) -> None:
    """Nothing yet."""
