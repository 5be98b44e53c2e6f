"""How the routers of a model use its experts on a text: counts, gate weights, every score.

One walk gathers everything. The document that `RoutingReport.to_json` gives has this form; lists
and keys keep their order, and the same model, text and machine give the same document::

    schema_version    1
    kind              "moe2edge.routing"
    model             MODEL as the user gave it
    family            its architecture
    target            target that wrote the folder; null: it is no output of moe2edge
    text              text, samples, length, seed and sha256 of its tokens (and more for a mix)
    tokens            tokens that each layer saw
    criteria          names of the scores below; the lowest is dropped first, by every one of them
    layers            one entry per MoE layer, in order:
      block, origin         index of its block in this model, and in the source of an output
      top_k                 experts chosen per token
      expert_count          experts in the layer
      skipped               places that dynamic skipping left empty, of tokens * top_k
      entropy_bits          of the shares below
      entropy_limit_bits    log2(expert_count), that of an even load
      coefficient_of_variation   of the loads: standard deviation / mean; 0 is even
      max_min_ratio         largest load / smallest; null: an expert has none
      unused                experts without a token
      experts               one entry per expert, in order:
        expert                position in the layer
        tokens                tokens routed to it
        share                 of the layer's routed places, sums to 1
        gate_mass             sum of its gate weights over those tokens
        mean_probability      mean over all tokens of the softmax of all router logits
        largest_output        largest entry of any of its outputs, absolute
        saliency              score by each of the criteria
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

from moe2edge.calibration import criteria
from moe2edge.calibration.observation import Facts
from moe2edge.errors import InputError
from moe2edge.model.layers import MoELayer
from moe2edge.model.model import Block, Model
from moe2edge.progress import Advance

if TYPE_CHECKING:
    from torch import Tensor

ROUTING_VERSION = 1
ROUTING_KIND = "moe2edge.routing"
# Every criterion that says something about an expert.
REPORTED_CRITERIA: tuple[criteria.Criterion, ...] = tuple(
    name for name in get_args(criteria.Criterion) if name != "random"
)


@dataclass(frozen=True)
class ExpertUse:
    """What one expert was used for; the module's docstring says what the figures are."""

    expert: int
    tokens: int
    share: float
    gate_mass: float
    mean_probability: float
    largest_output: float
    saliency: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        """The entry of the document."""
        return {
            "expert": self.expert,
            "tokens": self.tokens,
            "share": self.share,
            "gate_mass": self.gate_mass,
            "mean_probability": self.mean_probability,
            "largest_output": self.largest_output,
            "saliency": dict(self.saliency),
        }


@dataclass(frozen=True)
class LayerUse:
    """How one MoE layer used its experts.

    Attributes:
        block: index of its block.
        origin: index of the block in the model that an output was made from.
        top_k: experts chosen per token.
        tokens: tokens seen.
        experts: in the order of the layer.
    """

    block: int
    origin: int
    top_k: int
    tokens: int
    experts: tuple[ExpertUse, ...]

    @property
    def unused(self) -> tuple[int, ...]:
        """Experts that no token was routed to."""
        return tuple(e.expert for e in self.experts if not e.tokens)

    @property
    def skipped(self) -> int:
        """Places that dynamic skipping left empty."""
        return self.tokens * self.top_k - sum(e.tokens for e in self.experts)

    @property
    def entropy(self) -> float:
        """Entropy of the load, in bits: ``- sum share * log2(share)``."""
        return -sum(e.share * math.log2(e.share) for e in self.experts if e.tokens) + 0.0

    @property
    def entropy_limit(self) -> float:
        """Entropy of an even load, in bits."""
        return math.log2(len(self.experts))

    @property
    def variation(self) -> float:
        """Standard deviation of the loads over their mean.

        The square root of the importance loss of https://arxiv.org/abs/1701.06538, of loads.
        """
        count = len(self.experts)
        return math.sqrt(sum((e.share * count - 1) ** 2 for e in self.experts) / count)

    @property
    def ratio(self) -> float | None:
        """Largest load over smallest; None where an expert has none."""
        loads = [e.tokens for e in self.experts]
        return max(loads) / min(loads) if min(loads) else None

    def to_json(self) -> dict[str, Any]:
        """The entry of the document."""
        return {
            "block": self.block,
            "origin": self.origin,
            "top_k": self.top_k,
            "expert_count": len(self.experts),
            "skipped": self.skipped,
            "entropy_bits": self.entropy,
            "entropy_limit_bits": self.entropy_limit,
            "coefficient_of_variation": self.variation,
            "max_min_ratio": self.ratio,
            "unused": list(self.unused),
            "experts": [e.to_json() for e in self.experts],
        }


@dataclass(frozen=True)
class RoutingReport:
    """Routing of a whole model on one text.

    Attributes:
        model: MODEL as the user gave it.
        family: its architecture.
        target: target that wrote the folder, None for any other model.
        text: where the text is from.
        layers: the MoE layers, in order.
    """

    model: str
    family: str
    target: str | None
    text: Mapping[str, Any]
    layers: tuple[LayerUse, ...]

    @property
    def tokens(self) -> int:
        """Tokens that each layer saw."""
        return self.layers[0].tokens

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a user should know before trusting the figures."""
        found = []
        for layer in self.layers:
            if layer.unused:
                found.append(
                    f"block {layer.block}: no token was routed to {_experts(layer.unused)}; "
                    "scores that look at outputs say nothing about them"
                )
        return tuple(found)

    def to_json(self) -> dict[str, Any]:
        """The document."""
        return {
            "schema_version": ROUTING_VERSION,
            "kind": ROUTING_KIND,
            "model": self.model,
            "family": self.family,
            "target": self.target,
            "text": dict(self.text),
            "tokens": self.tokens,
            "criteria": list(REPORTED_CRITERIA),
            "layers": [layer.to_json() for layer in self.layers],
        }


def _experts(ids: Sequence[int]) -> str:
    """Experts in words.

    >>> _experts([3]), _experts([0, 2])
    ('expert 3', '2 experts: 0, 2')
    """
    if len(ids) == 1:
        return f"expert {ids[0]}"
    return f"{len(ids)} experts: {', '.join(map(str, ids))}"


def check_routable(model: Model, name: str) -> None:
    """Refuse a model without a router.

    Raises:
        InputError: no MoE layer is left.
    """
    if not model.moe_blocks:
        raise InputError(f"{name} has no MoE layer with a router, so there is no routing to show")


def measure_routing(
    model: Model, ids: Tensor, advance: Advance, origins: Sequence[int] | None = None
) -> tuple[LayerUse, ...]:
    """Run a text through a model once, and account for every MoE layer.

    Memory: one block in float32 and the hidden states; all weights are read twice, one block, then
    one expert at a time.

    Args:
        model: the model, quantized or not; it has an MoE layer.
        ids: tokens, int64 [samples, length].
        advance: told about progress.
        origins: index in its source of each block; None: this model is the source.
    """
    from moe2edge.calibration import walk
    from moe2edge.calibration.router_observers import OutputObserver, RoutingObserver

    routing, outputs = RoutingObserver(), OutputObserver()
    walk.observe(model, ids, [routing, outputs], advance, "routing")
    facts = Facts({RoutingObserver: routing.result(), OutputObserver: outputs.result()})
    found = []
    for n, (block, layer) in enumerate(model.moe_blocks):
        advance("scores of weights", n, len(model.moe_blocks))
        origin = block.origin if origins is None else origins[block.index]
        found.append(_layer(block, layer, facts, origin))
    advance("scores of weights", len(found), len(found))
    return tuple(found)


def _layer(block: Block, layer: MoELayer, facts: Facts, origin: int) -> LayerUse:
    from moe2edge.calibration.router_observers import OutputObserver, RoutingObserver

    seen, outputs = facts[RoutingObserver], facts[OutputObserver].layers[block.origin]
    counts = seen.counts[block.origin].tolist()
    probability = (seen.probability[block.origin] / seen.tokens).tolist()
    mass, largest = outputs.mass.tolist(), outputs.largest.tolist()
    by_criterion: dict[str, list[float]] = {
        name: criteria.score_experts(name, block, facts)
        for name in REPORTED_CRITERIA
        if name not in criteria.WEIGHTS
    }
    by_criterion |= _weight_scores(layer)
    experts = tuple(
        ExpertUse(
            expert=n,
            tokens=counts[n],
            share=counts[n] / sum(counts),
            gate_mass=mass[n],
            mean_probability=probability[n],
            largest_output=largest[n],
            saliency={name: by_criterion[name][n] for name in REPORTED_CRITERIA},
        )
        for n in range(layer.routed)
    )
    return LayerUse(block.index, origin, layer.router.top_k, seen.tokens, experts)


def _weight_scores(layer: MoELayer) -> dict[str, list[float]]:
    """Scores that look at weights only, by name; each expert is read once for all of them.

    Members have that of their base, and those without one the worst.
    """
    from moe2edge.numerics import saliency

    found: dict[str, list[float]] = {name: [] for name in criteria.WEIGHTS}
    for expert in layer.experts:
        matrices = [weight.load() for weight in (expert.gate, expert.up, expert.down)]
        for name, scores in found.items():
            scores.append(getattr(saliency, f"compute_{name}")(matrices))
    return {
        name: [min(scores) if base is None else scores[base] for base in layer.bases]
        for name, scores in found.items()
    }
