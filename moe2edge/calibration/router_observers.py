"""Observers of routers and of expert outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from moe2edge.calibration.observation import Resumable
from moe2edge.model.block import Block
from moe2edge.model.layers import MoELayer
from moe2edge.numerics.saliency import LayerOutputs, OutputStatistics, RoutingStatistics

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.calibration.observation import BlockTrace


class RoutingObserver(Resumable):
    """Gathers `RoutingStatistics`."""

    def __init__(self) -> None:
        self._experts: dict[int, tuple[int, ...]] = {}
        self._counts: dict[int, Tensor] = {}
        self._probability: dict[int, Tensor] = {}
        self._mass: dict[int, Tensor] = {}
        self._tokens = 0

    def observe(self, trace: BlockTrace) -> None:
        """Add one batch of one block."""
        layer = trace.block.mlp
        if trace.routing is None or not isinstance(layer, MoELayer):
            return
        routing, key = trace.routing, trace.block.origin
        rows = list(layer.routed)
        experts, count = len(rows), layer.router_rows
        if key not in self._counts:
            self._experts[key] = trace.block.expert_origins
            self._counts[key] = torch.zeros(experts, dtype=torch.int64)
            self._probability[key] = torch.zeros(experts, dtype=torch.float64)
            self._mass[key] = torch.zeros(experts, dtype=torch.float64)
        # The other rows run replacements; an id after the last row is a skipped choice.
        ids, weights = routing.ids.flatten(), routing.weights.double().flatten()
        self._counts[key] += torch.bincount(ids, minlength=count)[rows]
        self._mass[key] += torch.bincount(ids, weights, minlength=count)[rows]
        self._probability[key] += routing.logits.double().softmax(-1).sum(0)[rows]
        if key == min(self._counts):
            self._tokens += len(routing.ids)

    def save(self, block: Block) -> Any:
        """Return the sums of a block."""
        key = block.origin
        if key not in self._counts:
            return None
        sums = self._counts[key], self._probability[key], self._mass[key]
        return {"experts": self._experts[key], "tokens": self._tokens, "sums": sums}

    def restore(self, block: Block, saved: Any) -> None:
        """Take the sums of a block."""
        if saved is not None:
            key = block.origin
            self._experts[key], self._tokens = tuple(saved["experts"]), saved["tokens"]
            self._counts[key], self._probability[key], self._mass[key] = saved["sums"]

    def result(self) -> RoutingStatistics:
        """Return the statistics."""
        return RoutingStatistics(
            self._experts, self._tokens, self._counts, self._probability, self._mass
        )


class OutputObserver(Resumable):
    """Gathers `OutputStatistics`.

    Where nobody shows it the outputs (`SeesOutputs`), it runs the experts again.
    """

    def __init__(self) -> None:
        self._layers: dict[int, LayerOutputs] = {}
        self._was_shown = False

    def visit(self, block: Block, row: int, outputs: Tensor, weights: Tensor) -> None:
        """Add the outputs of an expert, as `SeesOutputs`."""
        assert isinstance(block.mlp, MoELayer), "only experts have outputs to visit"
        layer = self._find_layer(block, outputs.shape[-1])
        layer.add(block.mlp.routed.index(row), outputs, weights)
        self._was_shown = True

    def observe(self, trace: BlockTrace) -> None:
        """Add one batch of one block, if its outputs were not shown."""
        layer, routing = trace.block.mlp, trace.routing
        if routing is None or not isinstance(layer, MoELayer):
            return
        self._find_layer(trace.block, routing.inputs.shape[-1])
        for row in () if self._was_shown else layer.routed:
            token, place = torch.where(routing.ids == row)
            if len(token):
                outputs = trace.expert_output(row, routing.inputs[token])
                self.visit(trace.block, row, outputs, routing.weights[token, place])
        self._was_shown = False

    def _find_layer(self, block: Block, hidden: int) -> LayerOutputs:
        if block.origin not in self._layers:
            self._layers[block.origin] = LayerOutputs.empty(block.expert_origins, hidden)
        return self._layers[block.origin]

    def save(self, block: Block) -> Any:
        """Return the statistics of a block."""
        outputs = self._layers.get(block.origin)
        return None if outputs is None else vars(outputs)

    def restore(self, block: Block, saved: Any) -> None:
        """Take the statistics of a block."""
        if saved is not None:
            saved = {**saved, "experts": tuple(saved["experts"])}
            self._layers[block.origin] = LayerOutputs(**saved)

    def result(self) -> OutputStatistics:
        """Return the statistics."""
        return OutputStatistics(self._layers)


# ---- router logits and gate weights --------------------------------------------------------------


@dataclass(frozen=True)
class RouterOutputs:
    """Statistics of router logits, by the origin of the MoE block.

    Attributes:
        norm: mean over tokens of the Euclidean norm of the logits.
        gram: float64 [E, E], sum over tokens of the outer product of the logits with themselves.
    """

    norm: Mapping[int, float]
    gram: Mapping[int, Tensor]


class RouterOutputObserver(Resumable):
    """Gathers `RouterOutputs`."""

    def __init__(self) -> None:
        self._norm: dict[int, float] = {}
        self._gram: dict[int, Tensor] = {}
        self._tokens: dict[int, int] = {}

    def observe(self, trace: BlockTrace) -> None:
        """Add one batch of one block."""
        if trace.routing is None:
            return
        routing, key = trace.routing, trace.block.origin
        logits = routing.logits.double()
        self._norm[key] = self._norm.get(key, 0.0) + float(logits.norm(dim=1).sum())
        self._gram[key] = self._gram.get(key, 0) + logits.T @ logits
        self._tokens[key] = self._tokens.get(key, 0) + len(logits)

    def save(self, block: Block) -> Any:
        """Return the sums of a block."""
        key = block.origin
        return [sums.get(key) for sums in (self._norm, self._gram, self._tokens)]

    def restore(self, block: Block, saved: Any) -> None:
        """Take the sums of a block."""
        if saved[0] is not None:
            self._norm[block.origin], self._gram[block.origin], self._tokens[block.origin] = saved

    def result(self) -> RouterOutputs:
        """Return the mean norms and the sums of products."""
        norms = {key: total / self._tokens[key] for key, total in self._norm.items()}
        return RouterOutputs(norms, self._gram)


@dataclass(frozen=True)
class WeightRatios:
    """Ratios of gate weights, for dynamic skipping.

    Attributes:
        ratios: ``w_i / w_1`` for ``i = 2 .. k`` of every token, float32 [tokens, k - 1], by the
            origin of the block.
    """

    ratios: Mapping[int, Tensor]


class RatioObserver(Resumable):
    """Gathers `WeightRatios`; takes 4 (k - 1) bytes per token and layer."""

    def __init__(self) -> None:
        self._ratios: dict[int, list[Tensor]] = {}

    def observe(self, trace: BlockTrace) -> None:
        """Add one batch of one block."""
        if trace.routing is not None:
            # Not every router gives them in falling order.
            weights = trace.routing.weights.sort(dim=1, descending=True).values
            ratios = weights[:, 1:] / weights[:, :1]
            self._ratios.setdefault(trace.block.origin, []).append(ratios)

    def save(self, block: Block) -> Any:
        """Return the ratios of a block."""
        return self._ratios.get(block.origin)

    def restore(self, block: Block, saved: Any) -> None:
        """Take the ratios of a block."""
        if saved is not None:
            self._ratios[block.origin] = saved

    def result(self) -> WeightRatios:
        """Return the ratios."""
        return WeightRatios({key: torch.cat(parts) for key, parts in self._ratios.items()})


@dataclass(frozen=True)
class SkipRates:
    """Number of expert choices, and of those that dynamic skipping left out.

    Attributes:
        routed: number of choices (tokens * top_k), by the origin of the block.
        skipped: number of choices that were left out, by the origin of the block.
    """

    routed: Mapping[int, int]
    skipped: Mapping[int, int]

    @property
    def rate(self) -> float:
        """Fraction of choices that was left out, over all layers that skip."""
        return sum(self.skipped.values()) / max(1, sum(self.routed.values()))


class SkipObserver(Resumable):
    """Gathers `SkipRates` of layers that skip."""

    def __init__(self) -> None:
        self._routed: dict[int, int] = {}
        self._skipped: dict[int, int] = {}

    def observe(self, trace: BlockTrace) -> None:
        """Add one batch of one block."""
        layer, key = trace.block.mlp, trace.block.origin
        if not isinstance(layer, MoELayer) or not layer.router.skip_below or trace.routing is None:
            return
        left_out = int((trace.routing.ids == layer.router_rows).sum())
        self._routed[key] = self._routed.get(key, 0) + trace.routing.ids.numel()
        self._skipped[key] = self._skipped.get(key, 0) + left_out

    def save(self, block: Block) -> Any:
        """Return the counts of a block."""
        return [counts.get(block.origin) for counts in (self._routed, self._skipped)]

    def restore(self, block: Block, saved: Any) -> None:
        """Take the counts of a block."""
        if saved[0] is not None:
            self._routed[block.origin], self._skipped[block.origin] = saved

    def result(self) -> SkipRates:
        """Return the counts."""
        return SkipRates(self._routed, self._skipped)
