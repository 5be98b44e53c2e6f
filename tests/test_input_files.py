"""Inputs that change while they are used: an error that names the file, never a mixture."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from helpers import run
from moe2edge.commands.run_inputs import look_at_inputs
from moe2edge.errors import InputError, Unreadable, VerificationFailed
from moe2edge.evaluation.folder_record import REFERENCE
from moe2edge.evaluation.reference import Reference
from moe2edge.pipeline import recipe
from moe2edge.pipeline.decisions import read_decisions
from moe2edge.storage.checkpoint import open_checkpoint
from moe2edge.storage.companions import find_fault
from moe2edge.storage.input_files import InputFiles
from moe2edge.storage.journal import Journal
from moe2edge.storage.kept_walk import KeptWalk
from moe2edge.storage.locking import OutputLock
from moe2edge.storage.publishing import MARKER, Marker, PartialFolder
from moe2edge.storage.safetensors_files import open_file
from moe2edge.storage.text_files import hash_file, read_json
from moe2edge.storage.weight_files import find_weight_files
from moe2edge.testing import Make


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    found = [tmp_path / name for name in ("text", "shard-1", "shard-2")]
    for path in found:
        path.write_text(path.name)
    return found


def look(files: list[Path]) -> InputFiles:
    return InputFiles(files[:1], files[1:], lambda: "".join(p.read_text() for p in files[1:]))


@pytest.mark.parametrize("which", range(3))
def test_changed_files_are_found(files: list[Path], which: int) -> None:
    path, inputs = files[which], look(files)
    inputs.settle("shard-1shard-2")
    inputs.check()
    os.utime(path)  # another time, the same content
    inputs.check()
    copy = path.with_name("copy")
    shutil.copy(path, copy)
    copy.replace(path)  # another file of the same content
    inputs.check()
    state = path.stat()
    path.write_text(path.name[::-1])
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    with pytest.raises(InputError, match=f"{path.name} has changed since this run began"):
        inputs.check()
    path.unlink()
    with pytest.raises(InputError, match=f"{path.name} is gone or cannot be read since"):
        inputs.check()
    path.write_text(path.name)
    inputs.check()


# ---- pipes, devices and names that are none: nobody waits for them -------------------------------


def put_pipe(path: Path) -> Path:
    os.mkfifo(path)
    return path


@pytest.mark.parametrize("make", [put_pipe, lambda p: p.symlink_to("/dev/zero") or p, Path.mkdir])
def test_what_is_no_regular_file_is_not_read(tmp_path: Path, make: Any) -> None:
    make(tmp_path / "x")
    for read in (hash_file, read_decisions):
        with pytest.raises((InputError, IsADirectoryError)):
            read(tmp_path / "x")
    with pytest.raises(InputError, match="unknown recipe"):
        recipe.find(str(tmp_path / "x"))
    make(tmp_path / ".out.moe2edge-lock")
    with (
        pytest.raises(InputError, match=r"away|another place"),
        OutputLock(tmp_path / "out").hold(print),
    ):
        pass
    (tmp_path / "out.partial").mkdir()
    make(tmp_path / "out.partial" / MARKER)
    with pytest.raises(InputError, match="was not written by moe2edge"):
        PartialFolder(tmp_path / "out").read_marker()


def test_a_pipe_in_a_work_folder_is_foreign(tmp_path: Path) -> None:
    partial = PartialFolder(tmp_path / "out")
    partial.mark(Marker())
    partial.work.mkdir()
    assert partial.read_marker() is not None
    put_pipe(partial.work / "journal.jsonl")
    with pytest.raises(InputError, match=r"holds work/journal.jsonl, which moe2edge did not write"):
        partial.read_marker()


def test_names_with_a_zero_byte_and_files_without_end(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot be read \(embedded null byte\)"):
        read_decisions(Path("a\0b"))
    with (tmp_path / "r.yaml").open("wb") as file:
        file.truncate(1 << 40)  # a hole, which takes no space
    with pytest.raises(InputError, match=r"recipe .*r.yaml cannot be read: "):
        recipe.find(str(tmp_path / "r.yaml"))


def test_a_pipe_beside_the_weights_does_not_stop_an_export(tiny: Make, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny("mixtral"), tmp_path / "model"))
    put_pipe(folder / "model.safetensors.index.json")
    found = look_at_inputs(
        open_checkpoint(folder),
        recipe.parse("passes: []", ["calibration.text=builtin", "evaluation.text=builtin"]),
    )
    found.settle("0" * 64)
    found.check()


def test_a_change_before_the_digest_is_known(files: list[Path]) -> None:
    inputs = look(files)
    files[1].write_text("longer than it was")
    with pytest.raises(InputError, match=r"shard-1 has changed"):
        inputs.settle("shard-1shard-2")


EXPORT = [
    "-t", "gptq", "-r", "w4", "--eval", "none", "--threads", "1", "--set", "gptq.group_size=32",
    "--set", "calibration.samples=6", "--set", "calibration.length=32",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "text.txt"])
def test_an_export_whose_input_changes_writes_nothing(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder = tmp_path / "m"
    shutil.copytree(tiny("qwen3_moe"), folder)
    (tmp_path / "text.txt").write_text("0123456789 abcdefgh " * 40)
    changed = tmp_path / name if name == "text.txt" else folder / name
    before, added = changed.read_bytes(), Journal.add

    def adding(self: Journal, entry: Any) -> None:
        added(self, entry)
        if len(self.units) == 2:
            changed.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))

    command = ["export", str(folder), "-o", str(tmp_path / "out"), *EXPORT]
    command += ["--calib", str(tmp_path / "text.txt")]
    with monkeypatch.context() as inner:
        inner.setattr(Journal, "add", adding)
        failed = run(*command)
    assert failed.exit_code == 2
    assert f"{changed} has changed since this run began" in failed.stderr
    assert "2 finished blocks are kept in" in failed.stderr
    assert not (tmp_path / "out").exists()
    changed.write_bytes(before)
    again = run(*command, "--resume", "require")
    assert again.exit_code == 0, again.output
    assert run("verify", str(tmp_path / "out")).exit_code == 0


DECIDE = ["-r", "search.yaml", "--threads", "1", "--set", "calibration.samples=6"]
DECIDE += ["--set", "calibration.length=32"]


@pytest.mark.parametrize("progressive", [False, True])
def test_decide_resumes_what_was_killed(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, progressive: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    step = {"expert_search": {"keep": 4, "progressive": progressive}}
    Path("search.yaml").write_text(json.dumps({"passes": [{"expert_drop": {"keep": 5}}, step]}))
    command = ["decide", str(tiny("olmoe")), *DECIDE]
    assert run(*command, "-o", "whole.json").exit_code == 0
    whole, added, left = Path("whole.json").read_bytes(), KeptWalk.add, [5]
    assert not list(tmp_path.glob("*.partial"))

    def adding(self: KeptWalk, *more: Any) -> None:
        added(self, *more)
        left[0] -= 1
        if not left[0]:  # in the middle of the search
            raise RuntimeError("killed")

    with monkeypatch.context() as inner:
        inner.setattr(KeptWalk, "add", adding)
        failed = run(*command, "-o", "sets.json")
    assert failed.exit_code == 1
    assert "5 observed blocks are kept in" in failed.stderr
    assert not Path("sets.json").exists()
    other = run(*command, "-o", "sets.json", "--set", "calibration.seed=1")
    assert other.exit_code == 2
    assert "was begun with another calibration" in other.stderr
    again = run(*command, "-o", "sets.json", "--resume", "require")
    assert again.exit_code == 0, again.output
    assert "resuming after 5 observed blocks of an earlier run" in again.stderr
    assert Path("sets.json").read_bytes() == whole
    assert not list(tmp_path.glob("*.partial"))


def test_decide_does_not_mix_two_sources(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny("olmoe"), "m")
    Path("search.yaml").write_text('{"passes": [{"expert_drop": {"keep": 5}}]}')
    weights, added = Path("m/model.safetensors"), KeptWalk.add

    def adding(self: KeptWalk, *more: Any) -> None:
        added(self, *more)
        weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")

    monkeypatch.setattr(KeptWalk, "add", adding)
    failed = run("decide", "m", *DECIDE, "-o", "sets.json")
    assert failed.exit_code == 2
    assert "m/model.safetensors has changed since this run began" in failed.stderr
    assert not Path("sets.json").exists()


# ---- files that cannot be read -------------------------------------------------------------------

# What is to be done differs, and getting a sound file again does not help.
REMEDIES = {
    errno.EACCES: "get the right to read it",
    errno.EPERM: "get the right to read it",
    errno.EMFILE: "raise the limit on open files",
    errno.EIO: "check the disk or the connection to it",
    errno.ESTALE: "check the disk or the connection to it",
    errno.ETIMEDOUT: "check the disk or the connection to it",
    errno.ENOTCONN: "check the disk or the connection to it",
}


def refuse(monkeypatch: pytest.MonkeyPatch, name: str, number: int) -> None:
    """Let opening, and looking behind links, of files of a name fail with an error."""
    for place, key in ((io, "open"), (os, "open"), (os.path, "realpath")):
        real = getattr(place, key)

        def fail(path: Any, *given: Any, real: Any = real, **more: Any) -> Any:
            if isinstance(path, (str, Path)) and Path(path).name == name:
                raise OSError(number, os.strerror(number), str(path))
            return real(path, *given, **more)

        monkeypatch.setattr(place, key, fail)


@pytest.mark.parametrize("number", REMEDIES)
def test_what_to_do_about_a_file_is_that_of_the_error(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    source = tiny("olmoe")
    name = "tokenizer.json"
    (tmp_path / REFERENCE).write_bytes(b"x")
    shutil.copy(source / "model.safetensors", tmp_path)  # headers are cached by place
    with monkeypatch.context() as patch:
        refuse(patch, "model.safetensors", number)
        with pytest.raises(Unreadable) as weights:
            open_file(tmp_path / "model.safetensors")
    with monkeypatch.context() as patch:
        refuse(patch, name, number)
        with pytest.raises(Unreadable) as small:
            read_json(source / name)
        with pytest.raises(InputError) as decisions:
            read_decisions(source / name)
        fault = find_fault(source, source / name)
    with monkeypatch.context() as patch:
        refuse(patch, REFERENCE, number)
        with pytest.raises(VerificationFailed) as reference:
            Reference.read(tmp_path)
    for said in (*(str(e.value) for e in (weights, small, decisions, reference)), fault):
        assert os.strerror(number) in said
        assert REMEDIES[number] in said
        assert "download" not in said
        assert "export" not in said


def test_a_file_that_is_not_there_is_to_be_got(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file or directory; put it there, or download"):
        open_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(InputError, match=r"is damaged or cut short .*; download it again"):
        open_file(tmp_path / "model.safetensors")


def test_shards_that_cannot_be_read_are_not_taken_for_missing(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may be a second checkpoint."""
    folder = Path(shutil.copytree(tiny("olmoe"), tmp_path / "model"))
    (folder / "model-00001-of-00001.safetensors").write_bytes(b"x")
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refuse(monkeypatch, "model-00001-of-00001.safetensors", errno.EIO)
    with pytest.raises(Unreadable, match="Input/output error; check the disk"):
        find_weight_files(folder, {}, "none")
