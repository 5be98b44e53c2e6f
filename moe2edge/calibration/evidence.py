"""Gathers products of expert outputs from the batches of a walk."""

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

# Bytes of expert outputs held at a time, but of no fewer tokens than make fast products.
OUTPUT_BYTES, LEAST_ROWS = 8 << 20, 256


class Gatherer:
    """Gathers the `Evidence` of one layer after the other from the batches of a walk."""

    def __init__(self, tokens: int, most: int | None = None) -> None:
        """For walks over ``tokens`` tokens, of which at most ``most`` are looked at."""
        self._places = spread(tokens, most)
        self._tokens = tokens
        self._forget()

    def _forget(self) -> None:
        self._seen, self._parts, self._missing, self._wanted = 0, list[EvidencePart](), 0.0, 0.0

    @property
    def complete(self) -> bool:
        """Whether all tokens of a layer have been seen."""
        return self._seen == self._tokens

    def observe(self, trace: BlockTrace, target: Tensor | None = None) -> None:
        """Add one batch of a layer; batches come in the order of their tokens.

        Args:
            trace: what it showed.
            target: Z, [batch, length, hidden]; None: what the layer puts out itself.
        """
        layer, routing = trace.block.mlp, trace.routing
        if not isinstance(layer, MoELayer) or routing is None:
            raise Moe2EdgeError(f"block {trace.block.index} has no experts to search")
        rule = RoutingRule(layer.router.top_k, layer.router.renormalize)
        end = self._seen + len(routing.inputs)
        places = self._places[(self._places >= self._seen) & (self._places < end)] - self._seen
        self._seen = end
        output = trace.mlp_outputs.flatten(0, -2)
        wanted = output if target is None else target.flatten(0, -2)
        for rows in torch.split(places, PART_TOKENS):
            self._wanted += float(wanted[rows].double().square().sum())
            gap = None
            if target is not None:
                gap = wanted[rows] - output[rows]
                self._missing += float(gap.double().square().sum())
            gram, pull = compute_products(trace, routing.inputs[rows], len(layer.experts), gap)
            self._parts.append(make_part(gram, pull, routing.logits[rows], rule))

    def take(self, layer: MoELayer) -> SubsetEvidence:
        """The evidence of the layer whose tokens have all been seen; then forget it."""
        rule = RoutingRule(layer.router.top_k, layer.router.renormalize)
        parts, missing, wanted = tuple(self._parts), self._missing, self._wanted
        self._forget()
        return SubsetEvidence(rule, len(layer.experts), parts, missing, wanted)


def compute_products(
    trace: BlockTrace, inputs: Tensor, experts: int, gap: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Gram matrices of expert outputs for ``inputs`` [T, hidden], and products with ``gap``.

    Each expert runs once on each token. A few tokens at a time: the outputs of all experts are
    larger than their products.
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
