"""Drop files from the system's cache, so that the next load is a cold one, and bring them in."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

# Part of the bytes that may stay in the cache where a load counts as cold.
_MOST_LEFT = 0.02
_PART = 1 << 24


@dataclass(frozen=True)
class Eviction:
    """Outcome of dropping files from the cache.

    Attributes:
        state: ``evicted``, ``partly`` (another process has them mapped, or they are not yet on the
            disk), or ``unknown`` where the system does not say.
        resident: part of the bytes that stayed in the cache; None: not known.
    """

    state: str
    resident: float | None


def evict_files(paths: Iterable[Path]) -> Eviction:
    """Ask the system to drop files from its cache; needs no rights beyond reading them."""
    paths = list(paths)
    if not hasattr(os, "posix_fadvise"):
        return Eviction("unknown", None)
    for path in paths:
        with suppress(OSError):
            file = os.open(path, os.O_RDONLY)
            try:
                os.fsync(file)  # what is not yet on the disk stays
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(file)
    total = sum(path.stat().st_size for path in paths)
    counts = [count_resident_bytes(path) for path in paths]
    known = [count for count in counts if count is not None]
    if len(known) != len(counts) or not total:
        return Eviction("unknown", None)
    resident = sum(known) / total
    return Eviction("evicted" if resident <= _MOST_LEFT else "partly", resident)


def warm_files(paths: Iterable[Path]) -> None:
    """Read files that are not in the system's cache, so that the next load is a warm one.

    Files that memory does not hold together are left, since the last would drop the first.
    """
    import psutil

    paths = list(paths)
    if sum(path.stat().st_size for path in paths) > psutil.virtual_memory().available:
        return
    for path in paths:
        if count_resident_bytes(path) != path.stat().st_size:
            with suppress(OSError), path.open("rb") as file:
                while file.read(_PART):
                    pass


def count_resident_bytes(path: Path) -> int | None:
    """Count the bytes of a file that are in the system's cache; None if it does not say."""
    size = path.stat().st_size
    if not size:
        return 0
    if not sys.platform.startswith("linux"):
        return None
    page = mmap.PAGESIZE
    states = (ctypes.c_ubyte * (-(-size // page)))()
    try:
        library = ctypes.CDLL(None, use_errno=True)
        with (
            path.open("rb") as file,
            mmap.mmap(
                file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE
            ) as mapped,
        ):
            anchor = ctypes.c_char.from_buffer(mapped)
            address = ctypes.c_void_p(ctypes.addressof(anchor))
            code = library.mincore(address, ctypes.c_size_t(size), states)
            del anchor
    except (OSError, AttributeError, ValueError):
        return None
    return None if code else min(size, page * sum(state & 1 for state in states))
