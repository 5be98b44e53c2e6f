"""The lock of an output: processes, containers and hosts exclude each other."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fake_export import export
from moe2edge.errors import InputError, Moe2EdgeError
from moe2edge.storage import locking
from moe2edge.storage.locking import OutputLock
from moe2edge.storage.output_checks import check_output_early

QUIET: Callable[[str], None] = lambda _: None  # noqa: E731
FORK = multiprocessing.get_context("fork")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locking, "BEAT", 0.02)
    monkeypatch.setattr(locking, "GONE", 0.4)
    monkeypatch.setattr(locking, "SETTLE", 0.05)


@contextlib.contextmanager
def without_flock() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(locking, "fcntl", None)
        yield


@contextlib.contextmanager
def on_another_host(name: str = "beta", boot: str = "other") -> Any:
    """Let what is locked meanwhile look as if it was on another host without a common flock."""
    with pytest.MonkeyPatch.context() as patch, without_flock():
        patch.setattr(socket, "gethostname", lambda: name)
        patch.setattr(locking, "read_boot", lambda: boot)
        patch.setattr(locking, "read_namespace", lambda: "theirs")
        yield


def test_only_one_holds_it_and_nothing_stays(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with OutputLock(out).hold(QUIET) as lock:
        assert [path.name for path in tmp_path.iterdir()] == [".out.moe2edge-lock"]
        with (
            pytest.raises(InputError, match=rf"another export \(process {os.getpid()} on .*out;"),
            OutputLock(out).hold(QUIET),
        ):
            pass
        lock.check()
        with OutputLock(tmp_path / "other").hold(QUIET):
            pass
    assert list(tmp_path.iterdir()) == []
    with OutputLock(out).hold(QUIET):
        pass


def test_a_killed_holder_is_followed_at_once(tmp_path: Path) -> None:
    def hold() -> None:
        holding = OutputLock(tmp_path / "out").hold(QUIET)
        holding.__enter__()
        os.kill(os.getpid(), 9)

    process = FORK.Process(target=hold)
    process.start()
    process.join()
    assert (tmp_path / ".out.moe2edge-lock").exists()
    begun = time.monotonic()
    with OutputLock(tmp_path / "out").hold(QUIET):
        assert time.monotonic() - begun < 5
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_holder_left_goes_with_the_refusal_of_its_output(tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(out, "x")

    def hold() -> None:
        holding = OutputLock(out).hold(QUIET)
        holding.__enter__()
        os.kill(os.getpid(), 9)

    process = FORK.Process(target=hold)
    process.start()
    process.join()
    check_output_early(out, force=False)  # leaves it to the claim
    with pytest.raises(InputError, match="exists; choose another name"):
        export(out, "y")
    assert list(tmp_path.iterdir()) == [out]
    with pytest.raises(InputError, match="exists; choose another name"):
        check_output_early(out, force=False)


def test_of_ten_at_once_one_is_in_at_any_time(tmp_path: Path) -> None:
    inside, doubled, entered = tmp_path / "inside", tmp_path / "doubled", tmp_path / "entered"

    def work(_: int) -> None:
        for _ in range(20):
            with contextlib.suppress(InputError), OutputLock(tmp_path / "out").hold(QUIET):
                try:
                    os.close(os.open(inside, os.O_CREAT | os.O_EXCL))
                except FileExistsError:
                    doubled.touch()
                entered.touch()
                inside.unlink(missing_ok=True)

    processes = [FORK.Process(target=work, args=(n,)) for n in range(10)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert entered.exists()
    assert not doubled.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["entered"]


@pytest.mark.usefixtures("quick")
def test_another_host_is_seen_by_its_heartbeat(tmp_path: Path) -> None:
    out = tmp_path / "out"
    said: list[str] = []
    with on_another_host():
        other = OutputLock(out)
        holding = other.hold(QUIET)
        holding.__enter__()
    # The other one has no lock of this system on the file, but renews its line.
    with pytest.raises(InputError, match="on beta"), OutputLock(out).hold(said.append):
        pass
    assert "was being written on beta; waiting" in said[0]
    # Its machine loses power.
    other._ended.set()
    assert other._thread is not None
    other._thread.join()
    begun = time.monotonic()
    with OutputLock(out).hold(QUIET) as lock:
        assert time.monotonic() - begun >= 0.3
        lock.check()
        # It was only suspended: it finds out before it renames, and takes nothing away.
        with pytest.raises(Moe2EdgeError, match="belongs to another export now") as caught:
            other.check()
        assert caught.value.exit_code == 1
        assert not other.is_held()
        holding.__exit__(None, None, None)
        lock.check()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("quick")
def test_a_suspended_holder_that_wakes_finds_out_by_its_heartbeat(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def wait(lock: OutputLock) -> None:
        end = time.monotonic() + 5
        while time.monotonic() < end:
            lock.check_quickly()
            time.sleep(0.02)

    with OutputLock(out).hold(QUIET) as lock:
        lock.path.unlink()
        with OutputLock(out).hold(QUIET), pytest.raises(Moe2EdgeError, match="gone or belongs"):
            wait(lock)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("quick")
def test_without_flock_an_ended_process_of_this_system_is_seen_at_once(tmp_path: Path) -> None:
    def hold() -> None:
        holding = OutputLock(tmp_path / "out").hold(QUIET)
        holding.__enter__()
        os._exit(0)

    with without_flock():
        process = FORK.Process(target=hold)
        process.start()
        process.join()
        with (
            OutputLock(tmp_path / "out").hold(QUIET),
            pytest.raises(InputError, match="another export"),
            OutputLock(tmp_path / "out").hold(QUIET),
        ):
            pass
    assert list(tmp_path.iterdir()) == []


def test_an_old_line_of_another_host_needs_no_waiting(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with on_another_host():
        lock = OutputLock(out)
        holding = lock.hold(QUIET)
        holding.__enter__()
        lock._ended.set()
    os.utime(lock.path, (time.time() - 1000,) * 2)
    begun = time.monotonic()
    with OutputLock(out).hold(QUIET):
        assert time.monotonic() - begun < 5
        holding.__exit__(None, None, None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("data", [b"", b"\0" * 512, b'{"host": "a", "bo'])
def test_what_a_loss_of_power_leaves_of_the_file_is_taken(tmp_path: Path, data: bytes) -> None:
    (tmp_path / ".out.moe2edge-lock").write_bytes(data)
    with OutputLock(tmp_path / "out").hold(QUIET):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / ".out.moe2edge-lock"
    path.write_text("mine")
    with (
        pytest.raises(InputError, match="was not written by moe2edge; move it away"),
        OutputLock(tmp_path / "out").hold(QUIET),
    ):
        pass
    assert path.read_text() == "mine"
    path.unlink()
    (tmp_path / "target").touch()
    path.symlink_to("target")
    with pytest.raises(InputError), OutputLock(tmp_path / "out").hold(QUIET):
        pass
    assert path.is_symlink()


def test_names_of_any_length_have_a_lock_of_their_own(tmp_path: Path) -> None:
    names = ["x" * 247, "x" * 246 + "y", "ö" * 120, "a"]
    locks = [locking.name_lock(tmp_path / name).name for name in names]
    assert len(set(locks)) == 4
    assert all(len(os.fsencode(name)) <= 255 for name in locks)
