"""Children that run ``killed_export.py``."""

from __future__ import annotations

import multiprocessing
import runpy
from pathlib import Path
from typing import Any

CHILD = Path(__file__).with_name("killed_export.py")
# A child is forked from a process that has imported everything and computed nothing yet.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        "moe2edge.commands.export",
        "moe2edge.pipeline.blockwise",
        "transformers.models.qwen3_moe.modeling_qwen3_moe",
    ]
)


def run_child(given: dict[str, Any]) -> int:
    """Run it with these names set; its exit code, or minus the signal that it died of."""
    process = SERVER.Process(
        target=runpy.run_path,
        args=(str(CHILD),),
        kwargs={"init_globals": given, "run_name": "killed"},
    )
    process.start()
    process.join(120)
    assert process.exitcode is not None
    return process.exitcode
