"""Expert Drop: which experts stay, under every scope, and what it refuses."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers import compute_logits, each_family, plan
from moe2edge.calibration import router_observers, walk
from moe2edge.calibration.observation import Facts
from moe2edge.errors import InputError
from moe2edge.model.experts import Dense
from moe2edge.model.family import FAMILIES
from moe2edge.model.layers import MoELayer
from moe2edge.model.model import Model
from moe2edge.numerics import saliency
from moe2edge.passes.expert_drop import ExpertDrop
from moe2edge.storage.checkpoint import open_checkpoint
from moe2edge.testing import Make

IDS = torch.randint(1, 96, (3, 40), generator=torch.Generator().manual_seed(0))
CRITERIA = (
    "routing-score", "frequency", "soft-frequency", "ean", "reap", "man", "msan", "mone",
    "magnitude", "aimer", "random",
)  # fmt: skip


def options(**given: Any) -> ExpertDrop:
    return ExpertDrop.model_validate(given)


def apply(step: ExpertDrop, model: Model) -> Model:
    step.check(model)
    observers = {kind: kind() for kind in step.observers()}
    walk.observe(model, IDS, list(observers.values()), lambda *_: None, "")
    outcome = step.apply(model, Facts({kind: seen.result() for kind, seen in observers.items()}))
    outcome.model.verify()
    assert outcome.changed
    return outcome.model


def kept(model: Model) -> list[list[int]]:
    return [[expert.origin for expert in layer.experts] for _, layer in model.moe_blocks]


@pytest.mark.parametrize("family", each_family("olmoe"))
@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_on_every_family(tiny: Make, family: str, criterion: str) -> None:
    model = open_checkpoint(str(tiny(family))).model
    best, worst = (
        kept(apply(options(keep=4, criterion=criterion, reverse=reverse), model))
        for reverse in (False, True)
    )
    # Four of the best and four of the worst, of six: together they are all.
    for a, b in zip(best, worst, strict=True):
        assert len(a) == len(b) == 4
        assert set(a) | set(b) == set(range(6))
    assert best == kept(apply(options(keep=4, criterion=criterion), model))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_slicing_equals_masking_with_minus_infinity(tiny: Make, family: str) -> None:
    folder = tiny(family)
    model = apply(options(keep=3), open_checkpoint(str(folder)).model)
    masked = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for layer, ids in zip(masked.model.layers, kept(model), strict=True):
        gone = [j for j in range(6) if j not in ids]

        def forward(x: torch.Tensor, gate: Any = layer.mlp.gate, gone: list[int] = gone) -> Any:
            logits = torch.nn.functional.linear(x.reshape(-1, gate.hidden_dim), gate.weight)
            logits[:, gone] = -torch.inf
            p = logits.float().softmax(-1)
            top, chosen = p.topk(gate.top_k)
            if getattr(gate, "norm_topk_prob", family == "mixtral"):
                top = top / top.sum(-1, keepdim=True)
            return logits, top.to(logits.dtype), chosen

        layer.mlp.gate.forward = forward
    with torch.no_grad():
        expected = masked(IDS).logits
    found = compute_logits(model, IDS)
    assert (found - expected).abs().max() < 1e-5


def test_global_scope_keeps_the_best_of_all_layers(tiny: Make) -> None:
    model = open_checkpoint(str(tiny("olmoe"))).model
    step = options(keep=0.5, criterion="reap", scope="global")
    found = kept(apply(step, model))
    observer = router_observers.OutputObserver()
    walk.observe(model, IDS, [observer], lambda *_: None, "")
    scores = {
        (n, j): float(score)
        for n in range(3)
        for j, score in enumerate(saliency.compute_reap(observer.result().layers[n]))
    }
    ranked = sorted(scores, key=lambda at: -scores[at])
    floors = {n: [at for at in ranked if at[0] == n][:2] for n in range(3)}
    chosen = [at for of in floors.values() for at in of]
    chosen += [at for at in ranked if at not in chosen][: 9 - 6]
    assert found == [sorted(j for n, j in chosen if n == layer) for layer in range(3)]
    assert sum(map(len, found)) == 9
    # One layer takes all that the floors leave: as uneven as it may become.
    assert plan([step], model).expert_counts == (5, 2, 2)


def test_floor_is_respected(tiny: Make) -> None:
    model = open_checkpoint(str(tiny("mixtral"))).model
    step = options(keep=4, scope="global", floor=4, criterion="frequency")
    assert [len(ids) for ids in kept(apply(step, model))] == [4, 4, 4]
    low = options(keep=2, scope="global", floor=1, criterion="frequency", clamp_top_k=True)
    trimmed = apply(low, model)
    counts = [len(block.expert_origins) for block in trimmed.blocks]
    assert sum(counts) == 6
    assert min(counts) == 1  # or this shows nothing
    for block, count in zip(trimmed.blocks, counts, strict=True):
        if isinstance(block.mlp, MoELayer):
            assert block.mlp.router.top_k == 2
        else:  # one expert is always chosen, with weight one: a plain MLP
            assert count == 1
            assert isinstance(block.mlp, Dense)


def test_counts_of_each_layer(tiny: Make) -> None:
    model = open_checkpoint(str(tiny("qwen3_moe"))).model
    step = options(keep=[5, 2, 6], criterion="man")
    assert apply(step, model).expert_counts == plan([step], model).expert_counts == (5, 2, 6)


def test_super_experts_are_protected(tiny: Make) -> None:
    model = open_checkpoint(str(tiny("olmoe"))).model
    observer = router_observers.OutputObserver()
    walk.observe(model, IDS, [observer], lambda *_: None, "")
    layers = observer.result().layers
    # Blocks 0, 1 and 2 of 3 lie in the first three quarters; the largest of all is protected.
    block, expert = max(
        ((n, j) for n in range(3) for j in range(6)), key=lambda at: layers[at[0]].largest[at[1]]
    )
    # Three of the best and three of the worst, of six: it is among one of them only.
    dropping = next(
        reverse
        for reverse in (False, True)
        if expert not in kept(apply(options(keep=3, reverse=reverse), model))[block]
    )
    step = options(keep=3, reverse=dropping, protect_super_experts=True)
    guarded = kept(apply(step, model))
    assert expert in guarded[block]
    assert [len(ids) for ids in guarded] == [3, 3, 3]


def test_a_super_expert_is_not_dropped_in_silence(tiny: Make) -> None:
    model = open_checkpoint(str(tiny("olmoe"))).model
    observer = router_observers.OutputObserver()
    walk.observe(model, IDS, [observer], lambda *_: None, "")
    layers = observer.result().layers
    block = max(range(3), key=lambda n: float(layers[n].largest.max()))
    counts = [0 if n == block else 3 for n in range(3)]
    with pytest.raises(InputError, match=f"keeping 0 experts in block {block} would drop"):
        apply(options(keep=counts, protect_super_experts=True), model)


def test_thresholds_do_not_outlive_their_experts(tiny: Make) -> None:
    model = open_checkpoint(str(tiny("mixtral"))).model
    block, layer = model.moe_blocks[0]
    router = replace(layer.router, skip_below=(0.5,))
    model = model.replace_block(replace(block, mlp=replace(layer, router=router)))
    with pytest.raises(InputError, match="put expert_skip after it"):
        options(keep=3).check(model)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"keep": [4, 4]}, "keep lists 2 counts for 3 MoE layers"),
    ({"keep": [4, 7, 4]}, "keep is 7, but block 1 has 6 experts"),
    ({"keep": [4, 1, 4]}, "leaves 1 experts in block 1"),
    ({"keep": [6, 6, 6]}, "keeps every expert"),
    (
        {"keep": [4, 4, 4], "scope": "global"},
        "keep lists a count per layer, which needs scope: layer",
    ),
    ({"keep": 4, "floor": 2}, "floor needs scope: global"),
    ({"keep": 4, "scope": "global", "floor": 1}, "floor 1 may leave 1 experts in block 0"),
    ({"keep": 3, "scope": "global", "floor": 4}, "9 experts in all, but the floors"),
    ({"keep": 4, "scope": "global", "floor": 7}, "floor is 7, but block 0 has 6 experts"),
]


@pytest.mark.parametrize(("given", "message"), BAD, ids=[m for _, m in BAD])
def test_refusals(tiny: Make, given: dict[str, Any], message: str) -> None:
    model = open_checkpoint(str(tiny("mixtral"))).model
    with pytest.raises(InputError, match=re.escape(message)):
        options(**given).check(model)


@pytest.mark.parametrize("keep", [[], [-1, 2, 2], [2.0, 2, 2], [True, 2, 2], "half"])
def test_invalid_lists_of_counts(keep: Any) -> None:
    with pytest.raises(ValueError, match=r"a count|list of counts"):
        options(keep=keep)
