"""Put the trained model and its texts into the folder of ``builtin:tiny-moe``.

    python benchmarks/tiny_moe/pack.py --work /tmp/tiny-moe   # weights, tokenizer and texts
    python benchmarks/tiny_moe/pack.py                        # the texts alone

The texts are code of this repository as it stood at one commit, whole files in an order given by a
hash of their path: passes and targets for calibration, tests and benchmarks for evaluation. They
are data, and stay as they are when the code goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
BUILTIN = ROOT / "moe2edge" / "builtin" / "tiny-moe"
MODEL_FILES = (
    "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
    "tokenizer_config.json",
)  # fmt: skip
COMMIT = "007197cd8d0e4942a01f53a9fb74e2d1511086b2"
# Of each text: the folders that its files are from, and about how many bytes it has.
TEXTS = {
    "calibration": (("passes", "targets"), 420_000),
    "evaluation": (("tests", "benchmarks"), 240_000),
}


def read_git(*arguments: str) -> str:
    """Return what a git command prints."""
    return subprocess.run(
        ("git", "-C", str(ROOT), *arguments), check=True, capture_output=True, encoding="utf-8"
    ).stdout


def list_files(places: tuple[str, ...], suffixes: tuple[str, ...] = (".py",)) -> list[str]:
    """List the code below some folders at the commit, in the order of the hashes of the paths."""
    listed = read_git("ls-tree", "-r", "--name-only", COMMIT, "--", *places).splitlines()
    files = [path for path in listed if path.endswith(suffixes)]
    return sorted(files, key=lambda path: hashlib.sha256(path.encode()).digest())


def build_text(name: str) -> tuple[str, list[str]]:
    """Return a text, and the files that it consists of.

    Args:
        name: ``calibration`` or ``evaluation``.
    """
    folders, size = TEXTS[name]
    taken: dict[str, str] = {}
    for path in list_files(folders):
        if sum(map(len, taken.values())) < size:
            taken[path] = read_git("show", f"{COMMIT}:{path}")
    return "\n".join(taken.values()), list(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, help="folder of the training; default: texts alone")
    args = parser.parse_args()
    BUILTIN.mkdir(parents=True, exist_ok=True)
    for name in MODEL_FILES if args.work else ():
        shutil.copyfile(args.work / "model" / name, BUILTIN / name)
    for name in TEXTS:
        text, files = build_text(name)
        (BUILTIN / f"{name}.txt").write_text(text, "utf-8")
        print(f"{name}: {len(text.encode()):,} bytes, {len(files)} files: {', '.join(files)}")


if __name__ == "__main__":
    main()
