"""`moe2edge inspect` of every model type of transformers, and of folders of other programs."""

from __future__ import annotations

import json
import re
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from every_family import GENERIC, TABLED, make_folder
from helpers import run
from moe2edge.model.family import REFUSED
from moe2edge.pipeline import registry
from moe2edge.storage.checkpoint import open_checkpoint

# Processor time for one folder; the first one also imports transformers, which is not counted.
LONGEST = 5.0
SAMPLE = (
    "mixtral", "gpt_oss", "qwen3_5_moe", "dbrx", "qwen3_omni_moe", "nllb-moe",
    "switch_transformers",
    "dots3_note_vision_encoder", "llama", "gpt2", "t5", "clip", "vitpose_backbone", "EvollaModel",
    "encoder-decoder", "deepseek_v2",
)  # fmt: skip


def write_config(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def inspect(folder: Path) -> dict[str, Any]:
    """Inspect a folder, as text and as JSON, which have to say the same."""
    said, found = run("inspect", folder), run("inspect", folder, "--json")
    assert said.exit_code == found.exit_code == 0, said.output
    data: dict[str, Any] = json.loads(found.stdout)
    last = [line.partition(":")[0] for line in said.stdout.splitlines()[-2:]]
    if data["reason"]:
        assert said.stdout.splitlines()[-1] == f"nothing can be done with it: {data['reason']}"
        assert "\n" not in data["reason"]
        assert data["passes"] == data["targets"] == []
    else:
        assert last == ["passes", "targets"]
        assert data["passes"]
        assert data["targets"]
    return data


def describe_defaults(kind: str, folder: Path) -> str:
    """Inspect the config that transformers makes for a model type; return in which way it ended."""
    from transformers import CONFIG_MAPPING

    try:
        config = json.loads(CONFIG_MAPPING[kind]().to_json_string(use_diff=False))
    except Exception:  # no model has the default values of some
        config = {}
    write_config(folder, config | {"model_type": kind})
    begun = time.process_time()
    result = run("inspect", folder)
    taken = time.process_time() - begun
    assert taken < LONGEST, f"{kind} took {taken:.1f} s"
    if len(config) == 0:
        assert result.exit_code == 2, result.output
        assert result.stderr.startswith("error: config.json: transformers refuses it: ")
        assert len(result.stderr.splitlines()) == 1
        return "refused by transformers"
    data = inspect(folder)
    assert data["model_type"] == kind
    if data["reason"] is None:
        assert data["expert_counts"], kind
        assert data["parameters"] > data["active_parameters"] > 0, kind
        return "supported"
    reasons = {
        "is a dense model": "dense",
        "is an encoder-decoder model": "encoder and decoder",
        "has no causal language model": "no language model",
        "is not supported": "refused by name",
        "transformers cannot build": "defaults that are no model",
    }
    (found,) = [name for words, name in reasons.items() if words in data["reason"]]
    return found


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    """Import what the command imports."""
    assert run("inspect", "builtin:tiny-moe").exit_code == 0


@pytest.mark.parametrize("kind", SAMPLE)
def test_a_model_type_is_described(kind: str, tmp_path: Path) -> None:
    describe_defaults(kind, tmp_path)


@pytest.mark.slow
@pytest.mark.rest
def test_every_model_type_of_transformers_is_described(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    found = {kind: describe_defaults(kind, tmp_path) for kind in CONFIG_MAPPING_NAMES}
    counts = Counter(found.values())
    with capsys.disabled():
        sys.stdout.write(f"\n{dict(counts)}\n")
    refused = {kind for kind, how in found.items() if how == "refused by name"}
    assert refused >= set(REFUSED) & set(found)
    assert {kind for kind, how in found.items() if how == "supported"} >= {
        *TABLED, *GENERIC
    } - {"deepseek_v2", "dots1", "gemma4_text", "hunyuan_v1_moe", "lfm2_moe"}  # fmt: skip
    assert counts["dense"] > 400
    assert counts["refused by transformers"] <= 4


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "qwen3_next", "nemotron_h"])
def test_a_config_alone_says_what_the_weights_say(family: str, tmp_path: Path) -> None:
    """Numbers of the meta model are those of the tensors."""
    make_folder(tmp_path, family)
    whole = inspect(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert whole["parameters"] == sum(tensor.numel() for tensor in stored.values())
    assert whole["bytes"] == open_checkpoint(tmp_path).model.nbytes
    (tmp_path / "model.safetensors").unlink()
    alone = inspect(tmp_path)
    (note,) = alone.pop("notes")
    assert note.startswith("only config.json was read: ")
    assert alone == {key: value for key, value in whole.items() if key != "notes"} | {"bytes": None}


def test_passes_and_targets_are_those_that_do_not_refuse_the_family(tmp_path: Path) -> None:
    everything = registry.list_passes(), registry.list_targets()
    row = inspect(write_config(tmp_path, {"model_type": "olmoe"}))
    assert (row["passes"], row["targets"]) == everything
    other = inspect(write_config(tmp_path, {"model_type": "gpt_oss"}))
    assert set(other["passes"]) < set(everything[0])
    assert other["targets"] == ["gguf", "gptq", "hf", "mlx"]
    other = inspect(write_config(tmp_path, {"model_type": "phimoe"}))
    assert other["targets"] == ["compressed-tensors", "gptq", "hf"]


def test_weights_of_a_dense_model_are_counted(tmp_path: Path) -> None:
    folder = write_config(tmp_path, {"model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    tensors = {"a": torch.zeros(3, 5), "b": torch.zeros(7, dtype=torch.float16)}
    save_file(tensors, folder / "model.safetensors")
    data = inspect(folder)
    assert (data["parameters"], data["bytes"], data["blocks"]) == (22, 74, 32)
    assert data["architecture"] == "LlamaForCausalLM"
    assert "'llama' is a dense model" in data["reason"]


BITSANDBYTES = {"quant_method": "bitsandbytes", "load_in_4bit": True}


@pytest.mark.parametrize(
    ("config", "expected", "reason"),
    [
        (
            {"model_type": "hunyuan", "num_experts": 16, "num_layers": 12, "auto_map": {"A": "b"}},
            {"expert_counts": [16], "blocks": 12, "parameters": None},
            "'hunyuan' is not known to transformers .*; the code that comes with it",
        ),
        (
            {"model_type": "some_vl", "text_config": {"n_routed_experts": 64, "n_layer": 3}},
            {"expert_counts": [64], "blocks": 3},
            "'some_vl' is not known to transformers",
        ),
        (
            {"model_type": "qwen3_moe", "quantization_config": BITSANDBYTES},
            {"quantization": "bitsandbytes", "expert_counts": [128] * 24},
            "bitsandbytes is not read",
        ),
        (
            {"model_type": "gpt_oss", "quantization_config": {"group_size": 64, "bits": 4}},
            {"quantization": "mlx", "expert_counts": [128] * 36},
            "quant_method 'mlx' is not read",
        ),
        (  # one tensor of more numbers than any that is computed
            {"model_type": "deepseek_v3", "n_routed_experts": 1024},
            {"expert_counts": [1024] * 58},
            None,
        ),
        (
            {"model_type": "deepseek_v3", "quantization_config": {"quant_method": "fp8"}},
            {"quantization": "fp8", "expert_counts": [256] * 58},
            None,
        ),
        ({"model_type": "gemma4_text"}, {"expert_counts": []}, "'gemma4_text' is a dense model"),
        ({"model_type": "kimi_k2"}, {"family": "deepseek_v3", "blocks": 61}, None),
        (
            {
                "model_type": "vitpose",
                "backbone_config": {"model_type": "vitpose_backbone", "num_experts": 6},
            },
            {"expert_counts": [6]},
            r"experts \(backbone_config.num_experts\) are in a part that is no language model",
        ),
        (
            {
                "model_type": "encoder-decoder",
                "encoder": {"model_type": "bert"},
                "decoder": {"model_type": "mixtral"},
            },
            {"parameters": None},
            "is an encoder-decoder model",
        ),
        (
            {"model_type": "qwen3_moe", "routed_scaling_factor": 2.5},
            {"expert_counts": [128]},
            "qwen3_moe with routed_scaling_factor 2.5 is not supported",
        ),
        ({"model_type": "deepseek_v2"}, {"expert_counts": [64]}, "how many experts a token"),
    ],
)  # fmt: skip
def test_what_a_config_says_is_shown(
    config: dict[str, Any], expected: dict[str, Any], reason: str | None, tmp_path: Path
) -> None:
    data = inspect(write_config(tmp_path, config))
    assert {key: data[key] for key in expected} == expected
    if reason is None:
        assert data["reason"] is None
    else:
        assert re.search(reason, data["reason"])


def test_folders_that_are_no_checkpoints_are_named(tmp_path: Path) -> None:
    def refuse(folder: Path) -> str:
        result = run("inspect", folder)
        assert result.exit_code == 2, result.output
        assert len(result.stderr.splitlines()) == 1
        return result.stderr

    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    assert "holds an adapter of 'org/base'; merge it into its base model" in refuse(adapter)
    pipeline = tmp_path / "pipeline"
    write_config(pipeline, {}).joinpath("config.json").rename(pipeline / "model_index.json")
    write_config(pipeline / "text_encoder", {"model_type": "t5"})
    said = refuse(pipeline)
    assert "a pipeline of diffusers" in said
    named = said.strip().rpartition("such as ")[2]
    assert "encoder-decoder" in inspect(pipeline / named)["reason"]
    part = write_config(pipeline / "transformer", {"_class_name": "FluxTransformer2DModel"})
    assert "'FluxTransformer2DModel', a part of a diffusers pipeline" in refuse(part)
    nested = tmp_path / "nested"
    nested.mkdir()
    write_config(nested / "checkpoint-5", {"model_type": "llama"})
    assert "the folder checkpoint-5 in it has: name that one" in refuse(nested)
    odd = write_config(tmp_path / "odd", {"model_type": "olmoe", "rms_norm_eps": "x"})
    assert "rms_norm_eps is 'x', expected: a number with a point" in refuse(odd)
    (odd / "config.json").write_text("{")
    assert "config.json is damaged" in refuse(odd)
