"""Results that a run has before its work folder is opened, for the next start of the same command.

They are found again by all that they depend on, so whoever asks for something else gets nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe2edge.storage.records import read_records, write_records

RESULTS = "results.jsonl"


@dataclass
class KeptResults:
    """Results of this run and of an earlier one.

    Attributes:
        folder: the work folder that an earlier run may have left; None: none is looked at.
        describe: returns what all results depend on.
    """

    folder: Path | None = None
    describe: Callable[[], Mapping[str, str]] = dict
    _found: dict[str, dict[str, Any]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        if self.folder is not None:
            records, _ = read_records(self.folder / RESULTS)
            self._found = {record["key"]: record for record in records}

    def get(self, name: str, basis: Mapping[str, object]) -> Any | None:
        """Return a result as plain data; None: there is none.

        Args:
            name: what it is.
            basis: what it depends on beside that.
        """
        record = self._found.get(self._make_key(name, basis))
        return None if record is None else record["result"]

    def put(self, name: str, basis: Mapping[str, object], result: Any) -> None:
        """Hold a result: plain data, as JSON has it."""
        key = self._make_key(name, basis)
        self._found[key] = {"key": key, "result": result}

    def save(self, folder: Path) -> None:
        """Write all results to a work folder."""
        write_records(folder / RESULTS, self._found.values())

    def _make_key(self, name: str, basis: Mapping[str, object]) -> str:
        parts = {**self.describe(), **basis}.items()
        text = "".join(f"{key}: {value}\n" for key, value in parts)
        return hashlib.sha256(f"{name}\n{text}".encode()).hexdigest()
