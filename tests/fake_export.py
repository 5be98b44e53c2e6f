"""An export without a model: what is around it is the real one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moe2edge.storage import export_folder
from moe2edge.storage.export_folder import claim_output, open_partial_folder
from moe2edge.storage.manifest import check_manifest_files, open_artifact, write_manifest

INPUTS = {"model": "one"}


def write(content: Path, text: str) -> None:
    """Write an output, which holds a text."""
    (content / "part").mkdir()
    (content / "part" / "weights.bin").write_text(text * 100)
    (content / "config.json").write_text(json.dumps({"text": text}))
    write_manifest(content, "fake")


def export(
    out: Path,
    text: str,
    *,
    force: bool = False,
    during: Callable[[], object] = lambda: None,
    inputs: Any = None,
    resume: export_folder.Resume = "auto",
) -> str:
    """Make an output as an export does; return how: written, or finished by an earlier run."""
    inputs, outcome = INPUTS if inputs is None else inputs, {"text": text}
    with claim_output(out, force=force) as claim:
        if export_folder.publish_finished(claim, inputs, outcome, resume):
            return "finished"
        with open_partial_folder(claim, inputs, resume, outcome) as (content, work):
            (work.folder / "pass-1-fake").mkdir(exist_ok=True)
            (work.folder / "pass-1-fake" / "state.json").write_text("{}")
            write(content, text)
            during()
    return "written"


def read(out: Path) -> str:
    """Return the text of a whole output."""
    assert check_manifest_files(open_artifact(out)) == []
    text: str = json.loads((out / "config.json").read_text())["text"]
    return text


def fail(message: str) -> None:
    """Raise an error of the disk."""
    raise OSError(message)
