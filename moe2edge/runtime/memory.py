"""Memory limits and checks, and hidden states that go to the disk beyond a limit."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from moe2edge.errors import DoesNotFit, InputError
from moe2edge.runtime.control_groups import list_control_groups

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Memory of Python with torch and transformers before any work, measured.
IMPORTED = 600 << 20
# Addresses of the same, which ``ulimit -v`` counts: libraries are mapped, and every thread has a
# stack and a heap of its own.
IMPORTED_ADDRESSES = 1100 << 20
THREAD_ADDRESSES = 80 << 20
# Bytes of the matrices that are solved at the same time.
SOLVED_TOGETHER_BYTES = 256 << 20

# Allocations of at least this size return to the system when freed: see `avoid_fragmentation`.
LARGE = 4 << 20
# Parameter of mallopt, from <malloc.h>.
M_MMAP_THRESHOLD = -3


def find_limit(most: int | None = None) -> int:
    """Return the bytes that this process may take.

    This is the smallest of the memory of the machine, the limits of its container or of a systemd
    scope (cgroups), the limits of the process (``ulimit -d``, ``-v``) and ``most``.
    """
    limits = [psutil.virtual_memory().total, *_list_process_limits(), *list_cgroup_limits()]
    return min(limits if most is None else [*limits, most])


def list_cgroup_limits(root: Path = Path("/")) -> list[int]:
    """List the limits of memory of the control groups of this process, in bytes.

    Args:
        root: as in `moe2edge.runtime.control_groups.list_control_groups`.
    """
    limits = []
    for group in list_control_groups("memory", root):
        for name in ("memory.max", "memory.limit_in_bytes"):  # of version 2, and of version 1
            with contextlib.suppress(OSError, ValueError):  # "max" if there is no limit
                limits.append(int((group / name).read_text()))
    return limits


def _list_process_limits() -> list[int]:
    """List the soft limits of this process (``ulimit -d``, ``-v``), in bytes of memory.

    What imported libraries take of addresses beyond their memory is subtracted.
    """
    import resource

    found = []
    for kind, beyond in ((resource.RLIMIT_DATA, 0), (resource.RLIMIT_AS, _count_extra_addresses())):
        soft = resource.getrlimit(kind)[0]
        if soft != resource.RLIM_INFINITY:
            found.append(max(0, soft - beyond))
    return found


def _count_extra_addresses() -> int:
    """Return the bytes of addresses that imported libraries and threads take beyond their memory.

    By default torch runs one thread per core; OMP_NUM_THREADS sets another number.
    """
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    threads = int(wanted) if wanted.isdigit() else os.cpu_count() or 1
    return IMPORTED_ADDRESSES - IMPORTED + threads * THREAD_ADDRESSES


def check_imports_fit() -> None:
    """Refuse a limit in which not even the libraries can be loaded; call it before they are.

    Raises:
        DoesNotFit: the limit is too small.
    """
    check_memory(0, "loading Python with torch", "raise the limit, such as that of ulimit -v")


def fits(needed: int, within: int | None) -> bool:
    """Return whether ``needed`` bytes, and Python with torch, fit in ``within`` bytes.

    ``within`` None stands for `find_limit`.
    """
    return needed + IMPORTED <= (find_limit() if within is None else within)


@dataclass(frozen=True)
class Memory:
    """A memory budget.

    Attributes:
        group_bytes: bytes of the matrices that are solved at once; at least one group always is.
        hidden_bytes: bytes of one set of hidden states that stays in memory; None: no limit.
        folder: folder for larger hidden states; None: that of `tempfile`.
        limit: bytes for the whole process; None: see `find_limit`.
    """

    group_bytes: int = SOLVED_TOGETHER_BYTES
    hidden_bytes: int | None = None
    folder: Path | None = None
    limit: int | None = None

    @classmethod
    def from_limit(cls, within: int, folder: Path | None = None) -> Memory:
        """Divide ``within`` bytes for the whole process into shares."""
        free = max(0, within - IMPORTED)
        # Either one group at a time or the usual number, nothing in between, because the number
        # of groups that are solved at once changes roundings. Up to four sets of hidden states
        # exist at once, and half of the memory is for the matrices of a block.
        return cls(
            SOLVED_TOGETHER_BYTES if free >= 4 * SOLVED_TOGETHER_BYTES else 0,
            free // 16,
            folder,
            within,
        )

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        """Return an uninitialized tensor for hidden states, float32 if no other dtype is asked for.

        Beyond the budget, the tensor is mapped from an unnamed file on the disk, which disappears
        with the tensor.
        """
        import numpy as np
        import torch

        dtype = dtype or torch.float32
        size = math.prod(shape) * dtype.itemsize
        if self.hidden_bytes is None or size <= self.hidden_bytes:
            return torch.empty(shape, dtype=dtype)
        handle, name = tempfile.mkstemp(prefix="stream-", dir=self.folder)
        try:
            os.truncate(handle, size)
            mapped = np.memmap(name, np.uint8, "r+", shape=(size,))
            return torch.from_numpy(mapped).view(dtype).view(shape)
        finally:
            os.close(handle)
            os.unlink(name)


# Hidden states of any size stay in memory.
UNLIMITED = Memory()


@dataclass(frozen=True)
class Estimate:
    """Resources that a piece of work takes, from shapes alone.

    Attributes:
        memory: bytes of memory, without those of imported libraries; 0: hardly any.
        disk: bytes on the disk until the export ends.
        time: seconds; None: not known.
        gpu: bytes of memory of the GPU; 0: it is not used.
        runs: tokens that are run through the model; a gradient counts as two more runs.
        purpose: the work, as the beginning of a sentence.
        remedy: how to need less.
    """

    memory: int = 0
    disk: int = 0
    time: float | None = None
    gpu: int = 0
    runs: int = 0
    purpose: str = "verifying the output runs it"
    remedy: str = "export on a larger machine"

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
    """Let the C library return freed memory to the system, if it can (glibc).

    Memory that is still in use lies between memory that was freed, and the holes count as used:
    after a model was loaded they were as large as the model, and they grow with every block that
    is solved.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def avoid_fragmentation(most: int | None) -> None:
    """Keep the address space close to the memory in use, if either is limited.

    The C library (glibc) allocates large blocks as separate mappings. When such blocks are freed,
    it raises the size from which it does so, up to 32 MiB. Matrices then lie on the heap between
    data that stays, and every block of the model leaves holes. After `give_back` the holes take no
    memory, but they take addresses, which ``ulimit`` counts. A size that is set explicitly does
    not change. The cost: a system call for every matrix takes a tenth more time.

    Args:
        most: limit that the user set for the whole process, in bytes; None: no limit.
    """
    if most is None and not _list_process_limits():
        return
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE)


def choose_device(option: str, name: str) -> torch.device:
    """Return the device that an option ``auto``, ``cpu`` or ``cuda`` of a pass means.

    Args:
        option: its value; auto: the GPU where there is one.
        name: name of the pass, for the message.

    Raises:
        InputError: ``cuda``, and there is no GPU.
    """
    import torch

    has_gpu = torch.cuda.is_available()
    if option == "cuda" and not has_gpu:
        raise InputError(f"{name}.device is cuda, and torch finds no GPU; leave it out")
    return torch.device("cuda" if has_gpu and option != "cpu" else "cpu")


def check_gpu(needed: int, purpose: str, remedy: str) -> None:
    """Check that the GPU has enough memory; arguments as in `check_memory`.

    Raises:
        DoesNotFit: it has less.
    """
    import torch

    total: int = torch.cuda.get_device_properties(torch.device("cuda")).total_memory
    if needed > total:
        raise DoesNotFit(
            f"{purpose}, which needs {needed / 1e9:.2f} GB of GPU memory; the GPU has "
            f"{total / 1e9:.2f} GB: {remedy}"
        )


def check_memory(needed: int, purpose: str, remedy: str, within: int | None = None) -> None:
    """Check that there is enough memory, before work that could not finish.

    Args:
        needed: bytes, without those of the imported libraries.
        purpose: clause that says what needs the memory, for the message.
        remedy: what the user can do.
        within: bytes for the whole process; None: see `find_limit`.

    Raises:
        DoesNotFit: there is less.
    """
    available = find_limit() if within is None else within
    if not fits(needed, available):
        raise DoesNotFit(
            f"{purpose}, which needs {(needed + IMPORTED) / 1e9:.2f} GB of memory; only "
            f"{available / 1e9:.2f} GB are available (machine, container or limit): {remedy}"
        )
