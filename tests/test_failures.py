"""Errors of the system and of libraries end in one line, with the exit code of their kind."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from helpers import run
from moe2edge.cli.failures import LONGEST_MESSAGE, explain_shortage, shorten
from moe2edge.cli.main import main
from moe2edge.errors import InputError, VerificationFailed
from moe2edge.runtime import memory


def fail_with(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> Result:
    """Run a command that ends with an error."""

    def raising(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("moe2edge.storage.checkpoint.open_checkpoint", raising)
    return CliRunner().invoke(main, ["inspect", "some-model"])


def chain(error: Exception, cause: BaseException) -> Exception:
    error.__cause__ = cause
    return error


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out/model.safetensors")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (FULL, "the disk is full while out/model.safetensors was written; free some space"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "x"), "the disk quota is used up"),
        (OSError(errno.EFBIG, "File too large", "x"), "(ulimit -f) is reached"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "the disk is full"),
        (chain(InputError("x cannot be read"), FULL), "the disk is full"),
        (MemoryError(), "memory could not be had (machine, container or limit: "),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "memory could not be had"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "memory"),
        (RuntimeError("could not create a primitive"), "memory could not be had"),
        (RuntimeError("can't start new thread"), "memory could not be had"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "memory could not be had"),
        (ImportError("libx.so: failed to map segment from shared object"), "memory could not be"),
        (chain(VerificationFailed("refused"), RuntimeError("std::bad_alloc")), "memory could not"),
    ],
)
def test_shortages_have_their_exit_code(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    error.add_note("3 finished blocks are kept in out.partial")
    result = fail_with(error, monkeypatch)
    assert result.exit_code == 5
    assert said in result.stderr
    assert "bug" not in result.stderr
    assert result.stderr.strip().endswith("; 3 finished blocks are kept in out.partial")
    assert len(result.stderr.strip().splitlines()) == 1
    error.__notes__.clear()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full (in {})"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "the disk quota is used up (in {})"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "is full (in {})"),
        (chain(InputError("x cannot be read"), OSError(errno.ENOSPC, "No space")), "full (in {})"),
        (FULL, "the disk is full while out/model.safetensors was written"),
    ],
)
@pytest.mark.parametrize("command", ["export", "decide"])
def test_a_full_disk_is_named_by_its_folder(
    error: Exception, said: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writing into a file that is open raises an error without a name."""

    def raising(*_: object, **__: object) -> None:
        raise error

    for name in ("export.export_targets", "decide.decide_to_file"):
        monkeypatch.setattr(f"moe2edge.commands.{name}", raising)
    error.add_note("3 finished blocks are kept")
    more = ["-t", "hf"] if command == "export" else []
    result = run(command, "builtin:tiny-moe", "-r", "trim", "-o", tmp_path / "out", *more)
    error.__notes__.clear()
    assert result.exit_code == 5
    assert said.format(tmp_path) in result.stderr
    assert result.stderr.endswith(
        "free some space, or write to another disk; 3 finished blocks are kept\n"
    )


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(errno.ENAMETOOLONG, "File name too long", "n" * 300), 2),
        (OSError(errno.ELOOP, "Too many levels of symbolic links", "a"), 2),
        (OSError(errno.EIO, "Input/output error", "out/model.onnx.data"), 1),
        # The words of a shortage in the name of a file are no shortage.
        (FileNotFoundError(errno.ENOENT, "No such file", "out of memory.txt"), 1),
        (InputError("the text out of memory.txt does not exist"), 2),
        (ValueError("something else"), 1),
    ],
)
def test_other_errors_keep_theirs(
    error: Exception, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = fail_with(error, monkeypatch)
    assert result.exit_code == code
    assert len(result.stderr.strip().splitlines()) == 1
    assert len(result.stderr) < 500
    assert explain_shortage(error) is None


def test_messages_fit_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    result = fail_with(InputError("begin" + "x" * 10**6 + "what to do"), monkeypatch)
    assert len(result.stderr) < LONGEST_MESSAGE + 20
    assert result.stderr.startswith("error: begin")
    assert result.stderr.strip().endswith("what to do")


def test_messages_hold_no_controls_of_a_terminal() -> None:
    assert shorten("a\x1b]0;title\x07\nb") == "a\\x1b]0;title\\x07\\nb"
    assert shorten("Größe 表") == "Größe 表"


def test_names_are_no_markup(tmp_path: Path) -> None:
    from rich.table import Table

    from moe2edge.cli.common import print_table

    table = Table("model")
    table.add_row("[bold red]m[/]:smile:")
    with CliRunner().isolation() as streams:
        print_table(table)
        assert b"[bold red]m[/]:smile:" in streams[0].getvalue()


def test_no_line_on_a_terminal_holds_controls(monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.table import Table

    from moe2edge.cli.common import print_table, show
    from moe2edge.cli.progress_bar import make_reporter

    name = "m\x1b[31m\x9b2J"
    table = Table("model", title=name)
    table.add_row(name)
    for on_terminal in (False, True):
        with CliRunner().isolation() as streams:
            monkeypatch.setattr("sys.stderr.isatty", lambda on=on_terminal: on)
            print_table(table)
            show(f"written: {name}\nand more")
            reporter = make_reporter(quiet=False)
            reporter.log(f"recipe:\n{name}")
            reporter.advance(f"reading {name}{'n' * 300}", 1, 1)
            out, err = (streams[n].getvalue().decode() for n in (0, 1))
        assert out.count("m\\x1b[31m\\x9b2J") == 3
        assert err.count("m\\x1b[31m\\x9b2J") == 2
        assert "\x9b" not in out + err
        assert set(err.replace("\x1b[K", "")) & {"\x1b"} == set()
        assert out.endswith("\nand more\n")
        assert max(map(len, err.splitlines())) < 200


def test_a_name_of_300_characters(tmp_path: Path) -> None:
    for command in (
        ["inspect", tmp_path / ("n" * 300)],
        ["verify", tmp_path / ("n" * 300)],
        ["generate", tmp_path / ("n" * 300), "x"],
        ["export", "builtin:tiny-moe", "-t", "onnx", "-o", tmp_path / ("n" * 300)],
    ):
        result = run(*command)
        assert result.exit_code == 2, result.stderr
        errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert [result.stderr.strip().splitlines()[-1]] == errors


# ---- limits of control groups -----------------------------------------------------------------


def make_groups(root: Path, lines: str, **limits: str) -> Path:
    """Make the files of control groups; names of limits have two underscores for a slash."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(lines)
    for name, value in limits.items():
        path = root / "sys/fs/cgroup" / name.replace("__", "/").replace("DOT", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(value)
    return root


def test_cgroups_of_version_2(tmp_path: Path) -> None:
    lines = "0::/user.slice/run-1.scope\n"
    limits = {"user.slice__run-1.scope__memory.max": "5000\n", "user.slice__memory.max": "7000\n"}
    root = make_groups(tmp_path, lines, **limits)
    assert min(memory.list_cgroup_limits(root)) == 5000


def test_a_limit_of_an_outer_group_holds(tmp_path: Path) -> None:
    limits = {"a__b__memory.max": "max\n", "a__memory.max": "7000\n"}
    assert memory.list_cgroup_limits(make_groups(tmp_path, "0::/a/b\n", **limits)) == [7000]


def test_cgroups_of_version_1(tmp_path: Path) -> None:
    lines = "5:cpu,cpuacct:/x\n4:memory:/docker/1\n1:name=systemd:/y\n"
    inside = {"memory__docker__1__memory.limit_in_bytes": "3000\n"}
    assert memory.list_cgroup_limits(make_groups(tmp_path / "host", lines, **inside)) == [3000]
    # In a container its own group is mounted at the top.
    outside = {"memory__memory.limit_in_bytes": "4000\n"}
    assert memory.list_cgroup_limits(make_groups(tmp_path / "in", lines, **outside)) == [4000]


def test_systems_without_control_groups(tmp_path: Path) -> None:
    assert memory.list_cgroup_limits(tmp_path) == []


def test_addresses_are_not_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    none = resource.RLIM_INFINITY
    limits = {resource.RLIMIT_DATA: (none, none), resource.RLIMIT_AS: (2 << 30, none)}
    monkeypatch.setattr(resource, "getrlimit", limits.__getitem__)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert memory.find_limit() == (2 << 30) - (580 << 20)
    limits[resource.RLIMIT_AS] = (1 << 30, none)
    result = run("inspect", "builtin:tiny-moe")
    assert result.exit_code == 5
    assert "loading Python with torch" in result.stderr
    assert run("recipe", "list").exit_code == 0
