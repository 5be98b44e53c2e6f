"""Calibration and evaluation text by domain, disjoint, from the files in ``--data`` of a study."""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

# Modules of the standard library that make up python-test.txt, and those it shares code with.
HELD_OUT = (
    "test_importlib", "test_itertools", "test_json", "test_operator", "test_peg_generator",
    "test_sys_setprofile", "test_types", "test_unary", "test_userlist", "tomllib", "colormixer",
    "test_async_case", "minicompat",
)  # fmt: skip
DOMAINS = ("code", "math", "plays", "encyclopedia")


def write_texts(data: Path, folder: Path) -> dict[str, dict[str, Path]]:
    """Write text files, and return them by purpose (``calibration``, ``evaluation``) and domain."""
    plays = (data / "tinyshakespeare.txt").read_text()
    cut = int(len(plays) * 0.92)
    contents = {
        "calibration": {
            "code": "\n".join(_standard_library()),
            "math": "\n\n".join(_problems(data / "gsm8k-train.jsonl")),
            "plays": plays[:cut],
            "encyclopedia": (data / "wikitext2-valid.txt").read_text(),
        },
        "evaluation": {
            "code": (data / "python-test.txt").read_text(),
            "math": "\n\n".join(_problems(data / "gsm8k-test.jsonl")),
            "plays": plays[cut:],
            "encyclopedia": (data / "wikitext2-test.txt").read_text(),
        },
    }
    found: dict[str, dict[str, Path]] = {}
    for purpose, texts in contents.items():
        for domain, text in texts.items():
            path = folder / f"{purpose}-{domain}.txt"
            path.write_text(text)
            found.setdefault(purpose, {})[domain] = path
    return found


def _problems(path: Path) -> Iterator[str]:
    for line in path.read_text().splitlines():
        row = json.loads(line)
        yield f"{row['question']}\n{row['answer']}"


def _standard_library() -> Iterator[str]:
    """Yield modules at the top of the running Python's library, about two megabytes."""
    size = 0
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        if size < 2_000_000 and not any(name in path.stem for name in HELD_OUT):
            text = path.read_text("utf-8", "replace")
            size += len(text)
            yield text
