"""Values that no model can have, in each key of a config: refused when opened, or as in stock.

`benchmarks/attack/config_values.py` tries them all.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.attack.config_values import Source, judge, list_keys, make_source, try_family
from every_family import make_folder, spread_families
from moe2edge.errors import InputError, Unsupported
from moe2edge.storage.checkpoint import open_checkpoint

FINE = ("refused", "equal", "accepted")
# Late, or faults of moe2edge, before the model of a config was tried when it is opened.
CASES: list[tuple[str, dict[str, Any], str]] = [
    ("nemotron_h", {"chunk_size": 0}, "cannot run with it: ZeroDivisionError"),
    ("nemotron_h", {"chunk_size": -1}, "cannot run with it: RuntimeError"),
    ("nemotron_h", {"chunk_size": 10**9}, "computes a tensor of shape .* for 8 tokens"),
    ("nemotron_h", {"is_causal": "x"}, "is_causal is 'x', expected: true or false"),
    ("deepseek_v3", {"head_dim": 0}, "cannot run with it: RuntimeError"),
    ("deepseek_v3", {"n_group": None}, "cannot run with it: TypeError"),
    ("deepseek_v2", {"topk_method": "x"}, "cannot run with it: UnboundLocalError"),
    ("deepseek_v32", {"index_topk": -1}, "cannot run with it: RuntimeError"),
    ("cohere2_moe", {"expert_selection_fn": "x"}, "can only be `softmax` or `sigmoid`"),
    ("granitemoe", {"logits_scaling": None}, "cannot run with it: TypeError"),
    ("bailing_hybrid", {"linear_conv_kernel_dim": 1}, "further parts have shapes .* but config"),
    ("bailing_hybrid", {"num_experts_per_token": "x"}, "is 'x', expected: a positive whole number"),
    ("gpt_oss", {"num_experts_per_tok": -1}, "is -1, expected: a positive whole number"),
    ("gpt_oss", {"num_experts_per_tok": 9}, "is 9, but there are 8 experts"),
    ("hunyuan_v1_moe", {"moe_topk": [2, 2]}, r"is \[2, 2\], expected: a list of 4 numbers"),
    ("gpt_oss", {"num_experts_per_tok": 0}, "is 0, expected: how many experts a token chooses"),
    ("deepseek_v2", {"num_experts_per_tok": None}, "not say how many experts a token chooses"),
    ("gpt_oss", {"num_hidden_layers": 10**9}, "is 1000000000, expected: at most 2000"),
    ("gpt_oss", {"num_local_experts": 10**9}, "is 1000000000, expected: at most 100000"),
    ("gpt_oss", {"vocab_size": 10**30}, "expected: a number of at most 64 bits"),
    ("gpt_oss", {"use_cache": None}, "use_cache is None, expected: true or false"),
    ("gpt_oss", {"output_router_logits": 0}, "output_router_logits is 0, expected: true or false"),
    ("gpt_oss", {"attribute_map": []}, "attribute_map is the name of a part of transformers'"),
    ("gpt_oss", {"to_dict": 1}, "to_dict is the name of a part of transformers'"),
    ("gpt_oss", {"text_config": 5}, "text_config is 5, which gpt_oss does not have"),
    ("gpt_oss", {"per_layer_config": {"1": 3}}, "transformers refuses it"),
    ("gpt_oss", {"per_layer_config": {"1": {"num_local_experts": 4}}}, "."),
    ("qwen3_next", {"per_layer_config": {"9": {}}}, "transformers refuses it"),
    ("dots3_note_text", {"per_layer_config": None}, "has shape .* but config.json asks for"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, Any]]]:
    found = {}
    for family in dict.fromkeys(family for family, _, _ in CASES):
        folder = tmp_path_factory.mktemp(family)
        make_folder(folder, family)
        found[family] = folder, json.loads((folder / "config.json").read_text())
    return found


@pytest.mark.parametrize(("family", "changes", "message"), CASES, ids=[str(c) for _, c, _ in CASES])
def test_values_are_refused_when_a_model_is_opened(
    folders: dict[str, tuple[Path, dict[str, Any]]],
    family: str,
    changes: dict[str, Any],
    message: str,
) -> None:
    folder, config = folders[family]
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises((InputError, Unsupported), match=message) as caught:
        _ = open_checkpoint(folder).model
    assert "\n" not in str(caught.value)


SOUND: list[tuple[str, dict[str, Any]]] = [
    ("hunyuan_v1_moe", {"moe_topk": [2, 1, 2, 2]}),
    ("deepseek_v3", {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": None}),
    ("deepseek_v3", {"rope_scaling": None, "num_labels": 2, "name_or_path": "x", "head_dim": 8}),
    ("deepseek_v3", {"torch_dtype": "float32", "auto_map": {"AutoConfig": "configuration.X"}}),
    ("gpt_oss", {"is_causal": True, "use_cache": False, "output_attentions": False}),
    ("gpt_oss", {"per_layer_config": {}}),
]


@pytest.mark.parametrize(("family", "changes"), SOUND, ids=[str(c) for _, c in SOUND])
def test_what_models_have_is_computed_as_in_stock(
    family: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    """Older names of settings are properties of transformers' classes, and no parts of them."""
    source = make_source(tmp_path, family)
    key, value = changes.popitem()
    source.config.update(changes)
    assert judge(source, key, value) == "equal"


def test_the_pattern_of_older_files_of_nemotron_h_is_read(tmp_path: Path) -> None:
    source = make_source(tmp_path, "nemotron_h")
    source.config.pop("layers_block_type")
    assert judge(source, "hybrid_override_pattern", "ME*E") == "equal"


# Stock warns of older spellings.
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("family", spread_families(("lfm2_moe", "minimax_m2"), 0))
def test_each_value_is_refused_or_computed_as_in_stock(family: str, tmp_path: Path) -> None:
    """Each 29th case here, which are others in each family; all of them by the benchmark."""
    tried = dict(try_family(family, tmp_path, common=False, every=29))
    wrong = {case: became for case, became in tried.items() if became not in FINE}
    assert not wrong
    assert len(tried) > 8


@pytest.mark.slow
def test_keys_that_all_families_have(tmp_path: Path) -> None:
    tried = dict(try_family("phimoe", tmp_path, common=True, every=1))
    assert {case: became for case, became in tried.items() if became not in FINE} == {}


def test_a_late_fault_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the trial the sweep finds what the trial finds."""
    monkeypatch.setattr("moe2edge.model.build.try_config", lambda _: None)
    source: Source = make_source(tmp_path, "nemotron_h")
    assert "chunk_size" in list_keys(source, common=False)
    assert judge(source, "chunk_size", 0).startswith("late: ZeroDivisionError")


def test_a_layer_that_runs_twice_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The walk would run it once."""
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssModel

    make_folder(tmp_path, "gpt_oss")
    once = GptOssModel.forward

    def run_twice(self: Any, *given: Any, **more: Any) -> Any:
        once(self, *given, **more)
        return once(self, *given, **more)

    monkeypatch.setattr(GptOssModel, "forward", run_twice)
    with pytest.raises(Unsupported, match="it runs layer 0 2 times for one text"):
        _ = open_checkpoint(tmp_path).model
