"""Files that passes keep on the disk while an export runs, and estimates of their size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import (
    TYPE_CHECKING,
    Protocol,
)

from moe2edge.model.block import Block
from moe2edge.model.kinds import sum_weights
from moe2edge.model.model import Model
from moe2edge.model.weights import Weight
from moe2edge.storage.journal import BlockResult
from moe2edge.storage.solved_blocks import estimate_saved_bytes

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from moe2edge.numerics.grid import Quantized
    from moe2edge.storage.kept_walk import KeptWalk


# Roles of experts, of what replaces them, and of the expert that may be left of a layer.
EXPERT_ROLES = ("experts.", "members.", "substitutes.", "dense.")


def estimate_new_bytes(before: Model, after: Model) -> int:
    """Count the bytes of numbers that a pass keeps on the disk.

    What was there before is read where it was.
    """
    return sum_weights((weight for _, weight in after.new_beside(before)), estimate_saved_bytes)


def estimate_most_new_bytes(before: Model, after: Model) -> int:
    """Count the bytes of numbers that a pass keeps at most.

    If experts are new, it is not known which of which layers will be: all of them may.
    """
    if any(role.startswith("experts.") for role, _ in after.new_beside(before)):
        experts = [w for _, role, w in after.tensors() if role.startswith(EXPERT_ROLES)]
        return sum_weights(experts, estimate_saved_bytes)
    return estimate_new_bytes(before, after)


class Store(Protocol):
    """A place for computed numbers: the work folder of an export."""

    def put(self, block: Block, numbers: Mapping[str, Quantized | Tensor]) -> Block:
        """Save the numbers of a block by role; return the block with handles on them."""
        ...

    def put_rest(
        self, rest: Mapping[str, Weight], numbers: Mapping[str, Quantized | Tensor]
    ) -> dict[str, Weight]:
        """Save numbers of tensors outside of blocks by name; all of them, with new handles."""
        ...


class BlockJournal(Protocol):
    """The finished blocks of one slimming pass, kept so that a killed run can be resumed."""

    def restore(self, block: Block) -> tuple[Block, BlockResult] | None:
        """Return a block as it was solved before, with its report; None if it was not."""
        ...

    def stream(self) -> Tensor | None:
        """Return the hidden states after the last block that was restored, float32."""
        ...

    def finish(
        self,
        block: Block,
        numbers: Mapping[str, Quantized | Tensor],
        done: BlockResult,
        hidden: Tensor | None,
    ) -> Block:
        """Save a solved block and the hidden states after it; return it with handles."""
        ...


class Work(Store, Protocol):
    """The work folder of an export."""

    def ledger(self, step: int) -> BlockJournal:
        """Return the finished blocks of the pass at position ``step``."""
        ...

    def kept_walk(self, step: int, name: str) -> KeptWalk | None:
        """Return the folder of a walk of the pass at position ``step``, by a name for it."""
        ...

    def scratch(self, step: int, name: str) -> Path:
        """Make a folder for the pass ``name`` at position ``step``: see `PassContext`."""
        ...
