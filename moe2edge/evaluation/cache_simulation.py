"""Simulate a cache of experts: which part of them has to be in fast memory, and what is read.

A model that is larger than memory runs where experts that a token does not use stay on disk, or in
the memory beside a GPU. Tokens are decoded one by one, each layer has a cache of its own, and all
else stays in fast memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moe2edge.model.layers import MoELayer
from moe2edge.model.model import Model
from moe2edge.numerics.expert_cache import count_fixed_hits, count_recent_hits

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.calibration.observation import BlockTrace

# Parts of the experts of each layer that a cache holds.
PARTS_HELD = (1 / 8, 1 / 4, 1 / 2, 3 / 4)


class UseObserver:
    """Notes which stored experts each token uses, in the order of the tokens."""

    def __init__(self) -> None:
        self._batches: dict[int, list[Tensor]] = {}

    def observe(self, trace: BlockTrace) -> None:
        """Add one batch of one block."""
        import torch

        layer = trace.block.mlp
        if trace.routing is None or not isinstance(layer, MoELayer):
            return
        # A replacement is small, so it stays; an id after the last row is a skipped choice.
        bases = [-1 if base is None else base for base in (*layer.bases, None)]
        found = torch.tensor(bases, dtype=torch.int16)[trace.routing.ids.cpu()]
        self._batches.setdefault(trace.block.origin, []).append(found)

    def result(self) -> dict[int, Tensor]:
        """Return the experts that were used, int16 [tokens, k] by origin; -1: none."""
        import torch

        return {origin: torch.cat(found) for origin, found in self._batches.items()}


@dataclass(frozen=True)
class CacheFigures:
    """Figures of caches that hold the same part of the experts of each layer.

    Attributes:
        part: part of the experts of each layer, rounded up, and at least its top-k.
        experts: number of experts of each layer that are held.
        held: bytes of these.
        recent, fixed: part of the uses that finds its expert, if the cache holds those used last,
            or throughout those that another text uses most.
        recent_bytes, fixed_bytes: bytes of experts that are read for a token, on average.
    """

    part: float
    experts: tuple[int, ...]
    held: int
    recent: float
    recent_bytes: float
    fixed: float
    fixed_bytes: float

    def to_json(self) -> dict[str, Any]:
        """Return the entry of the document."""
        return {
            "part": self.part,
            "experts": list(self.experts),
            "bytes": self.held,
            "lru_hit_rate": self.recent,
            "lru_bytes_per_token": self.recent_bytes,
            "fixed_hit_rate": self.fixed,
            "fixed_bytes_per_token": self.fixed_bytes,
        }


@dataclass(frozen=True)
class CacheSimulation:
    """Caches of experts, simulated on the tokens of a text.

    Attributes:
        nbytes: bytes of all experts, as stored.
        bytes_per_token: bytes of the experts that a token uses.
        caches: figures by rising size, without those of caches that hold all.
    """

    nbytes: int
    bytes_per_token: float
    caches: tuple[CacheFigures, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the entry of the document."""
        return {
            "bytes": self.nbytes,
            "bytes_per_token": self.bytes_per_token,
            "caches": [cache.to_json() for cache in self.caches],
        }


@dataclass(frozen=True)
class _Layer:
    experts: int
    top_k: int
    nbytes: float  # of an expert, as stored
    uses: int
    recent: Sequence[int]
    fixed: Sequence[int]


def simulate_caches(model: Model, uses: Mapping[int, Tensor], tokens: int) -> CacheSimulation:
    """Simulate caches of several sizes.

    Args:
        model: the model whose experts were used, with at least one MoE layer.
        uses: as `UseObserver.result`.
        tokens: number of tokens.
    """
    layers = [
        _simulate_layer(layer, uses[block.origin].tolist()) for block, layer in model.moe_blocks
    ]
    found: dict[tuple[int, ...], CacheFigures] = {}
    for part in PARTS_HELD:
        sizes = tuple(
            min(layer.experts, max(layer.top_k, math.ceil(part * layer.experts)))
            for layer in layers
        )
        if sizes != tuple(layer.experts for layer in layers):
            found.setdefault(sizes, _sum_up(part, sizes, layers, tokens))
    return CacheSimulation(
        nbytes=round(sum(layer.experts * layer.nbytes for layer in layers)),
        bytes_per_token=sum(layer.uses * layer.nbytes for layer in layers) / tokens,
        caches=tuple(found.values()),
    )


def _simulate_layer(layer: MoELayer, chosen: list[list[int]]) -> _Layer:
    count = len(layer.experts)
    uses = [[expert for expert in token if expert >= 0] for token in chosen]
    middle = len(uses) // 2
    halves = [[e for token in half for e in token] for half in (uses[:middle], uses[middle:])]
    nbytes = sum(
        weight.nbytes
        for expert in layer.experts
        for weight in (expert.gate, expert.up, expert.down, *expert.biases.values())
    )
    return _Layer(
        experts=count,
        top_k=layer.router.top_k,
        nbytes=nbytes / max(1, count),
        uses=sum(map(len, halves)),
        recent=count_recent_hits((e for half in halves for e in half), count),
        fixed=count_fixed_hits(halves, count),
    )


def _sum_up(
    part: float, sizes: tuple[int, ...], layers: Sequence[_Layer], tokens: int
) -> CacheFigures:
    uses = max(1, sum(layer.uses for layer in layers))
    rates, read = [], []
    for kind in ("recent", "fixed"):
        hits = [getattr(layer, kind)[size] for layer, size in zip(layers, sizes, strict=True)]
        rates.append(sum(hits) / uses)
        misses = (
            (layer.uses - hit) * layer.nbytes for layer, hit in zip(layers, hits, strict=True)
        )
        read.append(sum(misses) / tokens)
    held = sum(size * layer.nbytes for size, layer in zip(sizes, layers, strict=True))
    return CacheFigures(part, sizes, round(held), rates[0], read[0], rates[1], read[1])
