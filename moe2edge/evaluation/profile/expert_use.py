"""Count which experts a text uses, apart from all that is timed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe2edge.errors import Moe2EdgeError
from moe2edge.model.layers import MoELayer
from moe2edge.pipeline import registry
from moe2edge.storage.checkpoint import open_checkpoint

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.calibration.observation import BlockTrace


class ChoiceCounter:
    """Counts the tokens that choose each row of a router, by the block's index."""

    def __init__(self) -> None:
        self._counts: dict[int, Tensor] = {}

    def observe(self, trace: BlockTrace) -> None:
        """Add one batch of one block."""
        import torch

        layer = trace.block.mlp
        if trace.routing is None or not isinstance(layer, MoELayer):
            return
        # An id after the last row is a skipped choice.
        ids, rows = trace.routing.ids.flatten().cpu(), layer.router_rows
        found = torch.bincount(ids, minlength=rows + 1)[:rows]
        self._counts[trace.block.index] = self._counts.get(trace.block.index, 0) + found

    def result(self) -> dict[int, list[int]]:
        """Return the counts."""
        return {index: counts.tolist() for index, counts in self._counts.items()}


def count_expert_choices(request: Mapping[str, Any], ids: Sequence[int]) -> dict[int, list[int]]:
    """Count the tokens of a text that choose each expert (row of a router), by the block's index.

    In the runtime where it tells, otherwise in PyTorch with the weights of the folder.

    Args:
        request: folder, target and options.
        ids: the text.

    Raises:
        Moe2EdgeError: the folder cannot be read as a model.
    """
    import torch

    from moe2edge.calibration import walk

    folder, name = Path(request["folder"]), request["target"]
    if name is None:
        model = open_checkpoint(folder).model
    else:
        target = registry.make_target(name, request.get("options", {}))
        if (counts := target.count_choices(folder, ids)) is not None:
            return dict(counts)
        found = target.streamed(folder)
        if found is None:
            raise Moe2EdgeError(f"target {name} is not read as a model")
        model = found
    counter = ChoiceCounter()
    walk.observe(model, torch.tensor([list(ids)]), [counter], lambda *_: None, "experts")
    return counter.result()


def describe_expert_use(counts: Mapping[int, Sequence[int]], tokens: int) -> dict[str, Any]:
    """Describe the use of experts: of each layer the load and how unevenly it is spread.

    Args:
        counts: tokens of each row of a router, by the block's index.
        tokens: tokens of the text.

    >>> describe_expert_use({0: [3, 1, 0, 0]}, 4)["layers"][0]["hit"]
    2
    """
    layers = [_describe_layer(index, loads) for index, loads in sorted(counts.items())]
    variations = [layer["coefficient_of_variation"] for layer in layers]
    experts = sum(layer["experts"] for layer in layers)
    return {
        "tokens": tokens,
        "coverage_pct": 100 * sum(layer["hit"] for layer in layers) / experts if experts else None,
        "load_imbalance": sum(variations) / len(variations) if variations else None,
        "layers": layers,
    }


def _describe_layer(index: int, loads: Sequence[int]) -> dict[str, Any]:
    mean = sum(loads) / len(loads)
    square = sum((load - mean) ** 2 for load in loads) / len(loads)
    return {
        "block": index,
        "experts": len(loads),
        "hit": sum(load > 0 for load in loads),
        "max_over_mean": max(loads) / mean if mean else 0.0,
        "coefficient_of_variation": math.sqrt(square) / mean if mean else 0.0,
        "counts": list(loads),
    }
