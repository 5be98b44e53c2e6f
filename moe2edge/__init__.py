"""Compress Mixture-of-Experts models and export them to one small machine."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe2edge.runtime.load import load

__all__ = ["load"]

# onnxruntime reports its use over the network unless told otherwise before it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


def __getattr__(name: str) -> Any:
    """``moe2edge.load`` without importing torch before it is used."""
    if name == "load":
        from moe2edge.runtime.load import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
