"""Facts that passes leave for later passes."""

from __future__ import annotations

from dataclasses import dataclass

from moe2edge.model.model import Model


@dataclass(frozen=True)
class UntiedModel:
    """The model as it was before experts shared matrices, or became factors.

    A pass that ties experts leaves it; `recover` anneals from it.

    Attributes:
        model: that model; the neurons of each expert are in the order of what it became part of.
    """

    model: Model
