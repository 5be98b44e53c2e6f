"""Count the files and lines that a newcomer reads and touches to add something.

For a pass, a target, a family and a command, two counts of what is read:

- *told*: the page, and the files that it tells to read. Pages name them in a list below
  ``**Read first**``; `BEFORE` has them for a checkout from before there were pages, where
  CONTRIBUTING and the nearest example take the place of the page.
- *with imports*: told, and the modules of the project that the example imports at its top, type
  checking included, each once. The example is the code block of the page that has a title in
  ``passes/`` or ``targets/``; before, it is the simplest file that there was.

Lines are all lines of a file, blank ones and comments included. What is touched is the list below
``**Touch**`` of the page; generated files (schema, golden texts) are counted apart. Lines touched
are those of its titled code blocks. Before, files touched are those that the same addition needs.

Usage::

    python benchmarks/reach.py                # this checkout
    python benchmarks/reach.py --before OLD   # a checkout of f14e8d5
"""

from __future__ import annotations

import argparse
import ast
import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"^```(\w*)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = {
    "pass": "docs/add-a-pass.md",
    "target": "docs/add-a-target.md",
    "family": "docs/add-a-family.md",
    "command": "CONTRIBUTING.md",
}


@dataclass(frozen=True)
class Old:
    """What there was to read before the pages.

    Attributes:
        read: what CONTRIBUTING named, and where it named nothing the file that defines the thing.
        example: the simplest one that there was; empty: none is needed.
        touched: files that an addition changed or added by hand.
        generated: files that a command wrote for it.
    """

    read: tuple[str, ...]
    example: str
    touched: int
    generated: int = 0


# Of f14e8d5. CONTRIBUTING said nothing of targets and commands.
BEFORE = {
    "pass": Old(("CONTRIBUTING.md", "moe2edge/pipeline.py"), "passes/layer_drop.py", 3, 1),
    "target": Old(("CONTRIBUTING.md", "moe2edge/target.py"), "targets/hf.py", 3),
    "family": Old(("CONTRIBUTING.md", "moe2edge/families.py"), "", 3),
    "command": Old(("CONTRIBUTING.md", "moe2edge/cli.py"), "moe2edge/cli_recipe.py", 4),
}


def find_imports(code: str, root: Path) -> set[Path]:
    """Files of the project that some code imports at its top, type checking included."""
    nodes = []
    for node in ast.parse(code).body:
        nodes += node.body if isinstance(node, ast.If) else [node]
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    found = set()
    for name in names:
        parts = name.split(".")
        if parts[0] == "moe2edge" and len(parts) > 1:
            below = parts[1:] if parts[1] in ("passes", "targets") else parts
            path = root.joinpath(*below).with_suffix(".py")
            found |= {path} if path.is_file() else set()
    return found


def list_items(text: str, heading: str) -> list[str]:
    """Return the files that the list below a heading names."""
    _, _, rest = text.partition(f"**{heading}")
    block = rest.partition("\n\n")[2].partition("\n\n")[0]
    return re.findall(r"^- \[?`?([\w/.]+)", block, re.MULTILINE)


def count_lines(paths: set[Path]) -> int:
    """Lines of files."""
    return sum(len(path.read_text("utf-8").splitlines()) for path in paths)


def describe(kind: str, told: set[Path], imports: set[Path], touched: str) -> str:
    """Format a row of the table."""
    whole = told | imports
    return (
        f"| {kind} | {len(told)}, {count_lines(told):,} | {len(whole)}, {count_lines(whole):,} "
        f"| {touched} |"
    )


def format_touched(edited: int, generated: int) -> str:
    """Format numbers of files: edited by hand, and generated."""
    return f"{edited} + {generated} generated" if generated else str(edited)


def measure_before(old: Path) -> list[str]:
    """Count in a checkout from before there were pages."""
    rows = []
    for kind, was in BEFORE.items():
        told = {old / name for name in (*was.read, was.example) if name}
        example = (old / was.example).read_text("utf-8") if was.example else ""
        imports = find_imports(example, old)
        rows.append(describe(kind, told, imports, format_touched(was.touched, was.generated)))
    return rows


def measure_after() -> list[str]:
    """Count in this checkout, by its pages."""
    rows = []
    for kind, name in PAGES.items():
        text = (ROOT / name).read_text("utf-8")
        told = {ROOT / name, *(ROOT / item for item in list_items(text, "Read first"))}
        touched, imports, lines = list_items(text, "Touch"), set(), 0
        for _, options, code in FENCE.findall(text):
            title = re.search(r'title="([^"]+)"', options)
            if title is not None and title[1].endswith(".py"):
                lines += len(code.splitlines())
                if title[1].startswith(("passes/", "targets/")):
                    imports |= find_imports(code, ROOT)
        if kind == "command":  # its page names a file as the example
            example = ROOT / list_items(text, "Read first")[-1]
            imports |= find_imports(example.read_text("utf-8"), ROOT)
        told = {path for path in told if path.is_file()}
        generated = sum(name.endswith(".json") or "golden" in name for name in touched)
        shown = format_touched(len(touched) - generated, generated)
        shown += f", {lines}" if lines else ""
        rows.append(describe(kind, told, imports, shown))
    return rows


def main() -> None:
    """Print a table for this checkout, or for an old one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path, help="a checkout of f14e8d5")
    old = parser.parse_args().before
    print("| to add a | told to read: files, lines | with imports | touched: files, lines |")
    print("|---|---|---|---|")
    print("\n".join(measure_after() if old is None else measure_before(old)))


if __name__ == "__main__":
    main()
