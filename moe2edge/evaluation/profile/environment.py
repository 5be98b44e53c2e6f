"""Describe the machine and the package versions of a measurement."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from moe2edge.evaluation.profile.sensors import CPUS
from moe2edge.runtime.control_groups import find_cpu_quota
from moe2edge.runtime.memory import list_cgroup_limits

PACKAGES = (
    "moe2edge",
    "torch",
    "transformers",
    "onnxruntime",
    "onnxruntime-gpu",
    "xllamacpp",
    "numpy",
)
# Version 1 of control groups says "no limit" with a number about this large.
_NO_LIMIT = 1 << 62


def describe_environment() -> dict[str, Any]:
    """Return the machine and the package versions; None for what is unknown."""
    import psutil

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    return {
        "host_fingerprint": compute_host_fingerprint(),
        "cpu": {
            "model": _read_cpu_model(),
            "cores": psutil.cpu_count(logical=False),
            "logical": psutil.cpu_count(),
            "usable": usable,
            "governor": _read_governor(),
        },
        "container": describe_limits(),
        "power_source": _find_power_source(),
        "ram_bytes": psutil.virtual_memory().total,
        "load_avg": psutil.getloadavg()[0],
        "os": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: _find_version(name) for name in PACKAGES},
    }


def describe_limits(root: Path = Path("/")) -> dict[str, Any]:
    """Return the limits of the control groups of this process; None: there is none.

    Args:
        root: as in `moe2edge.runtime.control_groups.list_control_groups`.
    """
    limits = [limit for limit in list_cgroup_limits(root) if limit < _NO_LIMIT]
    return {"cpu_quota": find_cpu_quota(root), "mem_limit": min(limits, default=None)}


def compute_host_fingerprint() -> str:
    """Compute a digest of the kind of machine: timings are compared only where it is equal.

    It is of processor, cores that may be used, memory in GiB, and system; of nothing that names
    one machine among others of its kind.
    """
    import psutil

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    memory = round(psutil.virtual_memory().total / 2**30)
    cpu = (_read_cpu_model(), psutil.cpu_count(logical=False), psutil.cpu_count(), usable)
    kind = [*cpu, memory, platform.machine(), platform.system()]
    return hashlib.sha256(json.dumps(kind).encode()).hexdigest()[:16]


def _read_cpu_model() -> str | None:
    """Return the name of the processor as the system reports it."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or None
    names = (
        value.strip()
        for key, _, value in (line.partition(":") for line in lines)
        if key.strip() == "model name"
    )
    return next(names, None) or platform.processor() or None


def _read_governor() -> str | None:
    """Return the name of what chooses the frequency of processors; several with a comma."""
    found = set()
    for path in CPUS.glob("cpu[0-9]*/cpufreq/scaling_governor"):
        with suppress(OSError):
            found.add(path.read_text().strip())
    return ", ".join(sorted(found)) or None


def _find_power_source() -> str | None:
    """Return ``mains`` or ``battery``; None where the system has no battery that it tells of."""
    import psutil

    read = getattr(psutil, "sensors_battery", None)  # some systems lack it
    battery = read() if read else None
    if battery is None or battery.power_plugged is None:
        return None
    return "mains" if battery.power_plugged else "battery"


def _find_version(package: str) -> str | None:
    """Return the version of a package; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
