"""Walks that change a model and are kept: each changed block outlives a kill, with its numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from moe2edge.calibration.observation import Resumable
from moe2edge.model.block import Block
from moe2edge.pipeline.work import Store

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.storage.kept_walk import KeptWalk


@dataclass
class KeptTransform(Resumable):
    """Transform of a walk that changes each block once, from what it has observed of it.

    A subclass computes the changed block, and says how a block gets the same shape again, so that a
    walk that is begun again takes the numbers that are there.

    Attributes:
        store: keeps numbers where the walk is not kept.
        kept: folder of the walk; None: the walk is not kept.
        changed, notes: for the report.
    """

    store: Store
    kept: KeptWalk | None
    changed: list[str] = field(default_factory=list, init=False)
    notes: list[str] = field(default_factory=list, init=False)
    _done: dict[int, dict[str, Any]] = field(default_factory=dict, init=False)

    def compute(self, block: Block) -> tuple[Block, Any] | None:
        """Return the block as changed, and plain data for `reshape`; None: it stays."""
        raise NotImplementedError

    def reshape(self, block: Block, shape: Any) -> Block:
        """Return the block in the shape that was computed for it, without its numbers."""
        raise NotImplementedError

    def put(self, block: Block, numbers: Mapping[str, Tensor]) -> Block:
        """Save numbers of a changed block by role; return the block with handles on them."""
        return (self.store if self.kept is None else self.kept).put(block, numbers)

    def change(self, block: Block) -> Block:
        """Return the block as changed, now or in an earlier run."""
        done = self._done.get(block.index)
        if done is not None:
            self.changed += done["changed"]
            self.notes += done["notes"]
            if done["shape"] is None or self.kept is None:
                return block
            return self.kept.reopen(self.reshape(block, done["shape"]))
        counts = len(self.changed), len(self.notes)
        found = self.compute(block)
        self._done[block.index] = {
            "changed": self.changed[counts[0] :],
            "notes": self.notes[counts[1] :],
            "shape": None if found is None else found[1],
        }
        return block if found is None else found[0]

    def save(self, block: Block) -> Any:
        """Return what was done to a block."""
        return self._done[block.index]

    def restore(self, block: Block, saved: Any) -> None:
        """Take what was done to a block."""
        self._done[block.index] = saved
