"""Places of outputs: which names are refused, what --force deletes, and single files."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from fake_export import INPUTS, export, fail, read
from helpers import run
from moe2edge.commands import api
from moe2edge.errors import DiskFailed, DoesNotFit, InputError
from moe2edge.storage import durable
from moe2edge.storage.export_folder import claim_output, open_partial_folder
from moe2edge.storage.output_checks import OutputForm

# ---- names and places ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/", "exists and was not written by moe2edge"),
        ("..", "exists and was not written by moe2edge"),
        ("none/out", "does not exist; make it first"),
        ("x" * 300, "choose a shorter one"),
        ("x" * 250, "choose a shorter one"),
        ("ö" * 125, "choose a shorter one"),
        ("/" + "a/" * 3000 + "out", "choose a shorter one"),
        ("a\0b", "has a zero byte"),
        ("/proc/out", "nothing can be written to /proc"),
        ("other.partial", "keeps its work in a folder of that name"),
        ("begun.partial/x", "which an export removes"),
        ("file/out", "file is not a folder; choose another place"),
    ],
)
def test_places_that_no_output_can_have(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(OSError, match="failed"):
        export(tmp_path / "begun", "x", during=lambda: fail("failed"))
    (tmp_path / "file").write_text("x")
    before = sorted(map(str, tmp_path.rglob("*")))
    with pytest.raises(InputError, match=message) as caught:
        export(tmp_path / name, "x")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    assert sorted(map(str, tmp_path.rglob("*"))) == before


def test_trying_a_place_leaves_nothing_whenever_it_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr(os, "fsync", lambda _: seen.append(os.listdir(tmp_path)))
    durable.check_writable(tmp_path / "out")
    assert seen == [[]]  # the file that is written has no name
    monkeypatch.delattr(os, "O_TMPFILE")
    durable.check_writable(tmp_path / "out")
    assert len(seen[1]) == 1  # on other systems it has one
    assert os.listdir(tmp_path) == []


def test_a_broken_disk_is_no_fault_of_the_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail_to_sync(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail_to_sync)
    with pytest.raises(DiskFailed, match=r"\(Input/output error\); look after its disk"):
        durable.check_writable(tmp_path / "out")


def test_an_output_is_no_place_for_another(tmp_path: Path) -> None:
    export(tmp_path / "outer", "x")
    for name in ("outer/inner", "outer/part/inner"):
        with pytest.raises(InputError, match=r"is inside of the output .*outer, which would no"):
            export(tmp_path / name, "x")
    assert read(tmp_path / "outer") == "x"


def test_a_name_as_long_as_can_be(tmp_path: Path) -> None:
    out = tmp_path / ("x" * (255 - len(".partial")))
    assert export(out, "new") == "written"
    assert read(out) == "new"
    assert os.listdir(tmp_path) == [out.name]


def test_a_full_disk_is_a_shortage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(DoesNotFit, match="No space left on device"):
        export(tmp_path / "out", "x")
    assert list(tmp_path.iterdir()) == []


def test_what_is_read_is_not_deleted(tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(out, "old")
    link = tmp_path / "link"
    link.symlink_to(out / "part")
    model = tmp_path / "model"
    model.mkdir()
    (model / "weights.bin").symlink_to(out / "part" / "weights.bin")
    for read_path in (out, out / "config.json", link, *model.iterdir()):
        with (
            pytest.raises(InputError, match="is read and lies in"),
            claim_output(out, force=True, reads=[read_path]),
        ):
            pass
    with claim_output(out, force=True, reads=[tmp_path, tmp_path / "outside"]):
        pass
    assert read(out) == "old"


def test_a_link_that_leads_to_itself_is_read_by_nobody(tmp_path: Path) -> None:
    export(tmp_path / "out", "x")
    (tmp_path / "loop").symlink_to("loop")
    with claim_output(tmp_path / "out", force=True, reads=[tmp_path / "loop"]):
        pass
    (tmp_path / "out" / "loop").symlink_to("loop")
    with (
        pytest.raises(InputError, match="is read and lies in"),
        claim_output(tmp_path / "out", force=True, reads=[tmp_path / "out" / "loop"]),
    ):
        pass


def test_force_deletes_only_what_is_ours(tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(out, "old")
    for name in (".gitattributes", ".DS_Store", "part/.DS_Store", ".cache/huggingface/upload/x"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("x")
    assert export(out, "new", force=True) == "written"
    for name in ("thesis.txt", "part/data.bin", ".git/HEAD", "link", "empty/"):
        path = out / name
        path.parent.mkdir(exist_ok=True)
        if name == "link":
            path.symlink_to("nowhere")
        elif name.endswith("/"):
            path.mkdir()
        else:
            path.write_text("mine")
        with pytest.raises(InputError, match=f"such as {name.rstrip('/')}"):
            export(out, "newer", force=True)
        assert os.path.lexists(path)
        (path.rmdir if name.endswith("/") else path.unlink)()
        if name.startswith(".git"):
            path.parent.rmdir()
    # A folder of outputs is one as well.
    (tmp_path / "several").mkdir()
    out.rename(tmp_path / "several" / "fake")
    (tmp_path / "several" / ".DS_Store").write_text("x")
    assert export(tmp_path / "several", "new", force=True) == "written"


def is_ours(path: Path) -> bool:
    return path.read_text().startswith("{")


FILE = OutputForm(False, is_ours, "holds no decisions", lambda _: [], lambda _: [])


# ---- single files --------------------------------------------------------------------------------


def test_a_single_file_is_claimed_and_published_likewise(tmp_path: Path) -> None:
    out = tmp_path / "sets.json"

    def decide(text: str, *, force: bool = False, fails: bool = False) -> None:
        with (
            claim_output(out, force=force, form=FILE) as claim,
            open_partial_folder(claim, INPUTS) as (content, work),
        ):
            assert content == tmp_path / "sets.json.partial" / "out"
            (work.folder / "pass-0-x").mkdir(exist_ok=True)
            (work.folder / "pass-0-x" / "state.json").write_text("{}")
            content.write_text(text)
            if fails:
                raise OSError("failed")

    with pytest.raises(OSError, match="failed"):
        decide("{1}", fails=True)
    assert [path.name for path in tmp_path.iterdir()] == ["sets.json.partial"]
    decide("{2}")
    assert out.read_text() == "{2}"
    with pytest.raises(InputError, match="exists; choose another name, or replace it"):
        decide("{3}")
    decide("{3}", force=True)
    assert out.read_text() == "{3}"
    out.write_text("mine")
    with pytest.raises(InputError, match="exists and holds no decisions"):
        decide("{4}", force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["sets.json"]


def test_a_file_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, link = tmp_path / "real.png", tmp_path / "link.png"
    target.write_bytes(b"old")
    link.symlink_to(target)
    durable.write_file(link, b"new")
    assert (link.is_symlink(), target.read_bytes()) == (True, b"new")
    monkeypatch.setattr(os, "fsync", lambda _: fail("failed"))
    with pytest.raises(OSError, match="failed"):
        durable.write_file(target, b"newer")
    assert target.read_bytes() == b"new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.png", "real.png"]


@pytest.mark.parametrize("name", ["/proc/x.json", "none/x.json", "x" * 300, "."])
def test_a_file_that_cannot_be_written_is_known_before(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError):
        durable.check_writable(tmp_path / name)
    durable.check_writable(tmp_path / "free.json")
    assert list(tmp_path.iterdir()) == []


# ---- before a model is downloaded ----------------------------------------------------------------

Place = tuple[str, str]
PLACES: list[Place] = [
    ("taken", "exists"),
    ("none/out", "does not exist; make it first"),
    ("/", "exists and was not written by moe2edge"),
    ("/proc/out", "nothing can be written to /proc"),
    ("other.partial", "keeps its work in a folder of that name"),
]


@pytest.mark.parametrize(("name", "message"), PLACES)
@pytest.mark.parametrize("command", ["export", "decide", "api"])
def test_a_bad_place_is_refused_before_a_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, name: str, message: str
) -> None:
    """Likewise a text that is missing."""
    asked = []

    def download(*_: object, **__: object) -> str:
        asked.append(name)
        raise InputError("downloaded")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    before = sorted(tmp_path.rglob("*"))

    def run_command(out: Path, *more: str) -> str:
        if command == "api":
            text = {"calibration": {"text": more[1]}} if more else {}
            with pytest.raises(InputError) as caught:
                api.export("org/name", {"passes": ["rtn"], **text}, "gptq", out)
            return str(caught.value)
        recipe = ["-t", "gptq", "-r", "w4-rtn"] if command == "export" else ["-r", "trim"]
        result = run(command, "org/name", *recipe, "-o", out, *more)
        assert result.exit_code == 2, result.output
        return result.stderr

    assert (message if command != "decide" or "was not" not in message else "exists") in (
        run_command(tmp_path / name)
    )
    assert "nofile.txt does not exist" in run_command(tmp_path / "out", "--calib", "nofile.txt")
    assert not asked
    assert "downloaded" in run_command(tmp_path / "out")
    assert asked
    assert sorted(tmp_path.rglob("*")) == before
