"""Slow the graphs of one folder down, and let them hold a buffer.

With this folder on PYTHONPATH, Python imports it at the start of a process. SLOWED_FOLDER names the
folder, SLOWED_BY the fraction of time that each run of its graph takes longer, and SLOWED_BYTES the
size of a buffer beside it.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def slow_down(module: ModuleType) -> None:
    """Replace the class of sessions by one that is slower for graphs of the folder."""
    folder = os.path.realpath(os.environ["SLOWED_FOLDER"])
    part, size = float(os.environ["SLOWED_BY"]), int(os.environ["SLOWED_BYTES"])

    class Session(module.InferenceSession):  # type: ignore[name-defined, misc]
        def __init__(self, source: Any, *rest: Any, **options: Any) -> None:
            super().__init__(source, *rest, **options)
            self.is_slow = os.path.realpath(str(source)).startswith(folder + os.sep)
            # Written, so that its pages are memory.
            self.buffer = b"\x01" * size if self.is_slow else b""

        def run(self, *given: Any, **options: Any) -> Any:
            return self._take_longer(super().run, *given, **options)

        def run_with_iobinding(self, *given: Any, **options: Any) -> Any:
            return self._take_longer(super().run_with_iobinding, *given, **options)

        def _take_longer(self, run: Any, *given: Any, **options: Any) -> Any:
            begin = time.perf_counter()
            found = run(*given, **options)
            end = time.perf_counter()
            while self.is_slow and time.perf_counter() < end + part * (end - begin):
                pass
            return found

    module.InferenceSession = Session  # type: ignore[attr-defined]


class Finder(MetaPathFinder):
    """Finds onnxruntime once, and slows it down behind its import."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        """Return the spec of onnxruntime with a loader that goes on."""
        if name != "onnxruntime":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def load_and_slow_down(module: ModuleType) -> None:
            load(module)
            slow_down(module)

        spec.loader.exec_module = load_and_slow_down  # type: ignore[method-assign]
        return spec


if "SLOWED_FOLDER" in os.environ:
    sys.meta_path.insert(0, Finder())
