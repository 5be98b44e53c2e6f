"""Measure decoding once; a request on stdin, times on stdout. ``SPINNING=0`` stops that of ORT.

The request and the reply are those of ``moe2edge.evaluation.profile.child``.
"""

from __future__ import annotations

import os
import sys

from moe2edge.evaluation.profile.child import serve_request


def set_spinning(value: str) -> None:
    """Let sessions of ONNX Runtime be made with or without spinning threads ("1" or "0")."""
    import onnxruntime as ort

    class Options(ort.SessionOptions):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.add_session_config_entry("session.intra_op.allow_spinning", value)

    ort.SessionOptions = Options


if __name__ == "__main__":
    if value := os.environ.get("SPINNING"):
        set_spinning(value)
    sys.exit(serve_request())
