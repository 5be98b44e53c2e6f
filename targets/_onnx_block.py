"""One transformer block as ONNX nodes: norms, attention with its cache, experts or a dense MLP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe2edge.families import Geometry
from moe2edge.layers import Always, MoELayer
from moe2edge.model import SECOND_NORM, Block, Model
from moe2edge.targets._onnx_graph import Graph, alike, linear
from moe2edge.targets._onnx_storage import Part, Source, quantized

Roles = Mapping[str, Source]


@dataclass(frozen=True)
class Inputs:
    """Values that every block reads.

    Attributes:
        last_position: int32 [batch], index of the last token of each sequence.
        total_length: int32 scalar, tokens in the cache after this run.
        cos: float32 [positions, head_dim / 2].
        sin: the same.
    """

    last_position: str
    total_length: str
    cos: str
    sin: str


@dataclass(frozen=True)
class Stream:
    """The residual stream: its value, and what the next norm adds to it before norming."""

    value: str
    pending: str = ""


def norm(graph: Graph, at: str, stream: Stream, weight: Source, eps: float) -> tuple[str, str]:
    """The normed stream, and the stream itself with what was pending."""
    scale = graph.vector(weight)
    if not stream.pending:
        y = graph.node(at, "RMSNormalization", [stream.value, scale], epsilon=eps, axis=-1)
        return y, stream.value
    op = "SkipSimplifiedLayerNormalization"
    total = f"{at}/{op}/output_3"
    outputs = [f"{at}/{op}/output_0", "", "", total]
    return graph.node(at, op, [stream.value, stream.pending, scale], outputs, epsilon=eps), total


@dataclass(frozen=True)
class BlockWriter:
    """Adds one block to a graph.

    Attributes:
        graph: where to.
        model: the model, for names.
        block: the block.
        geometry: sizes that all blocks share.
        inputs: values that all blocks read.
        accuracy_level: of quantized operators.
    """

    graph: Graph
    model: Model
    block: Block
    geometry: Geometry
    inputs: Inputs
    accuracy_level: int

    @property
    def at(self) -> str:
        """Path of the block's nodes."""
        return f"/model/layers.{self.block.index}"

    def add(self, stream: Stream) -> Stream:
        """The stream after the block."""
        roles = {
            role: Source(self.model.family.disk_name(self.block.index, role), weight)
            for role, weight in self.block.weights()
        }
        x, value = self._norm(roles, "input_layernorm", stream)
        stream = Stream(value, self._attention(roles, x))
        if f"norms.{SECOND_NORM}" not in roles:
            return stream
        x, value = self._norm(roles, "post_attention_layernorm", stream)
        mlp = self.block.mlp
        if isinstance(mlp, MoELayer):
            return Stream(value, self._moe(roles, mlp, x))
        if isinstance(mlp, Always):
            y = self._mlp(roles, "dense", f"{self.at}/mlp", x) if mlp.expert else ""
            return Stream(value, self._with_shared(roles, f"{self.at}/mlp", x, y))
        return Stream(value, x if mlp is None else self._mlp(roles, "dense", f"{self.at}/mlp", x))

    def _norm(self, roles: Roles, name: str, stream: Stream) -> tuple[str, str]:
        weight = roles[f"norms.{name}.weight"]
        return norm(self.graph, f"{self.at}/{name}", stream, weight, self.geometry.eps)

    def _linear(
        self,
        at: str,
        x: str,
        weights: Sequence[Source],
        biases: Sequence[Source] = (),
        name: str = "",
    ) -> str:
        name = name or weights[0].name
        return linear(self.graph, at, x, name, weights, biases, self.accuracy_level)

    def _split(self, at: str, x: str, sizes: Sequence[int]) -> list[str]:
        outputs = [f"{at}/Split/output_{n}" for n in range(len(sizes))]
        self.graph.node(at, "Split", [x, self.graph.constant(sizes)], outputs, axis=-1)
        return outputs

    # ---- attention -----------------------------------------------------------------------------

    def _attention(self, roles: Roles, x: str) -> str:
        at, index, geometry = f"{self.at}/attn", self.block.index, self.geometry
        cache = [f"past_key_values.{index}.{part}" for part in ("key", "value")]
        present = [f"present.{index}.{part}" for part in ("key", "value")]
        window = {} if self.block.window is None else {"local_window_size": self.block.window}
        inputs = self.inputs
        y = self.graph.node(
            at,
            "GroupQueryAttention",
            [
                *self._queries_keys_values(roles, x),
                *cache,
                inputs.last_position,
                inputs.total_length,
                inputs.cos,
                inputs.sin,
            ],
            [f"{at}/GroupQueryAttention/output_0", *present],
            num_heads=geometry.heads,
            kv_num_heads=geometry.kv_heads,
            do_rotary=1,
            scale=geometry.head_dim**-0.5,
            **window,
        )
        biases = [roles[r] for r in ("attention.o_proj.bias",) if r in roles]
        return self._linear(f"{at}/o_proj", y, [roles["attention.o_proj.weight"]], biases)

    def _queries_keys_values(self, roles: Roles, x: str) -> list[str]:
        """Inputs of the attention operator: three values, or one that holds all and two blanks."""
        at, names = f"{self.at}/attn", ("q_proj", "k_proj", "v_proj")
        weights = [roles[f"attention.{name}.weight"] for name in names]
        biases = [roles[r] for r in (f"attention.{name}.bias" for name in names) if r in roles]
        normed = "attention.q_norm.weight" in roles
        clip = self.geometry.clip_qkv
        if alike(weights) and alike(biases):
            stem = weights[0].name.replace("q_proj", "qkv_proj")
            packed = self._linear(f"{at}/qkv_proj", x, weights, biases, stem)
            if not normed and clip is None:
                return [packed, "", ""]
            sizes = [w.weight.shape[0] for w in weights]
            values = self._split(f"{at}/qkv_proj", packed, sizes)
        else:
            values = [
                self._linear(f"{at}/{name}", x, [w], biases[n : n + 1])
                for n, (name, w) in enumerate(zip(names, weights, strict=True))
            ]
        if normed:
            for n, name in enumerate(("q_norm", "k_norm")):
                values[n] = self._head_norm(roles[f"attention.{name}.weight"], name, values[n])
        if clip is not None:
            bounds = [self.graph.constant(b, np.float32) for b in (-clip, clip)]
            values = [
                self.graph.node(f"{at}/{name}", "Clip", [value, *bounds])
                for name, value in zip(names, values, strict=True)
            ]
        return values

    def _head_norm(self, weight: Source, name: str, x: str) -> str:
        """Norm of queries or keys: over each head, or over all of them."""
        at, graph, size = f"{self.at}/attn/{name}", self.graph, self.geometry.head_dim
        per_head = self.model.family.qk_norm == "head"
        if per_head:
            x = graph.node(f"{at}/split", "Reshape", [x, graph.constant([0, 0, -1, size])])
        scale = graph.vector(weight)
        x = graph.node(at, "RMSNormalization", [x, scale], epsilon=self.geometry.eps, axis=-1)
        if per_head:
            x = graph.node(f"{at}/join", "Reshape", [x, graph.constant([0, 0, -1])])
        return x

    # ---- what follows attention ----------------------------------------------------------------

    def _moe(self, roles: Roles, layer: MoELayer, x: str) -> str:
        at, graph, count = f"{self.at}/moe", self.graph, len(layer.experts)
        top_k = layer.router.top_k
        scores = self._linear(f"{at}/router", x, [roles["router.weight"]])
        rows = graph.node(f"{at}/router", "Reshape", [scores, graph.constant([-1, count])])
        if layer.router.skip_below:
            y = self._skipping_experts(roles, layer, x, rows)
        else:
            y = self._experts(roles, layer, x, rows)
            # normalize_routing_weights=0 gives zeros in MoE (onnxruntime issue 33866) and is
            # ignored by QMoE. So weights are always normalized, and the sum that this divides by
            # is put back.
            if not layer.router.renormalize and top_k < count:
                chances = graph.node(f"{at}/mass", "Softmax", [scores], axis=-1)
                y = self._times_sum(y, self._top(f"{at}/mass", chances, top_k)[0])
        return y if layer.shared is None else self._with_shared(roles, at, x, y)

    def _top(self, at: str, chances: str, top_k: int) -> tuple[str, str]:
        """The largest of each row, in falling order, and where they are."""
        outputs = [f"{at}/TopK/output_0", f"{at}/TopK/output_1"]
        self.graph.node(at, "TopK", [chances, self.graph.constant([top_k])], outputs, axis=-1)
        return outputs[0], outputs[1]

    def _times_sum(self, y: str, weights: str) -> str:
        """``y`` times the sum of each token's ``weights``."""
        at, graph = f"{self.at}/moe/mass", self.graph
        mass = graph.node(at, "ReduceSum", [weights, graph.constant([-1])], keepdims=1)
        return graph.node(at, "Mul", [y, mass])

    def _skipping_experts(self, roles: Roles, layer: MoELayer, x: str, rows: str) -> str:
        """Experts with dynamic skipping; see `moe2edge.modules.skipping`.

        ``QMoE`` takes the weights as an input and spends no time on those that are zero; ``MoE``
        has no such input, so logits of what is skipped are lowered until their weight is zero.
        """
        at, graph, router = f"{self.at}/moe/skip", self.graph, layer.router
        chances = graph.node(at, "Softmax", [rows], axis=-1)
        best, ids = self._top(at, chances, router.top_k)
        below = graph.constant([[0.0, *router.skip_below]], np.float32)
        first = graph.node(at, "ReduceMax", [best, graph.constant([-1])], keepdims=1)
        limits = graph.node(f"{at}/limits", "Mul", [first, below])
        runs = graph.node(at, "GreaterOrEqual", [best, limits])
        zero = graph.constant(0.0, np.float32)
        kept = graph.node(f"{at}/kept", "Where", [runs, best, zero])
        nothing = graph.node(f"{at}/nothing", "Mul", [chances, zero])
        if layer.experts[0].gate.scheme is None:
            logits = graph.node(at, "GatherElements", [rows, ids], axis=1)
            low = graph.constant(-1e4, np.float32)
            logits = graph.node(f"{at}/logits", "Where", [runs, logits, low])
            # All others are as low, or the operator would choose one of them for what is skipped.
            others = graph.node(f"{at}/others", "Add", [nothing, low])
            rows = graph.node(at, "ScatterElements", [others, ids, logits], axis=1)
            y = self._experts(roles, layer, x, rows)
            if router.renormalize:
                return y
            shape = graph.node(at, "Shape", [x], end=-1)
            one = graph.constant([1])
            shape = graph.node(f"{at}/per_token", "Concat", [shape, one], axis=0)
            mass = graph.node(at, "ReduceSum", [kept, graph.constant([-1])], keepdims=1)
            mass = graph.node(f"{at}/per_token", "Reshape", [mass, shape])
            return graph.node(f"{at}/mass", "Mul", [y, mass])
        if router.renormalize:
            total = graph.node(at, "ReduceSum", [kept, graph.constant([-1])], keepdims=1)
            kept = graph.node(at, "Div", [kept, total])
        weights = graph.node(at, "ScatterElements", [nothing, ids, kept], axis=1)
        return self._experts(roles, layer, x, rows, weights)

    def _with_shared(self, roles: Roles, at: str, x: str, y: str) -> str:
        """``y``, which may be nothing, and the shared expert."""
        graph = self.graph
        shared = self._mlp(roles, "shared", f"{at}/shared", x)
        gate = self._linear(f"{at}/shared_gate", x, [roles["shared.router"]])
        gate = graph.node(f"{at}/shared_gate", "Sigmoid", [gate])
        shared = graph.node(f"{at}/shared_gate", "Mul", [shared, gate])
        return graph.node(f"{at}/shared", "Add", [y, shared]) if y else shared

    def _experts(
        self, roles: Roles, layer: MoELayer, x: str, scores: str, weights: str = ""
    ) -> str:
        """All routed experts by one operator.

        Args:
            roles: the block's weights.
            layer: the MoE layer.
            x: its input.
            scores: router logits [tokens, experts].
            weights: what outputs are multiplied with, [tokens, experts]; none: the operator's own
                softmax over the chosen logits.
        """
        at, graph, count = f"{self.at}/moe", self.graph, len(layer.experts)
        width, hidden = layer.experts[0].gate.shape
        first: list[Part] = [
            (roles[f"experts.{n}.gate"], roles[f"experts.{n}.up"]) for n in range(count)
        ]
        second: list[Part] = [(roles[f"experts.{n}.down"],) for n in range(count)]
        stem = f"model.layers.{self.block.index}.moe.experts"
        shapes = (count, 2 * width, hidden), (count, hidden, width)
        names = f"{stem}.gate_up_proj.weight", f"{stem}.down_proj.weight"
        attributes: dict[str, Any] = {
            "k": layer.router.top_k,
            "activation_type": "swiglu",
            "swiglu_fusion": 1,
            "activation_alpha": 1.0,
            "activation_beta": 0.0,
            "normalize_routing_weights": int(layer.router.renormalize or not weights),
        }
        scheme = layer.experts[0].gate.scheme
        if scheme is None:
            matrices = [
                graph.stored(name, parts, shape)
                for name, parts, shape in zip(names, (first, second), shapes, strict=True)
            ]
            return graph.node(at, "MoE", [x, scores, matrices[0], "", matrices[1]], **attributes)
        stored = [
            graph.store(quantized(name, parts, shape, blocked=False))
            for name, parts, shape in zip(names, (first, second), shapes, strict=True)
        ]
        inputs = [x, scores, *stored[0][:2], "", *stored[1][:2]]
        if weights or not scheme.symmetric:
            points = ["", ""] if scheme.symmetric else [stored[0][2], stored[1][2]]
            inputs += ["", "", "", "", *points, *(["", weights] if weights else [])]
        # weights_prepacked is written because its default means another layout in later versions.
        return graph.node(
            at,
            "QMoE",
            inputs,
            **attributes,
            expert_weight_bits=scheme.bits,
            block_size=scheme.group_size,
            accuracy_level=self.accuracy_level,
            weights_prepacked=0,
        )

    def _mlp(self, roles: Roles, kind: str, at: str, x: str) -> str:
        """A gated MLP: ``down(silu(gate(x)) * up(x))``."""
        graph, weights = self.graph, [roles[f"{kind}.gate"], roles[f"{kind}.up"]]
        if alike(weights):
            stem = weights[0].name.replace("gate_proj", "gate_up_proj")
            packed = self._linear(f"{at}/gate_up_proj", x, weights, name=stem)
            sizes = [w.weight.shape[0] for w in weights]
            gate, up = self._split(f"{at}/gate_up_proj", packed, sizes)
        else:
            gate = self._linear(f"{at}/gate_proj", x, weights[:1])
            up = self._linear(f"{at}/up_proj", x, weights[1:])
        slope = graph.node(f"{at}/silu", "Sigmoid", [gate])
        gate = graph.node(f"{at}/silu", "Mul", [gate, slope])
        product = graph.node(at, "Mul", [gate, up])
        return self._linear(f"{at}/down_proj", product, [roles[f"{kind}.down"]])
