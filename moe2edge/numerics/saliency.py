"""Criteria of expert saliency: how much an expert matters. Pure functions on gathered statistics.

Notation: expert j of an MoE layer with E experts; ``R(t)`` are the k experts that token t was
routed to, ``g_tj`` the weight its output is multiplied with, ``f_j`` the expert, ``p_t`` the
softmax of all router logits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class RoutingStatistics:
    """Routing in each MoE block, by the block's origin.

    Attributes:
        experts: origins of the experts, in the order of the vectors.
        tokens: number of tokens seen.
        counts: int64 [E], tokens routed to each expert.
        probability: float64 [E], sum over tokens of the full softmax ``p_tj``.
        mass: float64 [E], sum of ``g_tj`` over the tokens routed to each expert.
    """

    experts: Mapping[int, tuple[int, ...]]
    tokens: int
    counts: Mapping[int, Tensor]
    probability: Mapping[int, Tensor]
    mass: Mapping[int, Tensor]


@dataclass(frozen=True)
class LayerOutputs:
    """Outputs of the experts of one MoE layer, over the tokens routed to each.

    Attributes:
        experts: origins of the experts, in the order of the rows.
        counts: int64 [E], tokens routed to each expert.
        mass: float64 [E], sum of ``g_tj``.
        norm: float64 [E], sum of ``||f_j(h_t)||``.
        squared_norm: float64 [E], sum of ``||f_j(h_t)||^2``.
        gated_norm: float64 [E], sum of ``g_tj * ||f_j(h_t)||``.
        largest: float64 [E], largest entry of any output, absolute.
        mean: float64 [E, hidden], mean output.
        scatter: float64 [E, hidden], sum of squared distances to the mean.
    """

    experts: tuple[int, ...]
    counts: Tensor
    mass: Tensor
    norm: Tensor
    squared_norm: Tensor
    gated_norm: Tensor
    largest: Tensor
    mean: Tensor
    scatter: Tensor

    @classmethod
    def empty(cls, experts: tuple[int, ...], hidden: int) -> LayerOutputs:
        """Make statistics of no tokens."""
        count = len(experts)

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(count, *shape, dtype=torch.float64)

        return cls(
            experts=experts,
            counts=torch.zeros(count, dtype=torch.int64),
            mass=zeros(),
            norm=zeros(),
            squared_norm=zeros(),
            gated_norm=zeros(),
            largest=zeros(),
            mean=zeros(hidden),
            scatter=zeros(hidden),
        )

    def add(self, expert: int, outputs: Tensor, weights: Tensor) -> None:
        """Add outputs [n, hidden] of one expert and their gate weights [n], n at least 1.

        Mean and scatter are merged as in Chan et al., 1979, which does not cancel, in float64; what
        is summed within ``outputs`` is summed in their dtype.
        """
        weights = weights.double()
        norms = torch.linalg.vector_norm(outputs, dim=-1).double()
        new = len(outputs)
        total = int(self.counts[expert]) + new
        mean = outputs.mean(0)
        self.scatter[expert] += outputs.sub(mean).square_().sum(0)
        mean = mean.double()
        shift = mean - self.mean[expert]
        self.scatter[expert] += shift.square() * (int(self.counts[expert]) * new / total)
        self.mean[expert] += shift * (new / total)
        self.counts[expert] = total
        self.mass[expert] += weights.sum()
        self.norm[expert] += norms.sum()
        self.squared_norm[expert] += norms.square().sum()
        self.gated_norm[expert] += (weights * norms).sum()
        largest = torch.stack(torch.aminmax(outputs)).abs().max()
        self.largest[expert] = max(float(self.largest[expert]), float(largest))


@dataclass(frozen=True)
class OutputStatistics:
    """`LayerOutputs` of every MoE block, by the block's origin."""

    layers: Mapping[int, LayerOutputs]


def compute_routing_score(statistics: RoutingStatistics, block: int) -> Tensor:
    """Compute the mean full softmax over all tokens: ``S_j = mean_t p_tj``, float64 [E].

    Unified-MoE-Compression (https://arxiv.org/abs/2406.02500), layer-wise Expert Drop.
    """
    return statistics.probability[block] / statistics.tokens


def compute_frequency(statistics: RoutingStatistics, block: int) -> Tensor:
    """Count the tokens routed to each expert, float64 [E]."""
    return statistics.counts[block].double()


def compute_soft_frequency(statistics: RoutingStatistics, block: int) -> Tensor:
    """Sum the gate weights of each expert, ``sum g_tj``; float64 [E].

    SEER in https://arxiv.org/abs/2606.15716.
    """
    return statistics.mass[block]


def compute_ean(layer: LayerOutputs) -> Tensor:
    """Sum the output norms of each expert, ``sum ||f_j(h_t)||``; float64 [E].

    See https://arxiv.org/abs/2606.15716.
    """
    return layer.norm


def compute_reap(layer: LayerOutputs) -> Tensor:
    """Average ``g_tj * ||f_j(h_t)||`` over the tokens routed to j; float64 [E].

    It is 0 where there are none. REAP (https://arxiv.org/abs/2510.13999).
    """
    return layer.gated_norm / layer.counts.clamp(min=1)


def compute_man(layer: LayerOutputs) -> Tensor:
    """Average the output norm over routed tokens; float64 [E].

    See https://arxiv.org/abs/2606.15716.
    """
    return layer.norm / layer.counts.clamp(min=1)


def compute_msan(layer: LayerOutputs) -> Tensor:
    """Average the squared output norm over routed tokens; float64 [E].

    See https://arxiv.org/abs/2606.15716.
    """
    return layer.squared_norm / layer.counts.clamp(min=1)


def compute_mone(layer: LayerOutputs) -> Tensor:
    """Multiply output fluctuation by routing mass: ``||std_t f_j(h_t)|| * sum g_tj``; float64 [E].

    The standard deviation is per output channel over routed tokens. MoNE
    (https://arxiv.org/abs/2507.00390); its factor 1 / samples does not change the order.
    """
    variance = layer.scatter / layer.counts.clamp(min=1)[:, None]
    return variance.sum(-1).sqrt() * layer.mass


def compute_magnitude(matrices: Sequence[Tensor]) -> float:
    """Compute the root mean square of all weights of an expert."""
    count = sum(m.numel() for m in matrices)
    return math.sqrt(sum(float(m.double().square().sum()) for m in matrices) / count)


def compute_aimer(matrices: Sequence[Tensor]) -> float:
    """Compute ``- mean|W| / rms(W)`` over all weights of an expert.

    The expert with the highest ratio of absolute mean to root mean square is dropped first. AIMER,
    as in its code; needs no data.
    """
    count = sum(m.numel() for m in matrices)
    mean = sum(float(m.double().abs().sum()) for m in matrices) / count
    return -mean / max(compute_magnitude(matrices), 1e-300)


def draw_random_scores(experts: int, block: int, seed: int) -> Tensor:
    """Draw random scores, float64 [experts]: the baseline of every criterion."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + block)
    return torch.rand(experts, generator=generator, dtype=torch.float64)
