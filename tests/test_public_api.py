"""The public names of the package: complete, documented, typed, and true to their examples."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import moe2edge
from moe2edge.commands import api
from moe2edge.errors import DoesNotFit, InputError, Moe2EdgeError
from moe2edge.storage.manifest import open_artifact

FUNCTIONS = ("compress", "export", "load", "open_checkpoint", "parse_recipe", "profile")
SMALL = {
    "calibration": {"samples": 4, "length": 32},
    "evaluation": {"samples": 2, "length": 32},
    "passes": [{"rtn": {}}],
}


def test_what_looks_public_is_exported_and_the_reverse() -> None:
    for name in moe2edge.__all__:
        assert getattr(moe2edge, name) is not None
    rooms = {module.name for module in pkgutil.iter_modules(moe2edge.__path__)}
    shown = {name for name in dir(moe2edge) if not name.startswith("_")}
    assert shown == set(moe2edge.__all__) - {"__version__"}
    assert "__version__" in dir(moe2edge)
    present = {name for name in vars(moe2edge) if not name.startswith("_")}
    assert present - rooms <= set(moe2edge.__all__)
    assert sorted(moe2edge.__all__) == list(moe2edge.__all__)


def test_type_checkers_see_the_same_names_in_the_same_modules() -> None:
    tree = ast.parse(Path(str(moe2edge.__file__)).read_text())
    guard = next(node for node in tree.body if isinstance(node, ast.If))
    imported = {
        alias.name: node.module
        for node in guard.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname == alias.name
    }
    assert imported == moe2edge._MODULES
    assert set(imported) == set(moe2edge.__all__) - {"__version__"}


def test_what_is_public_in_the_file_behind_it_is_exported() -> None:
    own = {
        name
        for name, value in vars(api).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == api.__name__
    }
    own -= {"QUIET"}
    assert own == {name for name, module in moe2edge._MODULES.items() if module == api.__name__}


@pytest.mark.parametrize("name", sorted(set(moe2edge.__all__) - {"__version__"}))
def test_each_name_is_documented_and_typed(name: str) -> None:
    value = getattr(moe2edge, name)
    text = inspect.getdoc(value) or ""
    assert len(text) > 20
    assert not text.startswith(f"{name}(")  # what a dataclass without a docstring gets
    if name in FUNCTIONS:
        for heading in ("Args:", "Raises:"):
            assert heading in text
        signature = inspect.signature(value)
        assert all(p.annotation is not p.empty for p in signature.parameters.values())
        assert signature.return_annotation is not signature.empty
        for parameter in signature.parameters:
            assert f"{parameter}: " in text
        # Either its own example, or it stands in that of the package.
        assert ">>> " in text or f"moe2edge.{name}(" in str(moe2edge.__doc__)


@pytest.mark.slow
def test_the_example_of_the_package_runs() -> None:
    # Those of functions are run with all other modules, in test_doctests.
    done = doctest.testmod(moe2edge)
    assert (done.failed, done.attempted) == (0, 13)


def test_importing_the_package_imports_nothing_large() -> None:
    code = (
        "import sys, moe2edge; dir(moe2edge); moe2edge.__version__;"
        "large = {'torch', 'transformers', 'numpy', 'onnx', 'pydantic', 'rich'} & set(sys.modules);"
        "assert not large, large;"
        "moe2edge.parse_recipe('trim-w4'); moe2edge.open_checkpoint('builtin:tiny-moe');"
        "moe2edge.Moe2EdgeError, moe2edge.Profile, moe2edge.Reporter;"
        "large = {'torch', 'transformers', 'onnx'} & set(sys.modules);"
        "assert not large, large"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'exprot'"):
        moe2edge.exprot  # type: ignore[attr-defined]  # noqa: B018


def test_the_version_is_that_of_the_distribution() -> None:
    from importlib.metadata import version

    assert moe2edge.__version__ == version("moe2edge")


# ---- recipes -----------------------------------------------------------------------------------


def test_a_recipe_is_a_name_a_path_or_a_mapping(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(json.dumps(SMALL))
    mapping = moe2edge.parse_recipe(SMALL)
    assert moe2edge.parse_recipe(path) == moe2edge.parse_recipe(str(path)) == mapping
    assert moe2edge.parse_recipe("w4-rtn").passes == mapping.passes
    assert isinstance(mapping, moe2edge.Recipe)
    assert moe2edge.parse_recipe(SMALL, ["rtn.bits=8"]).passes != mapping.passes


def test_small_numbers_of_a_mapping_stay_numbers() -> None:
    parsed = moe2edge.parse_recipe({"passes": [{"recover": {"learning_rate": 1e-05}}]})
    assert parsed.passes[0].learning_rate == 1e-05  # type: ignore[attr-defined]


def test_a_recipe_that_is_wrong_is_refused() -> None:
    with pytest.raises(moe2edge.Moe2EdgeError, match="did you mean"):
        moe2edge.parse_recipe("w4-rtm")
    with pytest.raises(InputError, match=r"a value that YAML cannot write: .*; use numbers"):
        moe2edge.parse_recipe({"passes": [{"rtn": {"bits": object()}}]})
    assert moe2edge.Moe2EdgeError is Moe2EdgeError


# ---- compress and export -----------------------------------------------------------------------


@pytest.fixture
def lines() -> list[str]:
    return []


@pytest.fixture
def reporter(lines: list[str]) -> moe2edge.Reporter:
    return moe2edge.Reporter(lines.append, lambda *_: None)


@pytest.mark.slow
def test_compress_gives_the_model_of_an_export(
    tmp_path: Path, reporter: moe2edge.Reporter, lines: list[str]
) -> None:
    recipe = {**SMALL, "passes": [{"expert_drop": {"keep": 0.5, "criterion": "reap"}}]}
    found = moe2edge.compress("builtin:tiny-moe", recipe, reporter=reporter)
    assert isinstance(found.model, moe2edge.Model)
    assert found.model.expert_counts == (8,) * 6
    report = moe2edge.export(found.source, recipe, "hf", tmp_path / "out")
    kept = open_artifact(tmp_path / "out").manifest["model"]
    assert kept["parameters"] == found.model.parameters == report.after.parameters
    assert [step.changed for step in report.steps] == [step.changed for step in found.steps]


def test_numbers_of_a_compressed_model_are_there_as_long_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # When it is first imported, it makes the folder of its cache in the one for temporary files.
    importlib.import_module("torch._dynamo")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    recipe = {**SMALL, "passes": [{"expert_merge": {"method": "hc-smoe", "keep": 8}}]}
    found = moe2edge.compress(Path("builtin:tiny-moe"), recipe)
    for _, _, weight in found.model.tensors():
        assert tuple(weight.load().shape) == weight.shape
    assert list(tmp_path.rglob("*.safetensors"))
    del found, weight
    assert not list(tmp_path.iterdir())


def test_the_model_alone_keeps_the_numbers() -> None:
    recipe = {**SMALL, "passes": ["rtn"]}
    model = moe2edge.compress("builtin:tiny-moe", recipe).model
    weight = next(weight for _, _, weight in model.tensors() if weight.scheme)
    assert weight.quantized().q.shape == weight.shape


def test_compress_keeps_a_limit_of_memory() -> None:
    with pytest.raises(DoesNotFit, match="holds one block in float32"):
        moe2edge.compress("builtin:tiny-moe", {"passes": ["rtn"]}, max_memory=1)


def test_compress_refuses_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(InputError, match="keeps every expert"):
        moe2edge.compress("builtin:tiny-moe", {"passes": [{"expert_drop": {"keep": 16}}]})

    def stop(*_: object, **__: object) -> None:
        assert list(tmp_path.iterdir())
        raise KeyboardInterrupt

    monkeypatch.setattr("moe2edge.pipeline.runner.run_passes", stop)
    with pytest.raises(KeyboardInterrupt):
        moe2edge.compress("builtin:tiny-moe", SMALL)
    assert not list(tmp_path.iterdir())
    with pytest.raises(moe2edge.Moe2EdgeError, match="expert_drop"):
        moe2edge.compress("builtin:tiny-moe", {"passes": [{"expert_drop": {"keep": 2}}]})
    with pytest.raises(InputError, match="there is no folder"):
        moe2edge.compress(tmp_path / "nowhere", SMALL)


@pytest.mark.slow
def test_export_takes_strings_paths_and_values(
    tmp_path: Path, reporter: moe2edge.Reporter, lines: list[str]
) -> None:
    report = moe2edge.export(
        "builtin:tiny-moe", SMALL, ["onnx:accuracy_level=0", "gptq"], str(tmp_path / "a"),
        reporter=reporter,
    )  # fmt: skip
    assert isinstance(report, moe2edge.Report)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["gptq", "onnx"]
    assert open_artifact(tmp_path / "a" / "onnx").options == {
        "accuracy_level": 0,
        "kv_cache": "float32",
        "layout": "plain",
    }
    assert any(line.startswith("recipe:") for line in lines)
    parsed = moe2edge.parse_recipe(SMALL)
    with pytest.raises(InputError, match="exists"):
        moe2edge.export("builtin:tiny-moe", parsed, "gptq", tmp_path / "a")
    with pytest.raises(moe2edge.Moe2EdgeError, match="did you mean"):
        moe2edge.export("builtin:tiny-moe", parsed, "gptk", tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_profile_refuses_a_mix_of_texts(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("one two three\n" * 100)
    mix = ",".join(f"{tmp_path}/{name}.txt:1" for name in "ab")
    with pytest.raises(InputError, match="prompts are cut from one text"):
        moe2edge.profile("builtin:tiny-moe", text=mix)
