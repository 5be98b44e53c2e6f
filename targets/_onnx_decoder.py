"""The decoder as an ONNX graph: inputs, embedding, the chain of blocks, head.

Operators and their layouts are those of ONNX Runtime's CPU provider
(https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md). Inputs and outputs
have the names that onnxruntime-genai expects.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Collection, Iterator

import torch
from onnx import TensorProto
from torch import Tensor

from moe2edge.model.family import Config, Family, Geometry
from moe2edge.model.model import FINAL_NORM, Model
from moe2edge.targets._onnx_block import BlockInputs, BlockWriter, ResidualStream, add_norm
from moe2edge.targets._onnx_ends import EndsWriter
from moe2edge.targets._onnx_graph import Graph
from moe2edge.targets._onnx_storage import (
    ROTARY_TABLES,
    Batch,
    Slot,
    Source,
)


def build_decoder(
    model: Model,
    accuracy_level: int,
    *,
    int8_cache: bool = False,
    omitted: Collection[tuple[str, str]] = (),
) -> Graph:
    """Build the whole graph; no weight is loaded until the weights are written.

    Args:
        model: shapes, and handles on the weights.
        accuracy_level: attribute of all quantized operators: 0 for float32 activations, 4 for int8.
        int8_cache: whether keys and values are cached in int8, with scales that are still to be
            set; otherwise in float32.
        omitted: operators and attributes that they go without.
    """
    graph = Graph(omitted)
    geometry = model.family.geometry(model.config)
    cached = TensorProto.INT8 if int8_cache else TensorProto.FLOAT
    inputs = _inputs(graph, model, geometry, cached)
    ends = EndsWriter(graph, model, accuracy_level)
    rows, table = ends.add_embedding("input_ids")
    stream = ResidualStream(rows)
    for block in model.blocks:
        stream = BlockWriter(graph, model, block, geometry, inputs, accuracy_level, int8_cache).add(
            stream
        )
    last = Source(FINAL_NORM, model.rest[FINAL_NORM])
    hidden, _ = add_norm(graph, "/model/norm", stream, last, geometry.eps)
    logits = graph.output("logits", ["batch_size", "sequence_length", geometry.vocab])
    ends.add_head(hidden, table, logits)
    for index in range(len(model.blocks)):
        for part in ("key", "value"):
            graph.output(f"present.{index}.{part}", _cache(geometry, "total_length"), cached)
    return graph


def _inputs(graph: Graph, model: Model, geometry: Geometry, cached: int) -> BlockInputs:
    """Declare the inputs, and add the rotary tables and lengths, which the attention mask gives."""
    graph.input("input_ids", TensorProto.INT64, ["batch_size", "sequence_length"])
    mask = graph.input("attention_mask", TensorProto.INT64, ["batch_size", "total_length"])
    for index in range(len(model.blocks)):
        for part in ("key", "value"):
            name = f"past_key_values.{index}.{part}"
            graph.input(name, cached, _cache(geometry, "past_length"))
    last, total = "/model/last_position", "/model/total_length"
    count = graph.node(last, "ReduceSum", [mask, graph.constant([1])], keepdims=0)
    position = graph.node(last, "Sub", [count, graph.constant(1)])
    sizes = graph.node(total, "Shape", [mask])
    length = graph.node(total, "Gather", [sizes, graph.constant(1)], axis=0)
    shape = (geometry.max_positions, geometry.head_dim // 2)
    slots = tuple(Slot(name, "F32", shape) for name in ROTARY_TABLES)

    def make() -> Iterator[tuple[Slot, Tensor]]:
        tables = compute_rotary_tables(model.family, model.config, geometry.max_positions)
        yield from zip(slots, tables, strict=True)

    cos, sin = graph.store(Batch(slots, make))
    return BlockInputs(
        last_position=graph.node(last, "Cast", [position], to=TensorProto.INT32),
        total_length=graph.node(total, "Cast", [length], to=TensorProto.INT32),
        cos=cos,
        sin=sin,
    )


def _cache(geometry: Geometry, length: str) -> list[int | str]:
    """Return the shape of the cached keys or values of one block."""
    return ["batch_size", geometry.kv_heads, length, geometry.head_dim]


def compute_rotary_tables(family: Family, config: Config, positions: int) -> tuple[Tensor, Tensor]:
    """Compute cosines and sines float32 [positions, head_dim / 2] by transformers' own module.

    They include the attention scaling of rotary embeddings such as yarn.
    """
    import transformers

    name = family.architecture
    architecture = getattr(transformers, name)
    settings = architecture.config_class.from_dict(copy.deepcopy(dict(config)))
    source = importlib.import_module(architecture.__module__)
    rotary = getattr(source, name.removesuffix("ForCausalLM") + "RotaryEmbedding")(settings)
    tables = rotary(torch.empty(0), torch.arange(positions)[None])
    cos, sin = (table[0, :, : table.shape[-1] // 2].contiguous() for table in tables)
    return cos, sin
