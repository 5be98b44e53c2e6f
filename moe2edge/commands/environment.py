"""Versions and peak memory, for the report."""

from __future__ import annotations

import contextlib
import importlib.metadata
import resource
import sys
from pathlib import Path

# Packages whose versions numbers depend on.
NUMERIC_PACKAGES = ("moe2edge", "torch", "transformers", "peft", "numpy", "scipy")


def measure_peak_bytes() -> int:
    """Return the peak resident set of this process, in bytes."""
    with contextlib.suppress(OSError, StopIteration):
        # The maximum of getrusage includes the process that started this one.
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def list_versions() -> dict[str, str]:
    """Return the versions of the libraries that numbers may depend on."""
    names = (
        "moe2edge", "torch", "transformers", "peft", "numpy", "scipy", "onnx", "onnxruntime",
        "onnxruntime-gpu", "gguf", "xllamacpp",
    )  # fmt: skip
    found = {"python": sys.version.split()[0]}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
