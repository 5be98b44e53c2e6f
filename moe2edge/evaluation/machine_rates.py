"""Rates of a machine: what exports and runs of models are bound by, measured once and kept.

Measured rates are kept in the user's cache folder with a fingerprint of the machine, so that those
of another one, or of a container with other limits, are not used.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from importlib import metadata
from pathlib import Path

from moe2edge.evaluation.profile.bandwidth import measure_bandwidth
from moe2edge.evaluation.profile.environment import compute_host_fingerprint
from moe2edge.runtime.memory import find_limit
from moe2edge.storage.durable import write_file

RATES_FILE = "machine-rates.json"
RATES_VERSION = 2
# Sizes of what is timed, and the least time of each.
PRODUCT, SOLVED, SOLVED_ROWS, LEAST_SECONDS = 1024, 1024, 1024, 1.0
# Bytes that are written, fewer where that takes longer; and how many at once.
DISK_BYTES, DISK_SECONDS, DISK_SYNCED = 192 << 20, 8.0, 32 << 20


@dataclass(frozen=True)
class MachineRates:
    """Rates of a machine.

    Attributes:
        products: floating-point operations per second of matrix products in float32.
        narrow: the same in bfloat16.
        solve: the same of the rounding of columns with error feedback.
        disk: bytes per second that are written, synced and read back with a digest.
        bandwidth: bytes per second that threads read from memory.
        source: ``measured``, or ``default``: slower than most machines.
    """

    products: float
    narrow: float
    solve: float
    disk: float
    bandwidth: float
    source: str = "measured"


# Two cores of an older laptop with a slow disk.
DEFAULT_RATES = MachineRates(50e9, 50e9, 15e9, 150e6, 8e9, "default")


def find_rates() -> MachineRates:
    """Return the rates that were measured on this machine, or the default."""
    path = locate_rates()
    with suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads(path.read_text())
        if found["version"] == RATES_VERSION and found["fingerprint"] == fingerprint_host():
            own = {each.name: found["rates"][each.name] for each in fields(MachineRates)}
            rates = MachineRates(**own)
            if all(value > 0 for value in own.values() if not isinstance(value, str)):
                return rates
    return DEFAULT_RATES


def keep_rates(rates: MachineRates) -> Path:
    """Write rates into the user's cache folder; return the file.

    Raises:
        OSError: it cannot be written.
    """
    path = locate_rates()
    path.parent.mkdir(parents=True, exist_ok=True)
    data = {
        "version": RATES_VERSION,
        "fingerprint": fingerprint_host(),
        "rates": asdict(rates),
    }
    write_file(path, json.dumps(data, indent=2).encode() + b"\n")
    return path


def locate_rates() -> Path:
    """Return the file of the rates, which need not exist."""
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder) / "moe2edge" / RATES_FILE


def fingerprint_host() -> str:
    """Return a digest of what rates depend on: kind of machine, limit of memory, torch."""
    told = [compute_host_fingerprint(), find_limit() >> 30, metadata.version("torch")]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


def measure_rates(clock: Callable[[], float] = time.perf_counter) -> MachineRates:
    """Measure the rates of this machine, in under half a minute.

    Args:
        clock: returns the time in seconds.

    Raises:
        OSError: the working folder takes no file.
    """
    import torch

    draw = torch.Generator().manual_seed(0)
    a, b = (torch.randn(PRODUCT, PRODUCT, generator=draw) for _ in range(2))
    wide = _time(lambda: a @ b, clock)
    a, b = a.bfloat16(), b.bfloat16()
    narrow = _time(lambda: a @ b, clock)
    return MachineRates(
        2 * PRODUCT**3 / wide,
        2 * PRODUCT**3 / narrow,
        _measure_solve(clock),
        _measure_disk(clock),
        measure_bandwidth(clock=clock).bytes_per_s,
    )


def count_solve_operations(outs: int, ins: int) -> int:
    """Count the operations of solving a matrix: a factorization, and feedback to all columns."""
    return 2 * ins**3 // 3 + outs * ins**2


def _measure_solve(clock: Callable[[], float]) -> float:
    """Return operations per second of solving one matrix."""
    import torch

    from moe2edge.numerics import bfloat16, error_feedback
    from moe2edge.numerics.rounding import choose_grid
    from moe2edge.numerics.scheme import Scheme

    draw, scheme = torch.Generator().manual_seed(0), Scheme(4, 128)
    x = torch.randn(2 * SOLVED, SOLVED, generator=draw)
    hessian = torch.empty(1, SOLVED, SOLVED)
    error_feedback.sum_hessian(hessian[0], [(x, None)], weighted=False)
    weights = torch.randn(1, SOLVED_ROWS, SOLVED, generator=draw)
    order = torch.arange(SOLVED).expand(1, SOLVED)
    groups = order // scheme.group_size

    def solve() -> None:
        factors, _ = error_feedback.factorize(hessian.clone(), 0.01)
        grid = choose_grid(weights, scheme, "absmax", hessian.diagonal(dim1=1, dim2=2))
        if bfloat16.can_round(weights):
            upper = factors.lower.mT
            bfloat16.round_matrices(weights, grid, order, upper, factors.weight, sparse=False)
            return
        rounder = error_feedback.GridRounder(groups, grid, "absmax", None)
        error_feedback.round_columns(error_feedback.transpose(weights), factors, rounder)

    return count_solve_operations(SOLVED_ROWS, SOLVED) / _time(solve, clock)


def _measure_disk(clock: Callable[[], float]) -> float:
    """Return bytes per second of writing, syncing and hashing a file in the working folder."""
    data, written = os.urandom(1 << 20), 0
    begun = clock()
    with tempfile.NamedTemporaryFile(dir=Path.cwd(), prefix=".moe2edge-") as file:
        while written < DISK_BYTES and clock() < begun + DISK_SECONDS:
            written += file.write(data)
            if not written % DISK_SYNCED:
                file.flush()
                os.fsync(file.fileno())
        file.flush()
        os.fsync(file.fileno())
        file.seek(0)
        digest = hashlib.sha256()
        for piece in iter(lambda: file.read(1 << 20), b""):
            digest.update(piece)
    return written / (clock() - begun)


def _time(work: Callable[[], object], clock: Callable[[], float]) -> float:
    """Return the seconds of one run, the fastest of those in a second, behind a first one."""
    work()
    ends, best = clock() + LEAST_SECONDS, float("inf")
    while True:
        begun = clock()
        work()
        now = clock()
        best = min(best, now - begun)
        if now > ends:
            return best
