"""Cosine similarity of the input and the output of blocks, MoE layers and runs of blocks."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from moe2edge.calibration.observation import Resumable
from moe2edge.model.block import Block

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.calibration.observation import BlockTrace


class _MeanCosines:
    """Means of cosines over tokens, by key.

    Sums are float64, because cosines near one differ only in late digits.
    """

    def __init__(self) -> None:
        self._sum: dict[tuple[int, ...], float] = {}
        self._tokens: dict[tuple[int, ...], int] = {}

    def add(self, key: tuple[int, ...], a: Tensor, b: Tensor) -> None:
        """Add the cosines of the rows of two tensors [..., hidden]."""
        cosine = torch.cosine_similarity(a.double(), b.double(), dim=-1)
        self._sum[key] = self._sum.get(key, 0.0) + float(cosine.sum())
        self._tokens[key] = self._tokens.get(key, 0) + cosine.numel()

    def save(self, block: Block) -> Any:
        """Return the sums of runs that end with a block."""
        keys = [key for key in self._sum if key[-1] == block.origin]
        return [[key, self._sum[key], self._tokens[key]] for key in keys]

    def restore(self, saved: Any) -> None:
        """Take such sums."""
        for key, total, tokens in saved:
            self._sum[tuple(key)], self._tokens[tuple(key)] = total, tokens

    def result(self) -> dict[tuple[int, ...], float]:
        """Return the mean of each key."""
        return {key: self._sum[key] / self._tokens[key] for key in self._sum}


@dataclass(frozen=True)
class BlockSimilarity:
    """Mean cosine over tokens between the input and the output of every run of blocks.

    This is the score of Block Drop in Unified-MoE-Compression (https://arxiv.org/abs/2406.02500).
    The code of its authors scores runs of one block more than it drops; here a run of n blocks is
    scored by n blocks.

    Attributes:
        cosine: mean cosine, by the origins of the blocks of the run.
    """

    cosine: Mapping[tuple[int, ...], float]


@dataclass(frozen=True)
class BlockSimilarityFactory:
    """Makes observers that gather `BlockSimilarity`.

    Attributes:
        longest: largest number of blocks in a run; the inputs of ``longest - 1`` blocks stay in
            memory.
    """

    longest: int = 1

    def __call__(self) -> BlockSimilarityObserver:
        """Make a fresh observer."""
        return BlockSimilarityObserver(self.longest)


class BlockSimilarityObserver(Resumable):
    """Gathers `BlockSimilarity`."""

    def __init__(self, longest: int) -> None:
        self._means = _MeanCosines()
        # For each batch, the origins and inputs of the latest blocks.
        self._latest: list[deque[tuple[int, Tensor]]] = []
        self._longest = longest
        self._block, self._batch = -1, 0

    def observe(self, trace: BlockTrace) -> None:
        """Add one batch; batches come in the same order for every block."""
        self._batch = self._batch + 1 if trace.block.index == self._block else 0
        self._block = trace.block.index
        if self._batch == len(self._latest):
            self._latest.append(deque(maxlen=self._longest - 1))
        latest = self._latest[self._batch]
        run: tuple[int, ...] = ()
        for origin, inputs in ((trace.block.origin, trace.inputs), *reversed(latest)):
            run = (origin, *run)
            self._means.add(run, inputs, trace.outputs)
        if self._longest > 1:
            # A copy, because the walk overwrites the input with the output.
            latest.append((trace.block.origin, trace.inputs.clone()))

    def save(self, block: Block) -> Any:
        """Return the sums of runs that end with a block."""
        return self._means.save(block)

    def restore(self, block: Block, saved: Any) -> None:
        """Take such sums."""
        self._means.restore(saved)

    def carry(self) -> Any:
        """Return the origins and inputs of the latest blocks, by batch."""
        return [list(latest) for latest in self._latest]

    def take_up(self, carried: Any) -> None:
        """Take them, as copies: the file goes when the next block is kept."""
        self._latest = [
            deque(((origin, inputs.clone()) for origin, inputs in latest), self._longest - 1)
            for latest in carried or ()
        ]

    def result(self) -> BlockSimilarity:
        """Return the similarities."""
        return BlockSimilarity(self._means.result())


@dataclass(frozen=True)
class LayerSimilarity:
    """Mean cosines over tokens of every MoE layer, by the key (origin of its block,).

    This is the score of Layer Drop in Unified-MoE-Compression (https://arxiv.org/abs/2406.02500).
    ``x`` is the residual stream between attention and the layer, ``n(x)`` the normalized ``x``,
    ``m`` the layer.

    Attributes:
        with_norm: cosine of ``x`` and ``x + m(n(x))``, for dropping the norm with the layer.
        without_norm: cosine of ``n(x)`` and ``m(n(x))``, for keeping the norm in place of the
            layer.
    """

    with_norm: Mapping[tuple[int, ...], float]
    without_norm: Mapping[tuple[int, ...], float]


class LayerSimilarityObserver(Resumable):
    """Gathers `LayerSimilarity`."""

    def __init__(self) -> None:
        self._with, self._without = _MeanCosines(), _MeanCosines()

    def observe(self, trace: BlockTrace) -> None:
        """Add one batch of one block."""
        if trace.routing is None:
            return
        key = (trace.block.origin,)
        self._with.add(key, trace.run_bare(), trace.outputs)
        self._without.add(key, trace.mlp_inputs, trace.mlp_outputs)

    def save(self, block: Block) -> Any:
        """Return the sums of a block."""
        return [self._with.save(block), self._without.save(block)]

    def restore(self, block: Block, saved: Any) -> None:
        """Take the sums of a block."""
        self._with.restore(saved[0])
        self._without.restore(saved[1])

    def result(self) -> LayerSimilarity:
        """Return the similarities."""
        return LayerSimilarity(self._with.result(), self._without.result())
