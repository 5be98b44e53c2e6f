"""Routing margins: how near the routers of a model come to a tie on recorded tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from moe2edge.calibration.observation import Resumable
from moe2edge.model.block import Block
from moe2edge.model.layers import MoELayer

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.calibration.observation import BlockTrace

# Recorded samples.
SAMPLES = 2


class MarginObserver(Resumable):
    """Finds the smallest routing margin of each sample, over its first tokens.

    A margin is the gap between the logits of the last expert that is chosen and the first that is
    not; with dynamic skipping, also the distance of a ratio of gate weights to its threshold. Two
    runtimes that differ only by rounding may choose different experts at a near tie, which says
    nothing about either. So samples without a near tie make the better reference.
    """

    def __init__(self, length: int) -> None:
        """Look at the first ``length`` tokens of each sample."""
        self._length = length
        self._least: dict[int, list[Tensor]] = {}

    def observe(self, trace: BlockTrace) -> None:
        """Add one batch of one block."""
        layer, routing = trace.block.mlp, trace.routing
        if not isinstance(layer, MoELayer) or routing is None:
            return
        top_k, below = layer.router.top_k, layer.router.skip_below
        first = routing.logits.view(*trace.inputs.shape[:2], -1)[:, : self._length]
        best = first.topk(min(top_k + 1, layer.router_rows)).values
        margins = best[..., top_k - 1 : top_k] - best[..., top_k:]  # empty where all are chosen
        if below:
            ratios = (best[..., 1:top_k] - best[..., :1]).exp()
            margins = torch.cat([margins, (ratios - torch.tensor(below)).abs()], dim=-1)
        if margins.shape[-1]:
            least = margins.flatten(1).min(1).values
            self._least.setdefault(trace.block.index, []).append(least)

    def save(self, block: Block) -> Any:
        """Return the margins in a block."""
        return self._least.get(block.index)

    def restore(self, block: Block, saved: Any) -> None:
        """Take the margins in a block."""
        if saved is not None:
            self._least[block.index] = saved

    def result(self) -> Tensor | None:
        """Return the smallest margin of each sample, float32 [samples].

        Returns None if no router has a choice, because every expert runs on every token.
        """
        blocks = [torch.cat(parts) for parts in self._least.values()]
        return torch.stack(blocks).min(0).values if blocks else None


def choose_reference_rows(margins: Tensor | None, samples: int) -> list[int]:
    """Choose the samples of the reference: those with the largest margins, in order."""
    count = min(SAMPLES, samples)
    if margins is None:
        return list(range(count))
    return sorted(margins.argsort(descending=True, stable=True)[:count].tolist())
