"""Measure decoding once; a request on stdin, times on stdout.

``SPINNING=0`` stops threads of ONNX Runtime from spinning, ``SPINNING=1`` lets them spin as long as
they do where nothing is set. The request and the reply are those of
``moe2edge.evaluation.profile.child``.
"""

from __future__ import annotations

import os
import sys

from moe2edge.evaluation.profile.child import serve_request

# Begin of the entries that say how threads wait.
ENTRIES = "session.intra_op."


def set_spinning(value: str) -> None:
    """Let sessions of ONNX Runtime be made with or without spinning threads ("1" or "0")."""
    import onnxruntime as ort

    class Options(ort.SessionOptions):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            super().add_session_config_entry(f"{ENTRIES}allow_spinning", value)

        def add_session_config_entry(self, key: str, given: str) -> None:
            if not key.startswith(ENTRIES):
                super().add_session_config_entry(key, given)

    ort.SessionOptions = Options


if __name__ == "__main__":
    if value := os.environ.get("SPINNING"):
        set_spinning(value)
    sys.exit(serve_request())
