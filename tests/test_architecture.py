"""Who may import whom, what importing costs, and the house rules of files, names and docstrings.

Every rule is a function of the files below a folder that names all its faults.
"""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from moe2edge.pipeline import registry

ROOT = Path(__file__).parents[1]
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
PLUGINS = ("passes", "targets")
REGISTRY = "moe2edge.pipeline.registry"  # the only one that names the folders of plug-ins
MOST_LINES, MOST_FUNCTION_LINES = 500, 70
CLAUSE = re.compile(r"(What|Whether|Of|How|Where|Which|Who|As)\b")


@dataclass(frozen=True)
class Source:
    """A file of ours.

    Attributes:
        path: relative to the root.
        text: its content.
    """

    path: Path
    text: str

    @property
    def room(self) -> str:
        """Folder or file on the ground that it is or belongs to."""
        parts = self.path.with_suffix("").parts
        return parts[0] if parts[0] in PLUGINS else parts[1]

    @property
    def module(self) -> str:
        """Name under which it is imported; a package has that of its folder."""
        parts = self.path.with_suffix("").parts
        parts = parts if parts[0] == "moe2edge" else ("moe2edge", *parts)
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @cached_property
    def imports(self) -> dict[str, str]:
        """Modules and names of ours that it imports anywhere, by the name that they get here."""
        found: dict[str, str] = {}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                found |= {a.asname or a.name: a.name for a in node.names}
            if isinstance(node, ast.ImportFrom):
                found |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
        return {name: full for name, full in found.items() if full.split(".")[0] == "moe2edge"}


def read_sources(root: Path) -> list[Source]:
    """Return all files of the three folders below ``root``; links in moe2edge are not followed."""
    paths = [
        path.relative_to(root)
        for folder in ("moe2edge", *PLUGINS)
        for path in sorted((root / folder).rglob("*.py"))
        if folder != "moe2edge" or not set(PLUGINS) & set(path.relative_to(root).parts)
    ]
    return [Source(path, (root / path).read_text("utf-8")) for path in paths]


# ---- imports -------------------------------------------------------------------------------------


def find_imports_from_above(sources: Sequence[Source]) -> Iterator[str]:
    """Faults: a room imports what does not stand below it."""
    for source in sources:
        room = source.room
        allowed = GROUND if room in GROUND else {room, *GROUND, *MAY_IMPORT[room]}
        if source.module == REGISTRY:
            allowed = allowed | set(PLUGINS)
        for name in sorted(set(source.imports.values())):
            if name.split(".")[1:2] and name.split(".")[1] not in allowed:
                yield f"{source.path} imports {name}, which is not below {room}"


def find_plugins_that_import_plugins(sources: Sequence[Source]) -> Iterator[str]:
    """Faults: a pass or target imports another one; what is shared belongs into the core."""
    plugins = tuple(f"moe2edge.{folder}." for folder in PLUGINS)
    for source in sources:
        for name in sorted(set(source.imports.values())):
            if name.startswith(plugins) and not name.split(".")[2].startswith("_"):
                yield f"{source.path} imports {name}"


def find_private_imports(sources: Sequence[Source]) -> Iterator[str]:
    """Faults: a private name of another file is used; files ``_x.py`` belong to their folder."""
    modules = {source.module for source in sources}
    for source in sources:
        for name in sorted(set(source.imports.values())):
            *folders, last = name.split(".")[1:] or [name]
            own = name.startswith(source.module.rpartition(".")[0] + "._") and name in modules
            inner = [f for f in folders if f.startswith("_")]
            if inner and source.room == folders[0]:
                inner = []
            if inner or (last.startswith("_") and not last.startswith("__") and not own):
                yield f"{source.path} imports {name}"
        for node in ast.walk(source.tree):
            if not isinstance(node, ast.Attribute) or not isinstance(node.value, ast.Name):
                continue
            if source.imports.get(node.value.id) in modules and re.match("_[^_]", node.attr):
                yield f"{source.path}:{node.lineno} uses {node.value.id}.{node.attr}"


def find_circles(sources: Sequence[Source]) -> Iterator[str]:
    """Faults: files import each other, be it for types alone or inside of functions."""
    modules = {source.module for source in sources}
    graph = {}
    for source in sources:
        found = set()
        for name in source.imports.values():
            while name and name not in modules:
                name = name.rpartition(".")[0]
            found.add(name)
        graph[source.module] = found - {source.module, ""}
    while True:
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            circle = error.args[1]
            yield f"{' <- '.join(circle)}"
            graph[circle[1]] = graph[circle[1]] - {circle[0]}  # and look for others
        else:
            return


def find_names_of_plugin_folders(sources: Sequence[Source]) -> Iterator[str]:
    """Faults: a file of the core names a folder of plug-ins, as only the registry does."""
    names = tuple(f"moe2edge.{folder}" for folder in PLUGINS)
    for source in sources:
        if source.room in PLUGINS or source.module == REGISTRY:
            continue
        for node in ast.walk(source.tree):
            text = node.value if isinstance(node, ast.Constant) else None
            if isinstance(text, str) and text.startswith(names):
                yield f"{source.path}: {text}"
        for name in source.imports.values():
            if name.startswith(names):
                yield f"{source.path} imports {name}"


def find_numerics_in_the_command_line(sources: Sequence[Source]) -> Iterator[str]:
    """Faults: the command line imports numerics."""
    for source in sources:
        if source.room == "cli":
            bad = [n for n in source.imports.values() if n.startswith("moe2edge.numerics")]
            yield from (f"{source.path} imports {name}" for name in bad)


def find_rooms_that_import(sources: Sequence[Source]) -> Iterator[str]:
    """Faults: an ``__init__.py`` of a room says nothing about it, or imports something."""
    for source in sources:
        if source.path.name == "__init__.py" and source.path.parts != ("moe2edge", "__init__.py"):
            if not ast.get_docstring(source.tree):
                yield f"{source.path} has no docstring"
            if any(isinstance(n, ast.Import | ast.ImportFrom) for n in ast.walk(source.tree)):
                yield f"{source.path} imports something"


# ---- files, names, docstrings --------------------------------------------------------------------


def find_prints(sources: Sequence[Source]) -> Iterator[str]:
    """Faults: something prints, or something else than the command line echoes."""
    for source in sources:
        for call in (n for n in ast.walk(source.tree) if isinstance(n, ast.Call)):
            if isinstance(call.func, ast.Name) and call.func.id == "print":
                yield f"{source.path}:{call.lineno} prints"
            echoes = isinstance(call.func, ast.Attribute) and call.func.attr in ("echo", "secho")
            if source.room != "cli" and echoes:
                yield f"{source.path}:{call.lineno} echoes"


def find_long_files(sources: Sequence[Source]) -> Iterator[str]:
    """Faults: a file is too long for one reading."""
    for source in sources:
        if (lines := len(source.text.splitlines())) > MOST_LINES:
            yield f"{source.path} has {lines} lines, at most {MOST_LINES}"


def find_long_functions(sources: Sequence[Source]) -> Iterator[str]:
    """Faults: a function is too long, its docstring included."""
    for source in sources:
        for node in ast.walk(source.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > MOST_FUNCTION_LINES:
                    yield f"{source.path}:{node.lineno} {node.name} has {lines} lines"


def find_names_in_two_files(sources: Sequence[Source]) -> Iterator[str]:
    """Faults: a public top-level name is in two files.

    A plug-in's class is named by its file, so a pass and a target may have the same name.
    """
    places: dict[str, set[str]] = defaultdict(set)
    for source in sources:
        for node in source.tree.body:
            names: list[str] = []
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                names = [node.name]
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                places_of = node.targets if isinstance(node, ast.Assign) else [node.target]
                inner = (n for target in places_of for n in ast.walk(target))
                names = [n.id for n in inner if isinstance(n, ast.Name)]
            for name in names:
                if name.startswith("_"):
                    continue
                stem = source.path.stem.replace("_", "")
                is_plugin = source.room in PLUGINS and name.lower() == stem
                places[name].add("a plug-in" if is_plugin else str(source.path))
    for name, files in sorted(places.items()):
        if len(files) > 1:
            yield f"{name} is in {', '.join(sorted(files))}"


Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def list_docstrings(source: Source) -> list[tuple[Documented, str]]:
    """Return what has a docstring, and the docstring."""
    found = (n for n in ast.walk(source.tree) if isinstance(n, Documented))
    return [(node, text) for node in found if (text := ast.get_docstring(node))]


def find_docstrings_that_are_clauses(sources: Sequence[Source]) -> Iterator[str]:
    """Faults: a docstring begins with a word of a subordinate clause, not with a verb or noun."""
    for source in sources:
        for node, text in list_docstrings(source):
            if CLAUSE.match(text):
                yield f"{source.path}:{getattr(node, 'lineno', 1)} {text.splitlines()[0]}"


def find_comments_that_begin_with_of(sources: Sequence[Source]) -> Iterator[str]:
    """Faults: a comment begins with "Of"."""
    for source in sources:
        for token in tokenize.generate_tokens(io.StringIO(source.text).readline):
            if token.type == tokenize.COMMENT and re.match(r"#:? *Of ", token.string):
                yield f"{source.path}:{token.start[0]} {token.string}"


Rule = Callable[[Sequence[Source]], Iterator[str]]
RULES: tuple[Rule, ...] = (
    find_imports_from_above,
    find_plugins_that_import_plugins,
    find_private_imports,
    find_circles,
    find_names_of_plugin_folders,
    find_numerics_in_the_command_line,
    find_rooms_that_import,
    find_prints,
    find_long_files,
    find_long_functions,
    find_names_in_two_files,
    find_docstrings_that_are_clauses,
    find_comments_that_begin_with_of,
)


@pytest.fixture(scope="module")
def sources() -> list[Source]:
    return read_sources(ROOT)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_all_files_keep_the_rule(rule: Rule, sources: list[Source]) -> None:
    if faults := list(rule(sources)):
        pytest.fail("\n".join([f"{len(faults)} faults:", *faults]), pytrace=False)


# ---- the rules find what they are for ------------------------------------------------------------

LONG = "def long():\n" + "    x = 1\n" * 70
# Files by their path, and the rules that they break.
PLANTED: dict[str, tuple[dict[str, str], set[Rule]]] = {
    "nothing": (
        {
            "moe2edge/model/a.py": "from moe2edge.numerics import b\nfrom moe2edge.errors import E",
            "moe2edge/numerics/b.py": '"""Sums."""\nfrom torch import x  # of all',
            "moe2edge/pipeline/registry.py": "import moe2edge.passes\nX = 'moe2edge.targets.x'",
            "passes/gptq.py": "from moe2edge.passes._shared import y\nclass Gptq: pass",
            "passes/_shared.py": "from moe2edge.passes import _more\nz = _more.y",
            "passes/_more.py": "y = 1" + "\n" * 400,
            "targets/gptq.py": "class Gptq:\n    def f(self): return self._x",
        },
        set(),
    ),
    "an import from above": (
        {"moe2edge/model/a.py": "from moe2edge.pipeline import b"},
        {find_imports_from_above},
    ),
    "an import from above for types": (
        {
            "moe2edge/model/a.py": "if TYPE_CHECKING:\n    from moe2edge.pipeline.b import C",
            "moe2edge/pipeline/b.py": "class C: pass",
        },
        {find_imports_from_above},
    ),
    "an import from above in a function": (
        {"moe2edge/storage/a.py": "def f():\n    import moe2edge.runtime.load as load"},
        {find_imports_from_above},
    ),
    "an import from the side": (
        {"targets/x.py": "from moe2edge.calibration import walk"},
        {find_imports_from_above},
    ),
    "the ground imports a room": (
        {"moe2edge/errors.py": "from moe2edge.model import a"},
        {find_imports_from_above},
    ),
    "numerics in the command line": (
        {"moe2edge/cli/a.py": "from moe2edge.numerics import scheme"},
        {find_imports_from_above, find_numerics_in_the_command_line},
    ),
    "a plug-in imports a plug-in": (
        {"passes/a.py": "def f():\n    from moe2edge.passes.b import x"},
        {find_plugins_that_import_plugins},
    ),
    "a private name": (
        {"moe2edge/model/a.py": "from moe2edge.model.b import _x", "moe2edge/model/b.py": "_x = 1"},
        {find_private_imports},
    ),
    "a private name of a module": (
        {
            "moe2edge/model/a.py": "from moe2edge.model import b\nprint_ = b._x",
            "moe2edge/model/b.py": "_x = 1",
        },
        {find_private_imports},
    ),
    "a file that another folder of plug-ins owns": (
        {"targets/a.py": "from moe2edge.passes._b import x", "passes/_b.py": "x = 1"},
        {find_imports_from_above, find_private_imports},
    ),
    "a circle": (
        {
            "moe2edge/model/a.py": "if TYPE_CHECKING:\n    from moe2edge.model.b import x",
            "moe2edge/model/b.py": "from moe2edge.model import c\nx = 1",
            "moe2edge/model/c.py": "def f():\n    from moe2edge.model import a",
        },
        {find_circles},
    ),
    "the core names a plug-in": (
        {"moe2edge/pipeline/a.py": "import importlib\nX = importlib('moe2edge.passes.gptq')"},
        {find_names_of_plugin_folders},
    ),
    "the core imports a plug-in": (
        {"moe2edge/pipeline/a.py": "from moe2edge.passes.gptq import Gptq"},
        {
            find_names_of_plugin_folders,
            find_imports_from_above,
            find_plugins_that_import_plugins,
        },
    ),
    "a room that imports": (
        {"moe2edge/model/__init__.py": '"""A room."""\nfrom moe2edge.numerics import a'},
        {find_rooms_that_import},
    ),
    "a room without a word": ({"moe2edge/model/__init__.py": ""}, {find_rooms_that_import}),
    "print": ({"moe2edge/model/a.py": "print(1)"}, {find_prints}),
    "echo": ({"moe2edge/commands/a.py": "import click\nclick.echo(1)"}, {find_prints}),
    "a long file": ({"targets/a.py": "\n" * 501}, {find_long_files}),
    "a long function": ({"targets/a.py": LONG}, {find_long_functions}),
    "a long method": (
        {"targets/a.py": "class A:\n" + "".join(f"  {line}\n" for line in LONG.splitlines())},
        {find_long_functions},
    ),
    "a name twice": (
        {"moe2edge/model/a.py": "def f(): pass", "targets/a.py": "g, f = 1, 2"},
        {find_names_in_two_files},
    ),
    "a class twice": (
        {"passes/gptq.py": "class Gptq: pass", "moe2edge/model/a.py": "class Gptq: pass"},
        {find_names_in_two_files},
    ),
    "a docstring": (
        {"moe2edge/model/a.py": 'class A:\n    def f(self):\n        """Whether it is."""'},
        {find_docstrings_that_are_clauses},
    ),
    "a docstring of a file": (
        {"moe2edge/model/a.py": '"""What is."""'},
        {find_docstrings_that_are_clauses},
    ),
    "a comment": ({"moe2edge/model/a.py": "x = 1  # Of all"}, {find_comments_that_begin_with_of}),
}


@pytest.mark.parametrize("case", PLANTED)
def test_a_planted_fault_is_found_and_nothing_else(case: str, tmp_path: Path) -> None:
    files, broken = PLANTED[case]
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    planted = read_sources(tmp_path)
    assert len(planted) == len(files)
    assert {rule for rule in RULES if list(rule(planted))} == broken


def test_every_rule_has_a_planted_fault() -> None:
    assert set().union(*(broken for _, broken in PLANTED.values())) == set(RULES)


def test_the_rules_see_all_files(sources: list[Source]) -> None:
    """Every module that can be imported is one of them, and the rooms are those of the list."""
    assert len(sources) > 120
    modules = {source.module for source in sources}
    assert modules >= {f"moe2edge.passes.{name}" for name in registry.list_passes()}
    files = {name.replace("-", "_") for name in registry.list_targets()}
    assert modules >= {f"moe2edge.targets.{name}" for name in files}
    assert {source.room for source in sources} == {*MAY_IMPORT, *GROUND}


# ---- plug-ins, and the cost of importing ---------------------------------------------------------


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
        "[registry.find_target(n) for n in registry.list_targets()];"
        "bad = {'torch', 'transformers', 'onnx', 'onnxruntime', 'numpy'} & set(sys.modules);"
        "sys.exit(str(bad) if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
