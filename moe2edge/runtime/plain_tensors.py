"""The dequantized tensors of a quantized source, for transformers' own classes.

Its readers of quantized checkpoints are not used: some leave experts random, or take their numbers
for others, without an error.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from moe2edge.model.model import Model

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def drop_quantization(config: Any) -> bool:
    """Take ``quantization_config`` out of a config of transformers; return whether it was there."""
    found = False
    for key in ("quantization_config", "compression_config"):
        if getattr(config, key, None) is not None:
            delattr(config, key)
            found = True
    return found


def load_plain_tensors(
    model: Model,
    blocks: Collection[int] | None = None,
    *,
    ends: bool = True,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Load tensors by their names on disk, dequantized.

    Args:
        model: a source.
        blocks: indices of the blocks; None: all.
        ends: also embedding, last norm and head.
        dtype: that they are rounded to; None: float32.
    """
    import torch

    wanted = [
        (model.family.disk_name(block.index, role), weight)
        for block in model.blocks
        if blocks is None or block.index in blocks
        for role, weight in block.weights()
    ]
    wanted += list(model.rest.items()) if ends else []
    return {name: weight.load().to(dtype or torch.float32) for name, weight in wanted}
