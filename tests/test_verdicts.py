"""The table of verdicts: what it claims was run, and all that is made from it agrees."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers import run
from moe2edge.pipeline.registry import find_target, list_targets, make_target
from moe2edge.pipeline.target import Loader
from moe2edge.storage.checkpoint import open_checkpoint
from moe2edge.testing import Make

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "runtimes.md"
HEADING = "| program | outputs | verdict | |\n|---|---|---|---|\n"


def render_tables() -> Iterator[str]:
    """Yield the lines of the page that are made from the table."""
    for name in list_targets():
        yield f"## Target `{name}`\n\n{HEADING}"
        for rule in find_target(name).rules():
            loader = rule.loader
            note = loader.note
            if loader.script:
                link = f"[{loader.script}](../{loader.script})"
                note = note.replace(loader.script, link)
            cells = (loader.program, rule.when or "all others", loader.verdict, note)
            yield f"| {' | '.join(cells)} |\n"
        yield "\n"


def test_the_page_is_made_from_the_table(request: pytest.FixtureRequest) -> None:
    head = PAGE.read_text("utf-8").partition("## Target ")[0]
    text = head + "".join(render_tables()).rstrip("\n") + "\n"
    if request.config.getoption("--renew-goldens"):
        PAGE.write_text(text, "utf-8")
    assert text == PAGE.read_text("utf-8"), "meant? pytest tests/test_verdicts.py --renew-goldens"


def test_a_yes_was_run() -> None:
    for name in list_targets():
        for rule in find_target(name).rules():
            check_evidence(rule.loader)


def check_evidence(loader: Loader) -> None:
    """Check that the script of a verdict is there, with its output."""
    assert loader.version in loader.note
    if not loader.script:
        assert loader.verdict != "yes", loader
        assert not loader.snippet, loader
        return
    script = ROOT / loader.script
    assert script.parent == ROOT / "benchmarks" / "readers", loader
    outputs = list(script.glob("*.txt")) if script.is_dir() else [script.with_suffix(".txt")]
    assert outputs, loader
    assert list(script.glob("*.py")) or script.suffix == ".py", loader
    for output in outputs:
        said = output.read_text("utf-8")
        assert said.strip(), output
        assert "FAILED" not in said, output


@pytest.mark.parametrize("name", list_targets())
def test_the_last_rule_on_a_program_is_for_all_others_or_says_for_which(name: str) -> None:
    rules = find_target(name).rules()
    assert rules
    seen: set[str] = set()
    for rule in rules:
        # What stands behind a rule for all others would never hold.
        assert rule.loader.program not in seen, rule
        if not rule.when:
            seen.add(rule.loader.program)


@pytest.mark.parametrize("name", list_targets())
def test_the_library_of_a_card_is_a_program_of_the_table(name: str) -> None:
    target = find_target(name)
    programs = {rule.loader.program for rule in target.rules()}
    library = target.card_program or target.card_library
    assert library in programs, "a verdict on it could not take it off the card"


def test_targets_prints_the_table() -> None:
    every = run("targets")
    assert "ollama: not tried" in every.stdout
    one = run("targets", "gptq")
    assert "transformers, with `config=auto-round`: yes (version 5.23" in one.stdout
    assert "gguf" not in one.stdout.partition("\n")[0]
    found = json.loads(run("targets", "onnx", "--json").stdout)["programs"]["onnx"]
    (optimum, *_) = [each for each in found if each["program"] == "optimum-onnx"]
    assert optimum["verdict"] == "yes"
    assert optimum["script"] == "benchmarks/readers/optimum_onnx"
    assert "ORTModelForCausalLM" in optimum["snippet"]
    wrong = run("targets", "ggml")
    assert wrong.exit_code == 2
    assert "gguf" in wrong.stderr


@pytest.mark.parametrize(
    ("family", "changes", "word"),
    [
        ("mixtral", {"sliding_window": 16}, "its sliding window of 16 tokens"),
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob false"),
        ("olmoe", {"norm_topk_prob": True, "num_key_value_heads": 4}, "norm_topk_prob true"),
    ],
)
def test_settings_that_llama_cpp_ignores(
    family: str, changes: dict[str, object], word: str, tiny: Make
) -> None:
    model = open_checkpoint(str(tiny(family, **changes))).model
    found = {each.program: each for each in make_target("hf", {}).loaders(model)}
    assert found["llama.cpp"].verdict == "no"
    assert word in found["llama.cpp"].note
