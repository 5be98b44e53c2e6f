"""The criteria of Expert Drop by name: what each needs to see, and the scores that it gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from moe2edge.calibration.observation import Facts, ObserverFactory
from moe2edge.errors import Moe2EdgeError
from moe2edge.model.layers import MoELayer
from moe2edge.model.model import Block

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.numerics.saliency import LayerOutputs, RoutingStatistics

Criterion = Literal[
    "routing-score", "frequency", "soft-frequency", "ean", "reap", "man", "msan", "mone",
    "magnitude", "aimer", "random",
]  # fmt: skip
ROUTING = ("routing-score", "frequency", "soft-frequency")
WEIGHTS = ("magnitude", "aimer")


def list_observers(criterion: Criterion) -> tuple[ObserverFactory, ...]:
    """Kinds of observers whose facts `score_experts` reads."""
    from moe2edge.calibration.router_observers import OutputObserver, RoutingObserver

    if criterion in ROUTING:
        return (RoutingObserver,)
    return () if criterion in (*WEIGHTS, "random") else (OutputObserver,)


def score_experts(criterion: Criterion, block: Block, facts: Facts, seed: int = 0) -> list[float]:
    """Scores of the experts of an MoE block, in their order; the lowest is dropped first.

    Args:
        criterion: how they are scored; formulas are in `moe2edge.numerics.saliency`.
        block: the block; facts may be those of a model that had more experts.
        facts: what the observers of the criterion gathered.
        seed: for ``random``.

    Raises:
        Moe2EdgeError: the block has no experts.
    """
    from moe2edge.calibration import router_observers
    from moe2edge.numerics import saliency

    layer, key = block.mlp, block.origin
    if not isinstance(layer, MoELayer):
        raise Moe2EdgeError(f"block {block.index} has no experts to score")
    if criterion == "random":
        return saliency.draw_random_scores(len(layer.experts), key, seed).tolist()
    if criterion in WEIGHTS:
        of_weights = saliency.compute_aimer if criterion == "aimer" else saliency.compute_magnitude
        return [of_weights([w.load() for w in (e.gate, e.up, e.down)]) for e in layer.experts]
    name = f"compute_{criterion.replace('-', '_')}"
    if criterion in ROUTING:
        statistics = facts[router_observers.RoutingObserver]
        of_routing: Callable[[RoutingStatistics, int], Tensor] = getattr(saliency, name)
        found, experts = of_routing(statistics, key), statistics.experts[key]
    else:
        outputs = facts[router_observers.OutputObserver].layers[key]
        of_outputs: Callable[[LayerOutputs], Tensor] = getattr(saliency, name)
        found, experts = of_outputs(outputs), outputs.experts
    by_origin = dict(zip(experts, found.tolist(), strict=True))
    return [by_origin[origin] for origin in block.expert_origins]
