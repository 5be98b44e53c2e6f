"""A graph under construction: nodes, small constants, stored weights, inputs and outputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from moe2edge.targets._onnx_storage import (
    Batch,
    DataPart,
    Source,
    make_plain_initializer,
    make_quantized_initializers,
)

OPSET, IR_VERSION = 23, 11
MICROSOFT = frozenset(
    {
        "FusedMatMul", "GatherBlockQuantized", "GroupQueryAttention", "MatMulNBits", "MoE", "QMoE",
        "SkipSimplifiedLayerNormalization",
    }
)  # fmt: skip

Branch = Callable[[], Sequence[str]]


class Graph:
    """Builds a graph node by node; values are referred to by name.

    Attributes:
        batches: the weights, in the order in which they will be written.
    """

    def __init__(self, omitted: Collection[tuple[str, str]] = ()) -> None:
        """Begin a graph; ``omitted`` are operators and attributes that they go without."""
        self._omitted = omitted
        self.batches: list[Batch] = []
        self._nodes: list[Any] = []
        # Nodes outside of branches; `_nodes` are those of the branch under construction.
        self._outermost = self._nodes
        self._constants: dict[str, Any] = {}
        self._inputs: list[Any] = []
        self._outputs: list[Any] = []
        self._floats: dict[str, str] = {}
        self._doubled: list[str] = []

    def input(self, name: str, dtype: int, shape: Sequence[int | str]) -> str:
        """Declare an input of the graph and return its name."""
        self._inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def output(self, name: str, shape: Sequence[int | str], dtype: int = TensorProto.FLOAT) -> str:
        """Declare an output of the graph and return its name."""
        self._outputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def node(
        self,
        at: str,
        op: str,
        inputs: Sequence[str],
        outputs: Sequence[str] = (),
        **attributes: Any,
    ) -> str:
        """Append the operator ``op`` as node ``at/op``; return the name of its first output.

        Without ``outputs`` it has one output, ``at/op/output_0``.
        """
        outputs = list(outputs) or [f"{at}/{op}/output_0"]
        attributes = {k: v for k, v in attributes.items() if (op, k) not in self._omitted}
        self._nodes.append(_node(f"{at}/{op}", op, inputs, outputs, attributes))
        return outputs[0]

    def choice(
        self, at: str, condition: str, branches: Sequence[Branch], dtypes: Sequence[int]
    ) -> list[str]:
        """Add two branches, of which one runs, as node ``at/If``; return its outputs.

        Args:
            at: path of the node.
            condition: a value that holds one bool.
            branches: the branch for true and that for false; each adds nodes and returns the names
                of its outputs.
            dtypes: dtypes of the outputs, the same for both branches.
        """
        graphs, nodes = {}, self._nodes
        for name, branch in zip(("then_branch", "else_branch"), branches, strict=True):
            self._nodes = []
            results = [
                helper.make_tensor_value_info(value, dtype, None)
                for value, dtype in zip(branch(), dtypes, strict=True)
            ]
            graphs[name] = helper.make_graph(self._nodes, f"{at}/{name}", [], results)
            self._nodes = nodes
        outputs = [f"{at}/If/output_{n}" for n in range(len(dtypes))]
        self.node(at, "If", [condition], outputs, **graphs)
        return outputs

    def split(self, at: str, x: str, sizes: Sequence[int]) -> list[str]:
        """Split ``x`` along its columns into parts of the given sizes."""
        outputs = [f"{at}/Split/output_{n}" for n in range(len(sizes))]
        self.node(at, "Split", [x, self.constant(sizes)], outputs, axis=-1)
        return outputs

    def constant(self, value: object, dtype: type[np.generic] = np.int64) -> str:
        """Add a small constant to the graph file; equal ones are stored once."""
        array = np.asarray(value, dtype)
        text = "_".join(map(str, array.reshape(-1).tolist()))
        name = f"/constants/{array.dtype}{list(array.shape)}/{text}"
        self._constants[name] = numpy_helper.from_array(array, name)
        return name

    def parameter(self, name: str, value: np.ndarray[Any, Any]) -> str:
        """Add a small tensor to the graph file, whatever its size, under a name of its own."""
        self._constants[name] = numpy_helper.from_array(value, name)
        return name

    def store(self, batch: Batch) -> tuple[str, ...]:
        """Add weights; return the names of their initializers."""
        self.batches.append(batch)
        return tuple(slot.name for slot in batch.slots)

    def stored(self, name: str, parts: Sequence[DataPart], shape: tuple[int, ...]) -> str:
        """Store unquantized ``parts`` in the source's dtype; return the value as float32."""
        (raw,) = self.store(make_plain_initializer(name, parts, shape))
        return self.as_float(raw, parts[0][0].weight.dtype)

    def as_float(self, name: str, dtype: str) -> str:
        """Return the float32 value of an initializer; ``dtype`` is spelled as in safetensors."""
        if dtype == "F32":
            return name
        if name not in self._floats:
            at = f"/weights/{name}/Cast"
            self._floats[name] = f"{at}/output_0"
            attributes = {"to": TensorProto.FLOAT}
            # Outside of branches, so that every branch can use it.
            self._outermost.append(_node(at, "Cast", [name], [f"{at}/output_0"], attributes))
        return self._floats[name]

    def double(self, name: str) -> None:
        """Note that one of several operators packs a weight anew, so that memory has it twice."""
        self._doubled.append(name)

    @property
    def widened_nbytes(self) -> int:
        """Bytes that stored weights take in memory beyond their file.

        They become float32, or are packed for one operator while another reads them as they are.
        """
        slots = [slot for batch in self.batches for slot in batch.slots]
        wider = (4 * math.prod(s.shape) - s.nbytes for s in slots if s.name in self._floats)
        return sum(wider) + sum(slot.nbytes for slot in slots if slot.name in self._doubled)

    def vector(self, source: Source) -> str:
        """Store a vector (norm, bias); return the value as float32."""
        return self.stored(source.name, [(source,)], source.weight.shape)

    def proto(self, stored: Sequence[Any], metadata: dict[str, str]) -> Any:
        """Build the finished ``ModelProto``; ``stored`` are the initializers of all weights."""
        graph = helper.make_graph(
            self._nodes,
            "decoder",
            self._inputs,
            self._outputs,
            [*self._constants.values(), *stored],
        )
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(
            graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="moe2edge"
        )
        helper.set_model_props(model, metadata)
        return model


def _node(
    name: str, op: str, inputs: Sequence[str], outputs: Sequence[str], attributes: dict[str, Any]
) -> Any:
    domain = "com.microsoft" if op in MICROSOFT else ""
    node = helper.make_node(op, list(inputs), list(outputs), name, domain=domain)
    node.attribute.extend(helper.make_attribute(k, v) for k, v in attributes.items())
    return node


def add_linear(
    graph: Graph,
    at: str,
    x: str,
    name: str,
    weights: Sequence[Source],
    biases: Sequence[Source],
    accuracy_level: int,
) -> str:
    """Add products of ``x`` [batch, length, in] with one or more matrices [out, in], concatenated.

    Args:
        graph: graph to add to.
        at: path of the nodes.
        x: the input.
        name: name of the initializer that holds the matrices.
        weights: matrices of one scheme; or unquantized ones of one dtype.
        biases: one per matrix, or none.
        accuracy_level: attribute of ``MatMulNBits``.
    """
    parts: list[DataPart] = [(w,) for w in weights]
    outs, ins = sum(w.weight.shape[0] for w in weights), weights[0].weight.shape[1]
    bias = ""
    if biases:
        bias = graph.stored(f"{name.removesuffix('.weight')}.bias", [(b,) for b in biases], (outs,))
    scheme = weights[0].weight.scheme
    if scheme is None:
        matrix = graph.stored(name, parts, (outs, ins))
        y = graph.node(at, "FusedMatMul", [x, matrix], transB=1)
        return graph.node(at, "Add", [y, bias]) if bias else y
    stored = graph.store(make_quantized_initializers(name, parts, (outs, ins), blocked=True))
    # After the scales come zero points, a column order (g_idx) that is not used, and the bias.
    gap = ["", ""] if scheme.symmetric else [""]
    return graph.node(
        at,
        "MatMulNBits",
        [x, *stored, *([*gap, bias] if bias else [])],
        K=ins,
        N=outs,
        bits=scheme.bits,
        block_size=scheme.group_size,
        accuracy_level=accuracy_level,
    )


def are_alike(sources: Sequence[Source]) -> bool:
    """Test if weights can be stored in one initializer."""
    return len({s.weight.scheme or s.weight.dtype for s in sources}) <= 1


def add_linear_pair(
    graph: Graph, at: str, x: str, name: str, weights: Sequence[Source], accuracy_level: int
) -> list[str]:
    """Add products of ``x`` with the matrices gate and up, which share an initializer if they can.

    Args:
        graph: graph to add to.
        at: path of the MLP's nodes.
        x: the input.
        name: name of the initializer that holds both.
        weights: the two matrices.
        accuracy_level: attribute of ``MatMulNBits``.
    """
    if are_alike(weights):
        both = add_linear(graph, f"{at}/gate_up_proj", x, name, weights, (), accuracy_level)
        return graph.split(f"{at}/gate_up_proj", both, [w.weight.shape[0] for w in weights])
    return [
        add_linear(graph, f"{at}/{part}_proj", x, weight.name, [weight], (), accuracy_level)
        for part, weight in zip(("gate", "up"), weights, strict=True)
    ]


def add_gated_product(graph: Graph, at: str, gate: str, up: str) -> str:
    """Add ``silu(gate) * up``."""
    slope = graph.node(f"{at}/silu", "Sigmoid", [gate])
    gate = graph.node(f"{at}/silu", "Mul", [gate, slope])
    return graph.node(at, "Mul", [gate, up])
