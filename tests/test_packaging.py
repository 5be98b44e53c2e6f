"""What pyproject.toml declares is what is on disk."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
TOOL = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def test_every_package_folder_is_declared_and_the_reverse() -> None:
    found = set()
    for package, folder in TOOL["package-dir"].items():
        for init in (ROOT / folder).rglob("__init__.py"):
            below = init.parent.relative_to(ROOT / folder).parts
            found.add(".".join((package, *below)))
    assert set(TOOL["packages"]) == found


def test_links_lead_to_the_folders_that_are_packaged() -> None:
    for name in ("passes", "targets"):
        assert (ROOT / "moe2edge" / name).resolve() == (ROOT / name).resolve()


def test_constraints_name_every_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = list(project["dependencies"])
    for extra in ("cpu", "test", "dev"):
        wanted += project["optional-dependencies"][extra]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {_plain(line.partition("==")[0]) for line in lines if "==" in line}
    assert not {_plain(w.partition(">=")[0]) for w in wanted} - pinned


def test_newest_constraints_differ_only_in_what_is_said() -> None:
    texts = ((ROOT / name).read_text() for name in ("constraints.txt", "constraints-newest.txt"))
    usual, newest = (dict(re.findall(r"^([\w-]+)==(.*)$", text, re.MULTILINE)) for text in texts)
    assert usual.keys() == newest.keys()
    changed = {name for name in usual if usual[name] != newest[name]}
    assert changed <= {"transformers", "onnxruntime", "peft"}


def _plain(name: str) -> str:
    return name.lower().replace("_", "-")
