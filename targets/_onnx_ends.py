"""Embedding and head of an ONNX graph, quantized or not; a tensor that is both is stored once."""

from __future__ import annotations

from dataclasses import dataclass

from onnx import TensorProto

from moe2edge.model.model import EMBEDDING, HEAD, Model
from moe2edge.targets._onnx_graph import Graph
from moe2edge.targets._onnx_storage import (
    Source,
    make_plain_initializer,
    make_quantized_initializers,
)


@dataclass(frozen=True)
class EndsWriter:
    """Adds embedding and head to a graph.

    Attributes:
        graph: graph to add to.
        model: the model.
        accuracy_level: attribute of a quantized head.
    """

    graph: Graph
    model: Model
    accuracy_level: int

    def add_embedding(self, ids: str) -> tuple[str, tuple[str, ...]]:
        """Add the rows of ``ids``, as float32; return them, and what the table is stored in."""
        graph, at = self.graph, "/model/embed_tokens"
        stored = self._store(EMBEDDING)
        weight = self.model.rest[EMBEDDING]
        if weight.scheme is None:
            rows = graph.node(at, "Gather", [stored[0], ids], axis=0)
            if weight.dtype != "F32":
                rows = graph.node(at, "Cast", [rows], to=TensorProto.FLOAT)
            return rows, stored
        # Integers are [rows, groups, inputs], as the operator of a head needs them; the one that
        # looks rows up takes scales of as many axes.
        scales = graph.node(at, "Unsqueeze", [stored[1], graph.constant([-1])])
        groups = graph.node(
            at,
            "GatherBlockQuantized",
            [stored[0], ids, scales],
            gather_axis=0,
            quantize_axis=2,
            block_size=weight.scheme.group_size,
            bits=weight.scheme.bits,
        )
        shape = graph.constant([0, 0, weight.shape[1]])
        return graph.node(at, "Reshape", [groups, shape]), stored

    def add_head(self, hidden: str, table: tuple[str, ...], logits: str) -> None:
        """Add the product of the normed hidden states with the head.

        Args:
            hidden: the hidden states.
            table: what the embedding is stored in, which a tied head multiplies by as well.
            logits: the output.
        """
        graph, name = self.graph, HEAD if HEAD in self.model.rest else EMBEDDING
        weight = self.model.rest[name]
        stored = self._store(HEAD) if name == HEAD else table
        if weight.scheme is None:
            # The runtime folds the Cast of a 16-bit matrix when a session opens; benchmarks/
            # onnx_head compares forms.
            matrix = graph.as_float(stored[0], weight.dtype)
            graph.node("/lm_head", "FusedMatMul", [hidden, matrix], [logits], transB=1)
            return
        if stored == table:
            graph.double(stored[0])
        graph.node(
            "/lm_head",
            "MatMulNBits",
            [hidden, *stored],
            [logits],
            K=weight.shape[1],
            N=weight.shape[0],
            bits=weight.scheme.bits,
            block_size=weight.scheme.group_size,
            accuracy_level=self.accuracy_level,
        )

    def _store(self, name: str) -> tuple[str, ...]:
        """Store a matrix outside of blocks; return the names of its initializers."""
        weight = self.model.rest[name]
        parts = [(Source(name, weight),)]
        if weight.scheme is None:
            return self.graph.store(make_plain_initializer(name, parts, weight.shape))
        batch = make_quantized_initializers(name, parts, weight.shape, blocked=True)
        return self.graph.store(batch)
