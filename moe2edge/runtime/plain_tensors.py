"""The dequantized tensors of a quantized source, for transformers' own classes.

Its readers of quantized checkpoints are not used: some leave experts random, or take their numbers
for others, without an error.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe2edge.model.model import Model
from moe2edge.model.stored_layout import list_stored_block
from moe2edge.storage.source_formats.recognition import KEYS, find_settings
from moe2edge.storage.text_files import read_json

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def drop_quantization(config: Any) -> bool:
    """Take ``quantization_config`` out of a config of transformers; return whether it was there."""
    found = False
    for key in KEYS:
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
        found
        for block in model.blocks
        if blocks is None or block.index in blocks
        for found in list_stored_block(model, block)
    ]
    rest = model.rest.items() if ends else ()
    wanted += [(model.names.get_rest_name(name), weight) for name, weight in rest]
    return {name: weight.load().to(dtype or torch.float32) for name, weight in wanted}


def find_plain_source(
    model: Model,
    folder: Path,
    config: Any,
    blocks: Collection[int] | None = None,
    *,
    ends: bool = True,
    dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """Find where transformers reads tensors: in a folder, or of a quantized one, from memory.

    Args:
        model: the source.
        folder: its folder.
        config: its config as transformers read it; what says that it is quantized is taken out.
        blocks: as in `load_plain_tensors`.
        ends: likewise.
        dtype: likewise.

    Returns:
        Arguments of ``from_pretrained``.
    """
    drop_quantization(config)
    if find_settings(read_json(folder / "config.json")) is None:
        return {"pretrained_model_name_or_path": folder}
    tensors = load_plain_tensors(model, blocks, ends=ends, dtype=dtype)
    return {"pretrained_model_name_or_path": None, "state_dict": tensors}
