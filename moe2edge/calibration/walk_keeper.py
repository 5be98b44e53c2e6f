"""Walks that are kept block by block, and resume after a kill with the same bits."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from moe2edge.calibration.observation import Resumable
from moe2edge.model.block import Block
from moe2edge.model.model import Model

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from moe2edge.storage.kept_walk import KeptWalk

# Keeping a block that takes longer than so many seconds has to be at most so large a share of the
# time since the last one was kept: hidden states of large texts on slow disks.
LONG, SHARE = 0.2, 0.02


@dataclass
class WalkKeeper:
    """Keeps what was gathered in each block of a walk.

    Attributes:
        kept: the folder.
        visitors: all that observe the walk.
    """

    kept: KeptWalk
    visitors: Sequence[Resumable]
    _blocks: list[Block] = field(default_factory=list)
    _gathered: list[Any] = field(default_factory=list)
    _seconds: float = 0.0
    _ended: float = field(default_factory=time.perf_counter)

    def resume(self, blocks: Sequence[Block]) -> tuple[int, dict[str, Any]]:
        """Give visitors what they gathered in an earlier run.

        Args:
            blocks: those of the walk.

        Returns:
            The number of blocks that were kept, and the state behind them: see `keep`.
        """
        count = len(self.kept.origins)
        if not count:
            return 0, {}
        for block, saved in zip(blocks, self.kept.read_gathered(), strict=False):
            for visitor, own in zip(self.visitors, saved, strict=True):
                visitor.restore(block, own)
        state: dict[str, Any] = self.kept.read_passing()
        for visitor, own in zip(self.visitors, state.pop("visitors"), strict=True):
            visitor.take_up(own)
        return count, state

    def keep(self, block: Block, state: dict[str, Any], *, last: bool) -> None:
        """Keep a block that all visitors have observed.

        Args:
            block: the block, as it was observed.
            state: hidden states that the next block gets, or that the walk returns.
            last: it is the last one.
        """
        self._blocks.append(block)
        self._gathered.append([visitor.save(block) for visitor in self.visitors])
        begun = time.perf_counter()
        rare = self._seconds > LONG and self._seconds > SHARE * (begun - self._ended)
        if rare and not last:
            return
        carried = [None if last else visitor.carry() for visitor in self.visitors]
        origins = [[each.origin, *each.expert_origins] for each in self._blocks]
        self.kept.add(origins, self._gathered, {**state, "visitors": carried})
        self._blocks, self._gathered = [], []
        self._ended = time.perf_counter()
        self._seconds = self._ended - begun


def make_keeper(
    kept: KeptWalk | None,
    visitors: Sequence[object],
    models: Sequence[Model],
    tokens: Tensor,
    dtype: torch.dtype,
) -> WalkKeeper | None:
    """Make the keeper of a walk; None: it has no folder, or one of its visitors cannot resume.

    Args:
        kept: the folder.
        visitors: all that observe the walk.
        models: the models that are walked over.
        tokens: int64 [samples, length].
        dtype: of products.
    """
    known = [visitor for visitor in visitors if isinstance(visitor, Resumable)]
    if kept is None or len(known) < len(visitors):
        return None
    key = hashlib.sha256(tokens.contiguous().numpy().tobytes())
    for part in (tokens.shape, dtype, *models, *(type(visitor).__name__ for visitor in known)):
        key.update(f"{part}\n".encode())
    kept.begin(key.hexdigest())
    return WalkKeeper(kept, known)
