"""Outputs from claim to cleaning up, without a model: kills at every operation, and refusals."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from moe2edge.errors import InputError
from moe2edge.storage import durable, export_folder
from moe2edge.storage.export_folder import OutputForm, claim_output, open_partial_folder
from moe2edge.storage.manifest import check_manifest_files, open_artifact, write_manifest

INPUTS = {"model": "one"}


@pytest.fixture(autouse=True)
def no_syncing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Save the time that the disk takes; that everything is synced has a test of its own."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


def is_ours(path: Path) -> bool:
    return path.read_text().startswith("{")


FILE = OutputForm(False, is_ours, "holds no decisions", lambda _: [], lambda _: [])


def write(content: Path, text: str) -> None:
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


# ---- kills ---------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for the end of the process: nothing that follows is carried out."""


class Kill:
    """Count operations on files, and end everything before or behind one of them."""

    def __init__(self, at: int | None, *, behind: bool) -> None:
        self.at, self.behind = at, behind
        self.count, self.dead = 0, False
        self.names: list[str] = []

    def wrap(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*args: Any, **more: Any) -> Any:
            if self.dead:
                raise Killed
            mine, self.count = self.count, self.count + 1
            self.names.append(name)
            if mine == self.at and not self.behind:
                self.dead = True
                raise Killed
            try:
                return original(*args, **more)
            finally:
                if mine == self.at:
                    self.dead = True
                    raise Killed

        return operation


@contextlib.contextmanager
def killing(kill: Kill) -> Iterator[None]:
    """Let the operations of storage be counted, and the process end at one of them."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir", "pwrite"):
            patch.setattr(os, name, kill.wrap(name, getattr(os, name)))
        patch.setattr(durable, "rename_exclusively", kill.wrap("new", durable.rename_exclusively))
        yield


def count_operations(folder: Path, *, force: bool) -> list[str]:
    kill = Kill(None, behind=False)
    with killing(kill):
        export(folder / "out", "new", force=force)
    return kill.names


@pytest.mark.parametrize("force", [False, True])
def test_a_kill_at_any_operation_leaves_a_whole_output_or_none(tmp_path: Path, force: bool) -> None:
    def begin(name: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        if force:
            export(folder / "out", "old")
        return folder

    export(tmp_path / "first", "x")  # imports what is imported late
    operations = count_operations(begin("all"), force=force)
    assert operations.count("new") == 1 + force
    assert len(operations) > 20
    for at in range(len(operations)):
        for behind in (False, True):
            folder = begin(f"{at} {behind}")
            out = folder / "out"
            kill = Kill(at, behind=behind)
            with killing(kill), contextlib.suppress(Killed):
                export(out, "new", force=force)
            assert kill.dead
            # The same command again: it writes or finishes, or the output is there already.
            if out.exists() and not force:
                with pytest.raises(InputError, match="exists"):
                    export(out, "new")
            else:
                if out.exists():
                    assert read(out) in ("old", "new")
                export(out, "new", force=force)
            assert read(out) == "new"
            assert [path.name for path in folder.iterdir()] == ["out"], (at, behind)
            shutil.rmtree(folder)
