"""Configs of outputs that readers older than transformers 5 take as they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoTokenizer

from moe2edge.model.older_spellings import add_older_spellings

DEFAULT = {"rope_type": "default", "rope_theta": 7.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 5e5, "partial_rotary_factor": 0.5}


@pytest.mark.parametrize(
    ("given", "added"),
    [
        ({"model_type": "qwen3_moe", "num_local_experts": 4}, {"num_experts": 4}),
        ({"model_type": "olmoe", "num_experts": 4}, {"num_local_experts": 4}),
        ({"model_type": "qwen2_moe", "num_experts": 4}, {}),
        ({"model_type": "deepseek_v3", "n_routed_experts": 4}, {}),
        ({"rope_parameters": DEFAULT}, {"rope_theta": 7.0}),
        (
            {"rope_parameters": YARN},
            {
                "rope_theta": 5e5, "partial_rotary_factor": 0.5,
                "rope_scaling": {"rope_type": "yarn", "factor": 4.0},
            },
        ),
        ({"rope_parameters": {"full_attention": YARN}}, {}),
        ({"rope_theta": 7.0}, {}),
    ],
)  # fmt: skip
def test_what_is_missing_is_added(given: dict[str, Any], added: dict[str, Any]) -> None:
    before = json.dumps(given)
    assert add_older_spellings(given) == given | added
    whole = {"text_config": given, "model_type": "of several parts"}
    assert add_older_spellings(whole) == whole | {"text_config": given | added}
    assert json.dumps(given) == before


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe", "gpt_oss", "deepseek_v3"])
def test_transformers_5_reads_the_same(family: str, tmp_path: Path) -> None:
    for rope in (
        {"rope_type": "default", "rope_theta": 7.0},
        YARN | {"original_max_position_embeddings": 64},
    ):
        config = AutoConfig.for_model(family, rope_parameters=rope).to_dict()
        found = AutoConfig.for_model(**add_older_spellings(config)).to_dict()
        assert found == config


@pytest.mark.parametrize("target", ["onnx", "gptq"])
def test_an_output_has_them(target: str, builtin_out: Path) -> None:
    out = builtin_out / target
    config = json.loads((out / "config.json").read_text())
    assert config["num_experts"] == config["num_local_experts"]
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    settings = json.loads((out / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    # Release 4 would add token_type_ids, which no model takes.
    assert settings["model_input_names"] == ["input_ids", "attention_mask"]
    assert AutoTokenizer.from_pretrained(out)("a b").input_ids
