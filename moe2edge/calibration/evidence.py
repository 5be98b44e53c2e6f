"""Gather products of expert outputs, from which the loss of any subset of experts follows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from moe2edge.errors import Moe2EdgeError
from moe2edge.model.layers import MoELayer
from moe2edge.numerics.routed_loss import RoutedEvidence, RoutedPart
from moe2edge.numerics.subset_loss import (
    PART_TOKENS,
    Evidence,
    EvidencePart,
    RoutingRule,
    SubsetEvidence,
    make_part,
    spread,
)

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.calibration.observation import BlockTrace
    from moe2edge.model.stock_router import StockRouter

# Bytes of expert outputs in memory at a time, and the fewest tokens that make fast products.
OUTPUT_BYTES, LEAST_ROWS = 8 << 20, 256


class EvidenceObserver:
    """Gathers the evidence of one layer after the other from the batches of a walk.

    For families of the table, outputs are those of the layer, and the rule of the router is known.
    For all others, outputs are the weighted sums of the experts' outputs, in front of all that
    follows in the layer, and transformers' router is asked, unless it is found to take a softmax.
    """

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
        self._seen, self._gap_square, self._square = 0, 0.0, 0.0
        self._parts, self._routed = list[EvidencePart](), list[RoutedPart]()
        self._router: StockRouter | None = None

    @property
    def complete(self) -> bool:
        """True if all tokens of a layer have been observed."""
        return self._seen == self._tokens

    def observe(self, trace: BlockTrace, source: BlockTrace | None = None) -> None:
        """Add one batch of a layer; batches come in the order of their tokens.

        Args:
            trace: the trace of the batch.
            source: the trace whose output the layer should have; None: its own.

        Raises:
            Moe2EdgeError: the block has no experts.
        """
        layer, routing = trace.block.mlp, trace.routing
        if not isinstance(layer, MoELayer) or routing is None:
            raise Moe2EdgeError(
                f"block {trace.block.index} has no experts to search; it has no MoE layer"
            )
        end = self._seen + len(routing.inputs)
        places = self._places[(self._places >= self._seen) & (self._places < end)] - self._seen
        self._seen = end
        if trace.router is not None and self._router is None:
            self._router = trace.router()
        gap = None if source is None else self._find_gap(trace, source)
        for rows in torch.split(places, PART_TOKENS):
            own = None if gap is None else gap[rows]
            if own is not None:
                self._gap_square += float(own.double().square().sum())
            if self._router is None:
                expected = (trace if source is None else source).mlp_outputs.flatten(0, -2)[rows]
                self._square += float(expected.double().square().sum())
            gram, pull = compute_products(trace, routing.inputs[rows], len(layer.experts), own)
            if self._router is None:
                self._parts.append(make_part(gram, pull, routing.logits[rows], _get_rule(layer)))
            else:
                self._ask(layer, self._router, (gram, pull), routing.logits[rows], own)

    def _ask(
        self,
        layer: MoELayer,
        router: StockRouter,
        products: tuple[Tensor, Tensor | None],
        scores: Tensor,
        gap: Tensor | None,
    ) -> None:
        """Add a part whose choices the router itself makes, unless it takes a plain softmax."""
        gram, pull = products
        ids, weights = router.choose(scores, torch.ones(router.experts, dtype=torch.bool))
        # ``|Y + D|^2``, of which Y is the weighted sum of outputs.
        full = gram.new_zeros(scores.shape).scatter_add(1, ids, weights.float())
        self._square += float((torch.bmm(gram, full[:, :, None])[..., 0] * full).sum())
        if gap is not None and pull is not None:
            self._square += float(gap.double().square().sum() + 2 * (full * pull).sum())
        if router.softmax is None:
            self._routed.append(RoutedPart(gram, pull, ids, weights, scores.clone()))
            return
        renormalize, scale = router.softmax
        gram.mul_(scale**2)
        pull = None if pull is None else pull * scale
        rule = RoutingRule(layer.router.top_k, renormalize)
        self._parts.append(make_part(gram, pull, scores, rule))

    def _find_gap(self, trace: BlockTrace, source: BlockTrace) -> Tensor:
        """Return what outputs lack of those that they should be, [N, hidden]."""
        gap: Tensor = (source.mlp_outputs - trace.mlp_outputs).flatten(0, -2)
        if self._router is None:
            return gap
        # What is added behind the experts, such as a shared expert, counts as in the others.
        if self._router.factor is not None:
            return gap / self._router.factor
        return _sum_outputs(source) - _sum_outputs(trace)

    def take(self, layer: MoELayer) -> Evidence:
        """Return the evidence of a completely observed layer, and reset for the next layer."""
        experts, router = len(layer.experts), self._router
        parts, routed, sums = tuple(self._parts), tuple(self._routed), self._sums
        self._reset()
        if router is None or router.softmax is not None:
            rule = _get_rule(layer)
            if router is not None and router.softmax is not None:
                rule = RoutingRule(layer.router.top_k, router.softmax[0])
            return SubsetEvidence(rule, experts, parts, *sums)
        groups = layer.router.groups
        # In groups each expert has a say: it is a part of the score of its group.
        local = groups == 1 and router.is_local
        return RoutedEvidence(router.choose, local, experts, groups, routed, *sums)

    @property
    def _sums(self) -> tuple[float, float]:
        return self._gap_square, self._square


def _get_rule(layer: MoELayer) -> RoutingRule:
    return RoutingRule(layer.router.top_k, layer.router.renormalize)


def _sum_outputs(trace: BlockTrace) -> Tensor:
    """Return the weighted sum of the outputs of the chosen experts, [N, hidden]."""
    routing = trace.routing
    assert routing is not None
    out = torch.zeros_like(routing.inputs)
    for n in sorted(set(routing.ids.flatten().tolist())):
        token, place = torch.where(routing.ids == n)
        y = trace.expert_output(n, routing.inputs[token])
        out.index_add_(0, token, y * routing.weights[token, place, None])
    return out


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
