"""Gather products of expert outputs, from which the loss of any subset of experts follows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from moe2edge.errors import Moe2EdgeError
from moe2edge.model.layers import MoELayer
from moe2edge.numerics.subset_loss import (
    PART_TOKENS,
    EvidencePart,
    RoutingRule,
    SubsetEvidence,
    make_part,
    spread,
)

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.calibration.observation import BlockTrace

# Bytes of expert outputs in memory at a time, and the fewest tokens that make fast products.
OUTPUT_BYTES, LEAST_ROWS = 8 << 20, 256


class EvidenceObserver:
    """Gathers the `SubsetEvidence` of one layer after the other from the batches of a walk."""

    def __init__(self, tokens: int, most: int | None = None) -> None:
        """Observe walks over ``tokens`` tokens.

        Args:
            tokens: number of tokens of the walk.
            most: use at most this many of them, spread evenly; None: all.
        """
        self._places = spread(tokens, most)
        self._tokens = tokens
        self._reset()

    def _reset(self) -> None:
        # Sums over tokens of ``|Z - Y|^2`` and ``|Z|^2``, for outputs Y that should be Z.
        self._seen, self._parts, self._gap_square, self._square = 0, list[EvidencePart](), 0.0, 0.0

    @property
    def complete(self) -> bool:
        """True if all tokens of a layer have been observed."""
        return self._seen == self._tokens

    def observe(self, trace: BlockTrace, target: Tensor | None = None) -> None:
        """Add one batch of a layer; batches come in the order of their tokens.

        Args:
            trace: the trace of the batch.
            target: the output Z that the layer should have, [batch, length, hidden]; None: the
                output that it has.

        Raises:
            Moe2EdgeError: the block has no experts.
        """
        layer, routing = trace.block.mlp, trace.routing
        if not isinstance(layer, MoELayer) or routing is None:
            raise Moe2EdgeError(
                f"block {trace.block.index} has no experts to search; it has no MoE layer"
            )
        rule = RoutingRule(layer.router.top_k, layer.router.renormalize)
        end = self._seen + len(routing.inputs)
        places = self._places[(self._places >= self._seen) & (self._places < end)] - self._seen
        self._seen = end
        output = trace.mlp_outputs.flatten(0, -2)
        expected = output if target is None else target.flatten(0, -2)
        for rows in torch.split(places, PART_TOKENS):
            self._square += float(expected[rows].double().square().sum())
            gap = None
            if target is not None:
                gap = expected[rows] - output[rows]
                self._gap_square += float(gap.double().square().sum())
            gram, pull = compute_products(trace, routing.inputs[rows], len(layer.experts), gap)
            self._parts.append(make_part(gram, pull, routing.logits[rows], rule))

    def take(self, layer: MoELayer) -> SubsetEvidence:
        """Return the evidence of a completely observed layer, and reset for the next layer."""
        rule = RoutingRule(layer.router.top_k, layer.router.renormalize)
        parts, gap_square, square = tuple(self._parts), self._gap_square, self._square
        self._reset()
        return SubsetEvidence(rule, len(layer.experts), parts, gap_square, square)


def compute_products(
    trace: BlockTrace, inputs: Tensor, experts: int, gap: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Compute Gram matrices of expert outputs, and their products with ``gap``.

    Each expert runs once on each token, for a few tokens at a time, because the outputs of all
    experts take more memory than their products.

    Args:
        trace: the trace that runs experts.
        inputs: inputs of the layer, [T, hidden].
        experts: number of experts E.
        gap: vectors [T, hidden], or None.

    Returns:
        Gram matrices float32 [T, E, E], and products float64 [T, E]; None without ``gap``.
    """
    tokens, hidden = inputs.shape
    gram = torch.empty(tokens, experts, experts)
    pull = None if gap is None else torch.empty(tokens, experts, dtype=torch.float64)
    step = max(LEAST_ROWS, OUTPUT_BYTES // (4 * experts * hidden))
    for at in range(0, tokens, step):
        rows = slice(at, at + step)
        outputs = torch.stack([trace.expert_output(j, inputs[rows]) for j in range(experts)], dim=1)
        torch.bmm(outputs, outputs.mT, out=gram[rows])
        if pull is not None and gap is not None:
            pull[rows] = torch.bmm(outputs, gap[rows, :, None])[..., 0].double()
    return gram, pull
