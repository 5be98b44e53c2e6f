"""Report how the routers of a model use its experts on a text: counts, gate weights, scores.

One pass over the text gathers everything. `RoutingReport.to_json` returns a document of the form
below. Lists and keys keep their order, and the same model, text and machine give the same
document::

    schema_version    1
    kind              "moe2edge.routing"
    model             MODEL as the user gave it
    family            architecture of the model
    target            target that wrote the folder; null if moe2edge did not write it
    text              text, samples, length, seed and sha256 of its tokens (and more for a mix)
    tokens            tokens that each layer processed
    expert_cache      a cache of experts, simulated on the text, one token after the other; each
                      layer has one of its own, and experts are read as they are stored:
      bytes                 of all experts
      bytes_per_token       of those that a token uses, on average
      caches                one entry per size, but the one that holds all experts:
        part, experts, bytes  part of each layer's experts that are held (at least its top-k), their
                              numbers by layer, and bytes in total
        lru_hit_rate          part of the uses whose expert is held, if those used last are
        lru_bytes_per_token   bytes of experts that a token has to read, on average
        fixed_hit_rate        the same, if the experts held never change: those most used in one
        fixed_bytes_per_token half of the text, tried on the other, and the other way round
    criteria          names of the scores below; for each, the lowest score is dropped first
    layers            one entry per MoE layer, in order:
      block, origin         index of its block in this model, and in the source of an output
      top_k                 experts chosen per token
      expert_count          experts in the layer
      skipped               of the tokens * top_k choices, those that dynamic skipping left out
      entropy_bits          entropy of the shares below
      entropy_limit_bits    log2(expert_count), the entropy of an even load
      coefficient_of_variation   standard deviation / mean of the loads; 0 is even
      max_min_ratio         largest load / smallest load; null if an expert has none
      unused                experts without a token
      experts               one entry per expert, in order:
        expert                position in the layer
        tokens                tokens routed to it
        share                 share of the layer's routed tokens; the shares sum to 1
        gate_mass             sum of its gate weights over those tokens
        mean_probability      mean over all tokens of its softmax probability, among all logits
        largest_output        largest absolute entry of any of its outputs
        saliency              its score by each of the criteria
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

from moe2edge.calibration import criteria
from moe2edge.calibration.observation import Facts
from moe2edge.errors import InputError
from moe2edge.evaluation.cache_simulation import CacheSimulation, UseObserver, simulate_caches
from moe2edge.model.block import Block
from moe2edge.model.layers import MoELayer
from moe2edge.model.model import Model
from moe2edge.progress import Advance
from moe2edge.runtime.memory import Estimate

if TYPE_CHECKING:
    from torch import Tensor

ROUTING_VERSION = 1
ROUTING_KIND = "moe2edge.routing"
# Every criterion but random, whose scores say nothing about an expert.
REPORTED_CRITERIA: tuple[criteria.Criterion, ...] = tuple(
    name for name in get_args(criteria.Criterion) if name != "random"
)


@dataclass(frozen=True)
class ExpertUse:
    """Use of one expert; the docstring of this module defines the figures."""

    expert: int
    tokens: int
    share: float
    gate_mass: float
    mean_probability: float
    largest_output: float
    saliency: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        """Return the expert's entry of the document."""
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
    """Use of the experts of one MoE layer.

    Attributes:
        block: index of the layer's block.
        origin: index of that block in the source that an output was made from.
        top_k: experts chosen per token.
        tokens: tokens that the layer processed.
        experts: one entry per expert, in the order of the layer.
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
        """Number of expert choices that dynamic skipping left out."""
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
        """Coefficient of variation of the loads: standard deviation / mean.

        This is the square root of the importance loss of https://arxiv.org/abs/1701.06538,
        computed from loads.
        """
        count = len(self.experts)
        return math.sqrt(sum((e.share * count - 1) ** 2 for e in self.experts) / count)

    @property
    def ratio(self) -> float | None:
        """Largest load / smallest load; None if an expert has no token."""
        loads = [e.tokens for e in self.experts]
        return max(loads) / min(loads) if min(loads) else None

    def to_json(self) -> dict[str, Any]:
        """Return the layer's entry of the document."""
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
    """Use of the experts of a whole model on one text.

    Attributes:
        model: MODEL as the user gave it.
        family: architecture of the model.
        target: target that wrote the folder; None for any other model.
        text: origin of the text, as in the document.
        layers: one entry per MoE layer, in order.
        expert_cache: caches of experts, simulated on the text.
    """

    model: str
    family: str
    target: str | None
    text: Mapping[str, Any]
    layers: tuple[LayerUse, ...]
    expert_cache: CacheSimulation

    @property
    def tokens(self) -> int:
        """Number of tokens that each layer processed."""
        return self.layers[0].tokens

    @property
    def warnings(self) -> tuple[str, ...]:
        """Reasons to distrust some of the figures, one sentence each."""
        return tuple(
            f"block {layer.block}: no token was routed to {_name_experts(layer.unused)}; "
            "criteria that use expert outputs cannot score them"
            for layer in self.layers
            if layer.unused
        )

    def to_json(self) -> dict[str, Any]:
        """Return the document that the docstring of this module describes."""
        return {
            "schema_version": ROUTING_VERSION,
            "kind": ROUTING_KIND,
            "model": self.model,
            "family": self.family,
            "target": self.target,
            "text": dict(self.text),
            "tokens": self.tokens,
            "expert_cache": self.expert_cache.to_json(),
            "criteria": list(REPORTED_CRITERIA),
            "layers": [layer.to_json() for layer in self.layers],
        }


def _name_experts(ids: Sequence[int]) -> str:
    """Name experts in words.

    >>> _name_experts([3]), _name_experts([0, 2])
    ('expert 3', '2 experts: 0, 2')
    """
    if len(ids) == 1:
        return f"expert {ids[0]}"
    return f"{len(ids)} experts: {', '.join(map(str, ids))}"


def check_routable(model: Model, name: str) -> None:
    """Check that a model has a router whose choices can be reported.

    Raises:
        InputError: the model has no MoE layer.
    """
    if not model.moe_blocks:
        raise InputError(
            f"{name} has no MoE layer with a router, so there is no routing to show; leave out "
            "--routing"
        )


def estimate_routing(model: Model, samples: int, length: int) -> Estimate:
    """Estimate what `measure_routing` takes: a block, and the hidden states of the text."""
    hidden = model.family.geometry(model.config).hidden
    return Estimate(
        memory=4 * samples * length * hidden + model.block_nbytes,
        purpose="--routing holds one block in float32 and the hidden states of the text",
        remedy="give fewer --samples, or a smaller --length, or use a larger machine",
    )


def measure_routing(
    model: Model, ids: Tensor, advance: Advance, origins: Sequence[int] | None = None
) -> tuple[tuple[LayerUse, ...], CacheSimulation]:
    """Run a text through a model once, and report the use of every MoE layer.

    Memory: one block in float32 and the hidden states. All weights are read twice: block by block,
    then expert by expert.

    Args:
        model: the model, quantized or not; it has at least one MoE layer.
        ids: tokens, int64 [samples, length].
        advance: receives progress.
        origins: index in the source of each block; None if this model is the source.
    """
    from moe2edge.calibration import walk
    from moe2edge.calibration.router_observers import OutputObserver, RoutingObserver

    routing, outputs, uses = RoutingObserver(), OutputObserver(), UseObserver()
    walk.observe(model, ids, [routing, outputs, uses], advance, "routing")
    facts = Facts({RoutingObserver: routing.result(), OutputObserver: outputs.result()})
    layers = []
    for n, (block, layer) in enumerate(model.moe_blocks):
        advance("scores of weights", n, len(model.moe_blocks))
        origin = block.origin if origins is None else origins[block.index]
        layers.append(_summarize_layer(block, layer, facts, origin))
    advance("scores of weights", len(layers), len(layers))
    return tuple(layers), simulate_caches(model, uses.result(), ids.numel())


def _summarize_layer(block: Block, layer: MoELayer, facts: Facts, origin: int) -> LayerUse:
    from moe2edge.calibration.router_observers import OutputObserver, RoutingObserver

    routing, outputs = facts[RoutingObserver], facts[OutputObserver].layers[block.origin]
    counts = routing.counts[block.origin].tolist()
    probability = (routing.probability[block.origin] / routing.tokens).tolist()
    mass, largest = outputs.mass.tolist(), outputs.largest.tolist()
    by_criterion: dict[str, list[float]] = {
        name: criteria.score_experts(name, block, facts)
        for name in REPORTED_CRITERIA
        if name not in criteria.WEIGHTS
    }
    by_criterion |= _score_weights(layer)
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
        for n in range(len(layer.routed))
    )
    return LayerUse(block.index, origin, layer.router.top_k, routing.tokens, experts)


def _score_weights(layer: MoELayer) -> dict[str, list[float]]:
    """Score every expert by the criteria that only need weights.

    Each expert is read once for all criteria. A tied expert gets the score of its base; one
    without a base gets the lowest score of the layer.
    """
    from moe2edge.numerics import saliency

    by_criterion: dict[str, list[float]] = {name: [] for name in criteria.WEIGHTS}
    for expert in layer.experts:
        matrices = [weight.load() for weight in (expert.gate, expert.up, expert.down)]
        for name, scores in by_criterion.items():
            scores.append(getattr(saliency, f"compute_{name}")(matrices))
    bases = [layer.bases[row] for row in layer.routed]
    return {
        name: [min(scores) if base is None else scores[base] for base in bases]
        for name, scores in by_criterion.items()
    }
