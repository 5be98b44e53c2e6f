"""Tiny random checkpoints that tests share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moe2edge.testing import Make, make_checkpoint, make_tokenizer


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Folder of a tiny checkpoint with a tokenizer; equal requests share it. Do not write there."""
    made: dict[str, Path] = {}

    def make(family: str, **changes: Any) -> Path:
        key = f"{family} {sorted(changes.items())}"
        if key not in made:
            made[key] = make_checkpoint(tmp_path_factory.mktemp(family), family, **changes)
            make_tokenizer(made[key])
        return made[key]

    return make
