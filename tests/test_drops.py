"""Layer Drop and Block Drop: what goes, that skipping it in transformers is the same, refusals."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers import compute_logits, each_family, plan
from moe2edge.calibration import walk
from moe2edge.calibration.observation import Facts
from moe2edge.calibration.similarity import BlockSimilarityFactory, LayerSimilarityObserver
from moe2edge.errors import InputError
from moe2edge.model.block import SECOND_NORM
from moe2edge.model.family import FAMILIES
from moe2edge.model.model import Model
from moe2edge.passes.block_drop import BlockDrop
from moe2edge.passes.layer_drop import LayerDrop
from moe2edge.pipeline.contract import Outcome, Trim
from moe2edge.storage.checkpoint import open_checkpoint
from moe2edge.testing import Make

IDS = torch.randint(1, 96, (3, 30), generator=torch.Generator().manual_seed(0))


def outcome(step: Trim, model: Model) -> Outcome:
    step = step.resolve(model)
    step.check(model)
    observers = {kind: kind() for kind in step.observers()}
    walk.observe(model, IDS, list(observers.values()), lambda *_: None, "")
    return step.apply(model, Facts({kind: seen.result() for kind, seen in observers.items()}))


def logits(model: Model) -> torch.Tensor:
    return compute_logits(model, IDS)


def skipping(folder: Path, change: Callable[[Any], None]) -> torch.Tensor:
    """Logits of stock transformers after ``change`` of its layers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    change(model.model.layers)
    with torch.no_grad():
        out: torch.Tensor = model(IDS, use_cache=False).logits
    return out


def five(tiny: Make, family: str) -> Path:
    """Five blocks, so that runs can differ."""
    return tiny(family, num_hidden_layers=5)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("family", each_family("olmoe"))
def test_layer_drop_equals_skipping_the_module(tiny: Make, family: str, norm: bool) -> None:
    folder = five(tiny, family)
    model = open_checkpoint(str(folder)).model
    observer = LayerSimilarityObserver()
    walk.observe(model, IDS, [observer], lambda *_: None, "")
    found = observer.result().with_norm if norm else observer.result().without_norm
    most_alike = sorted(range(5), key=lambda n: -found[n,])[:2]
    result = outcome(LayerDrop(drop=2, norm=norm), model)
    trimmed = result.model
    assert sorted(most_alike) == [b.index for b in trimmed.blocks if b.mlp is None]
    assert len(result.changed) == 2
    assert all((SECOND_NORM in trimmed.blocks[n].norms) is not norm for n in most_alike)

    def skip(layers: Any) -> None:
        for n in most_alike:
            stands_in = (lambda x: torch.zeros_like(x)) if norm else (lambda x: x)
            layers[n].mlp.forward = stands_in

    assert (logits(trimmed) - skipping(folder, skip)).abs().max() < 1e-5


def test_layers_that_are_dense_stay(tiny: Make) -> None:
    model = open_checkpoint(str(tiny("qwen3_moe", mlp_only_layers=[1]))).model
    trimmed = outcome(LayerDrop(drop=1), model).model
    assert trimmed.blocks[1].mlp is not None
    assert sum(block.mlp is None for block in trimmed.blocks) == 1
    with pytest.raises(
        InputError, match="drop is 2 of 2 MoE layers; choose at least 1 and at most 1"
    ):
        LayerDrop(drop=2).check(model)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_block_drop_equals_skipping_the_block(tiny: Make, family: str) -> None:
    folder = five(tiny, family)
    model = open_checkpoint(str(folder)).model
    observer = BlockSimilarityFactory()()
    walk.observe(model, IDS, [observer], lambda *_: None, "")
    cosine = observer.result().cosine
    most_alike = sorted(range(5), key=lambda n: -cosine[n,])[:2]
    trimmed = outcome(BlockDrop(drop=2), model).model
    assert [b.origin for b in trimmed.blocks] == [n for n in range(5) if n not in most_alike]
    assert [b.index for b in trimmed.blocks] == [0, 1, 2]

    def skip(layers: Any) -> None:
        for n in most_alike:
            layers[n].forward = lambda hidden_states, **_: hidden_states

    assert (logits(trimmed) - skipping(folder, skip)).abs().max() < 1e-5


def stream(folder: Path) -> list[torch.Tensor]:
    """Input of every block, and the output of the last, from transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    seen: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model.model.layers[-1].register_forward_hook(lambda _, args, out: seen.append(out))
    with torch.no_grad():
        model(IDS, use_cache=False)
    return seen


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_run_is_scored_over_exactly_its_blocks(tiny: Make, count: int) -> None:
    folder = five(tiny, "mixtral")
    states = stream(folder)
    scores = [
        float(torch.cosine_similarity(states[at], states[at + count], dim=-1).mean())
        for at in range(5 - count + 1)
    ]
    best = max(range(len(scores)), key=scores.__getitem__)
    step = BlockDrop(drop=count, consecutive=True)
    trimmed = outcome(step, open_checkpoint(str(folder)).model).model
    gone = set(range(best, best + count))
    assert [b.origin for b in trimmed.blocks] == [n for n in range(5) if n not in gone]


def test_thresholds_drop_what_reaches_them(tiny: Make) -> None:
    model = open_checkpoint(str(five(tiny, "olmoe"))).model
    blocks, layers = BlockSimilarityFactory(3)(), LayerSimilarityObserver()
    walk.observe(model, IDS, [blocks, layers], lambda *_: None, "")
    cosine, of_layers = blocks.result().cosine, layers.result().with_norm
    second = sorted((of_layers[n,] for n in range(5)), reverse=True)[1]
    trimmed = outcome(LayerDrop(threshold=second, most=3), model).model
    assert {b.origin for b in trimmed.blocks if b.mlp is None} == {
        n for n in range(5) if of_layers[n,] >= second
    }
    # At most so many, the most alike first.
    trimmed = outcome(LayerDrop(threshold=-1, most=0.4), model).model
    assert sum(b.mlp is None for b in trimmed.blocks) == 2
    second = sorted((cosine[n,] for n in range(5)), reverse=True)[1]
    trimmed = outcome(BlockDrop(threshold=second, most=0.99), model).model
    assert len(trimmed.blocks) == 3
    # Consecutive: the longest run that reaches it.
    limit = sorted((cosine[run] for run in cosine if len(run) == 2), reverse=True)[0]
    longest = max(len(run) for run in cosine if cosine[run] >= limit)
    trimmed = outcome(BlockDrop(threshold=limit, most=3, consecutive=True), model).model
    assert len(trimmed.blocks) == 5 - longest
    result = outcome(BlockDrop(threshold=1.0, most=3), model)
    assert result.model is model
    assert "below the threshold 1.0" in result.skipped["every block"]
    result = outcome(LayerDrop(threshold=1.0), model)
    assert "below the threshold 1.0" in result.skipped["every MoE layer"]


def test_fractions_are_of_the_source_and_rounded_down(tiny: Make) -> None:
    model = open_checkpoint(str(five(tiny, "mixtral"))).model
    assert BlockDrop(drop=0.5).resolve(model).drop == 2
    assert LayerDrop(drop=0.25).resolve(model).drop == 1
    assert len(plan([BlockDrop(drop=0.5).resolve(model)], model).blocks) == 3
    planned = plan([LayerDrop(drop=0.5).resolve(model)], model)
    assert len(planned.moe_blocks) == 3
    assert not planned.is_uniform


def test_single_blocks_need_no_second_copy_of_the_stream(tiny: Make) -> None:
    model = open_checkpoint(str(five(tiny, "mixtral"))).model
    for longest, held in ((1, 0), (3, 2)):
        observer = BlockSimilarityFactory(longest)()
        walk.observe(model, IDS, [observer], lambda *_: None, "")
        assert [len(latest) for latest in observer._latest] == [held]


def test_without_most_a_threshold_drops_a_quarter_and_one_at_least(tiny: Make) -> None:
    model = open_checkpoint(str(tiny("mixtral"))).model
    assert LayerDrop(threshold=-1).resolve(model).most == 1
    assert BlockDrop(threshold=-1).resolve(model).most == 1
    eight = open_checkpoint(str(tiny("mixtral", num_hidden_layers=8))).model
    assert LayerDrop(threshold=-1).resolve(eight).most == 2


def test_runs_of_blocks_that_are_no_longer_adjacent_are_refused(tiny: Make) -> None:
    """Two passes of one stage; the first breaks up every run of the second."""
    model = open_checkpoint(str(five(tiny, "mixtral"))).model
    step = BlockDrop(drop=2, consecutive=True)
    observers = {kind: kind() for kind in step.observers()}
    walk.observe(model, IDS, list(observers.values()), lambda *_: None, "")
    facts = Facts({kind: seen.result() for kind, seen in observers.items()})
    with pytest.raises(InputError, match="set rescore: true"):
        step.apply(model.keep_blocks([0, 2, 4]), facts)
    # One run is left.
    assert [b.origin for b in step.apply(model.keep_blocks([0, 1, 3]), facts).model.blocks] == [3]


BAD = [
    (BlockDrop(), "give drop (a count or a fraction) or threshold"),
    (BlockDrop(drop=1, threshold=0.9), "give drop (a count or a fraction) or threshold"),
    (LayerDrop(), "give drop (a count or a fraction) or threshold"),
    (BlockDrop(drop=0.1), "drop is 0 of 5 blocks; choose at least 1 and at most 4"),
    (BlockDrop(drop=5), "drop is 5 of 5 blocks; choose at least 1 and at most 4"),
    (LayerDrop(drop=5), "drop is 5 of 5 MoE layers; choose at least 1 and at most 4"),
    (LayerDrop(drop=1, most=2), "most needs threshold"),
    (LayerDrop(threshold=0.5, most=0.1), "most is 0 of 5 MoE layers"),
]


@pytest.mark.parametrize(("step", "message"), BAD, ids=[f"{n}" for n in range(len(BAD))])
def test_refusals(tiny: Make, step: Trim, message: str) -> None:
    model = open_checkpoint(str(five(tiny, "mixtral"))).model
    with pytest.raises(InputError, match=re.escape(message)):
        step.resolve(model).check(model)


@pytest.mark.parametrize("drop", [0, -1, 1.0, True, "two"])
def test_invalid_amounts(drop: Any) -> None:
    for kind in (BlockDrop, LayerDrop):
        with pytest.raises(ValueError, match=r"a count|a fraction"):
            kind.model_validate({"drop": drop})
