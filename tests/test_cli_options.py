"""Options of targets and of texts on the command line."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import onnx
import pytest
from click.testing import Result

from helpers import run, write_text
from moe2edge.errors import InputError
from moe2edge.evaluation.profile.subject import open_subject
from moe2edge.pipeline import registry
from moe2edge.pipeline.registry import parse_targets
from moe2edge.pipeline.target import Target
from moe2edge.testing import Make


@pytest.fixture(scope="module")
def pair(tiny: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both quantized targets, one with an option of its own. Do not write there."""
    out = tmp_path_factory.mktemp("options") / "out"
    text = out.parent / "text.txt"
    write_text(text)
    result = run(
        "export", tiny("olmoe"), "-t", "onnx:accuracy_level=0, gptq", "-o", out, "-r", "w4-rtn",
        "--eval", text, "--set", "evaluation.samples=2", "--set", "evaluation.length=32",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    return out


def test_options_of_a_target_are_recorded_and_reopened(
    pair: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = pair
    levels = {
        attribute.i
        for node in onnx.load(out / "onnx" / "model.onnx", load_external_data=False).graph.node
        for attribute in node.attribute
        if attribute.name == "accuracy_level"
    }
    assert levels == {0}
    manifest = json.loads((out / "onnx" / "manifest.json").read_text())
    options = {"accuracy_level": 0, "kv_cache": "float32", "layout": "plain"}
    assert manifest["target_options"] == options
    report = json.loads((out / "onnx" / "report.json").read_text())
    assert report["target_options"]["onnx"] == options
    said = "for the target `onnx`, accuracy_level 0, kv_cache float32, layout plain."
    assert said in (out / "onnx" / "README.md").read_text()
    seen = []
    kind = type(registry.find_target("onnx"))
    reopen = kind.reopen

    def watched(self: Any, folder: Path, *, exact: bool = False) -> Any:
        seen.append(self)
        return reopen(self, folder, exact=exact)

    monkeypatch.setattr(kind, "reopen", watched)
    text: list[str | Path] = [
        "--text",
        pair.parent / "text.txt",
        "--samples",
        "2",
        "--length",
        "32",
    ]
    assert run("verify", out / "onnx").exit_code == 0
    assert run("generate", out / "onnx", "ab", "-n", "2").exit_code == 0
    assert run("evaluate", out / "onnx", *text).exit_code == 0
    assert seen == [registry.make_target("onnx", {"accuracy_level": 0})] * 4
    # The request that the profiler sends to its process.
    assert open_subject(out / "onnx").request["options"] == options


def test_folders_of_older_versions_have_no_options(pair: Path, tmp_path: Path) -> None:
    folder = tmp_path / "old"
    shutil.copytree(pair / "onnx", folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["target_options"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert run("generate", folder, "ab", "-n", "2").exit_code == 0
    for options, message in (
        ([], "target_options is not a mapping"),
        ({"level": 4}, "unknown option of target onnx 'level'"),
        ({"accuracy_level": "4"}, "onnx:accuracy_level is '4', expected: a valid integer"),
    ):
        (folder / "manifest.json").write_text(json.dumps({**manifest, "target_options": options}))
        result = run("generate", folder, "ab", "-n", "2")
        assert result.exit_code == 2
        assert message in result.stderr
        assert len(result.stderr.splitlines()) == 1


def test_targets_lists_options() -> None:
    assert "onnx:accuracy_level=4 is the default" in run("targets").stdout
    found = json.loads(run("targets", "--json").stdout)
    assert set(found["targets"]) == set(found["options"]) == set(registry.list_targets())
    said = run("export", "--help").stdout.partition("--target")[2].partition(";")[0]
    assert all(name in said for name in registry.list_targets())
    defaults = {"accuracy_level": 4, "kv_cache": "float32", "layout": "plain"}
    assert found["options"]["onnx"] == defaults


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """JSONL whose field ``both`` holds question and answer."""
    path = tmp_path / "qa.jsonl"
    pairs = [(f"{n} plus {n}?", f"{2 * n}") for n in range(80)]
    path.write_text("\n".join(json.dumps({"q": q, "a": a, "both": f"{q}\n{a}"}) for q, a in pairs))
    return path


def evaluate(folder: Path, *more: str | Path) -> Result:
    return run("evaluate", folder, "--samples", "4", "--length", "32", "--json", *more)


def test_evaluate_fills_in_a_template(pair: Path, questions: Path) -> None:
    results = [
        evaluate(pair / "onnx", "--text", questions, *more)
        for more in (["--template", r"{q}\n{a}"], ["--field", "both"], ["--template", "{q}{a}"])
    ]
    assert [result.exit_code for result in results] == [0, 0, 0]
    found = [json.loads(result.stdout)["perplexity"] for result in results]
    assert found[0] == found[1] != found[2]


def test_evaluate_takes_a_mix(pair: Path, questions: Path) -> None:
    text = pair.parent / "text.txt"
    mixed = evaluate(pair / "onnx", "--text", f"{questions}:3,{text}:1", "--field", "both")
    alone = [
        evaluate(pair / "onnx", "--text", path, *field, "--samples", samples)
        for path, field, samples in ((questions, ["--field", "both"], "3"), (text, [], "1"))
    ]
    assert mixed.exit_code == 0, mixed.stderr
    logs = [math.log(json.loads(result.stdout)["perplexity"]) for result in (mixed, *alone)]
    assert logs[0] == pytest.approx((3 * logs[1] + logs[2]) / 4, rel=1e-6)


def test_evaluate_takes_a_seed(pair: Path) -> None:
    text = pair.parent / "text.txt"
    found = [evaluate(pair / "onnx", "--text", text, "--seed", seed).stdout for seed in "001"]
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--field", "q", "--template", "{a}"], "give field or template, not both"),
        (["--template", "{b}"], "qa.jsonl, line 1 has no text in field 'b'"),
        (["--template", "a"], "expected: a text with plain fields"),
        (["--text", "none.txt:1,builtin:1"], "evaluation text none.txt does not exist"),
        (["--text", "builtin:x,builtin:1"], "the weight of builtin is 'x'"),
    ],
)
def test_evaluate_refuses_bad_texts(
    pair: Path, questions: Path, more: list[str], message: str
) -> None:
    result = evaluate(pair / "onnx", "--text", questions, *more)
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_options_of_other_types(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class Made(Target):
        layout: Literal["natural", "uniform"] = "natural"
        tied: bool = False
        limit: int | None = None

    # Types of a local class cannot be looked up by their names.
    Made.__annotations__.update(layout=Literal["natural", "uniform"], tied=bool, limit=int | None)
    monkeypatch.setattr(registry, "_only", lambda *_: Made)
    (found,) = parse_targets("hf:layout=uniform : tied=true: limit = 7")
    assert found == Made("uniform", True, 7)
    assert parse_targets("hf:limit=null") == [Made()]
    assert registry.list_choices(found) == {"layout": ("natural", "uniform")}
    assert registry.make_target("hf", registry.list_options(found)) == found
    for text, message in (
        ("hf:layout=unifrm", "hf:layout is 'unifrm', expected: 'natural' or 'uniform'"),
        ("hf:tied=1", "hf:tied is 1, expected: a valid boolean"),
        ("hf:limit=many", "hf:limit is 'many', expected: a valid integer"),
        ("hf:layuot=natural", "did you mean 'layout'"),
        ("hf:layout=[", "is not valid YAML"),
        ("hf:=natural", "expected NAME:option=value"),
    ):
        with pytest.raises(InputError) as caught:
            parse_targets(text)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_target_without_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_only", lambda *_: Target)
    with pytest.raises(InputError, match="target gptq has no options, but level is given"):
        parse_targets("gptq:level=1")


def test_prompts_are_cut_from_one_text(pair: Path) -> None:
    text = pair.parent / "text.txt"
    result = run("profile", pair / "onnx", "--text", f"{text}:1,builtin:1")
    assert result.exit_code == 2
    assert "prompts are cut from one text" in result.stderr
