"""The documentation: links lead somewhere, commands parse, and the how-to pages work as written."""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import pytest

from moe2edge.cli.main import main

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Fence:
    """A code block of a page.

    Attributes:
        language: of the code.
        options: what stands behind it, such as ``title="passes/x.py"``.
        text: the code.
    """

    language: str
    options: dict[str, str]
    text: str


def fences(page: Path) -> Iterator[Fence]:
    """Return the code blocks of a page in order."""
    for language, rest, text in FENCE.findall(page.read_text("utf-8")):
        options = dict(re.findall(r'([\w-]+)="(.*?)"', rest))
        yield Fence(language, {k: v.replace("\\n", "\n") for k, v in options.items()}, text)


def prose(page: Path) -> str:
    """Return a page without its code blocks."""
    return FENCE.sub("", page.read_text("utf-8"))


# ---- links and names -----------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """Anchors of the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    plain = (re.sub(r"[`*]|\[|\]\([^)]*\)", "", heading).strip().lower() for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in plain}


def broken_links(page: Path) -> list[str]:
    """Relative links that lead nowhere, or to a heading that is not there."""
    found = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        to = (page.parent / name).resolve() if name else page
        if not to.exists() or (anchor and anchor not in anchors(to)):
            found.append(link)
    return found


def test_every_link_leads_somewhere() -> None:
    broken = {page.name: found for page in PAGES if (found := broken_links(page))}
    assert not broken


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "index.md").read_text("utf-8")
    missing = [page.name for page in PAGES if page.name != "index.md" and page.name not in index]
    assert not missing


# Files that a page tells its reader to write.
WRITTEN = re.compile(r"npz|expert_half|NAME")
NAMED = re.compile(
    r"`((?:moe2edge|passes|targets|tests|benchmarks|docs)/[\w./-]*\w\.\w+"
    r"|(?:moe2edge|passes|targets|tests|benchmarks|docs)/(?:[\w-]+/)*)`"
)


def test_every_path_that_is_named_exists() -> None:
    missing = {
        page.name: lost
        for page in PAGES
        if (
            lost := [
                name
                for name in NAMED.findall(page.read_text("utf-8"))
                if not WRITTEN.search(name) and not (ROOT / name).exists()
            ]
        )
    }
    assert not missing


def test_names_in_the_tables_of_the_architecture_are_in_their_files() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    lost = []
    for row in re.findall(r"^\|(.*`moe2edge/[\w/]+\.py`.*)\|$", text, re.MULTILINE):
        cells = row.split("|")
        where = next(n for n, cell in enumerate(cells) if "`moe2edge/" in cell)
        code = "".join(
            (ROOT / f).read_text("utf-8") for f in re.findall(r"`(\S+\.py)`", cells[where])
        )
        names = [name.rpartition(".")[2] for name in re.findall(r"`([\w.]+)`", cells[where - 1])]
        pattern = r"^( *def|class) {0}\b|^{0} = "
        lost += [n for n in names if not re.search(pattern.format(n), code, re.MULTILINE)]
    assert not lost


# ---- commands ------------------------------------------------------------------------------------


def commands(page: Path) -> Iterator[list[str]]:
    """Every ``moe2edge ...`` line of the shell blocks of a page, as words behind the name."""
    for fence in fences(page):
        if fence.language in ("sh", "console", ""):
            for line in fence.text.replace("\\\n", " ").splitlines():
                for part in re.split(r"&&|\|(?!\|)", line.removeprefix("$ ")):
                    words = shlex.split(part.partition(" > ")[0], comments=True)
                    if words[:1] == ["moe2edge"]:
                        yield words[1:]


def parse(words: list[str]) -> None:
    """Parse a command line as click would, without running it.

    Raises:
        click.ClickException: a verb or an option is unknown, or an argument is missing.
    """
    command: click.Command = main
    context = click.Context(main, info_name="moe2edge")
    while isinstance(command, click.Group) and words[0] not in ("--help", "--version"):
        _, found, words = command.resolve_command(context, words)
        assert found is not None
        command = found
    if "--help" not in words and "--version" not in words:
        command.make_context("moe2edge", list(words), resilient_parsing=False)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_parses(page: Path) -> None:
    wrong = []
    for words in commands(page):
        try:
            parse(words)
        except click.ClickException as error:
            wrong.append(f"moe2edge {shlex.join(words)}: {error.format_message()}")
    assert not wrong


def test_the_readme_names_every_pass_target_family_and_verb() -> None:
    from moe2edge.model.family import FAMILIES
    from moe2edge.pipeline import registry

    text = (ROOT / "README.md").read_text("utf-8")
    names = [*registry.list_passes(), *registry.list_targets(), *FAMILIES, *main.commands]
    assert not [name for name in names if f"`{name}`" not in text]


# ---- messages ------------------------------------------------------------------------------------


def literals() -> set[str]:
    """Every piece of text in the code: strings, and what stands between values in f-strings."""
    folders = (ROOT / name for name in ("moe2edge", "passes", "targets"))
    trees = (ast.parse(path.read_text("utf-8")) for f in folders for path in f.rglob("*.py"))
    nodes = (node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant))
    return {n.value.strip() for n in nodes if isinstance(n.value, str) and "\n" not in n.value}


def known_part(message: str, pieces: set[str]) -> float:
    """Which part of the letters of a message stands in the code, in pieces of 10 or more."""
    left = message
    for piece in sorted(pieces, key=len, reverse=True):
        if len(piece) >= 10:
            left = left.replace(piece, "")
    return 1 - len(left) / len(message)


def test_messages_of_the_troubleshooting_page_are_those_of_the_code() -> None:
    text = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
    quoted = re.findall(r"^\| `(.*?)` \|", text, re.MULTILINE)
    quoted += re.findall(r"^error: (.*)$", text, re.MULTILINE)
    pieces = literals()
    lost = [m for m in quoted if "No such command" not in m and known_part(m, pieces) < 0.1]
    assert len(quoted) > 30
    assert not lost


# ---- pages that are followed literally -----------------------------------------------------------


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """Return a copy of what a contributor works on, where a test may write."""
    folder = tmp_path / "clone"
    ignore = shutil.ignore_patterns("__pycache__", "builtin")
    for name in ("moe2edge", "passes", "targets", "tests"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignore)
    (folder / "moe2edge" / "builtin").symlink_to(ROOT / "moe2edge" / "builtin")
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def write(fence: Fence, folder: Path) -> None:
    """Write a block into the file of its title, or put it where its options say."""
    path, text = folder / fence.options["title"], fence.text
    places = {"after": "{at}\n{new}", "before": "{new}{at}", "instead-of": "{new}"}
    place = next((key for key in places if key in fence.options), None)
    if place is not None:
        old, at = path.read_text("utf-8"), fence.options[place]
        at += "\n" if place == "instead-of" else ""
        new = places[place].format(at=at, new=text)
        assert old.count(at) == 1, f"{at!r} is {old.count(at)} times in {path.name}"
        text = old.replace(at + "\n", new) if place == "after" else old.replace(at, new)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")


def run(script: str, folder: Path, code: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run shell commands in a folder, with the code there, or in another one, before any other."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "COV"))}
    own = {"PYTHONPATH": str(code or folder), "PYTHONDONTWRITEBYTECODE": "1"}
    # The scripts of an environment may be missing or of another one.
    names = ("python", ""), ("pytest", " -m pytest"), ("moe2edge", " -m moe2edge")
    python = shlex.quote(sys.executable)
    functions = "".join(f'{name}() {{ {python}{rest} "$@"; }}\n' for name, rest in names)
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", functions + script],
        cwd=folder,
        env={**inherited, **own, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")},
        capture_output=True,
        text=True,
    )


def follow(page: str, folder: Path) -> None:
    """Do what a page says, block by block."""
    for fence in fences(ROOT / "docs" / page):
        if "title" in fence.options:
            write(fence, folder)
        elif fence.language == "sh":
            done = run(fence.text, folder)
            assert done.returncode == 0, f"{fence.text}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"


@pytest.mark.slow
def test_the_lines_of_the_commands_page_run_in_order(tmp_path: Path) -> None:
    lines = next(fence.text for fence in fences(ROOT / "docs" / "cli.md"))
    done = run(lines, tmp_path, code=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_the_python_page_runs_in_order(tmp_path: Path) -> None:
    for fence in fences(ROOT / "docs" / "python.md"):
        (tmp_path / "example.py").write_text(fence.text, "utf-8")
        done = run("python example.py", tmp_path, code=ROOT)
        assert done.returncode == 0, f"{fence.text}\n{done.stderr[-3000:]}"


@pytest.mark.slow
def test_adding_a_pass(clone: Path) -> None:
    follow("add-a-pass.md", clone)
    report = (clone / "out-half" / "report.json").read_text("utf-8")
    assert '"name": "expert_half"' in report


@pytest.mark.slow
def test_adding_a_target(clone: Path) -> None:
    follow("add-a-target.md", clone)
    assert (clone / "out-npz" / "weights.npz").is_file()


@pytest.mark.slow
def test_adding_a_family(clone: Path) -> None:
    page = "add-a-family.md"
    for fence in fences(ROOT / "docs" / page):  # the row is there: take it out
        if "title" in fence.options:
            path = clone / fence.options["title"]
            text = path.read_text("utf-8")
            lines = [fence.text] if fence.text in text else fence.text.splitlines(keepends=True)
            for line in lines:
                assert text.count(line) == 1, f"{path.name} has no {line!r}"
                text = text.replace(line, "")
            path.write_text(text, "utf-8")
    gone = run("pytest -q -n 0 tests/test_families.py -k olmoe", clone)
    assert gone.returncode == 1
    assert "KeyError: 'olmoe'" in gone.stdout
    follow(page, clone)
    row = next(f.text for f in fences(ROOT / "docs" / page) if "family.py" in str(f.options))
    assert row in (clone / "moe2edge" / "model" / "family.py").read_text("utf-8")
