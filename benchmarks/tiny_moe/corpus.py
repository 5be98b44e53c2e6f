"""The training text of the built-in model: the running Python's standard library.

Whole modules are held out, a module together with its own tests (``json`` with
``test/test_json``), so that nothing of a held-out module is seen in training. The split is by a
hash of the module's name and therefore the same on every machine and every Python version.
"""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Split = Literal["train", "calibration", "evaluation"]

# Tables and generated text, not programs; `__phello__` and friends are build fixtures.
SKIPPED = ("encodings", "pydoc_data", "site-packages", "lib-dynload", "__pycache__", "ensurepip")
# Held out for good: other held-out texts of the project's studies are made of these.
ALWAYS_EVALUATION = frozenset(
    {"itertools", "operator", "types", "unary", "userlist", "tomllib", "turtledemo"}
    | {"peg_generator", "sys_setprofile", "json"}
)
ALWAYS_HELD_OUT_FILES = frozenset(
    {"unittest/test/test_async_case.py", "xml/dom/minicompat.py"}
    | {
        f"test/test_importlib/{name}.py"
        for name in ("import_/test_caching", "test_locks", "update-zips")
    }
)


@dataclass(frozen=True)
class Module:
    """A source file: its path below the standard library, its text, its split."""

    path: str
    text: str
    split: Split


def module_name(path: str) -> str:
    """Return the name of a module and its tests: ``test/test_json/x.py``, ``json/x.py`` -> json."""
    parts = path.removesuffix(".py").split("/")
    if parts[0] == "test" and len(parts) > 1:
        parts = parts[1:]
    return parts[0].removeprefix("test_").removeprefix("_py").strip("_")


def split_of(path: str) -> Split:
    """Return the split of a file: 4 % of the modules for calibration, 4 % for evaluation."""
    name = module_name(path)
    if name in ALWAYS_EVALUATION or path in ALWAYS_HELD_OUT_FILES:
        return "evaluation"
    bucket = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 25
    return {0: "evaluation", 1: "calibration"}.get(bucket, "train")  # type: ignore[return-value]


def modules(root: Path | None = None) -> list[Module]:
    """Return all usable source files of the standard library below ``root``, sorted by path."""
    root = root or Path(sysconfig.get_path("stdlib"))
    found, seen = [], set()
    for file in sorted(root.rglob("*.py")):
        path = file.relative_to(root).as_posix()
        if any(part in SKIPPED for part in path.split("/")) or "bad" in file.name:
            continue
        try:
            text = file.read_text("utf-8")
        except UnicodeDecodeError:
            continue
        digest = hashlib.sha256(text.encode()).digest()
        if len(text) < 200 or digest in seen:
            continue
        seen.add(digest)
        found.append(Module(path, text, split_of(path)))
    return found


def choose_modules(corpus: list[Module], split: Split, size: int) -> list[Module]:
    """Choose modules of a split, ``size`` characters in all, none longer than a tenth of it.

    The order is given by a hash of their path.
    """
    taken: list[Module] = []
    for module in sorted(corpus, key=lambda m: hashlib.sha256(m.path.encode()).digest()):
        fits = module.split == split and len(module.text) <= size // 10
        if fits and sum(len(m.text) for m in taken) < size:
            taken.append(module)
    return taken
