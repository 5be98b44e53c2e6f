"""Recipes: parsed strictly, rendered in full, refused with a helpful line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import pytest

from moe2edge.errors import InputError
from moe2edge.passes.expert_drop import ExpertDrop
from moe2edge.pipeline import recipe, registry
from moe2edge.pipeline.stages import group_stages


@pytest.mark.parametrize("name", sorted(recipe.list_bundled()))
def test_bundled_recipes_survive_a_round_trip(name: str) -> None:
    parsed = recipe.parse(recipe.find(name))
    assert recipe.parse(parsed.render()) == parsed
    assert recipe.list_bundled()[name].read_text().startswith("# ")


def test_every_option_is_spelt_out() -> None:
    text = recipe.parse("passes: [gptq, {block_drop: {drop: 1}}]").render()
    for name in ("gptq", "block_drop"):
        assert all(f"{field}:" in text for field in registry.find_pass(name).model_fields)


def test_settings_override() -> None:
    parsed = recipe.parse(
        "passes: [{expert_drop: {keep: 0.5}}, gptq]",
        ["expert_drop.keep=4", "gptq.group_size=64", "calibration.samples=7", "evaluation.seed=3"],
    )
    first = parsed.passes[0]
    assert isinstance(first, ExpertDrop)
    assert first.keep == 4
    assert isinstance(first.keep, int)
    assert parsed.passes[1].model_dump()["group_size"] == 64
    assert (parsed.calibration.samples, parsed.evaluation.seed) == (7, 3)


BAD = [
    ("passes: [gptqq]", "unknown pass 'gptqq': did you mean 'gptq'?"),
    ("pases: []", "unknown key in the recipe 'pases': did you mean 'passes'?"),
    ("passes: [{gptq: {group_sise: 64}}]", "unknown option of gptq 'group_sise': did you mean"),
    (
        "passes: [{gptq: {group_size: 100}}]",
        "gptq.group_size is 100, expected: -1, 16, 32, 64 or 128",
    ),
    ("passes: [{gptq: {bits: 5}}]", "gptq.bits is 5, expected: 2, 3, 4 or 8"),
    ("passes: [{gptq: 4}]", "gptq: expected options"),
    ("passes: [{expert_drop: {keep: 0}}]", "expert_drop.keep is 0, expected: a count"),
    ("passes: [{expert_drop: {keep: 1.5}}]", "expert_drop.keep is 1.5, expected: a fraction"),
    ("passes: [{expert_drop: {keep: half}}]", "expert_drop.keep is 'half', expected: a count"),
    ("passes: [{expert_drop: {keep: true}}]", "expert_drop.keep is True, expected: a count"),
    ("passes: [{expert_drop: {keep: .nan}}]", "expert_drop.keep is nan, expected"),
    ("passes: [expert_drop]", "expert_drop.keep is missing: experts to keep"),
    (
        "passes: [{expert_drop: {keep: 2, criterion: reep}}]",
        "expert_drop.criterion is 'reep', expected: 'routing-score', 'frequency', 'soft",
    ),
    ("passes: [{block_drop: {drop: 0}}]", "block_drop.drop is 0, expected"),
    ("passes: gptq", "needs 'passes', a list"),
    ("passes: [[gptq]]", "a pass is a name"),
    ("[gptq]", "a recipe is a mapping"),
    ("passes: [", "not valid YAML"),
    ("passes: []\ncalibration: {sampels: 3}", "unknown option of calibration 'sampels'"),
    ("passes: []\ncalibration: {samples: 0}", "calibration.samples is 0"),
    ("passes: []\ncalibration: {sources: 3}", "calibration.sources: expected options"),
    ("passes: []\ncalibration: {sources: {m: 3}}", "calibration.sources.m: expected options"),
    (
        "passes: []\ncalibration: {sources: {m: {txt: a}}}",
        "unknown option of calibration.sources.m 'txt': did you mean 'text'?",
    ),
    ("passes: []\ncalibration: {sources: {m: {}}}", "calibration.sources.m.text is missing"),
    ("passes: []\ncalibration: {sources: {'a:b': {text: a}}}", "without comma and colon"),
    ("passes: []\ncalibration: {sources: {builtin: {text: a}}}", "names other than builtin"),
    ("passes: []\nevaluation: {template: '{a'}", "evaluation.template is '{a', expected: a text"),
    ("passes: []\nevaluation: {template: '{a.b}'}", "with plain fields, such as"),
    ("passes: []\nevaluation: {template: '{a[0]}'}", "with plain fields"),
    ("passes: []\nevaluation: {template: '{a!r}'}", "with plain fields"),
    ("passes: []\nevaluation: {template: '{a:>9}'}", "with plain fields"),
    ("passes: []\nevaluation: {template: '{}'}", "with plain fields"),
    ("passes: []\nevaluation: {template: 'a{{b}}'}", "with plain fields"),
    (
        "passes: []\nevaluation: {template: '{a}', field: b}",
        "evaluation: give field or template, not both",
    ),
]


@pytest.mark.parametrize(("text", "message"), BAD)
def test_bad_recipes_are_refused(text: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        recipe.parse(text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("gptq.group_size", "expected name.option=value"),
        ("group_size=64", "expected name.option=value"),
        ("gtpq.bits=4", "did you mean 'gptq'"),
        ("gptq.bit=4", "did you mean 'bits'"),
        ("rtn.bits=4", "the recipe has rtn 2 times"),
    ],
)
def test_bad_settings_are_refused(setting: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        recipe.parse("passes: [gptq, rtn, rtn]", [setting])


def test_unknown_recipe_names_the_bundled_ones() -> None:
    with pytest.raises(InputError, match="did you mean 'trim-w4'"):
        recipe.find("trim-w5")


def test_adjacent_trimming_shares_a_stage() -> None:
    parsed = recipe.parse(
        "passes: [{expert_drop: {keep: 4}}, {block_drop: {drop: 1}}, gptq,"
        " {expert_drop: {keep: 3}}, {expert_drop: {keep: 2, rescore: true}}]"
    )
    names = [[p.name for p in stage.passes] for stage in group_stages(parsed.passes)]
    assert names == [["expert_drop", "block_drop"], ["gptq"], ["expert_drop"], ["expert_drop"]]


def test_schema_knows_every_pass() -> None:
    schema = recipe.build_json_schema()
    assert set(registry.list_passes()) <= set(schema["$defs"])
    assert json.loads(json.dumps(schema)) == schema
    committed = recipe.BUNDLED / "recipe.schema.json"
    assert json.loads(committed.read_text()) == schema, "run: moe2edge recipe schema > " + str(
        committed
    )


# Ten lists, each ten times the one before: ten thousand million letters if written out.
BOMB = "[&a0 [x, x], " + ", ".join(f"&a{n + 1} [{f'*a{n}, ' * 10}]" for n in range(10)) + "]"
UNREADABLE = [
    ("passes: [", "the recipe is not valid YAML: while parsing"),
    ("passes: [rtn]\npasses: []", "'passes' is given twice"),
    ("passes: [{gptq: {bits: 4, bits: 4}}]", "'bits' is given twice"),
    ("passes: !!python/name:os.system", "could not determine a constructor"),
    ("passes: " + "[" * 5000, "the recipe is not valid YAML"),
    ("passes: [{gptq: {bits: !!bool x}}]", "is not valid YAML: 'x'"),
    ("passes: !!timestamp x", "is not valid YAML: 'NoneType'"),
    ("passes: [{gptq: !!map [1]}]", "is not valid YAML: cannot unpack"),
    ("passes: [{gptq: {bits: " + BOMB + "}}]", "gptq.bits is [['x'"),
    ("passes: [{gptq: " + BOMB + "}]", "gptq: expected options"),
    ("passes: [" + BOMB + "]", "a pass is a name"),
]


@pytest.mark.parametrize(("text", "message"), UNREADABLE, ids=[m for _, m in UNREADABLE])
def test_yaml_beyond_plain_values_gives_one_line(text: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        recipe.parse(text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("value", ["[", "!!python/name:os.system", "{a: 1, a: 2}", "---\n--- 2"])
def test_a_setting_beyond_plain_yaml_gives_one_line(value: str) -> None:
    with pytest.raises(InputError, match="is not valid YAML") as caught:
        recipe.parse("passes: [gptq]", [f"gptq.group_size={value}"])
    assert "\n" not in str(caught.value)


def test_recipe_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(b"passes: [\xff]")
    for name in (str(tmp_path / "r.yaml"), "x" * 5000, "~no-such-user/r.yaml"):
        with pytest.raises(InputError, match="cannot be read") as caught:
            recipe.find(name)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 500


def test_seeds_have_a_bound() -> None:
    for place in ("calibration", "evaluation", "expert_drop"):
        with pytest.raises(InputError, match=f"{place}.seed is {2**32}, expected"):
            recipe.parse("passes: [{expert_drop: {keep: 2}}]", [f"{place}.seed={2**32}"])


def test_no_option_takes_a_number_that_no_library_takes() -> None:
    """Each option that may be a count, of every pass; found when the recipe is read."""
    tried = 0
    for name in registry.list_passes():
        kind = registry.find_pass(name)
        needed = {
            field.alias or key: next(
                (one for one in get_args(field.annotation) if isinstance(one, str)), 2
            )
            for key, field in kind.model_fields.items()
            if field.is_required()
        }
        for key, field in kind.model_fields.items():
            if int in (field.annotation, *get_args(field.annotation)):
                options = json.dumps({**needed, key: 10**30})
                with pytest.raises(InputError, match=rf"{name}\.{key}.*"):
                    recipe.parse(f"passes:\n  - {name}: {options}\n")
                tried += 1
    assert tried > 30
    with pytest.raises(InputError, match="a number below 4294967296"):
        recipe.parse("passes:\n  - expert_drop: {keep: [3, 10000000000]}\n")


def test_a_mix_with_sources_survives_a_round_trip() -> None:
    parsed = recipe.parse(
        """
        calibration:
          text: math:0.5,code:0.5
          sources:
            math: {text: gsm8k.jsonl, template: "{question}\\n{answer}"}
            code: {text: code.txt}
        passes: []
        """,
        ["evaluation.template='{q}'"],
    )
    assert parsed.calibration.sources["math"].template == "{question}\n{answer}"
    assert parsed.calibration.sources["code"].field is None
    assert parsed.evaluation.template == "{q}"
    assert recipe.parse(parsed.render()) == parsed
