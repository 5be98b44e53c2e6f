"""How little a block changes what passes through it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from moe2edge.walk import Seen


@dataclass(frozen=True)
class BlockSimilarity:
    """Per block by its origin: mean over tokens of the cosine of its input and its output.

    Unified-MoE-Compression (https://arxiv.org/abs/2406.02500), Block Drop.
    """

    cosine: Mapping[int, float]


class SimilarityObserver:
    """Gathers `BlockSimilarity`."""

    def __init__(self) -> None:
        self._sum: dict[int, float] = {}
        self._tokens: dict[int, int] = {}

    def see(self, seen: Seen) -> None:
        """Add one batch. Cosines near one differ in late digits, hence float64."""
        cosine = torch.cosine_similarity(seen.inputs.double(), seen.outputs.double(), dim=-1)
        key = seen.block.origin
        self._sum[key] = self._sum.get(key, 0.0) + float(cosine.sum())
        self._tokens[key] = self._tokens.get(key, 0) + cosine.numel()

    def fact(self) -> BlockSimilarity:
        """The similarities."""
        return BlockSimilarity({k: self._sum[k] / self._tokens[k] for k in self._sum})
