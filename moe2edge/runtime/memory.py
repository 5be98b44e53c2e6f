"""How much memory a walk may take, and hidden states that are on the disk beyond that."""

from __future__ import annotations

import contextlib
import ctypes
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
SOLVED_TOGETHER_BYTES = 256 << 20

# Blocks of at least so many bytes go back to the system when freed: see `avoid_fragmentation`.
LARGE = 4 << 20
# Of <malloc.h>.
M_MMAP_THRESHOLD = -3


def find_limit(most: int | None = None) -> int:
    """Bytes that this process may take: of the machine, its container, its limits and ``most``."""
    found = [psutil.virtual_memory().total, *_process_limits()]
    with contextlib.suppress(OSError, ValueError):  # "max" where there is no limit
        found.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(found if most is None else [*found, most])


def _process_limits() -> list[int]:
    """The soft limits of addresses that this process may take, in bytes (``ulimit -d``, ``-v``)."""
    import resource

    softs = (resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_DATA, resource.RLIMIT_AS))
    return [soft for soft in softs if soft != resource.RLIM_INFINITY]


def fits(needed: int, within: int | None) -> bool:
    """Whether ``needed`` bytes and Python with torch are no more than ``within``, or `find_limit`."""
    return needed + IMPORTED <= (find_limit() if within is None else within)


@dataclass(frozen=True)
class Memory:
    """A budget.

    Attributes:
        together: bytes for matrices that are solved at once; at least one group is.
        stream: bytes of one stream of hidden states that is kept in memory; None: no limit.
        folder: where larger ones go.
        limit: bytes for the whole process; None: see `find_limit`.
    """

    together: int = SOLVED_TOGETHER_BYTES
    stream: int | None = None
    folder: Path | None = None
    limit: int | None = None

    @classmethod
    def of(cls, within: int, folder: Path | None = None) -> Memory:
        """Shares of ``within`` bytes for the whole process."""
        free = max(0, within - IMPORTED)
        # One at a time, or as many as ever: how many are solved at once changes roundings. Up to
        # four streams are alive at once, and half is for a block's own matrices.
        return cls(
            SOLVED_TOGETHER_BYTES if free >= 4 * SOLVED_TOGETHER_BYTES else 0,
            free // 16,
            folder,
            within,
        )

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


@dataclass(frozen=True)
class Estimate:
    """Resources that a piece of work takes, from shapes alone.

    Attributes:
        memory: bytes of memory, without those of imported libraries; 0: hardly any.
        disk: bytes on the disk until the export ends.
        time: seconds; None: not known.
        gpu: bytes of memory of the GPU; 0: it is not used.
        purpose: the work, as the beginning of a sentence.
        remedy: how to need less.
    """

    memory: int = 0
    disk: int = 0
    time: float | None = None
    gpu: int = 0
    purpose: str = "verifying the output runs it"
    remedy: str = "export on a larger one"

    def check(self, within: int | None = None) -> None:
        """Refuse to begin what memory, or that of the GPU, could not hold.

        Args:
            within: bytes for the whole process; None: see `find_limit`.

        Raises:
            DoesNotFit: there is less.
        """
        if self.memory:
            check_memory(self.memory, self.purpose, self.remedy, within)
        if self.gpu:
            check_gpu(self.gpu, self.purpose, f"{self.remedy}; or set device: cpu")


def give_back() -> None:
    """Have the C library return freed memory to the system, where it is one that can (glibc).

    What stays lies between what was only needed on the way, and the holes count as used: after
    loading a model they were as large as it is, and they grow with every block that is solved.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def avoid_fragmentation(most: int | None) -> None:
    """Keep the addresses taken close to the memory used, where either is limited.

    The C library (glibc) raises the size from which a block is a mapping of its own up to 32 MiB as
    it sees such blocks freed. Matrices then lie on its heap between what stays, and every block of
    the model leaves holes: no memory after `give_back`, but addresses, which ``ulimit`` counts. A
    size that is set stays; asking the system for every matrix takes a tenth more time.

    Args:
        most: bytes that the whole process was told to take; None: not told.
    """
    if most is None and not _process_limits():
        return
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE)


def check_gpu(needed: int, purpose: str, remedy: str) -> None:
    """Refuse to begin what a GPU could not hold; arguments as of `check_memory`.

    Raises:
        DoesNotFit: it has less memory.
    """
    import torch

    there: int = torch.cuda.get_device_properties(torch.device("cuda")).total_memory
    if needed > there:
        raise DoesNotFit(
            f"{purpose}, which needs {needed / 1e9:.2f} GB of memory of the GPU; it has "
            f"{there / 1e9:.2f} GB: {remedy}"
        )


def check_memory(needed: int, purpose: str, remedy: str, within: int | None = None) -> None:
    """Refuse to begin what memory could not hold.

    Args:
        needed: bytes, without what is imported.
        purpose: what needs them.
        remedy: what to do.
        within: bytes for the whole process; None: see `find_limit`.

    Raises:
        DoesNotFit: there is less memory.
    """
    there = find_limit() if within is None else within
    if not fits(needed, there):
        raise DoesNotFit(
            f"{purpose}, which needs {(needed + IMPORTED) / 1e9:.2f} GB of memory; this machine "
            f"has {there / 1e9:.2f} GB, or allows so much: {remedy}"
        )
