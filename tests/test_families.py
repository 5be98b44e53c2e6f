"""Every row of the family table against transformers, and what a row refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from helpers import compute_logits
from moe2edge.errors import InputError, Unsupported
from moe2edge.model.config_parser import parse_config
from moe2edge.model.family import FAMILIES, find_family
from moe2edge.model.hf_config import build_config
from moe2edge.runtime.load import build_transformers_model
from moe2edge.storage.checkpoint import open_checkpoint
from moe2edge.testing import Make

IDS = torch.randint(1, 96, (2, 24), generator=torch.Generator().manual_seed(0))
YARN = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3", "factor": 4.0, "rope_theta": 10000.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
SWITCHES: list[tuple[str, dict[str, Any]]] = [
    *((family, {}) for family in FAMILIES),
    ("mixtral", {"sliding_window": 5}),
    ("mixtral", {"head_dim": 32}),
    ("mixtral", {"tie_word_embeddings": True}),
    ("olmoe", {"clip_qkv": 0.5}),
    ("olmoe", {"norm_topk_prob": True}),
    ("olmoe", {"attention_bias": True}),
    ("olmoe", {"rope_parameters": YARN}),
    ("qwen2_moe", {"mlp_only_layers": [1]}),
    ("qwen2_moe", {"decoder_sparse_step": 2}),
    ("qwen2_moe", {"qkv_bias": False}),
    ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}),
    ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 4}),
    ("qwen3_moe", {"norm_topk_prob": True, "attention_bias": True}),
    ("qwen3_moe", {"mlp_only_layers": [0, 2], "rope_parameters": LLAMA3}),
    ("qwen3_moe", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}),
]


def named(value: object) -> str:
    return value if isinstance(value, str) else "+".join(value) if isinstance(value, dict) else ""


@pytest.mark.parametrize(("family", "changes"), SWITCHES, ids=named)
def test_logits_equal_those_of_transformers(
    tiny: Make, family: str, changes: dict[str, Any]
) -> None:
    folder = tiny(family, **changes)
    model = open_checkpoint(str(folder)).model
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = theirs(IDS).logits
    found = compute_logits(model, IDS)
    assert (found - expected).abs().max() < 1e-4
    assert model.parameters == theirs.num_parameters()


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_unchanged_model_gets_its_own_config_back(tiny: Make, family: str) -> None:
    checkpoint = open_checkpoint(str(tiny(family)))
    before = AutoConfig.for_model(**dict(checkpoint.config))
    after = AutoConfig.for_model(**build_config(checkpoint.model))
    head_dim = checkpoint.model.config["head_dim"]  # written out where it was derived
    assert before.to_dict() | {"head_dim": head_dim} == after.to_dict()


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("mixtral", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ("mixtral", {"rope_scaling": {"type": "dynamic", "factor": 2}}, "rope type 'dynamic'"),
        ("olmoe", {"rope_parameters": {"rope_type": "longrope"}}, "rope type 'longrope'"),
        ("mixtral", {"clip_qkv": 8.0}, "clip_qkv"),
        ("mixtral", {"use_qk_norm": True}, "use_qk_norm"),
        ("mixtral", {"is_causal": False}, "is_causal"),
        ("mixtral", {"is_causal": None}, "is_causal"),  # not the default: false
        ("mixtral", {"layer_types": ["sliding_attention"] * 32}, "layer_types"),
        ("olmoe", {"sliding_window": 4}, "sliding_window"),
        ("qwen2_moe", {"layer_types": ["chunked_attention"] * 24}, "layer type 'chunked"),
        (
            "qwen2_moe",
            {"rope_parameters": {"full_attention": {}}},
            "rotary embeddings in different",
        ),
        ("qwen2_moe", {"attribute_map": {"hidden_size": "vocab_size"}}, "name of a part of"),
        ("qwen3_moe", {"partial_rotary_factor": 0.5}, "partial rotary"),
        ("qwen3_moe", {"routed_scaling_factor": 2.5}, "routed_scaling_factor"),
    ],
)
def test_config_features_without_support_are_refused(
    family: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(Unsupported, match=message):
        parse_config(FAMILIES[family], changes)


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({}, InputError, "no model_type"),
        ({"model_type": "llama"}, Unsupported, "dense model"),
        ({"model_type": "mixtrol"}, Unsupported, "'mixtrol' is not known to transformers 5"),
        ({"model_type": "dbrx"}, Unsupported, "dbrx is not supported: .* one matrix holds all"),
        ({"model_type": "lfm2_vl"}, Unsupported, "'lfm2' is a dense model"),
    ],
)
def test_other_models_are_refused(config: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        find_family(config)


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("mixtral", {"rms_norm_eps": "x"}, "rms_norm_eps is 'x', expected: a number with a point"),
    ("mixtral", {"rms_norm_eps": 0.0}, "rms_norm_eps is 0.0, expected: greater than 0"),
    ("mixtral", {"rms_norm_eps": float("nan")}, "rms_norm_eps is nan, expected: a finite number"),
    ("mixtral", {"hidden_size": 1e30}, "hidden_size is 1e+30, expected: a whole number"),
    ("mixtral", {"hidden_size": 10**30}, "a number of at most 64 bits"),
    ("mixtral", {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, expected: at most"),
    ("mixtral", {"hidden_size": True}, "hidden_size is True, expected: a whole number"),
    ("mixtral", {"num_experts": 8}, "num_experts is 8 and num_local_experts is 6; both name"),
    ("qwen2_moe", {"router_aux_loss_coef": {"__float__": "Infinity"}}, "expected: a finite number"),
    ("olmoe", {"head_dim": 32}, "head_dim is 32, expected: hidden_size / num_attention_heads"),
    ("qwen3_moe", {"head_dim": 31}, "an even rotary dimension"),
    ("qwen3_moe", {"num_key_value_heads": 3}, "num_key_value_heads is 3, expected: a divisor"),
    ("mixtral", {"rope_scaling": "linear"}, "rope_scaling is 'linear', expected"),
    ("mixtral", {"rope_parameters": [1]}, "rope_parameters is [1], expected"),
    ("olmoe", {"output_hidden_states": "x"}, "output_hidden_states is 'x', expected: true or"),
    ("olmoe", {"max_position_embeddings": 1}, "max_position_embeddings is 1, expected: at least 2"),
    ("olmoe", {"torch_dtype": "float16"}, "torch_dtype is 'float16' and dtype is"),
    ("mixtral", {"rope_theta": "x"}, "rope_theta is 'x'; both name the same setting"),
    ("mixtral", {"rope_theta": "x", "rope_parameters": None}, "needs rope_theta > 0, found 'x'"),
    ("mixtral", {"rope_parameters": {"rope_theta": "x"}}, "needs rope_theta > 0, found 'x'"),
    ("mixtral", {"sliding_window": "x"}, "sliding_window is 'x', expected: a whole number or null"),
    ("mixtral", {"sliding_window": -4}, "sliding_window is -4, expected: at least 1"),
    ("mixtral", {"sliding_window": 0}, "sliding_window is 0, expected: at least 1"),
    ("mixtral", {"eos_token_id": "<end>"}, "eos_token_id is '<end>', expected"),
    ("mixtral", {"num_experts_per_tok": 9}, "num_experts_per_tok is 9, but there are 6 experts"),
    (
        "mixtral",
        {"rope_parameters": {"rope_type": "linear"}},
        "'linear' rope needs factor > 0, found None",
    ),
    ("olmoe", {"rope_parameters": YARN | {"factor": 0}}, "'yarn' rope needs factor > 0"),
    ("olmoe", {"rope_parameters": YARN | {"type": "linear"}}, "rope_parameters.type is 'linear'"),
    ("olmoe", {"rope_parameters": YARN | {"attention_factor": "x"}}, "cannot be computed"),
    ("olmoe", {"rope_scaling": YARN}, "'rope_type': 'default'}; both name the same"),
    (
        "qwen3_moe",
        {"rope_parameters": LLAMA3 | {"low_freq_factor": "x"}},
        "'llama3' rope needs low_freq_factor > 0, found 'x'",
    ),
    ("olmoe", {"clip_qkv": "x"}, "clip_qkv is 'x', expected: a number with a point or null"),
    ("mixtral", {"dtype": "nope"}, "transformers refuses it"),
    ("mixtral", {"use_cache": "x"}, "use_cache is 'x', expected: true or false"),
    ("mixtral", {"initializer_range": "x"}, "initializer_range is 'x'"),
    ("mixtral", {"id2label": 3}, "transformers refuses it"),
    ("mixtral", {"rope_parameters": YARN | {"beta_fast": "x"}}, "transformers refuses it"),
    ("qwen2_moe", {"mlp_only_layers": 3}, "mlp_only_layers is 3, expected: a list or null"),
    ("qwen2_moe", {"decoder_sparse_step": "a"}, "decoder_sparse_step is 'a', expected"),
    (
        "qwen2_moe",
        {"use_sliding_window": True, "layer_types": ["full_attention"]},
        "must be equal to the number of `layer_types` (1)",
    ),
]


def changed(source: Path, tmp_path: Path, changes: dict[str, Any]) -> Path:
    """Return a copy of a checkpoint with other values in its config."""
    folder = tmp_path / "model"
    shutil.copytree(source, folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@pytest.mark.parametrize(("family", "changes", "message"), WRONG, ids=[m for _, _, m in WRONG])
def test_wrong_values_are_refused_in_one_line(
    tiny: Make, tmp_path: Path, family: str, changes: dict[str, Any], message: str
) -> None:
    folder = changed(tiny(family), tmp_path, changes)
    with pytest.raises(InputError) as caught:
        _ = open_checkpoint(str(folder)).model
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


# What is beside it in a config changes nothing: it is redundant, the default, or how to run.
REDUNDANT: list[tuple[str, dict[str, Any]]] = [
    ("qwen3_moe", {"use_qk_norm": True, "qkv_bias": False, "shared_expert_intermediate_size": 0}),
    ("qwen3_moe", {"layer_types": ["full_attention"] * 3, "scoring_func": "softmax"}),
    ("qwen3_moe", {"routed_scaling_factor": 1.0, "n_group": 1, "query_pre_attn_scalar": 32}),
    ("mixtral", {"_attn_implementation": "flash_attention_2", "experts_implementation": "x"}),
    ("mixtral", {"attn_implementation": "flex_attention", "return_dict": False}),
    ("mixtral", {"torchscript": True, "use_cache": False, "output_attentions": True}),
    ("mixtral", {"hidden_act": "swish", "num_experts": 6, "head_dim": None}),
    ("mixtral", {"rope_theta": 1e6, "rope_scaling": None, "max_window_layers": 3}),
    ("mixtral", {"auto_map": {"AutoModelForCausalLM": "modeling.Other"}, "temperature": 0.5}),
    ("olmoe", {"head_dim": 16, "is_causal": True, "decoder": None}),
    ("qwen2_moe", {"layer_types": ["attention"] * 3, "sliding_window": 0, "num_local_experts": 9}),
]


@pytest.mark.parametrize(("family", "changes"), REDUNDANT, ids=named)
def test_what_changes_nothing_is_accepted(
    tiny: Make, tmp_path: Path, family: str, changes: dict[str, Any]
) -> None:
    plain = open_checkpoint(str(tiny(family))).model
    model = open_checkpoint(str(changed(tiny(family), tmp_path, changes))).model
    assert torch.equal(compute_logits(model, IDS), compute_logits(plain, IDS))
    build_transformers_model(model, torch.float32)


@pytest.mark.parametrize("head_dim", [{}, {"head_dim": None}], ids=["absent", "null"])
def test_yarn_gets_the_derived_size_of_heads(
    tiny: Make, tmp_path: Path, head_dim: dict[str, Any]
) -> None:
    source = tiny("mixtral")
    config = json.loads((source / "config.json").read_text()) | {"rope_parameters": YARN}
    del config["head_dim"]
    folder = changed(source, tmp_path, {})
    (folder / "config.json").write_text(json.dumps(config | {"head_dim": 16}))
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    (folder / "config.json").write_text(json.dumps(config | head_dim))
    model = open_checkpoint(str(folder)).model
    with torch.no_grad():
        assert (compute_logits(model, IDS) - theirs(IDS).logits).abs().max() < 1e-4
    assert model.config["head_dim"] == 16
