"""How much an expert matters. Pure functions on what a walk has gathered.

Notation: expert j of an MoE layer with E experts; ``R(t)`` are the k experts that token t was
routed to, ``g_tj`` the weight its output is multiplied with, ``f_j`` the expert, ``p_t`` the
softmax of all router logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from moe2edge.model import Block, MoELayer

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.walk import Seen

Criterion = Literal["routing-score", "frequency", "reap", "random"]


@dataclass(frozen=True)
class RoutingStatistics:
    """What routers did, per MoE block by its origin.

    Attributes:
        experts: origins of the experts, in the order of the vectors.
        tokens: tokens seen.
        counts: int64 [E], tokens routed to each expert.
        probability: float64 [E], sum over tokens of the full softmax ``p_tj``.
    """

    experts: Mapping[int, tuple[int, ...]]
    tokens: int
    counts: Mapping[int, Tensor]
    probability: Mapping[int, Tensor]


@dataclass(frozen=True)
class OutputStatistics:
    """What experts put out, per MoE block by its origin.

    Attributes:
        experts: origins of the experts, in the order of the vectors.
        gated_norm: float64 [E], sum over routed tokens of ``g_tj * ||f_j(h_t)||``.
        counts: int64 [E], tokens routed to each expert.
    """

    experts: Mapping[int, tuple[int, ...]]
    gated_norm: Mapping[int, Tensor]
    counts: Mapping[int, Tensor]


class RoutingObserver:
    """Gathers `RoutingStatistics`."""

    def __init__(self) -> None:
        self._experts: dict[int, tuple[int, ...]] = {}
        self._counts: dict[int, Tensor] = {}
        self._probability: dict[int, Tensor] = {}
        self._tokens = 0

    def see(self, seen: Seen) -> None:
        """Add one batch."""
        if seen.routing is None:
            return
        routing, key = seen.routing, seen.block.origin
        experts = routing.logits.shape[1]
        if key not in self._counts:
            self._experts[key] = expert_origins(seen.block)
            self._counts[key] = torch.zeros(experts, dtype=torch.int64)
            self._probability[key] = torch.zeros(experts, dtype=torch.float64)
        self._counts[key] += torch.bincount(routing.ids.flatten(), minlength=experts)
        self._probability[key] += routing.logits.double().softmax(-1).sum(0)
        if key == min(self._counts):
            self._tokens += len(routing.ids)

    def fact(self) -> RoutingStatistics:
        """The statistics."""
        return RoutingStatistics(self._experts, self._tokens, self._counts, self._probability)


class OutputObserver:
    """Gathers `OutputStatistics`; runs every expert once more on the tokens routed to it."""

    def __init__(self) -> None:
        self._experts: dict[int, tuple[int, ...]] = {}
        self._norm: dict[int, Tensor] = {}
        self._counts: dict[int, Tensor] = {}

    def see(self, seen: Seen) -> None:
        """Add one batch."""
        if seen.routing is None:
            return
        routing, key = seen.routing, seen.block.origin
        experts = routing.logits.shape[1]
        if key not in self._norm:
            self._norm[key] = torch.zeros(experts, dtype=torch.float64)
            self._experts[key] = expert_origins(seen.block)
            self._counts[key] = torch.zeros(experts, dtype=torch.int64)
        for expert in range(experts):
            token, place = torch.where(routing.ids == expert)
            if len(token) == 0:
                continue
            norms = seen.expert_output(expert, routing.inputs[token]).norm(dim=-1)
            self._norm[key][expert] += (routing.weights[token, place] * norms).double().sum()
            self._counts[key][expert] += len(token)

    def fact(self) -> OutputStatistics:
        """The statistics."""
        return OutputStatistics(self._experts, self._norm, self._counts)


def expert_origins(block: Block) -> tuple[int, ...]:
    """Origins of the experts of an MoE block, in order."""
    return tuple(e.origin for e in block.mlp.experts) if isinstance(block.mlp, MoELayer) else ()


def routing_score(statistics: RoutingStatistics, block: int) -> Tensor:
    """Mean over all tokens of the full softmax: ``S_j = mean_t p_tj``, float64 [E].

    Unified-MoE-Compression (https://arxiv.org/abs/2406.02500), layer-wise Expert Drop.
    """
    return statistics.probability[block] / statistics.tokens


def frequency(statistics: RoutingStatistics, block: int) -> Tensor:
    """Number of tokens routed to each expert, float64 [E]."""
    return statistics.counts[block].double()


def reap(statistics: OutputStatistics, block: int) -> Tensor:
    """Mean over the tokens routed to j of ``g_tj * ||f_j(h_t)||``; never routed: 0. float64 [E].

    REAP (https://arxiv.org/abs/2510.13999).
    """
    return statistics.gated_norm[block] / statistics.counts[block].clamp(min=1)


def random_scores(experts: int, block: int, seed: int) -> Tensor:
    """Scores that mean nothing, float64 [experts]; the baseline of every criterion."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + block)
    return torch.rand(experts, generator=generator, dtype=torch.float64)
