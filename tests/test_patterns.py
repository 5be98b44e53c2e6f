"""Patterns of folders and recipes are matched in linear time, or refused by name."""

from __future__ import annotations

import time

import pytest

from helpers import run
from moe2edge.errors import Unsupported
from moe2edge.storage.output import read_gptq_settings
from moe2edge.storage.patterns import LONGEST_SOURCE, compile_pattern

SETTINGS = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}


def test_nested_repetitions_take_no_time() -> None:
    """Harmless here; a matcher that tries every way to divide the text would take for ever."""
    begun = time.perf_counter()
    assert compile_pattern(r"(a|a)*(a+)+$").search("a" * 5000 + "b") is None
    assert time.perf_counter() - begun < 1


@pytest.mark.parametrize("pattern", ["(?!model).*", r"(x)\1", "(", "[z-a]", "\ud800"])
def test_what_cannot_be_matched_is_named(pattern: str) -> None:
    with pytest.raises(Unsupported, match="only patterns can be loaded") as caught:
        read_gptq_settings({**SETTINGS, "dynamic": {f"-:{pattern}": {}}})
    assert "\n" not in str(caught.value)


def test_a_pattern_has_a_length() -> None:
    with pytest.raises(ValueError, match="at most"):
        compile_pattern("x" * (LONGEST_SOURCE + 1))
    with pytest.raises(ValueError, match="repetition"):
        compile_pattern("((x{100}){100}){100}")


def test_dynamic_matches_the_start_of_a_name() -> None:
    dynamic = {r"-:model\.layers\.0\.mlp": {}, r".*experts\.[01]\.": {"bits": 8}}
    settings = read_gptq_settings({**SETTINGS, "dynamic": dynamic})
    assert settings.find_scheme("model.layers.0.mlp.experts.1.up_proj") is None
    eight = settings.find_scheme("model.layers.1.mlp.experts.1.up_proj")
    assert eight is not None
    assert eight.bits == 8
    assert settings.find_scheme("model.layers.1.mlp.experts.11.up_proj") == settings.main


def test_a_rule_of_a_recipe_that_cannot_be_matched() -> None:
    rules = "rtn.rules=[{match: '(?!x)y', bits: 8}]"
    result = run(
        "export", "builtin:tiny-moe", "-t", "gptq", "-o", "never", "-r", "w4-rtn", "--set", rules
    )
    assert result.exit_code == 2
    assert "lookaround" in result.stderr
