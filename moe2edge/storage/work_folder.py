"""Folder of computed numbers, which outlive a killed export until a target packs them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from moe2edge.model.model import Block
from moe2edge.model.weights import Weight
from moe2edge.storage.journal import FileBlockJournal, Journal
from moe2edge.storage.solved_blocks import open_handles, save

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.numerics.grid import Quantized

# Prefix of the names of folders of passes.
SCRATCH = "pass-"


@dataclass
class WorkFolder:
    """Folder where an export keeps computed numbers until a target packs them."""

    folder: Path
    journal: Journal = field(init=False)
    _count: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.journal = Journal(self.folder)

    def ledger(self, step: int) -> FileBlockJournal:
        """Return the journal of the pass at position ``step``."""
        return FileBlockJournal(self.journal, step)

    def scratch(self, step: int, name: str) -> Path:
        """Return a folder for the pass ``name`` at position ``step``; its files outlive a kill."""
        folder = self.folder / f"{SCRATCH}{step}-{name}"
        folder.mkdir(exist_ok=True)
        return folder

    @property
    def kept(self) -> str:
        """Description of the work that can be resumed; empty if there is none."""
        parts = [f"{count} finished blocks"] if (count := len(self.journal.units)) else []
        for folder in sorted(self.folder.glob(f"{SCRATCH}*")):
            # A file that does not have its final name yet is incomplete.
            if any(path.suffix != ".tmp" for path in folder.iterdir()):
                parts.append(f"the saved work of {folder.name.rpartition('-')[2]}")
        return " and ".join(parts)

    def put(self, block: Block, numbers: Mapping[str, Quantized | Tensor]) -> Block:
        """Save numbers of a block by role; a pass computes them again if the export is resumed.

        A tensor that is not quantized takes the dtype of the one that it replaces.
        """
        path = self.folder / f"put-{self._count:05}.safetensors"
        self._count += 1
        weights = dict(block.weights())
        return block.with_weights(open_handles(weights, path, *save(path, weights, numbers)))

    def put_rest(
        self, rest: Mapping[str, Weight], numbers: Mapping[str, Tensor]
    ) -> dict[str, Weight]:
        """Save numbers of tensors outside of blocks by name.

        Return all of the tensors, those that were saved with new handles.
        """
        path = self.folder / f"put-{self._count:05}.safetensors"
        self._count += 1
        return {**rest, **open_handles(rest, path, *save(path, rest, numbers))}
