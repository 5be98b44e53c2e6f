"""Dynamic skipping: thresholds are medians, the rule is the paper's, rates are counted."""

from __future__ import annotations

import pickle
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers import plan, refuse, run
from moe2edge.calibration import router_observers, walk
from moe2edge.calibration.block_runner import BlockRunner
from moe2edge.calibration.observation import Facts
from moe2edge.errors import InputError
from moe2edge.model.family import FAMILIES
from moe2edge.model.layers import MoELayer
from moe2edge.model.model import Model
from moe2edge.numerics import skipping
from moe2edge.numerics.skipping import apply_skipping as skip
from moe2edge.passes.expert_skip import ExpertSkip
from moe2edge.runtime.load import build_transformers_model
from moe2edge.storage.checkpoint import open_checkpoint
from moe2edge.testing import Make

IDS = torch.randint(1, 96, (3, 30), generator=torch.Generator().manual_seed(0))


def skipped(model: Model, **options: Any) -> Model:
    step = ExpertSkip(**options)
    step.check(model)
    observer = router_observers.RatioObserver()
    walk.observe(model, IDS, [observer], lambda *_: None, "")
    outcome = step.apply(model, Facts({router_observers.RatioObserver: observer.result()}))
    outcome.model.verify()
    return outcome.model


def weights_in_transformers(folder: Path) -> dict[int, torch.Tensor]:
    """Softmax probabilities of the chosen experts, per block, in falling order."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    seen: dict[int, torch.Tensor] = {}
    for n, layer in enumerate(model.model.layers):
        layer.mlp.gate.register_forward_hook(
            lambda gate, _, out, n=n: seen.update({n: out[0].softmax(-1).topk(gate.top_k).values})
        )
    with torch.no_grad():
        model(IDS)
    return seen


@pytest.mark.parametrize("top_k", [2, 3])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_thresholds_are_medians_of_ratios(tiny: Make, family: str, top_k: int) -> None:
    folder = tiny(family, num_experts_per_tok=top_k)
    model = skipped(open_checkpoint(str(folder)).model)
    for (_, layer), rows in zip(
        model.moe_blocks, weights_in_transformers(folder).values(), strict=True
    ):
        for place in range(1, top_k):
            ratios = [float(row[place] / row[0]) for row in rows]
            expected = statistics.median(ratios)
            assert layer.router.skip_below[place - 1] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_thresholds_lie_between_ratios(count: int) -> None:
    """On a ratio, rounding would decide whether its token skips."""
    draw = torch.Generator().manual_seed(count)
    ratios = torch.rand(count, 2, generator=draw)
    ratios[-1] = ratios[0]  # equal ones are no gap
    for column, below in enumerate(skipping.compute_thresholds(ratios, 0.5)):
        values = ratios[:, column].tolist()
        assert min(abs(value - below) for value in values) > 1e-4
        ordered = sorted(values)
        if count % 2 == 0 and ordered[count // 2] != ordered[count // 2 - 1]:
            assert below == pytest.approx(statistics.median(values))
        assert sum(value < below for value in values) <= count / 2


def test_verifying_the_very_text_that_was_calibrated_on(tiny: Make, tmp_path: Path) -> None:
    """An odd number of tokens: the median is one token's ratio."""
    recipe, text = tmp_path / "skip.yaml", tmp_path / "text.txt"
    recipe.write_text("passes: [expert_skip]")
    text.write_text("The quick brown fox jumps over the lazy dog, again. " * 3)
    sizes = [
        f"--set={section}.{key}={value}"
        for section in ("calibration", "evaluation")
        for key, value in (("samples", 1), ("length", 49))
    ]
    command = ["export", str(tiny("mixtral")), "-t", "onnx", "-o", str(tmp_path / "out")]
    texts = ["--calib", str(text), "--eval", str(text)]
    result = run(*command, "-r", str(recipe), *texts, *sizes)
    assert result.exit_code == 0, result.output


def test_a_loaded_model_can_be_pickled(tiny: Make) -> None:
    model = build_transformers_model(
        skipped(open_checkpoint(str(tiny("mixtral"))).model), torch.float32
    )
    again = pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, again(IDS).logits)


def test_the_rule_token_by_token() -> None:
    weights = torch.tensor([[0.6, 0.3, 0.1], [0.4, 0.35, 0.25], [0.5, 0.25, 0.25]])
    found, left_out = skip(weights, (0.5, 0.3), renormalize=True)
    # 0.3 < 0.5 * 0.6 is false (equal stays); 0.1 < 0.3 * 0.6 is true.
    assert left_out.tolist() == [[False, False, True], [False, False, False], [False] * 3]
    assert found[0].tolist() == pytest.approx([2 / 3, 1 / 3, 0])
    assert found[1].tolist() == pytest.approx(weights[1].tolist())
    found, _ = skip(weights, (0.9, 0.3), renormalize=False)
    assert found[0].tolist() == pytest.approx([0.6, 0, 0])


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_half_of_the_calibration_tokens_skip_the_second(tiny: Make, family: str) -> None:
    model = skipped(open_checkpoint(str(tiny(family))).model)
    observer = router_observers.SkipObserver()
    hidden = walk.observe(model, IDS, [observer], lambda *_: None, "")
    rates = observer.result()
    # The first block's inputs are those that were calibrated on: 45 of 90 tokens, of 180 places.
    assert rates.routed[0] == 180
    assert rates.skipped[0] == 45
    assert rates.rate == pytest.approx(0.25, abs=0.08)
    whole = walk.observe(open_checkpoint(str(tiny(family))).model, IDS, (), lambda *_: None, "")
    assert not torch.allclose(hidden, whole, atol=1e-3)


def test_skipped_experts_see_no_tokens(tiny: Make) -> None:
    """In the PyTorch path; the experts' implementation gets an id that it leaves out."""
    model = skipped(open_checkpoint(str(tiny("mixtral"))).model, quantile=0.999)
    routed = BlockRunner(model, model.blocks[0]).watch(walk.embed(model, IDS)).routing
    assert routed is not None
    assert int((routed.ids == 6).sum()) >= 89
    assert routed.weights[routed.ids == 6].eq(0).all()


def test_quantile_is_about_the_part_that_skips(tiny: Make) -> None:
    model = open_checkpoint(str(tiny("olmoe"))).model
    for quantile in (0.1, 0.9):
        observer = router_observers.SkipObserver()
        walk.observe(skipped(model, quantile=quantile), IDS, [observer], lambda *_: None, "")
        assert observer.result().skipped[0] / 90 == pytest.approx(quantile, abs=0.02)


def test_thresholds_go_with_a_smaller_top_k(tiny: Make) -> None:
    model = skipped(open_checkpoint(str(tiny("mixtral", num_experts_per_tok=3))).model)
    block, layer = model.moe_blocks[0]
    kept = layer.keep([0, 4], clamp_top_k=True)
    assert kept.router.skip_below == layer.router.skip_below[:1]
    model.replace_block(replace(block, mlp=kept)).verify()


def test_refusals(tiny: Make) -> None:
    model = open_checkpoint(str(tiny("mixtral"))).model
    with pytest.raises(InputError, match="twice"):
        ExpertSkip().check(skipped(model))
    single = open_checkpoint(str(tiny("mixtral", num_experts_per_tok=1))).model
    with pytest.raises(InputError, match="nothing to skip"):
        ExpertSkip().check(single)
    for quantile in (0, 1, 2):
        with pytest.raises(ValueError, match="quantile"):
            ExpertSkip(quantile=quantile)
    planned = plan([ExpertSkip()], model)
    assert not planned.is_uniform
    assert all(isinstance(block.mlp, MoELayer) for block in planned.blocks)


def test_stock_layout_refuses_before_calibration(tiny: Make, tmp_path: Path) -> None:
    error = refuse(tiny("mixtral"), tmp_path / "out", ["expert_skip"], "hf")
    assert error.exit_code == 6
    assert "skip" in str(error)
