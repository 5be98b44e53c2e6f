"""Who may import whom, and what importing costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from moe2edge.pipeline import registry

ROOT = Path(__file__).parents[1]
FILES = [
    path
    for folder in ("moe2edge", "passes", "targets")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if folder != "moe2edge" or not {"passes", "targets"} & set(path.relative_to(ROOT).parts)
]
# The rooms, from the ground up. A room may import itself, what stands below, and GROUND.
GROUND = {"errors", "options", "progress"}
BELOW = ["numerics", "model", "storage", "runtime", "calibration", "pipeline"]
MAY_IMPORT = {room: set(BELOW[:n]) for n, room in enumerate(BELOW)} | {
    "passes": set(BELOW),
    "targets": set(BELOW) - {"calibration"},
    "evaluation": set(BELOW),
    "commands": {*BELOW, "evaluation"},
    "cli": {*BELOW, "evaluation", "commands"} - {"numerics"},
    "testing": set(BELOW),
    # The public API, lazily.
    "__init__": {"model", "storage", "runtime", "pipeline", "evaluation", "commands"},
    "__main__": {"cli"},
}
PLUGINS = ("moe2edge.passes.", "moe2edge.targets.")


def imports(path: Path) -> list[str]:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    seen = [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    return seen + [a.name for node in nodes if isinstance(node, ast.Import) for a in node.names]


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_imports_point_at_the_core(path: Path) -> None:
    siblings = [m for m in imports(path) if m.startswith(PLUGINS) and "._" not in m]
    assert not siblings, f"{path.name} imports {siblings}; move what is shared into the core"


def room_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[0] if parts[0] in ("passes", "targets") else parts[1]


def imported(path: Path) -> set[str]:
    """All modules of ours that a file names: at the top, for types alone, inside of functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        if isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{a.name}" for a in node.names}
    return {name for name in found if name.startswith("moe2edge.")}


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_rooms_import_only_rooms_below(path: Path) -> None:
    room = room_of(path)
    allowed = GROUND if room in GROUND else {room, *GROUND, *MAY_IMPORT[room]}
    named = {name.split(".")[1] for name in imported(path)}
    if path.name == "registry.py":  # looks into the two folders, and names no file there
        named -= {"passes", "targets"}
    assert not named - allowed, f"{room} imports {sorted(named - allowed)}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_only_the_command_line_prints(path: Path) -> None:
    calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
    names = {call.func.id for call in calls if isinstance(call.func, ast.Name)}
    assert "print" not in names
    if room_of(path) != "cli":
        methods = {call.func.attr for call in calls if isinstance(call.func, ast.Attribute)}
        assert not methods & {"echo", "secho"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_files_fit_one_reading(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 500


@pytest.mark.parametrize("name", registry.list_passes())
def test_every_pass_file_holds_one_documented_pass(name: str) -> None:
    kind = registry.find_pass(name)
    assert kind.__doc__
    assert kind.__name__.lower() == name.replace("_", "")
    assert all(f.description for k, f in kind.model_fields.items() if k != "rescore")


@pytest.mark.parametrize("name", registry.list_targets())
def test_every_target_has_a_summary(name: str) -> None:
    assert len(registry.find_target(name).summary) > 10


def test_recipes_are_read_without_torch() -> None:
    code = (
        "import sys; import moe2edge.cli.main; from moe2edge.pipeline import recipe, registry;"
        "from moe2edge.storage import checkpoint;"
        "recipe.parse(recipe.find('trim-w4'));"
        "[registry.target(n) for n in registry.target_names()];"
        "bad = {'torch', 'transformers', 'onnx', 'onnxruntime', 'numpy'} & set(sys.modules);"
        "sys.exit(str(bad) if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
