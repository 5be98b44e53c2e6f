"""Routed experts of an MoE layer as ONNX nodes: router, dynamic skipping, one fused operator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import TensorProto

from moe2edge.model.layers import MoELayer
from moe2edge.targets._onnx_graph import Graph, add_linear
from moe2edge.targets._onnx_storage import (
    HALF_BITS,
    DataPart,
    Source,
    make_quantized_initializers,
)

Roles = Mapping[str, Source]


@dataclass(frozen=True)
class MoEWriter:
    """Adds the routed experts of one MoE layer to a graph.

    Attributes:
        graph: graph to add to.
        at: path of the layer's nodes.
        roles: weights of the block, by role.
        layer: the layer.
        index: index of the block.
        accuracy_level: attribute of quantized operators.
    """

    graph: Graph
    at: str
    roles: Roles
    layer: MoELayer
    index: int
    accuracy_level: int

    def add(self, x: str) -> str:
        """Add the layer; return the weighted sum of expert outputs, in the shape of ``x``."""
        graph, router, count = self.graph, self.layer.router, len(self.layer.experts)
        scores, rows = self._scores(x)
        if router.skip_below or self._takes_half:
            return self._add_weighted(x, rows)
        y = self._fused(x, rows)
        # normalize_routing_weights=0 makes MoE output zeros (onnxruntime issue 33866) and is
        # ignored by QMoE. So weights are always normalized, and the output is multiplied by the
        # sum that this divided by.
        if not router.renormalize and router.top_k < count:
            at = f"{self.at}/mass"
            probabilities = graph.node(at, "Softmax", [scores], axis=-1)
            mass = self._sum(at, self._top(at, probabilities)[0])
            y = graph.node(at, "Mul", [y, mass])
        return y

    @property
    def _takes_half(self) -> bool:
        """True if the operator takes activations in float16 only."""
        scheme = self.layer.experts[0].gate.scheme
        return scheme is not None and scheme.bits == HALF_BITS

    # ---- routing -------------------------------------------------------------------------------

    def _scores(self, x: str) -> tuple[str, str]:
        """Add the router; return its logits as [batch, length, rows] and as [tokens, rows]."""
        at, weight = f"{self.at}/router", self.roles["router.weight"]
        scores = add_linear(self.graph, at, x, weight.name, [weight], (), self.accuracy_level)
        shape = self.graph.constant([-1, self.layer.router_rows])
        return scores, self.graph.node(at, "Reshape", [scores, shape])

    def _top(self, at: str, probabilities: str) -> tuple[str, str]:
        """Choose the top k; return their weights, in descending order, and their rows."""
        outputs = [f"{at}/TopK/output_0", f"{at}/TopK/output_1"]
        top_k = self.graph.constant([self.layer.router.top_k])
        self.graph.node(at, "TopK", [probabilities, top_k], outputs, axis=-1)
        return outputs[0], outputs[1]

    def _sum(self, at: str, weights: str) -> str:
        """Sum the weights of each token."""
        return self.graph.node(at, "ReduceSum", [weights, self.graph.constant([-1])], keepdims=1)

    def _kept(self, at: str, best: str) -> tuple[str, str]:
        """Return weights with zeros for skipped experts, and bool [tokens, k]: which ones run.

        The formula is that of `moe2edge.numerics.skipping.apply_skipping`.
        """
        graph = self.graph
        below = graph.constant([[0.0, *self.layer.router.skip_below]], np.float32)
        first = graph.node(at, "ReduceMax", [best, graph.constant([-1])], keepdims=1)
        limits = graph.node(f"{at}/limits", "Mul", [first, below])
        runs = graph.node(at, "GreaterOrEqual", [best, limits])
        zero = graph.constant(0.0, np.float32)
        return graph.node(f"{at}/kept", "Where", [runs, best, zero]), runs

    def _add_weighted(self, x: str, rows: str) -> str:
        """Add experts whose weights are computed before the operator: with dynamic skipping.

        ``QMoE`` takes weights as an input and spends no time on experts whose weight is zero.
        ``MoE`` has no such input, so the logits of skipped experts are lowered until their weights
        are zero. In float16 logits would choose other experts at near ties; weights do not, and are
        zero for all that were not chosen.
        """
        graph, router = self.graph, self.layer.router
        at = f"{self.at}/{'skip' if router.skip_below else 'gates'}"
        probabilities = graph.node(at, "Softmax", [rows], axis=-1)
        best, ids = self._top(at, probabilities)
        kept, runs = self._kept(at, best) if router.skip_below else (best, "")
        zero = graph.constant(0.0, np.float32)
        zeros = graph.node(f"{at}/nothing", "Mul", [probabilities, zero])
        if self.layer.experts[0].gate.scheme is None:
            return self._add_lowered(x, rows, (zeros, ids, kept, runs))
        if router.renormalize:
            kept = graph.node(at, "Div", [kept, self._sum(at, kept)])
        weights = graph.node(at, "ScatterElements", [zeros, ids, kept], axis=1)
        return self._fused(x, weights if self._takes_half else rows, weights)

    def _add_lowered(self, x: str, rows: str, routing: tuple[str, str, str, str]) -> str:
        """Add skipping for ``MoE``, by lowered logits."""
        at, graph = f"{self.at}/skip", self.graph
        zeros, ids, kept, runs = routing
        logits = graph.node(at, "GatherElements", [rows, ids], axis=1)
        low = graph.constant(-1e4, np.float32)
        logits = graph.node(f"{at}/logits", "Where", [runs, logits, low])
        # All others are as low: otherwise, the operator would choose one in place of a skipped one.
        others = graph.node(f"{at}/others", "Add", [zeros, low])
        rows = graph.node(at, "ScatterElements", [others, ids, logits], axis=1)
        y = self._fused(x, rows)
        if self.layer.router.renormalize:
            return y
        shape = graph.node(at, "Shape", [x], end=-1)
        one = graph.constant([1])
        shape = graph.node(f"{at}/per_token", "Concat", [shape, one], axis=0)
        mass = graph.node(f"{at}/per_token", "Reshape", [self._sum(at, kept), shape])
        return graph.node(f"{at}/mass", "Mul", [y, mass])

    # ---- experts -------------------------------------------------------------------------------

    def _fused(self, x: str, scores: str, weights: str = "") -> str:
        """Add one operator that holds all experts.

        Args:
            x: the layer's input.
            scores: router logits [tokens, experts].
            weights: factors of expert outputs, [tokens, experts]; empty: the softmax over the
                chosen logits, which the operator computes.
        """
        experts, router = range(len(self.layer.experts)), self.layer.router
        normalize = router.renormalize or not weights
        return self._operator(x, experts, (scores, weights), router.top_k, normalize=normalize)

    def _operator(
        self,
        x: str,
        experts: Sequence[int],
        routing: tuple[str, str],
        top_k: int,
        *,
        normalize: bool,
    ) -> str:
        """Add ``QMoE`` for some experts, or ``MoE`` if they are not quantized.

        Args:
            x: the layer's input.
            experts: positions of the experts in the layer.
            routing: scores and weights of the experts, as in `_fused`.
            top_k: number of experts chosen per token.
            normalize: whether weights are scaled to sum to one.
        """
        graph, roles, count = self.graph, self.roles, len(experts)
        like = self.layer.experts[experts[0]].gate
        width, hidden = like.shape
        first: list[DataPart] = [
            (roles[f"experts.{n}.gate"], roles[f"experts.{n}.up"]) for n in experts
        ]
        second: list[DataPart] = [(roles[f"experts.{n}.down"],) for n in experts]
        stem = f"model.layers.{self.index}.moe.experts"
        shapes = (count, 2 * width, hidden), (count, hidden, width)
        names = f"{stem}.gate_up_proj.weight", f"{stem}.down_proj.weight"
        attributes: dict[str, Any] = {
            "k": top_k,
            "activation_type": "swiglu",
            "swiglu_fusion": 1,
            "activation_alpha": 1.0,
            "activation_beta": 0.0,
            "normalize_routing_weights": int(normalize),
        }
        scores, weights = routing
        if like.scheme is None:
            matrices = [
                graph.stored(name, parts, shape)
                for name, parts, shape in zip(names, (first, second), shapes, strict=True)
            ]
            inputs = [x, scores, matrices[0], "", matrices[1]]
            return graph.node(self.at, "MoE", inputs, **attributes)
        stored = [
            graph.store(make_quantized_initializers(name, parts, shape, blocked=False))
            for name, parts, shape in zip(names, (first, second), shapes, strict=True)
        ]
        half = like.scheme.bits == HALF_BITS
        if half:
            x, weights = (self._cast_half(*each) for each in (("x", x), ("weights", weights)))
            scores = weights
        inputs = [x, scores, *stored[0][:2], "", *stored[1][:2]]
        if weights or not like.scheme.symmetric:
            points = ["", ""] if like.scheme.symmetric else [stored[0][2], stored[1][2]]
            inputs += ["", "", "", "", *points, *(["", weights] if weights else [])]
        # weights_prepacked is explicit, because its default means another layout in later versions.
        y = graph.node(
            self.at,
            "QMoE",
            inputs,
            **attributes,
            expert_weight_bits=like.scheme.bits,
            block_size=like.scheme.group_size,
            accuracy_level=self.accuracy_level,
            weights_prepacked=0,
        )
        return graph.node(f"{self.at}/half/y", "Cast", [y], to=TensorProto.FLOAT) if half else y

    def _cast_half(self, name: str, value: str) -> str:
        """Add an input of the operator in float16."""
        return self.graph.node(f"{self.at}/half/{name}", "Cast", [value], to=TensorProto.FLOAT16)
