"""Describe the machine and the package versions of a measurement."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "moe2edge",
    "torch",
    "transformers",
    "onnxruntime",
    "onnxruntime-gpu",
    "xllamacpp",
    "numpy",
)


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
        },
        "ram_bytes": psutil.virtual_memory().total,
        "load_avg": psutil.getloadavg()[0],
        "os": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: _find_version(name) for name in PACKAGES},
    }


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


def _find_version(package: str) -> str | None:
    """Return the version of a package; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
