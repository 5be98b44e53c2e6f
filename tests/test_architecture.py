"""Who may import whom, and what importing costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from moe2edge import registry

ROOT = Path(__file__).parents[1]
FILES = [
    path
    for folder in ("moe2edge", "moe2edge/profile", "passes", "targets")
    for path in sorted((ROOT / folder).glob("*.py"))
]
PLUGINS = ("moe2edge.passes.", "moe2edge.targets.")


def imports(path: Path) -> list[str]:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    seen = [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    return seen + [a.name for node in nodes if isinstance(node, ast.Import) for a in node.names]


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_imports_point_at_the_core(path: Path) -> None:
    siblings = [m for m in imports(path) if m.startswith(PLUGINS) and "._" not in m]
    assert not siblings, f"{path.name} imports {siblings}; move what is shared into the core"


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_only_the_command_line_prints(path: Path) -> None:
    calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
    names = {call.func.id for call in calls if isinstance(call.func, ast.Name)}
    assert "print" not in names
    # progress.py tells on stderr what work is under way.
    if not (path.name == "cli.py" or path.name.startswith("cli_") or path.name == "progress.py"):
        methods = {call.func.attr for call in calls if isinstance(call.func, ast.Attribute)}
        assert not methods & {"echo", "secho"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_files_fit_one_reading(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 500


@pytest.mark.parametrize("name", registry.pass_names())
def test_every_pass_file_holds_one_documented_pass(name: str) -> None:
    kind = registry.pass_type(name)
    assert kind.__doc__
    assert kind.__name__.lower() == name.replace("_", "")
    assert all(f.description for k, f in kind.model_fields.items() if k != "rescore")


@pytest.mark.parametrize("name", registry.target_names())
def test_every_target_has_a_summary(name: str) -> None:
    assert len(registry.target(name).summary) > 10


def test_recipes_are_read_without_torch() -> None:
    code = (
        "import sys; from moe2edge import cli, recipe, registry, checkpoint;"
        "recipe.parse(recipe.find('trim-w4'));"
        "[registry.target(n) for n in registry.target_names()];"
        "bad = {'torch', 'transformers', 'onnx', 'onnxruntime', 'numpy'} & set(sys.modules);"
        "sys.exit(str(bad) if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
