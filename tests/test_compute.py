"""Walks that score with products in bfloat16 choose what float32 chooses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from every_family import make_model
from helpers import ignore
from moe2edge.calibration import walk
from moe2edge.calibration.block_runner import BlockRunner
from moe2edge.calibration.router_observers import OutputObserver, RoutingObserver
from moe2edge.commands.export_stages import list_export_stages
from moe2edge.model.block import Block
from moe2edge.passes.expert_drop import ExpertDrop
from moe2edge.pipeline import contract, stages
from moe2edge.pipeline.recipe import parse
from moe2edge.runtime import products
from moe2edge.runtime.memory import UNLIMITED, Estimate
from moe2edge.storage.checkpoint import BUILTIN, open_checkpoint

IDS = torch.randint(4, 90, (2, 24), generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("family", ["qwen3_next", "gpt_oss", "mixtral", "jamba"])
def test_only_matrices_that_are_bfloat16_are_multiplied_so(tmp_path: Path, family: str) -> None:
    stock = make_model(family)
    for dtype, is_narrow in ((torch.bfloat16, True), (torch.float32, False)):
        stock.to(dtype).save_pretrained(tmp_path / f"{dtype}")
        model = open_checkpoint(tmp_path / f"{dtype}").model
        hidden = walk.embed(model, IDS)
        for block in model.blocks[-2:]:
            wide = BlockRunner(model, block).run(hidden)
            found = BlockRunner(model, block, torch.bfloat16).run(hidden)
            assert torch.equal(found, wide) is not is_narrow
            assert found.dtype == torch.float32
            # A few tokens may be near a tie of the router.
            errors = (found - wide).norm(dim=-1) / (wide - hidden).norm(dim=-1)
            assert errors.median() <= 0.02


def test_outputs_are_seen_as_they_are_computed(tmp_path: Path) -> None:
    make_model("qwen3_next").save_pretrained(tmp_path)
    model = open_checkpoint(tmp_path).model
    seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    class Seeing:
        def visit(self, block: Block, row: int, outputs: Any, weights: Any) -> None:
            if block.index == 1:
                seen[row] = outputs.clone(), weights.clone()

        def observe(self, trace: Any) -> None:
            if trace.block.index != 1:
                return
            routing, out = trace.routing, torch.zeros_like(trace.routing.inputs)
            assert set(routing.ids.flatten().tolist()) == set(seen)
            for row, (outputs, weights) in seen.items():
                token, place = torch.where(routing.ids == row)
                again = trace.expert_output(row, routing.inputs[token])
                assert torch.equal(outputs, again)
                assert torch.equal(weights, routing.weights[token, place])
                out.index_add_(0, token, outputs * weights[:, None])
            assert out.norm() > 0

        def result(self) -> None:
            return None

    walk.observe(model, IDS, [Seeing()], ignore, "")
    assert seen


def test_builtin_keeps_the_same_experts() -> None:
    model = open_checkpoint(BUILTIN).model
    ids = torch.randint(4, model.vocabulary, (2, 128), generator=torch.Generator().manual_seed(1))
    kinds = (RoutingObserver, OutputObserver)
    kept = [
        [b.expert_origins for b in ExpertDrop(keep=0.5).apply(model, facts).model.blocks]
        for dtype in (torch.float32, torch.bfloat16)
        for facts in [walk.gather(model, ids, kinds, ignore, "", dtype=dtype)]
    ]
    assert kept[0] == kept[1]


@pytest.mark.parametrize(
    ("native", "large", "chosen"),
    [(True, True, "bfloat16"), (True, False, "float32"), (False, True, "float32")],
)
def test_dtype_is_chosen_by_size_and_processor(
    monkeypatch: pytest.MonkeyPatch, *, native: bool, large: bool, chosen: str
) -> None:
    monkeypatch.setattr(products, "multiplies_bfloat16", lambda *_: native)
    model = open_checkpoint(BUILTIN).model
    monkeypatch.setattr(contract, "LONG_TO_SCORE", 1 if large else model.parameters + 1)
    step = ExpertDrop(keep=0.5).resolve(model)
    assert step.compute == chosen
    other = ExpertDrop(keep=0.75, compute="float32")
    (stage,) = stages.group_stages([step, other])
    assert stages.Stage((step,)).compute == chosen
    assert stage.compute == "float32"  # they share the walk, and one wants it exact


@pytest.mark.parametrize(("other", "narrow"), [("float32", False), ("bfloat16", True)])
def test_a_plan_knows_the_dtype_of_a_walk_that_passes_share(other: str, narrow: bool) -> None:
    recipe = parse(
        "passes: [expert_drop: {keep: 0.75, compute: bfloat16}, "
        f"expert_drop: {{keep: 0.5, compute: {other}}}]"
    )
    plan = stages.plan_passes(recipe.passes, open_checkpoint(BUILTIN).model)
    costs = [Estimate(0)] * 2
    found = [s for s in list_export_stages(plan, costs, recipe, [], UNLIMITED) if s.step in (0, 1)]
    assert [(s.narrow > 0, s.products > 0) for s in found] == [(narrow, not narrow), (False, False)]
