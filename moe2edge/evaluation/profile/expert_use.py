"""Count which experts a text uses, apart from all that is timed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe2edge.errors import Moe2EdgeError
from moe2edge.model.layers import MoELayer
from moe2edge.pipeline import registry
from moe2edge.runtime.router_choices import RouterChoices
from moe2edge.storage.checkpoint import open_checkpoint

if TYPE_CHECKING:
    from moe2edge.calibration.observation import BlockTrace

# Tokens at the end of the text whose experts a document holds.
LAST_TOKENS = 32


class ChoiceLister:
    """Lists the rows of routers that tokens choose, by the block's index."""

    def __init__(self) -> None:
        self._found: dict[int, RouterChoices] = {}

    def observe(self, trace: BlockTrace) -> None:
        """Take the text of one block."""
        layer = trace.block.mlp
        if trace.routing is None or not isinstance(layer, MoELayer):
            return
        mine = RouterChoices.collect(layer.router_rows, trace.routing.ids, trace.routing.logits)
        before = self._found.get(trace.block.index)
        self._found[trace.block.index] = before.join(mine) if before else mine

    def result(self) -> dict[int, RouterChoices]:
        """Return the choices."""
        return self._found


def list_expert_choices(request: Mapping[str, Any], ids: Sequence[int]) -> dict[int, RouterChoices]:
    """List the experts (rows of routers) that the tokens of a text choose, by the block's index.

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
        if (choices := target.list_router_choices(folder, ids)) is not None:
            return dict(choices)
        found = target.streamed(folder)
        if found is None:
            raise Moe2EdgeError(f"target {name} is not read as a model")
        model = found
    lister = ChoiceLister()
    walk.observe(model, torch.tensor([list(ids)]), [lister], lambda *_: None, "experts")
    return lister.result()


def describe_expert_use(choices: Mapping[int, RouterChoices]) -> dict[str, Any]:
    """Describe the use of experts: of each layer the load, and how unevenly it is spread.

    Args:
        choices: of the tokens of a text, by the block's index.

    >>> describe_expert_use({0: RouterChoices(4, ((0, 1), (0,), (0,)))})["layers"][0]["hit"]
    2
    """
    layers = [_describe_layer(index, found) for index, found in sorted(choices.items())]
    variations = [layer["coefficient_of_variation"] for layer in layers]
    experts = sum(layer["experts"] for layer in layers)
    return {
        "tokens": max((len(found.by_token) for found in choices.values()), default=0),
        "coverage_pct": 100 * sum(layer["hit"] for layer in layers) / experts if experts else None,
        "load_imbalance": statistics.fmean(variations) if variations else None,
        "router_entropy": _average([layer["router_entropy"] for layer in layers]),
        "load_entropy": _average([layer["load_entropy"] for layer in layers]),
        "layers": layers,
    }


def _describe_layer(index: int, found: RouterChoices) -> dict[str, Any]:
    loads = found.counts
    mean = sum(loads) / len(loads)
    square = sum((load - mean) ** 2 for load in loads) / len(loads)
    return {
        "block": index,
        "experts": len(loads),
        "hit": sum(load > 0 for load in loads),
        "hit_per_token": sum(loads) / max(1, len(found.by_token)),
        "new_per_token": _count_new(found.by_token),
        "max_over_mean": max(loads) / mean if mean else 0.0,
        "coefficient_of_variation": math.sqrt(square) / mean if mean else 0.0,
        "router_entropy": statistics.fmean(found.entropies) if found.entropies else None,
        "load_entropy": compute_load_entropy(loads),
        "counts": list(loads),
        "last_tokens": [list(chosen) for chosen in found.by_token[-LAST_TOKENS:]],
    }


def compute_load_entropy(loads: Sequence[int]) -> float | None:
    """Compute the entropy of the load over experts, in nats; None: there is no load.

    >>> compute_load_entropy([3, 3, 0]) == math.log(2)
    True
    """
    total = sum(loads)
    parts = [load / total for load in loads if load]
    return math.fsum(-part * math.log(part) for part in parts) if parts else None


def _average(values: Sequence[float | None]) -> float | None:
    """Return the mean; None if one is not known, or there is none."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None


def _count_new(by_token: Sequence[Sequence[int]]) -> float | None:
    """Return the experts of a token that the one before did not choose, in the mean."""
    pairs = list(pairwise(by_token))
    if not pairs:
        return None
    return sum(len({*after} - {*before}) for before, after in pairs) / len(pairs)
