"""Criteria of expert dropping by name: the observers that each needs, and its scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from moe2edge.calibration.observation import Facts, ObserverFactory
from moe2edge.errors import Moe2EdgeError
from moe2edge.model.block import Block
from moe2edge.model.layers import MoELayer

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.numerics.saliency import LayerOutputs, RoutingStatistics

Criterion = Literal[
    "routing-score", "frequency", "soft-frequency", "ean", "reap", "man", "msan", "mone",
    "magnitude", "aimer", "random",
]  # fmt: skip
# Criteria that need only routing statistics, and criteria that need only weights.
ROUTING = ("routing-score", "frequency", "soft-frequency")
WEIGHTS = ("magnitude", "aimer")


def list_observers(criterion: Criterion) -> tuple[ObserverFactory, ...]:
    """List the observers whose facts `score_experts` reads for a criterion."""
    from moe2edge.calibration.router_observers import OutputObserver, RoutingObserver

    if criterion in ROUTING:
        return (RoutingObserver,)
    return () if criterion in (*WEIGHTS, "random") else (OutputObserver,)


def score_experts(criterion: Criterion, block: Block, facts: Facts, seed: int = 0) -> list[float]:
    """Score the experts of an MoE block, in their order; the lowest is dropped first.

    Args:
        criterion: name of the score; formulas are in `moe2edge.numerics.saliency`.
        block: the block. The facts may come from a model in which it had more experts.
        facts: results of the observers of the criterion.
        seed: seed of the criterion ``random``.

    Raises:
        Moe2EdgeError: the block has no experts.
    """
    from moe2edge.calibration import router_observers
    from moe2edge.numerics import saliency

    layer, key = block.mlp, block.origin
    if not isinstance(layer, MoELayer):
        raise Moe2EdgeError(
            f"block {block.index} has no experts to score; {criterion} needs an MoE layer"
        )
    if criterion == "random":
        return saliency.draw_random_scores(len(layer.experts), key, seed).tolist()
    if criterion in WEIGHTS:
        weight_score = (
            saliency.compute_aimer if criterion == "aimer" else saliency.compute_magnitude
        )
        parts = [[w for w in (e.gate, e.up, e.down) if w.count] for e in layer.experts]
        return [weight_score([w.load() for w in own]) for own in parts]
    name = f"compute_{criterion.replace('-', '_')}"
    if criterion in ROUTING:
        statistics = facts[router_observers.RoutingObserver]
        score_routing: Callable[[RoutingStatistics, int], Tensor] = getattr(saliency, name)
        scores, experts = score_routing(statistics, key), statistics.experts[key]
    else:
        outputs = facts[router_observers.OutputObserver].layers[key]
        score_outputs: Callable[[LayerOutputs], Tensor] = getattr(saliency, name)
        scores, experts = score_outputs(outputs), outputs.experts
    by_origin = dict(zip(experts, scores.tolist(), strict=True))
    return [by_origin[origin] for origin in block.expert_origins]
