"""How much memory a walk may take, and hidden states that are on the disk beyond that."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from moe2edge.errors import DoesNotFit

if TYPE_CHECKING:
    from torch import Tensor

# What Python with torch and transformers takes before any work, measured.
IMPORTED = 600 << 20
TOGETHER = 256 << 20


@dataclass(frozen=True)
class Memory:
    """A budget.

    Attributes:
        together: bytes for matrices that are solved at once.
        stream: bytes of one stream of hidden states that is kept in memory; None: no limit.
        folder: where larger ones go.
    """

    together: int = TOGETHER
    stream: int | None = None
    folder: Path | None = None

    @classmethod
    def of(cls, most: int | None, folder: Path) -> Memory:
        """Shares of ``most`` bytes for the whole process; None: of what the machine has."""
        if most is None:
            return cls(TOGETHER, psutil.virtual_memory().total // 8, folder)
        free = max(0, most - IMPORTED)
        # Up to four streams are alive at once, and half is for a block's own matrices.
        return cls(min(TOGETHER, free // 4), free // 16, folder)

    def empty(self, shape: tuple[int, ...]) -> Tensor:
        """A stream of hidden states, float32, without numbers.

        Beyond the budget it is a map of a file that has no name and is gone with the stream.
        """
        import numpy as np
        import torch

        count = 1
        for size in shape:
            count *= size
        if self.stream is None or 4 * count <= self.stream:
            return torch.empty(shape)
        handle, name = tempfile.mkstemp(prefix="stream-", dir=self.folder)
        try:
            os.truncate(handle, 4 * count)
            return torch.from_numpy(np.memmap(name, np.float32, "r+", shape=shape))
        finally:
            os.close(handle)
            os.unlink(name)


# In memory, whatever its size.
UNLIMITED = Memory()


def check(most: int | None, needed: int, what: str) -> None:
    """Refuse a limit that is too small for the work.

    Args:
        most: bytes for the whole process; None: no limit.
        needed: bytes that the largest unit of work takes, without what is imported.
        what: that unit.

    Raises:
        DoesNotFit: it is.
    """
    if most is not None and most < needed + IMPORTED:
        raise DoesNotFit(
            f"--max-memory {most / 1e9:.2f} GB: {what} takes {needed / 1e9:.2f} GB, and Python "
            f"with torch {IMPORTED / 1e9:.2f} GB; allow at least {(needed + IMPORTED) / 1e9:.2f} GB"
        )
