"""Measure how fast processor threads read memory: the bound of decoding."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
# Bytes that are read at least and at most; the former where the size of the caches is not known.
_LEAST, _MOST = 256 << 20, 1 << 30
# Parts of what memory is available, and multiples of the largest cache, that are read.
_PART_OF_MEMORY, _CACHES = 4, 4
_RUNS = 7


@dataclass(frozen=True)
class Bandwidth:
    """Rate at which threads read an array that no cache holds.

    Attributes:
        bytes_per_s: median over the runs.
        samples: bytes per second of each run.
        threads: threads that read.
        array_bytes: size of the array.
    """

    bytes_per_s: float
    samples: tuple[float, ...]
    threads: int
    array_bytes: int

    def to_json(self) -> dict[str, Any]:
        """Return the measurement as JSON values."""
        return asdict(self) | {"samples": list(self.samples)}


def measure_bandwidth(
    threads: int | None = None, *, clock: Callable[[], float] = time.perf_counter
) -> Bandwidth:
    """Measure the read bandwidth of memory, in under two seconds on most machines.

    Args:
        threads: threads that read; None: as many as torch uses.
        clock: returns the time in seconds.
    """
    import torch

    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        size = choose_array_bytes(find_cache_bytes(), _read_available())
        # Written, so that every page is a page of memory of its own; and the largest of integers,
        # because that takes less arithmetic than a sum of floats.
        array = torch.arange(size // 4, dtype=torch.int32)
        array.max()
        rates = []
        for _ in range(_RUNS):
            begin = clock()
            array.max()
            rates.append(array.nbytes / (clock() - begin))
        return Bandwidth(
            statistics.median(rates), tuple(rates), torch.get_num_threads(), array.nbytes
        )
    finally:
        torch.set_num_threads(before)


def choose_array_bytes(cache: int | None, available: int) -> int:
    """Choose the size of an array that is much larger than the caches and fits in memory.

    Args:
        cache: bytes of the largest cache; None: not known.
        available: bytes of memory that are free.

    >>> choose_array_bytes(32 << 20, 8 << 30) >> 20, choose_array_bytes(None, 400 << 20) >> 20
    (256, 100)
    """
    wanted = min(max(_LEAST, _CACHES * (cache or 0)), _MOST)
    return max(min(wanted, available // _PART_OF_MEMORY), 1 << 20) // 4096 * 4096


def find_cache_bytes() -> int | None:
    """Return the bytes of the largest cache of a processor; None if the system does not say."""
    found = []
    for place in CACHES.glob("index*/size"):
        with suppress(OSError, ValueError, KeyError):
            text = place.read_text().strip()
            unit = {"K": 10, "M": 20, "G": 30}.get(text[-1:].upper(), 0)
            found.append(int(text.rstrip("KMGkmg")) << unit)
    return max(found, default=None)


def _read_available() -> int:
    import psutil

    return int(psutil.virtual_memory().available)
