"""Each criterion equals a slow loop over tokens; similarities equal their formula."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers import ignore
from moe2edge.calibration import router_observers, walk
from moe2edge.calibration.similarity import BlockSimilarityFactory, LayerSimilarityObserver
from moe2edge.model.family import FAMILIES
from moe2edge.numerics import saliency
from moe2edge.storage.checkpoint import open_checkpoint
from moe2edge.testing import Make

IDS = torch.randint(1, 96, (3, 20), generator=torch.Generator().manual_seed(0))


def hooked(folder: Path, block: int) -> dict[str, torch.Tensor]:
    """Return inputs and outputs of parts of a block, from transformers' own model."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    layer = model.model.layers[block]
    seen: dict[str, torch.Tensor] = {}
    layer.mlp.gate.register_forward_hook(
        lambda _, args, out: seen.update(h=args[0].reshape(-1, 64), logits=out[0])
    )
    layer.register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    layer.register_forward_hook(lambda _, args, out: seen.update(y=out))
    layer.post_attention_layernorm.register_forward_hook(
        lambda _, args, out: seen.update(attended=args[0], normed=out)
    )
    layer.mlp.register_forward_hook(lambda _, args, out: seen.update(mlp=out))
    with torch.no_grad():
        model(IDS)
    seen["gate_up"] = layer.mlp.experts.gate_up_proj.detach()
    seen["down"] = layer.mlp.experts.down_proj.detach()
    return seen


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_criteria_equal_a_loop_over_tokens(
    tiny: Make, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(walk, "BATCH_TOKENS", 20)  # statistics of three batches are merged
    folder = tiny(family)
    model = open_checkpoint(str(folder)).model
    routing, outputs = router_observers.RoutingObserver(), router_observers.OutputObserver()
    walk.observe(model, IDS, [routing, outputs], ignore, "")
    seen = hooked(folder, 1)
    renormalize = model.moe_blocks[1][1].router.renormalize
    score, mass = torch.zeros(6), torch.zeros(6)
    outs: list[list[torch.Tensor]] = [[] for _ in range(6)]
    gates: list[list[float]] = [[] for _ in range(6)]
    for h, logits in zip(seen["h"], seen["logits"], strict=True):
        p = logits.softmax(-1)
        score += p / len(seen["h"])
        top = p.topk(2)
        total = top.values.sum() if renormalize else 1
        for j, g in zip(top.indices.tolist(), (top.values / total).tolist(), strict=True):
            gate, up = (seen["gate_up"][j] @ h).chunk(2)
            outs[j].append(seen["down"][j] @ (torch.nn.functional.silu(gate) * up))
            gates[j].append(g)
            mass[j] += g
    assert min(map(len, outs)) > 1
    norms = [[float(f.norm()) for f in of] for of in outs]
    count = [len(of) for of in outs]
    spread = [float(torch.stack(of).std(0, unbiased=False).norm()) for of in outs]
    gated = [
        sum(g * n for g, n in zip(*both, strict=True)) for both in zip(gates, norms, strict=True)
    ]
    layer = outputs.result().layers[1]
    for found, expected in (
        (saliency.compute_routing_score(routing.result(), 1), score.tolist()),
        (saliency.compute_frequency(routing.result(), 1), count),
        (saliency.compute_soft_frequency(routing.result(), 1), mass.tolist()),
        (saliency.compute_ean(layer), [sum(n) for n in norms]),
        (saliency.compute_man(layer), [sum(n) / len(n) for n in norms]),
        (saliency.compute_msan(layer), [sum(x * x for x in n) / len(n) for n in norms]),
        (saliency.compute_reap(layer), [a / b for a, b in zip(gated, count, strict=True)]),
        (saliency.compute_mone(layer), [a * b for a, b in zip(spread, mass.tolist(), strict=True)]),
        (layer.largest, [max(float(f.abs().max()) for f in of) for of in outs]),
    ):
        assert found.tolist() == pytest.approx(expected, rel=1e-4)


def test_an_expert_without_tokens_scores_nothing() -> None:
    zeros = torch.zeros(1, dtype=torch.float64)
    layer = saliency.LayerOutputs(
        (0,), torch.zeros(1, dtype=torch.int64), *[zeros] * 5, *[torch.zeros(1, 4)] * 2
    )
    nothing = saliency.RoutingStatistics({1: (0,)}, 5, {1: zeros.long()}, {1: zeros}, {1: zeros})
    assert saliency.compute_soft_frequency(nothing, 1).tolist() == [0.0]
    for criterion in ("ean", "reap", "man", "msan", "mone"):
        assert getattr(saliency, f"compute_{criterion}")(layer).tolist() == [0.0]


def test_criteria_of_weights() -> None:
    even, spiky = [torch.ones(3, 4), -torch.ones(5)], [torch.tensor([3.0, 0, 0, 0])]
    assert saliency.compute_magnitude(even) == 1
    assert saliency.compute_magnitude(spiky) == 1.5
    # mean|W| / rms(W) is highest, 1, where all weights are alike: that expert goes first.
    assert saliency.compute_aimer(even) == -1
    assert saliency.compute_aimer(spiky) == -0.5
    assert saliency.compute_aimer([torch.zeros(2)]) == 0


def mean_cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    pairs = zip(a.reshape(-1, 64), b.reshape(-1, 64), strict=True)
    cosines = [float(x @ y / (x.norm() * y.norm())) for x, y in pairs]
    return sum(cosines) / len(cosines)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_similarities_are_mean_cosines(
    tiny: Make, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(walk, "BATCH_TOKENS", 40)  # two batches, of which one is smaller
    folder = tiny(family)
    blocks, layers = BlockSimilarityFactory(longest=2)(), LayerSimilarityObserver()
    walk.observe(open_checkpoint(str(folder)).model, IDS, [blocks, layers], ignore, "")
    first, second = hooked(folder, 0), hooked(folder, 1)
    cosine = blocks.result().cosine
    assert set(cosine) == {(0,), (1,), (2,), (0, 1), (1, 2)}
    assert cosine[1,] == pytest.approx(mean_cosine(second["x"], second["y"]), abs=1e-5)
    assert cosine[0, 1] == pytest.approx(mean_cosine(first["x"], second["y"]), abs=1e-5)
    found = layers.result()
    with_norm = mean_cosine(second["attended"], second["attended"] + second["mlp"])
    assert found.with_norm[1,] == pytest.approx(with_norm, abs=1e-5)
    without = mean_cosine(second["normed"], second["mlp"])
    assert found.without_norm[1,] == pytest.approx(without, abs=1e-5)


def test_random_scores_follow_their_seed() -> None:
    first, same = (saliency.draw_random_scores(8, 2, 7).tolist() for _ in range(2))
    assert first == same
    assert first != saliency.draw_random_scores(8, 2, 8).tolist()
    assert first != saliency.draw_random_scores(8, 3, 7).tolist()
