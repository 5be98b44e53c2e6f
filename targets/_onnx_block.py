"""One transformer block as ONNX nodes: norms, attention with its cache, experts or a dense MLP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moe2edge.model.block import SECOND_NORM, Block
from moe2edge.model.family import Geometry
from moe2edge.model.layers import MoELayer, UnroutedMLP
from moe2edge.model.model import Model
from moe2edge.targets._onnx_experts import MoEWriter, Roles
from moe2edge.targets._onnx_graph import (
    Graph,
    add_gated_product,
    add_linear,
    add_linear_pair,
    are_alike,
)
from moe2edge.targets._onnx_mixed import MixedWriter
from moe2edge.targets._onnx_storage import CACHE_SCALES, Source

# Attributes of an attention operator whose cache is int8.
INT8_CACHE = {
    "k_quant_type": "PER_CHANNEL",
    "v_quant_type": "PER_CHANNEL",
    "kv_cache_bit_width": 8,
}


@dataclass(frozen=True)
class BlockInputs:
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
class ResidualStream:
    """The residual stream, as a sum of two values.

    Attributes:
        value: the hidden states.
        pending: a value that the next norm adds to them first; empty: none.
    """

    value: str
    pending: str = ""


def add_norm(
    graph: Graph, at: str, stream: ResidualStream, weight: Source, eps: float
) -> tuple[str, str]:
    """Add a norm; return the normed hidden states, and the hidden states with the pending value."""
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
        graph: graph to add to.
        model: the model, for names.
        block: the block.
        geometry: sizes that all blocks share.
        inputs: values that all blocks read.
        accuracy_level: attribute of quantized operators.
        int8_cache: whether keys and values are cached in int8.
    """

    graph: Graph
    model: Model
    block: Block
    geometry: Geometry
    inputs: BlockInputs
    accuracy_level: int
    int8_cache: bool = False

    @property
    def at(self) -> str:
        """Path of the block's nodes."""
        return f"/model/layers.{self.block.index}"

    def add(self, stream: ResidualStream) -> ResidualStream:
        """Add the block; return the residual stream after it."""
        roles = {
            role: Source(self.model.disk_name(self.block, role), weight)
            for role, weight in self.block.weights()
        }
        x, value = self._norm(roles, "input_layernorm", stream)
        stream = ResidualStream(value, self._attention(roles, x))
        if f"norms.{SECOND_NORM}" not in roles:
            return stream
        x, value = self._norm(roles, "post_attention_layernorm", stream)
        mlp = self.block.mlp
        if isinstance(mlp, MoELayer):
            return ResidualStream(value, self._moe(roles, mlp, x))
        if isinstance(mlp, UnroutedMLP):
            y = self._mlp(roles, "dense", f"{self.at}/mlp", x) if mlp.expert else ""
            return ResidualStream(value, self._with_shared(roles, f"{self.at}/mlp", x, y))
        return ResidualStream(
            value, x if mlp is None else self._mlp(roles, "dense", f"{self.at}/mlp", x)
        )

    def _norm(self, roles: Roles, name: str, stream: ResidualStream) -> tuple[str, str]:
        """Add a norm of the block, as `add_norm`."""
        weight = roles[f"norms.{name}.weight"]
        return add_norm(self.graph, f"{self.at}/{name}", stream, weight, self.geometry.eps)

    def _linear(
        self,
        at: str,
        x: str,
        weights: Sequence[Source],
        biases: Sequence[Source] = (),
        name: str = "",
    ) -> str:
        """Add products with matrices, as `add_linear`; ``name`` is that of the first if empty."""
        name = name or weights[0].name
        return add_linear(self.graph, at, x, name, weights, biases, self.accuracy_level)

    # ---- attention -----------------------------------------------------------------------------

    def _attention(self, roles: Roles, x: str) -> str:
        """Add attention with its cache and its output projection."""
        at, index, geometry = f"{self.at}/attn", self.block.index, self.geometry
        cache = [f"past_key_values.{index}.{part}" for part in ("key", "value")]
        present = [f"present.{index}.{part}" for part in ("key", "value")]
        attributes = dict(INT8_CACHE) if self.int8_cache else {}
        if self.block.window is not None:
            attributes["local_window_size"] = self.block.window
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
                *self._cache_scales(),
            ],
            [f"{at}/GroupQueryAttention/output_0", *present],
            num_heads=geometry.heads,
            kv_num_heads=geometry.kv_heads,
            do_rotary=1,
            scale=geometry.head_dim**-0.5,
            **attributes,
        )
        biases = [roles[r] for r in ("attention.o_proj.bias",) if r in roles]
        return self._linear(f"{at}/o_proj", y, [roles["attention.o_proj.weight"]], biases)

    def _cache_scales(self) -> list[str]:
        """Add the scales of a cache in int8, ones until text was measured, behind three blanks."""
        if not self.int8_cache:
            return []
        ones = np.ones((1, self.geometry.kv_heads, 1, self.geometry.head_dim), np.float32)
        names = (CACHE_SCALES.format(index=self.block.index, part=part) for part in ("k", "v"))
        return ["", "", "", *(self.graph.parameter(name, ones) for name in names)]

    def _queries_keys_values(self, roles: Roles, x: str) -> list[str]:
        """Add the inputs of the attention operator: three values, or one packed and two blanks."""
        at, names = f"{self.at}/attn", ("q_proj", "k_proj", "v_proj")
        weights = [roles[f"attention.{name}.weight"] for name in names]
        biases = [roles[r] for r in (f"attention.{name}.bias" for name in names) if r in roles]
        normed = "attention.q_norm.weight" in roles
        clip = self.geometry.clip_qkv
        if are_alike(weights) and are_alike(biases):
            stem = weights[0].name.replace("q_proj", "qkv_proj")
            packed = self._linear(f"{at}/qkv_proj", x, weights, biases, stem)
            if not normed and clip is None:
                return [packed, "", ""]
            sizes = [w.weight.shape[0] for w in weights]
            values = self.graph.split(f"{at}/qkv_proj", packed, sizes)
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
        """Add the norm of queries or keys: over each head, or over all of them."""
        at, graph, size = f"{self.at}/attn/{name}", self.graph, self.geometry.head_dim
        per_head = self.model.family.qk_norm == "head"
        if per_head:
            x = graph.node(f"{at}/split", "Reshape", [x, graph.constant([0, 0, -1, size])])
        scale = graph.vector(weight)
        x = graph.node(at, "RMSNormalization", [x, scale], epsilon=self.geometry.eps, axis=-1)
        if per_head:
            x = graph.node(f"{at}/join", "Reshape", [x, graph.constant([0, 0, -1])])
        return x

    # ---- MoE layer or MLP ----------------------------------------------------------------------

    def _moe(self, roles: Roles, layer: MoELayer, x: str) -> str:
        at = f"{self.at}/moe"
        writer = MoEWriter if layer.is_plain else MixedWriter
        y = writer(self.graph, at, roles, layer, self.block.index, self.accuracy_level).add(x)
        return y if layer.shared is None else self._with_shared(roles, at, x, y)

    def _with_shared(self, roles: Roles, at: str, x: str, y: str) -> str:
        """Add the shared expert, and its sum with ``y`` if that is not empty."""
        graph = self.graph
        shared = self._mlp(roles, "shared", f"{at}/shared", x)
        gate = self._linear(f"{at}/shared_gate", x, [roles["shared.router"]])
        gate = graph.node(f"{at}/shared_gate", "Sigmoid", [gate])
        shared = graph.node(f"{at}/shared_gate", "Mul", [shared, gate])
        return graph.node(f"{at}/shared", "Add", [y, shared]) if y else shared

    def _mlp(self, roles: Roles, kind: str, at: str, x: str) -> str:
        """Add a gated MLP: ``down(silu(gate(x)) * up(x))``."""
        graph, weights = self.graph, [roles[f"{kind}.gate"], roles[f"{kind}.up"]]
        stem = weights[0].name.replace("gate_proj", "gate_up_proj")
        gate, up = add_linear_pair(graph, at, x, stem, weights, self.accuracy_level)
        return self._linear(
            f"{at}/down_proj", add_gated_product(graph, at, gate, up), [roles[f"{kind}.down"]]
        )
