"""Merged experts in folders: members, plain smaller models, other passes around, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from helpers import TEXT, compute_logits, each_family, export, refuse, run, search, slow_except
from moe2edge.model.block import is_quantizable
from moe2edge.model.model import Model
from moe2edge.passes.expert_merge import ExpertMerge
from moe2edge.pipeline.recipe import parse
from moe2edge.runtime.load import load
from moe2edge.storage.checkpoint import open_checkpoint
from moe2edge.storage.output import open_stored_model
from moe2edge.targets.hf import Hf
from moe2edge.testing import Make

METHODS = ("hc-smoe", "m-smoe", "ream")
IDS = torch.randint(1, 96, (6, 40), generator=torch.Generator().manual_seed(9))
MERGE: dict[str, Any] = {"method": "m-smoe", "keep": 4}


def logits(model: Model) -> Tensor:
    return compute_logits(model, IDS)


@pytest.mark.parametrize("family", each_family("olmoe"))
@pytest.mark.parametrize("method", METHODS)
def test_a_folder_computes_what_was_merged(
    tiny: Make, tmp_path: Path, family: str, method: str
) -> None:
    model = open_checkpoint(str(tiny(family))).model
    step = ExpertMerge.model_validate({"method": method, "keep": 3, "routing": "members"})
    merged = search(step, model, IDS).model
    out = tmp_path / "out"
    out.mkdir()
    hf = Hf(layout="natural")
    hf.accepts(merged)
    hf.write(merged, out)
    again = open_stored_model(open_checkpoint(str(out)))
    assert [m.bases for _, m in again.moe_blocks] == [m.bases for _, m in merged.moe_blocks]
    loaded = load(out, dtype=torch.float32)
    with torch.no_grad():
        assert torch.allclose(loaded(IDS).logits, logits(merged), atol=1e-4)
    assert sum(p.numel() for p in set(loaded.parameters())) == merged.parameters


@pytest.mark.parametrize("family", each_family("mixtral"))
@pytest.mark.parametrize("method", slow_except(["m-smoe", "ream"], "ream"))
@pytest.mark.slow
def test_blocks_go_then_experts_merge_then_bits(
    tiny: Make, tmp_path: Path, family: str, method: str
) -> None:
    folder, out = tiny(family), tmp_path / "out"
    steps = [
        {"block_drop": {"drop": 1}},
        {"expert_merge": {"method": method, "keep": 0.5}},
        {"gptq": {}},
    ]
    code, said, report = export(folder, out, steps, "gptq:layout=natural")
    assert code == 0, said
    assert report["results"][0]["parity"]["exact"] < 1e-4
    model = open_stored_model(open_checkpoint(str(out)))
    assert model.expert_counts == (3, 3)
    assert model.tied_count == (0 if method == "ream" else 6)
    for name, role, weight in model.tensors():
        assert (weight.scheme is not None) == is_quantizable(role), name
    loaded: Any = load(out, dtype=torch.float32)
    with torch.no_grad():
        assert torch.allclose(loaded(IDS).logits, logits(model), atol=1e-3)
    resolved = parse((out / "recipe.resolved.yaml").read_text()).passes[1]
    assert isinstance(resolved, ExpertMerge)
    assert resolved.align is True
    assert resolved.routing == ("centroids" if method == "ream" else "members")
    assert resolved.group_limit == (16 if method == "ream" else None)


@pytest.mark.parametrize("family", each_family("qwen2_moe"))
@pytest.mark.parametrize("method", slow_except(METHODS, "hc-smoe"))
@pytest.mark.slow
def test_centroids_are_a_plain_smaller_model(
    tiny: Make, tmp_path: Path, family: str, method: str
) -> None:
    """Which stock transformers loads, and an ONNX graph holds."""
    folder, out = tiny(family), tmp_path / "out"
    step = {"expert_merge": {"method": method, "keep": 0.5, "routing": "centroids"}}
    code, said, report = export(folder, out, [step], "hf,onnx")
    assert code == 0, said
    assert all(row["parity"]["exact"] < 1e-4 for row in report["results"])
    stock, info = AutoModelForCausalLM.from_pretrained(
        out / "hf", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values())
    model = open_checkpoint(str(out / "hf")).model
    assert model.is_uniform
    assert model.expert_counts == (3, 3, 3)
    with torch.no_grad():
        assert torch.allclose(stock(IDS).logits, logits(model), atol=1e-4)


@pytest.mark.parametrize("routing", ["members", "centroids"])
def test_decisions_hold_no_merged_experts(tiny: Make, tmp_path: Path, routing: str) -> None:
    recipe, sets = tmp_path / "recipe.json", tmp_path / "sets.json"
    recipe.write_text(json.dumps({"passes": [{"expert_merge": {**MERGE, "routing": routing}}]}))
    command = ["decide", str(tiny("olmoe")), "-r", str(recipe), "-o", str(sets), *TEXT]
    result = run(*command)
    assert result.exit_code == 2
    assert "a file of decisions holds choices only" in result.stderr
    assert not sets.exists()


WRONG: list[tuple[list[Any], str, str]] = [
    ([{"expert_merge": {"keep": 4}}], "hf", "expert_merge.method is missing"),
    ([{"expert_merge": {"method": "average", "keep": 4}}], "hf", "'hc-smoe', 'm-smoe' or 'ream'"),
    ([{"expert_merge": {"method": "ream"}}], "hf", "expert_merge.keep is missing"),
    ([{"expert_merge": {**MERGE, "keep": 6}}], "hf", "keeps every expert; nothing to do"),
    ([{"expert_merge": {**MERGE, "keep": 7}}], "hf", "keep is 7, but MoE layer 0 has 6 experts"),
    ([{"expert_merge": {**MERGE, "keep": 1.5}}], "hf", "between 0 and 1"),
    (
        [{"expert_merge": {**MERGE, "group_limit": 2}}],
        "hf",
        "expert_merge: group_limit is for method: ream; set that",
    ),
    ([{"expert_merge": {"method": "ream", "keep": 1}}], "hf", "leaves 1 experts in block 0"),
    (
        [{"expert_merge": {"method": "ream", "keep": 2, "group_limit": 1}}],
        "hf",
        "absorb at most 2 of the 4 others; set group_limit to at least 2",
    ),
    ([{"expert_merge": MERGE}], "hf", "tied or replaced experts"),
    (
        [{"gptq": {}}, {"expert_merge": MERGE}],
        "gptq",
        "before the pass that quantizes or sparsifies",
    ),
    ([{"expert_merge": MERGE}, {"expert_drop": {"keep": 3}}], "hf", "after expert_drop"),
    (
        [{"expert_merge": MERGE}, {"expert_replace": {"with": "constant", "keep": 3}}],
        "gptq",
        "routing: centroids",
    ),
    (
        [
            {"expert_skip": {}},
            {"expert_merge": {**MERGE, "routing": "centroids"}},
        ],
        "gptq",
        "put expert_skip after it",
    ),
]


@pytest.mark.parametrize(("steps", "name", "expected"), WRONG, ids=[e for _, _, e in WRONG])
def test_unsuitable_recipes_are_refused(
    tiny: Make, tmp_path: Path, steps: list[Any], name: str, expected: str
) -> None:
    error = refuse(tiny("olmoe"), tmp_path / "out", steps, name)
    assert error.exit_code in (2, 6)
    assert expected in str(error)


@pytest.mark.slow
def test_thresholds_stay_with_their_rows(tiny: Make, tmp_path: Path) -> None:
    steps = [{"expert_skip": {}}, {"expert_merge": MERGE}]
    code, said, report = export(tiny("mixtral"), tmp_path / "out", steps, "hf:layout=natural")
    assert code == 0, said
    assert report["results"][0]["parity"]["exact"] < 1e-4
