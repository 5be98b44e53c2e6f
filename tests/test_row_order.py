"""Rows of a router in any order: they run, and are written, as if they were sorted."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import each_family
from moe2edge.calibration import walk
from moe2edge.calibration.criteria import score_experts
from moe2edge.calibration.observation import Facts
from moe2edge.calibration.router_observers import OutputObserver, RoutingObserver
from moe2edge.errors import InputError
from moe2edge.model.edits import materialize, sort_rows
from moe2edge.model.experts import (
    PARTS,
    Constant,
    Factors,
    Full,
    Linear,
    Row,
    Tied,
    list_full_rows,
)
from moe2edge.model.layers import MoELayer
from moe2edge.model.model import Model
from moe2edge.model.weights import Weight
from moe2edge.numerics.scheme import Scheme
from moe2edge.passes.expert_replace import ExpertReplace
from moe2edge.passes.rtn import Rtn
from moe2edge.pipeline.blockwise import solve_blocks
from moe2edge.pipeline.checks import refuse_replaced
from moe2edge.pipeline.contract import PassContext
from moe2edge.pipeline.registry import find_pass
from moe2edge.pipeline.target import Target
from moe2edge.runtime.load import build_transformers_model, load
from moe2edge.storage.checkpoint import open_checkpoint
from moe2edge.storage.output import open_stored_model
from moe2edge.targets.gptq import Gptq
from moe2edge.targets.hf import Hf
from moe2edge.targets.onnx import Onnx
from moe2edge.testing import InMemory, Make, quantize, read_all_numbers

IDS = torch.randint(0, 96, (3, 40), generator=torch.Generator().manual_seed(1))


QUIET: Any = SimpleNamespace(advance=lambda *_: None, log=lambda _: None)


def silent(*_: object) -> None:
    """No progress."""


def mix(model: Model, kind: str) -> Model:
    """``model`` with random rows of all kinds in no order, or of those that a test is about."""
    draw = torch.Generator().manual_seed(0)

    def weight(*shape: int) -> Weight:
        numbers = 0.3 * torch.randn(shape, generator=draw)
        return Weight("new", shape, "F32", lambda: numbers)

    def factors(layer: MoELayer) -> dict[str, Factors]:
        shapes = {part: getattr(layer.experts[0], part).shape for part in PARTS}
        return {p: Factors(weight(4, ins), weight(outs, 4)) for p, (outs, ins) in shapes.items()}

    for block, layer in model.moe_blocks:
        constants = [Constant(n, weight(64)) for n in (3, 5)]
        first, second = constants
        linear = Linear(0, weight(64), weight(4, 64), weight(64, 4))
        rows: dict[str, tuple[Row, ...]] = {
            "all kinds": (
                linear,
                Full(1, 1),
                Tied(2, None, factors(layer)),
                first,
                Full(4, 0),
                Tied(5, 1, factors(layer)),
            ),
            "replacements": (
                linear,
                Full(1, 0),
                Full(2, 1),
                first,
                Full(4, 2),
                second,
            ),
            "permuted": (linear, Full(1, 2), Full(2, 0), first, Full(4, 1), second),
            "experts alone": tuple(Full(n, (n + 1) % 6) for n in range(6)),
        }
        found = rows[kind]
        count = 1 + max(base for row in found if isinstance(row, Full) for base in (row.expert,))
        mlp = replace(layer, experts=layer.experts[:count], rows=found)
        model = model.replace_block(replace(block, mlp=mlp))
    model.verify()
    return model


KINDS = ("all kinds", "replacements", "permuted", "experts alone")


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def logits(model: Model) -> Tensor:
    hidden = walk.observe(model, IDS, [], silent, "")
    return torch.stack(list(walk.compute_logits(model, hidden)))


def files(target: Target, model: Model, folder: Path) -> dict[str, bytes]:
    """Return what the target writes of the model."""
    folder.mkdir()
    target.accepts(model)
    target.write(model, folder)
    if isinstance(target, Onnx):
        assert target.estimate(model).disk == (folder / "model.onnx.data").stat().st_size
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("family", each_family("mixtral"))
def test_sorting_changes_nothing_that_is_computed(tiny: Make, family: str, kind: str) -> None:
    """In the walk, and as a transformers model; sorted rows are sorted already."""
    model = mix(open_checkpoint(str(tiny(family))).model, kind)
    in_order = sort_rows(model)
    assert sort_rows(in_order) is in_order
    in_order.verify()
    for (_, before), (_, after) in zip(model.moe_blocks, in_order.moe_blocks, strict=True):
        assert before.rows != after.rows
        assert (*after.routed, *after.replaced) == tuple(range(6))
        assert after.is_tied == (kind == "all kinds")
        origins = [[layer.rows[n].origin for n in layer.routed] for layer in (before, after)]
        assert origins[0] == origins[1]
    assert model.parameters == in_order.parameters
    assert model.active_parameters == in_order.active_parameters
    expected = logits(in_order)
    assert torch.allclose(logits(model), expected, atol=1e-4)
    with torch.no_grad():
        for one in (model, in_order, materialize(model)):
            loaded = build_transformers_model(one, torch.float32)
            assert torch.allclose(loaded(IDS).logits, expected, atol=1e-4)


@pytest.mark.parametrize("target", [Hf(layout="natural"), Gptq(layout="natural"), Onnx()])
@pytest.mark.slow
def test_folders_are_those_of_sorted_rows(
    tiny: Make, tmp_path: Path, kind: str, target: Target
) -> None:
    """The files to the byte, and what is read back and run."""
    model = open_checkpoint(str(tiny("mixtral"))).model
    if isinstance(target, Gptq):
        model = quantize(model, Scheme(group_size=32))
    model = mix(model, kind)
    in_order = sort_rows(model)
    assert target.estimate(model).disk == target.estimate(in_order).disk
    found, out = files(target, model, tmp_path / "mixed"), tmp_path / "mixed"
    assert found == files(target, in_order, tmp_path / "sorted")
    own = json.loads(found["config.json"]).get("per_layer_config", {})
    assert all(("members" in entry["moe2edge"]) == (kind == "all kinds") for entry in own.values())
    expected = logits(model)
    assert (target.reopen(out, exact=True).logits(IDS) - expected).abs().max() < 1e-4
    if not isinstance(target, Onnx):
        again = open_stored_model(open_checkpoint(str(out)))
        assert [m.rows for _, m in again.moe_blocks] == [
            tuple(replace(row, origin=n) for n, row in enumerate(m.rows))
            for _, m in renamed(in_order, again).moe_blocks
        ]
        with torch.no_grad():
            found_logits = load(out, dtype=torch.float32)(IDS).logits
        assert (found_logits - expected).abs().max() < 1e-4


def renamed(model: Model, names: Model) -> Model:
    """``model`` whose tensors in blocks are called, and read, as those of ``names``."""
    for block, other in zip(model.blocks, names.blocks, strict=True):
        model = model.replace_block(block.with_weights(dict(other.weights())))
    return model


def test_onnx_keeps_apart_what_is_quantized(tiny: Make, tmp_path: Path, kind: str) -> None:
    """Experts of 4 bits are in the fused operator, factors and maps of 8 bits beside it."""
    model = mix(open_checkpoint(str(tiny("olmoe"))).model, kind)
    step = Rtn(group_size=32, factors=16 if kind == "experts alone" else 8)
    model = solve_blocks(model, None, step.solver(model), InMemory(), silent, "rtn")[0]
    found = files(Onnx(), model, tmp_path / "mixed")
    assert found == files(Onnx(), sort_rows(model), tmp_path / "sorted")
    runtime = Onnx().reopen(tmp_path / "mixed", exact=True)
    assert (runtime.logits(IDS) - logits(model)).abs().max() < 1e-4


@pytest.mark.parametrize("slim", ["gptq", "awq", "rtn"])
@pytest.mark.slow
def test_solvers_find_the_same(tiny: Make, kind: str, slim: str) -> None:
    model = mix(open_checkpoint(str(tiny("olmoe"))).model, kind)
    step: Any = find_pass(slim).model_validate({"bits": 8, "group_size": 32})
    found = []
    for one in (model, sort_rows(model)):
        resolved = step.resolve(one)
        tokens = None if slim == "rtn" else IDS
        solved = solve_blocks(one, tokens, resolved.solver(one), InMemory(), silent, slim)[0]
        resolved.check_result(one, solved)
        found.append(read_all_numbers(sort_rows(solved)))
    assert found[0].keys() == found[1].keys()
    for name, numbers in found[0].items():
        assert torch.allclose(numbers, found[1][name], atol=1e-2), name


def test_observers_see_experts_and_not_rows(tiny: Make, kind: str) -> None:
    model = mix(open_checkpoint(str(tiny("qwen3_moe"))).model, kind)
    scores: list[list[list[float]]] = []
    for one in (model, sort_rows(model)):
        observers = RoutingObserver(), OutputObserver()
        walk.observe(one, IDS, observers, silent, "")
        facts = Facts({type(o): o.result() for o in observers})
        scores.append(
            [
                score_experts(criterion, block, facts)
                for criterion in ("frequency", "routing-score", "reap", "msan")
                for block, _ in one.moe_blocks
            ]
        )
    for mixed, expected in zip(*scores, strict=True):
        assert mixed == pytest.approx(expected, rel=1e-4)


def test_more_replacements_follow_the_rows(tiny: Make) -> None:
    """A second pass of `expert_replace` asks rows, not places, what their experts put out."""
    model = mix(open_checkpoint(str(tiny("olmoe"))).model, "replacements")
    step = ExpertReplace.model_validate({"with": "constant", "keep": 2})
    found = []
    for one in (model, sort_rows(model)):
        context = PassContext(one, one, IDS, InMemory(), QUIET)
        found.append(step.search(context).model)
    assert found[0].expert_counts == (2, 2, 2)
    for before, after in zip(*map(read_all_numbers, found), strict=True):
        assert before == after
    for name, numbers in read_all_numbers(found[0]).items():
        assert torch.allclose(numbers, read_all_numbers(found[1])[name], atol=1e-4), name


@pytest.mark.parametrize("kind", KINDS)
def test_passes_that_know_plain_layers_refuse_others(tiny: Make, kind: str) -> None:
    model = mix(open_checkpoint(str(tiny("olmoe"))).model, kind)
    with pytest.raises(InputError, match="put expert_replace or expert_merge after expert_drop"):
        refuse_replaced("expert_drop", model)


# ---- a layer by itself ---------------------------------------------------------------------------


def layer_of(tiny: Make, kind: str) -> MoELayer:
    return mix(open_checkpoint(str(tiny("olmoe"))).model, kind).moe_blocks[0][1]


def scores_of(layer: MoELayer) -> list[list[float]]:
    rows: list[list[float]] = layer.router.weight.load().tolist()
    return rows


def test_numbers_count_within_a_kind(tiny: Make) -> None:
    layer = layer_of(tiny, "all kinds")
    assert layer.row_numbers == (0, 0, 1, 1, 2, 3)
    assert layer.row_roles == (
        "substitutes.0", "members.0", "members.1", "substitutes.1", "members.2", "members.3",
    )  # fmt: skip
    assert (layer.routed, layer.replaced) == ((1, 2, 4, 5), (0, 3))
    assert layer.bases == (None, 1, None, None, 0, 1)
    assert layer.sharing == (1, 2, 5)
    assert layer.find_uses(1, torch.tensor([[0, 1], [5, 4]])).tolist() == [
        [False, True],
        [True, False],
    ]


@pytest.mark.parametrize(("ids", "rows"), [((1, 0), (2, 1, 0, 3, 5)), ((2,), (4, 0, 3, 5))])
def test_experts_are_kept_with_their_rows(
    tiny: Make, ids: Sequence[int], rows: Sequence[int]
) -> None:
    layer = layer_of(tiny, "replacements")
    kept = layer.keep(ids, clamp_top_k=True)
    assert [row.origin for row in kept.rows] == [layer.rows[row].origin for row in rows]
    assert kept.bases[: len(ids)] == tuple(range(len(ids)))
    assert scores_of(kept) == [scores_of(layer)[row] for row in rows]


def test_experts_are_replaced_in_their_rows(tiny: Make) -> None:
    layer = layer_of(tiny, "permuted")
    new = Constant(9, layer.experts[0].gate)
    after = layer.replace_experts({0: new})
    assert [row.origin for row in after.rows] == [1, 4, 9, 0, 3, 5]
    assert after.rows[2] is new
    assert after.bases[:2] == (1, 0)
    assert scores_of(after) == [scores_of(layer)[row] for row in (1, 4, 2, 0, 3, 5)]
    tied = layer_of(tiny, "all kinds")
    with pytest.raises(InputError, match="some of which are tied"):
        tied.replace_experts({1: new})
    with pytest.raises(InputError, match="cannot replace experts"):
        tied.replace_experts({0: new, 1: new})


def test_a_plain_layer_needs_no_rows(tiny: Make) -> None:
    layer = open_checkpoint(str(tiny("olmoe"))).model.moe_blocks[0][1]
    assert layer == MoELayer.make_plain(layer.router, layer.experts, layer.shared)
    assert layer.rows == list_full_rows(layer.experts)
    assert layer.is_plain
    assert not layer.sharing
