"""The texts that come with moe2edge: whose they are, and which one a model gets by default."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from helpers import run
from moe2edge.calibration.builtin_texts import (
    BUILTIN_TEXT,
    DEFAULT_TEXT,
    FILE_NAMES,
    GENERAL_KINDS,
    GENERAL_TEXT,
    find_builtin_file,
    name_general_parts,
)
from moe2edge.calibration.mixes import list_parts
from moe2edge.calibration.sources import NamedText, TextSource
from moe2edge.calibration.tokens import load_tokens, read_texts
from moe2edge.commands.texts import list_default_texts, resolve_recipe
from moe2edge.errors import InputError
from moe2edge.pipeline import recipe as recipes
from moe2edge.progress import Reporter
from moe2edge.storage.checkpoint import BUILTIN, open_checkpoint
from moe2edge.storage.tokenizer import load_tokenizer
from moe2edge.testing import Make

ROOT = Path(__file__).parents[1]
ALL = (BUILTIN_TEXT, *name_general_parts())


def read(text: str, purpose: str) -> str:
    path = find_builtin_file(text, purpose)
    assert path is not None
    return path.read_text("utf-8")


# ---- the files ---------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ALL)
def test_evaluation_shares_no_paragraph_with_calibration(text: str) -> None:
    def paragraphs(purpose: str) -> set[str]:
        return {p.strip() for p in read(text, purpose).split("\n\n") if len(p) > 200}

    mine, theirs = paragraphs("evaluation"), paragraphs("calibration")
    assert len(mine) > 50
    assert not mine & theirs
    assert read(text, "training") == read(text, "calibration")


@pytest.mark.parametrize("text", ALL)
@pytest.mark.parametrize("purpose", ["calibration", "evaluation"])
def test_no_text_is_from_elsewhere(text: str, purpose: str) -> None:
    """Licences and copyrights of others stood in the excerpts that these texts replaced."""
    found = re.findall(r"(?i)copyright|all rights reserved|licensed under", read(text, purpose))
    assert not found


def test_the_texts_are_what_the_scripts_write(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.general_text.make import build_texts
    from benchmarks.tiny_moe.pack import COMMIT, build_text

    known = ("git", "-C", str(ROOT), "cat-file", "-e", f"{COMMIT}^{{commit}}")
    if subprocess.run(known, capture_output=True).returncode:
        pytest.skip(f"this is no clone that holds commit {COMMIT[:7]}")
    for purpose in ("calibration", "evaluation"):
        assert build_text(purpose)[0] == read(BUILTIN_TEXT, purpose)
        assert build_texts(purpose) == {
            kind: read(f"{GENERAL_TEXT} ({kind})", purpose) for kind in GENERAL_KINDS
        }


def test_the_arithmetic_is_right() -> None:
    """Every line of a worked problem that is an equation of numbers holds."""
    checked = 0
    for line in re.split(r"\n|(?<=[.?]) ", read("general (problems)", "calibration")):
        plain = re.sub(r"[$,]", "", line).replace(" x ", " * ")
        for left, right in re.findall(r"(\d[\d.]*(?: [-+*/] \d[\d.]*)+) = (\d+(?:\.\d+)?)", plain):
            assert eval(left) == pytest.approx(float(right)), line
            checked += 1
    assert checked > 1000


# ---- parts -------------------------------------------------------------------------------------


def test_the_general_text_has_equal_parts_and_keeps_its_share_of_a_mix() -> None:
    parts = list_parts(TextSource(text="general:1,builtin:1"), "calibration")
    assert [part.name for part in parts] == [*name_general_parts(), "builtin"]
    assert [part.weight for part in parts] == pytest.approx([0.2] * 5 + [1])
    named = TextSource(text="mine", sources={"mine": NamedText(text="general")})
    assert [part.name for part in list_parts(named, "calibration")] == [*name_general_parts()]


def test_a_few_samples_do_not_need_every_kind() -> None:
    tokenizer = load_tokenizer(open_checkpoint(BUILTIN).folder)
    found = load_tokens(TextSource(text="general", samples=2, length=16), tokenizer, "calibration",
                        (512, 4096))  # fmt: skip
    assert found.ids.shape == (2, 16)
    assert [part.text for part in found.parts] == ["general (code)", "general (docs)"]


def test_the_default_is_no_part_of_a_mix() -> None:
    for source in (
        TextSource(text="default:1,builtin:1"),
        TextSource(text="mine", sources={"mine": NamedText(text="default")}),
    ):
        with pytest.raises(InputError, match="text default is no part of a mix"):
            read_texts(source, "calibration")


def test_every_default_of_samples_fits_the_texts() -> None:
    """Of the smallest vocabulary, which gives the most tokens, or a large one: 128 of 512."""
    tokenizer = load_tokenizer(open_checkpoint(BUILTIN).folder)
    for text in (BUILTIN_TEXT, GENERAL_TEXT):
        for purpose in FILE_NAMES:
            words = sum(len(t.split()) for t in read_texts(TextSource(text=text), purpose))
            assert words > (32 if purpose == "evaluation" else 64) * 512
            found = load_tokens(TextSource(text=text), tokenizer, purpose, (512, 4096))
            assert found.ids.shape == (128, 512)


# ---- the default -------------------------------------------------------------------------------


def resolve(model: str, text: str, *settings: str) -> tuple[recipes.Recipe, list[str]]:
    said: list[str] = []
    parsed = recipes.parse(text, settings)
    reporter = Reporter(said.append, lambda *_: None)
    return resolve_recipe(open_checkpoint(model), parsed, reporter), said


def test_the_default_depends_on_the_model(tiny: Make) -> None:
    passes = "passes: [expert_drop: {keep: 4}, recover]"
    for model, text in ((BUILTIN, "builtin"), (str(tiny("olmoe")), "general")):
        found, said = resolve(model, passes)
        assert {found.calibration.text, found.evaluation.text} == {text}
        assert found.training is not None
        assert found.training.text == text
        assert said[:3] == [f"{purpose} text: {text} (the default)" for purpose in FILE_NAMES_ORDER]
        assert recipes.parse(found.render()) == found


FILE_NAMES_ORDER = ("calibration", "evaluation", "training")


@pytest.mark.parametrize(
    ("passes", "settings", "names"),
    [
        ("[expert_drop: {keep: 4}]", (), "expert_drop chooses"),
        ("[expert_drop: {keep: 4}, block_drop: {drop: 1}, gptq]", (),
         "expert_drop and block_drop choose"),
        ("[expert_search: {keep: 4}]", (), "expert_search chooses"),
        ("[expert_drop: {keep: 4}]", ("calibration.text=general",), None),
        ("[expert_drop: {keep: 4, criterion: magnitude}, gptq]", (), None),
        ("[gptq]", (), None),
        ("[recover]", (), None),
    ],
)  # fmt: skip
def test_who_chooses_by_the_default_is_warned_about(
    tiny: Make, passes: str, settings: tuple[str, ...], names: str | None
) -> None:
    _, said = resolve(str(tiny("olmoe")), f"passes: {passes}", *settings)
    warnings = [line for line in said if line.startswith("warning:")]
    expected = (
        f"warning: {names} what stays by the default calibration text; give text of the task that "
        "the model is for, with --calib"
    )
    assert warnings == ([expected] if names else [])


def test_a_text_that_nothing_reads_is_no_default(tiny: Make) -> None:
    assert list_default_texts(recipes.parse("passes: []")) == ("evaluation",)
    assert list_default_texts(recipes.parse("passes: [gptq]", ["evaluation.text=none"])) == (
        "calibration",
    )


def test_export_says_which_text_it_was(tiny: Make, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run(
        "export", str(tiny("olmoe")), "-t", "hf", "-o", str(out), "-r", "trim",
        "--set", "calibration.samples=5", "--set", "evaluation.samples=2",
        "--set", "calibration.length=16", "--set", "evaluation.length=16",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "calibration text: general (the default)" in result.stderr
    assert "warning: expert_drop chooses what stays by the default" in result.stderr
    report = json.loads((out / "report.json").read_text())
    assert report["default_texts"] == ["calibration", "evaluation"]
    assert [part["text"] for part in report["calibration"]["parts"]] == [*name_general_parts()]
    said = "Calibration text: general, the default, 5 samples of 16 tokens."
    assert said in (out / "README.md").read_text()
    assert said in result.stdout
    # What is written names the text, so that the next export with it is no default.
    written = recipes.parse((out / "recipe.resolved.yaml").read_text())
    assert not list_default_texts(written)
    # Evaluated by itself, the folder gets the text of its source.
    assert run("evaluate", str(out), "--samples", "2", "--length", "16").exit_code == 0


def test_decisions_say_which_text_it_was(tiny: Make, tmp_path: Path) -> None:
    out = tmp_path / "sets.json"
    result = run(
        "decide", str(tiny("olmoe")), "-r", "trim", "-o", str(out),
        "--set", "calibration.samples=5", "--set", "calibration.length=16",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "warning: expert_drop chooses what stays by the default" in result.stderr
    assert json.loads(out.read_text())["calibration"]["text"] == "general"
    assert DEFAULT_TEXT not in json.loads(out.read_text())["recipe"]
