"""Outputs from claim to cleaning up, without a model: kills at every operation, and refusals."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fake_export import INPUTS, export, fail, read, write
from moe2edge.cli import progress_bar
from moe2edge.errors import Diverged, InputError
from moe2edge.storage import durable, export_folder, output_checks
from moe2edge.storage.export_folder import claim_output, open_partial_folder
from moe2edge.storage.publishing import PartialFolder


@pytest.fixture(autouse=True)
def no_syncing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Save the time that the disk takes; that everything is synced has a test of its own."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


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


@pytest.mark.slow
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
            whole = out.exists() and read(out) == "new"
            cleaned = not (folder / "out.partial" / ".moe2edge-partial").exists()
            if whole and cleaned and not force:
                with pytest.raises(InputError, match="exists"):
                    export(out, "new")
            else:
                if out.exists():
                    assert read(out) in ("old", "new")
                finished = (
                    not cleaned
                    and '"finished"' in (folder / "out.partial" / ".moe2edge-partial").read_text()
                )
                how = export(out, "new", force=force)
                assert how == ("finished" if finished else "written"), (at, behind)
            assert read(out) == "new"
            assert [path.name for path in folder.iterdir()] == ["out"], (at, behind)
            shutil.rmtree(folder)


# ---- what appears under way ----------------------------------------------------------------------


def test_what_appears_at_the_output_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def appear() -> None:
        out.mkdir()
        (out / "thesis.txt").write_text("years of work")

    for force in (False, True):
        with pytest.raises(InputError, match="was not written by moe2edge") as caught:
            export(out, "new", force=force, during=appear)
        assert "the finished output is kept as" in caught.value.__notes__[0]
        assert (out / "thesis.txt").read_text() == "years of work"
        assert read(tmp_path / "out.partial" / "out") == "new"
        # As long as it is there, the message names what is kept.
        with pytest.raises(InputError, match="exists") as caught:
            export(out, "new", force=force)
        assert "the finished output is kept as" in caught.value.__notes__[0]
        shutil.rmtree(out)
        assert export(out, "new", force=force) == "finished"
        assert read(out) == "new"
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        shutil.rmtree(out)


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_an_empty_folder_a_file_or_a_link_is_not_replaced_either(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    make: Callable[[], object] = {
        "folder": lambda: out.mkdir(),
        "file": lambda: out.write_text("mine"),
        "link": lambda: out.symlink_to("nowhere"),
    }[kind]
    with pytest.raises(InputError, match="exists"):
        export(out, "new", during=make)
    assert os.path.lexists(out)
    # Likewise if it appears behind the last look: the rename itself replaces nothing.
    (out.rmdir if kind == "folder" else out.unlink)()
    look = output_checks.check_output

    def looking(*args: Any, **more: Any) -> None:
        look(*args, **more)
        make()

    with pytest.MonkeyPatch.context() as patch:
        begin = lambda: patch.setattr(output_checks, "check_output", looking)  # noqa: E731
        with pytest.raises(InputError, match="has appeared"):
            export(out, "newer", during=begin)
    assert os.path.lexists(out)
    (out.rmdir if kind == "folder" else out.unlink)()
    assert export(out, "newer") == "finished"


def test_without_an_exclusive_rename_nothing_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(durable, "rename_exclusively", lambda *_: False)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    with pytest.raises(FileExistsError):
        durable.rename_new(tmp_path / "a", tmp_path / "b")
    export(tmp_path / "out", "old")
    assert export(tmp_path / "out", "new", force=True) == "written"
    assert read(tmp_path / "out") == "new"


def test_a_finished_output_is_published_only_for_the_same_command(tmp_path: Path) -> None:
    out, kept = tmp_path / "out", tmp_path / "out.partial" / "out"

    def finish() -> None:
        with pytest.raises(InputError, match="exists"):
            export(out, "new", during=out.mkdir)
        out.rmdir()
        assert read(kept) == "new"

    finish()
    assert export(out, "other") == "written"  # from the same work: only the output differs
    assert read(out) == "other"
    shutil.rmtree(out)
    finish()
    with pytest.raises(InputError, match="begun with another model: then one, now two"):
        export(out, "new", inputs={"model": "two"})
    assert read(kept) == "new"
    assert export(out, "new", resume="never") == "written"
    shutil.rmtree(out)
    finish()
    (kept / "part" / "weights.bin").write_text("x")
    assert export(out, "new") == "written"  # damaged: written again
    assert read(out) == "new"


@pytest.mark.parametrize("where", ["notes.txt", "work/notes.txt", "work/link.json", ".hidden"])
def test_foreign_files_in_the_partial_folder_are_named_and_stay(tmp_path: Path, where: str) -> None:
    out = tmp_path / "out"
    path = tmp_path / "out.partial" / where

    def put() -> None:
        if "link" in where:
            path.symlink_to("nowhere")
        else:
            path.write_text("mine")

    with pytest.raises(OSError, match="failed"):
        export(out, "new", during=lambda: fail("failed"))
    put()
    resumes: tuple[export_folder.Resume, ...] = ("auto", "never")
    for force in (False, True):
        for resume in resumes:
            with pytest.raises(InputError, match="which moe2edge did not write; move it away"):
                export(out, "new", force=force, resume=resume)
    assert os.path.lexists(path)
    path.unlink()
    # What appears there while an export runs stays as well, and the export is not lost.
    assert export(out, "new", during=put) == "written"
    assert read(out) == "new"
    assert os.path.lexists(path)


def test_everything_is_synced_before_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    rename = durable.rename_exclusively

    def renaming(source: Path, target: Path) -> bool:
        done.append(f"{source.relative_to(tmp_path)} -> {target.relative_to(tmp_path)}")
        return rename(source, target)

    def syncing(handle: int) -> None:
        done.append(os.path.relpath(os.readlink(f"/proc/self/fd/{handle}"), tmp_path))

    export(tmp_path / "out", "old")
    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(durable, "rename_exclusively", renaming)
    export(tmp_path / "out", "new", force=True)
    moved, named = done.index("out -> out.partial/old"), done.index("out.partial/out -> out")
    content = "out.partial/out"
    files = [f"{content}/{name}" for name in ("config.json", "manifest.json", "part/weights.bin")]
    for path in (*files, f"{content}/part", content):
        assert path in done[:moved], path
    assert done.index(f"{content}/part/weights.bin") < done.index(f"{content}/part")
    assert done.index(f"{content}/part") < done.index(content)
    # The name of what was moved aside is durable before the next rename, and that before it goes.
    assert {".", "out.partial"} <= set(done[moved:named])
    assert "." in done[named : named + 2]


def test_what_appears_in_the_old_output_at_the_last_moment_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    export(out, "old")
    rename = durable.rename_exclusively

    def renaming(source: Path, target: Path) -> bool:
        if source == out:
            (out / "thesis.txt").write_text("years of work")
        return rename(source, target)

    monkeypatch.setattr(durable, "rename_exclusively", renaming)
    with pytest.raises(InputError, match="holds files that moe2edge did not write"):
        export(out, "new", force=True)
    assert (out / "thesis.txt").exists()
    assert read(tmp_path / "out.partial" / "out") == "new"


# ---- signals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_second_signal_waits_for_the_cleaning_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    number = getattr(signal, name)
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, number)}
    monkeypatch.setattr("sys.argv", ["moe2edge"])
    unlink = os.unlink
    sent: list[str] = []

    def unlinking(path: Any, *args: Any, **more: Any) -> None:
        unlink(path, *args, **more)
        sent.append(str(path))
        os.kill(os.getpid(), number)

    def interrupt() -> None:
        shutil.rmtree(tmp_path / "out.partial" / "work")  # nothing is worth keeping
        (tmp_path / "out.partial" / "work").mkdir()
        monkeypatch.setattr(os, "unlink", unlinking)
        os.kill(os.getpid(), number)

    progress_bar.listen()
    try:
        with pytest.raises(KeyboardInterrupt) as caught:
            export(tmp_path / "out", "x", during=interrupt)
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    assert len(sent) > 3
    assert caught.value.__notes__ == ["nothing was left behind"]
    assert list(tmp_path.iterdir()) == []


def test_an_output_with_its_name_that_waits_for_the_cleaning_up(tmp_path: Path) -> None:
    """Another command than the one that was killed sees it as any other output."""
    out = tmp_path / "out"

    def begin() -> None:
        shutil.rmtree(out, ignore_errors=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(PartialFolder, "remove", lambda _: None)
            export(out, "new")
        assert (tmp_path / "out.partial" / "work").exists()

    for force, inputs, how in ((False, {"model": "two"}, ""), (True, {"model": "two"}, "written")):
        begin()
        if how:
            assert export(out, "new", inputs=inputs, force=force) == how
        else:
            with pytest.raises(InputError, match="exists; choose another name"):
                export(out, "new", inputs=inputs)
        assert read(out) == "new"
        assert os.listdir(tmp_path) == ["out"]
    begin()
    with pytest.raises(InputError, match="exists"):
        export(out, "new", resume="never")
    begin()
    (out / "config.json").write_text('{"text": "changed"}')
    with pytest.raises(InputError, match="exists"):
        export(out, "new")
    begin()
    with pytest.raises(OSError, match="early"), claim_output(out, force=False):
        raise OSError("early")
    assert os.listdir(tmp_path) == ["out"]
    begin()
    out.rename(tmp_path / "other")
    assert export(out, "new") == "written"
    shutil.rmtree(tmp_path / "other")
    begin()
    assert export(out, "new") == "finished"
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"inputs": {"a": 1}}', '{"inputs": [1]}', '{"state": "x"}', "\xff", "[" * 9999],
)
def test_a_damaged_marker_is_not_ours(tmp_path: Path, text: str) -> None:
    with pytest.raises(OSError, match="failed"):
        export(tmp_path / "out", "x", during=lambda: fail("failed"))
    (tmp_path / "out.partial" / ".moe2edge-partial").write_text(text, "latin-1")
    with pytest.raises(InputError, match="was not written by moe2edge; move it away"):
        export(tmp_path / "out", "x")
    assert (tmp_path / "out.partial" / "work" / "pass-1-fake" / "state.json").exists()


def test_an_interrupt_behind_the_last_rename_says_that_the_output_is_finished(
    tmp_path: Path,
) -> None:
    def finish_and_interrupt() -> None:
        with claim_output(tmp_path / "out", force=False) as claim:
            with open_partial_folder(claim, INPUTS) as (content, _):
                write(content, "x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        finish_and_interrupt()
    assert caught.value.__notes__ == [f"{tmp_path / 'out'} is finished"]


def test_nothing_left_is_said_only_where_that_is_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        export(tmp_path / "out", "x", during=interrupt)
    assert "kept in" in caught.value.__notes__[0]
    assert len(caught.value.__notes__) == 1

    def fail(*_: Any, **__: Any) -> None:
        raise PermissionError("no")

    monkeypatch.setattr(shutil, "rmtree", fail)
    with pytest.raises(KeyboardInterrupt) as caught:
        export(tmp_path / "other", "x", during=interrupt)
    assert not any("nothing was left" in note for note in caught.value.__notes__)
    assert any("could be removed: no" in note for note in caught.value.__notes__)


def test_a_signal_that_is_ignored_stays_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
        progress_bar.listen()
        with durable.hold_signals():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        os.kill(os.getpid(), signal.SIGHUP)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_what_a_diverged_training_leaves_is_of_use_with_resume_never_only(tmp_path: Path) -> None:
    """The same command would diverge again, and with other settings it is not resumed."""

    def diverge() -> None:
        raise Diverged("recover: the loss became NaN; lower learning_rate")

    out = tmp_path / "out"
    with pytest.raises(Diverged) as caught:
        export(out, "x", during=diverge)
    (note,) = caught.value.__notes__
    assert note == (
        f"the saved work of fake is kept in {out}.partial; with other settings, add --resume never"
    )
    lower = INPUTS | {"recipe": "lower"}
    with pytest.raises(InputError, match="start over with --resume never"):
        export(out, "x", inputs=lower)
    assert export(out, "x", inputs=lower, resume="never") == "written"
