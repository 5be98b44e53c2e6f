"""Every MoE family of transformers: read, walked over, trimmed, and read back by transformers."""

from __future__ import annotations

import gc
import json
import re
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CONFIG_MAPPING

from every_family import (
    GENERIC,
    IDS,
    ROUNDING,
    TABLED,
    check_walk_and_trimming,
    make_folder,
    run_stock,
    walk_over,
)
from moe2edge.calibration.block_runner import BlockRunner
from moe2edge.calibration.observation import Facts
from moe2edge.calibration.similarity import BlockSimilarity
from moe2edge.calibration.walk import embed
from moe2edge.errors import InputError, Unsupported
from moe2edge.model.family import REFUSED, find_family
from moe2edge.model.hf_config import build_transformers_dict
from moe2edge.passes.block_drop import BlockDrop
from moe2edge.runtime.memory import UNLIMITED
from moe2edge.storage.checkpoint import open_checkpoint
from moe2edge.targets.hf import Hf

# Models with such experts of which transformers has no causal language model.
WITHOUT_CLASS = {
    "deepseek_ocr2", "diffusion_gemma", "ernie4_5_vl_moe", "glm4v_moe", "glm5_next",
    "mistral_large4", "muse_spark", "openai_privacy_filter", "qwen3_omni_moe", "qwen3_vl_moe",
    "unlimited_ocr",
}  # fmt: skip
# The same of transformers 5.24, which the older one does not have.
NEWER = {"hy_v4_vl"}


@pytest.mark.parametrize("family", [*TABLED, *GENERIC])
def test_a_family_is_walked_trimmed_and_read_back(family: str, tmp_path: Path) -> None:
    check_walk_and_trimming(make_folder(tmp_path / "source", family), tmp_path)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "qwen3_next", "gemma4_text"])
def test_a_block_is_freed_without_a_collection(family: str, tmp_path: Path) -> None:
    """Nothing around a layer points back at it, or several blocks would be in memory at once."""
    make_folder(tmp_path, family)
    model = open_checkpoint(tmp_path).model
    gc.collect()
    gc.disable()
    try:
        runner = BlockRunner(model, model.blocks[1])
        numbers = [weakref.ref(p) for p in runner._layer.parameters()]
        runner.watch(embed(model, IDS, UNLIMITED))
        del runner
        assert numbers
        assert not any(reference() is not None for reference in numbers)
    finally:
        gc.enable()


@pytest.mark.parametrize("family", sorted(REFUSED))
def test_other_kinds_of_experts_are_refused_by_name(family: str) -> None:
    if family not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} does not know {family}")
    with pytest.raises(Unsupported, match=f"{family} is not supported: "):
        find_family({"model_type": family})


def test_every_family_of_transformers_has_its_place() -> None:
    """A family that a new release of transformers brings has to be put into a list."""
    folder = Path(transformers.__file__).parent / "models"
    mark = "@use_experts_implementation"
    found = {
        path.parent.name for path in folder.glob("*/modeling_*.py") if mark in path.read_text()
    }
    kinds = [kind for kind in (*TABLED, *GENERIC, *REFUSED) if kind in CONFIG_MAPPING]
    placed = [CONFIG_MAPPING[kind].__module__ for kind in kinds]
    assert found - {module.split(".")[2] for module in placed} - NEWER == WITHOUT_CLASS


def test_the_page_of_families_lists_them() -> None:
    page = (Path(__file__).parents[1] / "docs" / "families.md").read_text()
    listed = page.partition("<!-- families: generic -->")[2].partition("<!-- end -->")[0]
    assert re.findall(r"`(\w+)`", listed) == list(GENERIC)
    refused = page.partition("## Refused by name")[2]
    assert set(re.findall(r"`(\w+)`", refused)) == set(REFUSED)


def test_the_last_block_with_attention_is_never_dropped(tmp_path: Path) -> None:
    """Transformers keeps its cache in such blocks: without one it cannot go on with a text."""
    make_folder(tmp_path / "source", "nemotron_h")
    model = open_checkpoint(tmp_path / "source").model
    step = BlockDrop(drop=1)
    (kind,) = step.observers()
    cosines: dict[tuple[int, ...], float] = {(0,): 0.1, (1,): 0.5, (2,): 0.9, (3,): 0.2}
    found = step.apply(model, Facts({kind: BlockSimilarity(cosines)}))
    assert [block.origin for block in found.model.blocks] == [0, 2, 3]
    assert found.notes == (
        "block 2 stays: it is the last with attention, and transformers' caches need one",
    )
    with pytest.raises(InputError, match="only 3 of 4 can go: the last block with attention"):
        BlockDrop(drop=4).apply(model, Facts({kind: BlockSimilarity(cosines)}))


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss", "jamba"])
def test_tensors_are_those_that_transformers_has_for_the_config(
    family: str, tmp_path: Path
) -> None:
    """A missing, a spare and a differently shaped tensor is named, whichever it is."""
    make_folder(tmp_path, family)
    place = tmp_path / "model.safetensors"
    tensors = load_file(place)

    def refuse(changed: dict[str, Tensor], message: str) -> None:
        save_file(changed, place, metadata={"format": "pt"})
        with pytest.raises(InputError, match=message):
            _ = open_checkpoint(tmp_path).model

    for name in sorted(tensors)[::11]:
        others = {key: tensor for key, tensor in tensors.items() if key != name}
        refuse(others, f"has no tensor {re.escape(name)}")
        wider = torch.zeros([size + 1 for size in tensors[name].shape])
        refuse(others | {name: wider}, rf"{re.escape(name)} has shape .*, but config.json asks")
    first = next(name for name in sorted(tensors) if re.search(r"layers\.3\..*experts", name))
    refuse({key: t for key, t in tensors.items() if key != first}, f"no tensor {re.escape(first)}")
    for spare in ("odd.weight", "model.layers.0.mlp.odd.weight", "lm_head.bias"):
        refuse(tensors | {spare: torch.zeros(3)}, f"does not know, such as {re.escape(spare)}")


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("deepseek_v3", {"initializer_range": "x"}, "initializer_range"),
        ("nemotron_h", {"layers_block_type": []}, "no list of decoder layers"),
        ("nemotron_h", {"model_type": ["nemotron_h"]}, "has no model_type"),
        ("deepseek_v3", {"n_group": 3}, "n_group is 3, expected: a divisor of the 8 experts"),
        ("deepseek_v3", {"n_group": 0}, "n_group is 0, expected: a divisor"),
        ("deepseek_v3", {"topk_group": 9}, "topk_group is 9, expected: 1 to 2"),
        ("jamba", {"attn_layer_period": 0}, "transformers refuses it"),
        ("granitemoehybrid", {"mamba_n_heads": 0}, "transformers refuses it"),
        ("deepseek_v3", {"dtype": []}, "transformers cannot read it as deepseek_v3"),
        ("gpt_oss", {"use_cache": "x"}, "use_cache is 'x', expected: true or false"),
        ("gpt_oss", {"num_local_experts": -3}, "."),
        ("qwen3_next", {"hidden_size": None}, "."),
    ],
)
def test_values_that_no_model_can_have_are_faults_of_the_config(
    family: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    make_folder(tmp_path, family)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises((InputError, Unsupported), match=message) as caught:
        _ = open_checkpoint(tmp_path).model
    assert "\n" not in str(caught.value)


def test_blocks_are_not_dropped_where_a_config_places_layers_by_their_number(
    tmp_path: Path,
) -> None:
    """Without the first block of DeepSeek the next one would be dense in transformers."""
    make_folder(tmp_path, "deepseek_v3")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"pad_token_id": 96}))
    model = open_checkpoint(tmp_path).model
    step = BlockDrop(drop=1)
    (kind,) = step.observers()
    cosines: dict[tuple[int, ...], float] = {(0,): 0.9, (1,): 0.5, (2,): 0.8, (3,): 0.2}
    found = step.apply(model, Facts({kind: BlockSimilarity(cosines)}))
    assert [block.origin for block in found.model.blocks] == [0, 1, 3]
    make_folder(tmp_path, "jamba", num_hidden_layers=6)  # each second block has attention, experts
    model = open_checkpoint(tmp_path).model
    with pytest.raises(InputError, match=r"one of blocks \[0, 1, 2, 3, 4\] others would change"):
        BlockDrop(drop=2).check(model)


@pytest.mark.parametrize("family", ["ernie4_5_moe", "hunyuan_v1_moe"])
def test_a_changed_top_k_replaces_each_name_that_the_source_gives_it(
    family: str, tmp_path: Path
) -> None:
    stock = make_folder(tmp_path, family)
    config = json.loads((tmp_path / "config.json").read_text())
    (name,) = [key for key in ("moe_k", "moe_topk") if key in config]
    config["num_experts_per_tok"] = config.pop(name)
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = open_checkpoint(tmp_path).model
    for block, layer in model.moe_blocks:
        router = replace(layer.router, top_k=1)
        model = model.replace_block(replace(block, mlp=replace(layer, router=router)))
    written = build_transformers_dict(model)
    assert getattr(type(stock.config)(**written), name) == 1


@pytest.mark.parametrize("family", ["gemma4_text", "gpt_oss"])
def test_fewer_experts_than_are_chosen_lower_their_number(family: str, tmp_path: Path) -> None:
    """The router of Gemma 4 reads the number from its config while it runs."""
    key = "top_k_experts" if family == "gemma4_text" else "num_experts_per_tok"
    stock = make_folder(tmp_path / "source", family, **{key: 4})
    model = open_checkpoint(tmp_path / "source").model
    for block, _ in model.moe_blocks:
        model = model.replace_block(block.keep_experts((0, 2, 5), clamp_top_k=True))
    out = tmp_path / "out"
    out.mkdir()
    Hf().write(model, out)
    again = type(stock).from_pretrained(out, dtype=torch.float32, local_files_only=True)
    assert (run_stock(again.eval()) - walk_over(model)).abs().max() <= ROUNDING
