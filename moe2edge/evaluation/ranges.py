"""The largest activation of a model: whether a dtype with a small range holds them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from moe2edge.calibration.observation import Resumable
from moe2edge.model.block import Block

if TYPE_CHECKING:
    from moe2edge.calibration.observation import BlockTrace


class RangeObserver(Resumable):
    """Finds the largest absolute activation in each block: residual stream, MLP, linear inputs."""

    def __init__(self) -> None:
        self._largest: dict[int, float] = {}

    def observe(self, trace: BlockTrace) -> None:
        """Add one batch of one block."""
        seen = [trace.inputs, trace.attended, trace.outputs, trace.mlp_outputs]
        seen += trace.linear_inputs.values()
        ends = [torch.aminmax(tensor) for tensor in seen if tensor.numel()]
        largest = max(max(-float(least), float(most)) for least, most in ends)
        index = trace.block.index
        self._largest[index] = max(largest, self._largest.get(index, 0.0))

    def save(self, block: Block) -> Any:
        """Return the largest activation in a block."""
        return self._largest.get(block.index)

    def restore(self, block: Block, saved: Any) -> None:
        """Take the largest activation in a block."""
        if saved is not None:
            self._largest[block.index] = saved

    def result(self) -> float:
        """Return the largest absolute activation."""
        return max(self._largest.values(), default=0.0)
