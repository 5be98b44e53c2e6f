"""MoE layers with tied experts or replacements, as ONNX nodes.

No tied expert gets matrices of its own. The fused operator has all experts that it can hold, with
weights of zero for rows that other nodes run; constants are one product of gates; every linear map,
every base with factors and the factors of every row are branches that are run only if a token chose
them, and with its tokens alone. For a single token linear maps are picked from a stack instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from onnx import TensorProto

from moe2edge.targets._onnx_columns import ColumnGroup, Columns
from moe2edge.targets._onnx_experts import MoEWriter
from moe2edge.targets._onnx_graph import add_gated_product, add_linear, add_linear_pair
from moe2edge.targets._onnx_storage import (
    Source,
    make_per_channel_initializers,
    make_plain_initializer,
)

# Types of the values of a branch: outputs for its tokens, and the places of these.
BRANCH_TYPES = (TensorProto.FLOAT, TensorProto.INT64)
# The two matrices of a linear map or of factors.
LOW = ("first", "second")


@dataclass(frozen=True)
class GraphRouting:
    """Decisions of the router.

    Attributes:
        rows: int64 [tokens * k], rows of the router that were chosen; the number of rows where one
            is skipped.
        weights: float32 [tokens * k], gate weights of their outputs.
        gates: float32 [tokens, columns], the same by `Columns`.
    """

    rows: str
    weights: str
    gates: str


@dataclass(frozen=True)
class Stack:
    """Matrices [count, out, in] of linear maps or factors, as they are stored.

    Attributes:
        value: in the source's dtype, or int8 if there are scales.
        scales: float32 [count, out]; empty: there are none.
    """

    value: str
    scales: str = ""


class MixedWriter(MoEWriter):
    """Adds a layer with tied experts or replacements to a graph."""

    @cached_property
    def columns(self) -> Columns:
        """Columns of the rows."""
        return Columns(self.layer)

    @cached_property
    def row_roles(self) -> tuple[str, ...]:
        """First part of the roles of each row's tensors."""
        return self.layer.row_roles

    @property
    def hidden(self) -> int:
        """Width of the hidden states."""
        return self.layer.router.weight.shape[1]

    def add(self, x: str) -> str:
        """Add the weighted sum of the outputs of the chosen rows, in the shape of ``x``."""
        graph, columns = self.graph, self.columns
        routing = self._add_routing(self._scores(x)[1])
        fused, constants = self._split_gates(routing.gates)
        small = []
        if columns.replaced:
            small.append(self._add_constants(constants))
        if columns.stacks or columns.groups:
            small.append(self._add_branches(x, routing))
        parts = []
        if columns.fused:
            top_k = min(self.layer.router.top_k, len(columns.fused))
            parts.append(self._operator(x, columns.fused, (fused, fused), top_k, normalize=False))
        if small:
            y = self._add_up("small", small)
            shape = graph.node(f"{self.at}/shape", "Shape", [x])
            parts.append(graph.node(f"{self.at}/small", "Reshape", [y, shape]))
        return self._add_up("all", parts)

    def _add_up(self, name: str, values: Sequence[str]) -> str:
        at = f"{self.at}/{name}"
        return values[0] if len(values) == 1 else self.graph.node(at, "Add", values)

    # ---- routing -------------------------------------------------------------------------------

    def _add_routing(self, logits: str) -> GraphRouting:
        """Add the decisions of transformers' router: softmax over all rows, then the largest."""
        at, graph, router = f"{self.at}/gates", self.graph, self.layer.router
        chances = graph.node(at, "Softmax", [logits], axis=-1)
        weights, ids = self._top(at, chances)
        flat = graph.constant([-1])
        if router.skip_below:
            weights, runs = self._kept(at, weights)
            behind = graph.constant(self.layer.router_rows)
            rows = graph.node(f"{at}/rows", "Where", [runs, ids, behind])
        else:
            rows = ids
        if router.renormalize:
            weights = graph.node(at, "Div", [weights, self._sum(at, weights)])
        return GraphRouting(
            rows=graph.node(f"{at}/rows", "Reshape", [rows, flat]),
            weights=graph.node(f"{at}/weights", "Reshape", [weights, flat]),
            gates=self._add_gates(ids, weights),
        )

    def _add_gates(self, ids: str, weights: str) -> str:
        """Add the weights [tokens, k] by column; those of rows with a common one are summed up."""
        at, graph, of_rows = f"{self.at}/gates", self.graph, self.columns.of_rows
        if of_rows != tuple(range(len(of_rows))):
            ids = graph.node(at, "Gather", [graph.constant(of_rows), ids], axis=0)
        count = graph.node(at, "Shape", [ids], end=1)
        width = graph.constant([max(of_rows) + 1])
        shape = graph.node(at, "Concat", [count, width], axis=0)
        nothing = graph.node(at, "ConstantOfShape", [shape])
        inputs = [nothing, ids, weights]
        return graph.node(at, "ScatterElements", inputs, axis=1, reduction="add")

    def _split_gates(self, gates: str) -> tuple[str, str]:
        """Split off the columns of the fused operator and of replacements; ``""`` if none."""
        columns = self.columns
        sizes = [len(columns.fused), len(columns.replaced), len(columns.groups)]
        found = [size for size in sizes if size]
        if len(found) == 1:
            return (gates, "") if sizes[0] else ("", gates)
        values = iter(self.graph.split(f"{self.at}/gates", gates, found))
        fused, constants, _ = (next(values) if size else "" for size in sizes)
        return fused, constants

    # ---- replacements and tied experts ---------------------------------------------------------

    def _add_constants(self, gates: str) -> str:
        """Add the constants of all replacements, times their gates: [tokens, hidden]."""
        at, graph = f"{self.at}/constants", self.graph
        rows = [self.roles[f"{self.row_roles[row]}.constant"] for row in self.columns.replaced]
        flat = graph.node(at, "Concat", [graph.vector(row) for row in rows], axis=0)
        matrix = graph.node(at, "Reshape", [flat, graph.constant([len(rows), self.hidden])])
        return graph.node(at, "MatMul", [gates, matrix])

    def _add_branches(self, x: str, routing: GraphRouting) -> str:
        """Add the outputs of linear maps and groups, times their weights: [tokens, hidden]."""
        at, graph, columns = f"{self.at}/answers", self.graph, self.columns
        tokens = graph.node(f"{at}/tokens", "Reshape", [x, graph.constant([-1, self.hidden])])
        asked = iter(self._find_asked(routing.gates))
        found = [self._add_stack(stack, next(asked), tokens, routing) for stack in columns.stacks]
        found += [self._add_group(group, next(asked), tokens, routing) for group in columns.groups]
        y, places = (
            self._join(f"{at}/{name}", values)
            for name, values in zip(("y", "places"), zip(*found, strict=True), strict=True)
        )
        last = graph.constant([-1])
        weights = graph.node(f"{at}/weights", "Gather", [routing.weights, places], axis=0)
        weights = graph.node(f"{at}/weights", "Unsqueeze", [weights, last])
        y = graph.node(at, "Mul", [y, weights])
        # Every place of a token has one output at most. With reduction="add" ScatterND loses some
        # outputs that go to one token, as threads write at once (onnxruntime 1.31).
        count = graph.node(f"{at}/all", "Shape", [routing.rows])
        hidden = graph.constant([self.hidden])
        shape = graph.node(f"{at}/all", "Concat", [count, hidden], axis=0)
        nothing = graph.node(f"{at}/all", "ConstantOfShape", [shape])
        places = graph.node(f"{at}/places", "Unsqueeze", [places, last])
        y = graph.node(at, "ScatterND", [nothing, places, y])
        by_token = graph.constant([-1, self.layer.router.top_k, self.hidden])
        y = graph.node(at, "Reshape", [y, by_token])
        return graph.node(at, "ReduceSum", [y, graph.constant([1])], keepdims=0)

    def _find_asked(self, gates: str) -> list[str]:
        """Add whether any token chose it: bools of the maps of each stack, and of each group."""
        at, graph, columns = f"{self.at}/asked", self.graph, self.columns
        sizes = [*map(len, columns.stacks), *[1] * len(columns.groups)]
        most = graph.node(at, "ReduceMax", [gates, graph.constant([0])], keepdims=0)
        asked = graph.node(at, "Greater", [most, graph.constant(0.0, np.float32)])
        if first := max(columns.of_rows) + 1 - sum(sizes):
            return graph.split(at, asked, [first, *sizes])[1:]
        return graph.split(at, asked, sizes) if len(sizes) > 1 else [asked]

    def _find_places(self, at: str, row: int, routing: GraphRouting) -> str:
        """Add the places where a row was chosen: int64 [n], among the tokens times k."""
        graph = self.graph
        same = graph.node(at, "Equal", [routing.rows, graph.constant(row)])
        places = graph.node(at, "NonZero", [same])
        return graph.node(f"{at}/places", "Reshape", [places, graph.constant([-1])])

    def _gather_inputs(self, at: str, tokens: str, places: str) -> str:
        """Add the inputs of the tokens at ``places``: [n, hidden]."""
        top_k = self.graph.constant(self.layer.router.top_k)
        token = self.graph.node(at, "Div", [places, top_k])
        return self.graph.node(f"{at}/x", "Gather", [tokens, token], axis=0)

    def _add_nothing(self, at: str) -> tuple[str, str]:
        """Add the values of a branch that no token chose."""
        graph = self.graph
        y = graph.constant(np.zeros((0, self.hidden)), np.float32)
        return (
            graph.node(f"{at}/no_y", "Identity", [y]),
            graph.node(f"{at}/no_places", "Identity", [graph.constant(np.zeros(0))]),
        )

    def _add_stack(
        self, stack: Sequence[int], asked: str, tokens: str, routing: GraphRouting
    ) -> list[str]:
        """Add the outputs of linear maps for their tokens, and the places of these.

        For one token alone the matrices that it needs are picked from all; for more, each map that
        was chosen is a branch. benchmarks/onnx_mixed: with 64 experts picking takes about three
        quarters of the time of branches, with 8 experts both take the same.
        """
        graph, at, roles = self.graph, self._name_stack(stack), self.row_roles
        stem = f"model.layers.{self.index}.moe.{roles[stack[0]]}"
        stored = [
            self._store(f"{stem}.{name}s", [self.roles[f"{roles[row]}.{name}"] for row in stack])
            for name in LOW
        ]
        if len(stack) == 1:
            return self._add_map(stack[0], 0, stored, asked, tokens, routing)

        def one_by_one() -> tuple[str, str]:
            ones = [f"{at}/Split/output_{n}" for n in range(len(stack))]
            graph.node(at, "Split", [asked], ones, axis=0, num_outputs=len(stack))
            found = [
                self._add_map(row, number, stored, one, tokens, routing)
                for number, (row, one) in enumerate(zip(stack, ones, strict=True))
            ]
            y, places = (
                graph.node(f"{at}/{name}", "Concat", values, axis=0)
                for name, values in zip(("y", "places"), zip(*found, strict=True), strict=True)
            )
            return y, places

        count = graph.node(at, "Shape", [tokens], end=1)
        alone = graph.node(at, "Equal", [count, graph.constant([1])])
        branches = (lambda: self._add_picked(stack, stored, tokens, routing)), one_by_one
        return graph.choice(at, alone, branches, BRANCH_TYPES)

    def _name_stack(self, stack: Sequence[int]) -> str:
        """Return the path of the nodes of a stack of linear maps."""
        return f"{self.at}/maps.{self.layer.row_numbers[stack[0]]}"

    def _store(self, stem: str, sources: Sequence[Source]) -> Stack:
        """Store matrices of one shape and form, one behind the other."""
        like, parts = sources[0].weight, [(source,) for source in sources]
        shape = (len(sources), *like.shape)
        batch = make_plain_initializer if like.scheme is None else make_per_channel_initializers
        return Stack(*self.graph.store(batch(stem, parts, shape)))

    def _pick(self, at: str, stack: Stack, which: str, *, one: bool) -> str:
        """Pick matrices of a stack at ``which``, in float32: ``one``, [out, in], or [n, out, in].

        ``which`` is a value that is known only in a run: from a constant the runtime would compute
        float32 matrices when it loads the graph, and keep them for each node that reads them.
        """
        graph = self.graph
        found = graph.node(at, "Gather", [stack.value, which], axis=0)
        if not stack.scales:
            return graph.node(at, "Cast", [found], to=TensorProto.FLOAT)
        scales = graph.node(f"{at}/scales", "Gather", [stack.scales, which], axis=0)
        if one:
            return graph.node(at, "DequantizeLinear", [found, scales], axis=0)
        found = graph.node(at, "Cast", [found], to=TensorProto.FLOAT)
        scales = graph.node(f"{at}/scales", "Unsqueeze", [scales, graph.constant([-1])])
        return graph.node(at, "Mul", [found, scales])

    def _add_number(self, at: str, asked: str, number: int) -> str:
        """Add ``number`` as a value that is known only in a run, where ``asked`` is true."""
        graph, at = self.graph, f"{at}/number"
        one = graph.node(at, "Cast", [asked], to=TensorProto.INT64)
        one = graph.node(at, "Squeeze", [one])
        return graph.node(at, "Mul", [one, graph.constant(number)])

    def _add_picked(
        self, stack: Sequence[int], stored: Sequence[Stack], tokens: str, routing: GraphRouting
    ) -> tuple[str, str]:
        """Add the outputs of the maps of a stack, each place with the matrices that it needs."""
        graph, at = self.graph, f"{self._name_stack(stack)}/picked"
        numbers = {row: number for number, row in enumerate(stack)}
        of_rows = graph.constant(
            [numbers.get(row, -1) for row in range(self.layer.router_rows + 1)]
        )
        maps = graph.node(f"{at}/maps", "Gather", [of_rows, routing.rows], axis=0)
        here = graph.node(at, "GreaterOrEqual", [maps, graph.constant(0)])
        places = graph.node(at, "NonZero", [here])
        places = graph.node(f"{at}/places", "Reshape", [places, graph.constant([-1])])
        maps = graph.node(f"{at}/own", "Gather", [maps, places], axis=0)
        x = self._gather_inputs(at, tokens, places)
        y = graph.node(at, "Unsqueeze", [x, graph.constant([1])])
        y = self._multiply_low_rank(at, stored, maps, y, one=False)
        return graph.node(at, "Squeeze", [y, graph.constant([1])]), places

    def _add_map(
        self,
        row: int,
        number: int,
        stored: Sequence[Stack],
        asked: str,
        tokens: str,
        routing: GraphRouting,
    ) -> list[str]:
        """Add the output of the linear map at ``number`` for its tokens, and their places."""
        at = f"{self.at}/{self.row_roles[row]}"

        def run() -> tuple[str, str]:
            places = self._find_places(at, row, routing)
            x = self._gather_inputs(at, tokens, places)
            return self._multiply_low_rank(
                at, stored, self._add_number(at, asked, number), x
            ), places

        return self.graph.choice(at, asked, (run, lambda: self._add_nothing(at)), BRANCH_TYPES)

    def _multiply_low_rank(
        self, at: str, stored: Sequence[Stack], which: str, x: str, *, one: bool = True
    ) -> str:
        """Multiply ``x`` [..., n, in] with first and second at ``which``: [..., n, out]."""
        for name, stack in zip(LOW, stored, strict=True):
            matrices = self._pick(f"{at}/{name}", stack, which, one=one)
            x = self.graph.node(f"{at}/{name}", "FusedMatMul", [x, matrices], transB=1)
        return x

    def _add_group(
        self, group: ColumnGroup, asked: str, tokens: str, routing: GraphRouting
    ) -> list[str]:
        """Add the outputs of the rows of a group for their tokens, and the places of these."""
        what = f"factors.{group.rows[0]}" if group.base is None else f"experts.{group.base}"
        at = f"{self.at}/{what}"

        def run() -> tuple[str, str]:
            first = self._add_number(at, asked, 0)
            found = [self._find_places(f"{at}/{row}", row, routing) for row in group.rows]
            places = self._join(f"{at}/places", found)
            counts = [
                self.graph.node(f"{at}/{row}", "Shape", [own])
                for row, own in zip(group.rows, found, strict=True)
            ]
            return self._add_mlp(
                at, group, first, self._gather_inputs(at, tokens, places), counts
            ), places

        return self.graph.choice(at, asked, (run, lambda: self._add_nothing(at)), BRANCH_TYPES)

    def _join(self, at: str, values: Sequence[str]) -> str:
        return values[0] if len(values) == 1 else self.graph.node(at, "Concat", values, axis=0)

    def _add_mlp(
        self, at: str, group: ColumnGroup, first: str, x: str, counts: Sequence[str]
    ) -> str:
        """Add the MLPs of a group's rows: [n, hidden].

        Args:
            at: path of the nodes.
            group: the rows.
            first: zero, see `_add_number`.
            x: inputs, those of one row behind those of another, [n, hidden].
            counts: number of inputs of each row, int64 [1].
        """
        graph, level, base = self.graph, self.accuracy_level, f"experts.{group.base}"
        both, y = ["", ""], ""
        own = self._split_by_row(f"{at}/x", group, x, counts)
        if group.base is not None:
            pair = [self.roles[f"{base}.gate"], self.roles[f"{base}.up"]]
            name = f"model.layers.{self.index}.moe.{base}.gate_up_proj.weight"
            both = add_linear_pair(graph, at, x, name, pair, level)
        gate, up = (
            self._add_factors(f"{at}/{part}", part, first, value, own)
            for part, value in zip(("gate", "up"), both, strict=True)
        )
        inside = add_gated_product(graph, at, gate, up)
        own = self._split_by_row(f"{at}/inside", group, inside, counts)
        if group.base is not None:
            down = self.roles[f"{base}.down"]
            y = add_linear(graph, f"{at}/down_proj", inside, down.name, [down], (), level)
        return self._add_factors(f"{at}/down", "down", first, y, own)

    def _split_by_row(
        self, at: str, group: ColumnGroup, x: str, counts: Sequence[str]
    ) -> dict[int, str]:
        """Split ``x`` by the rows of a group; nothing if none has factors."""
        if not any(map(self.columns.has_factors, group.rows)):
            return {}
        outputs = [f"{at}/Split/output_{n}" for n in range(len(counts))]
        if len(counts) > 1:
            sizes = self.graph.node(f"{at}/sizes", "Concat", counts, axis=0)
            self.graph.node(at, "Split", [x, sizes], outputs, axis=0)
        return dict(zip(group.rows, outputs if len(counts) > 1 else [x], strict=True))

    def _add_factors(
        self, at: str, part: str, first: str, y: str, inputs: Mapping[int, str]
    ) -> str:
        """Add the products of factors to ``y`` [n, out], the output of bases, which may be missing.

        Args:
            at: path of the nodes.
            part: gate, up or down.
            first: zero, see `_add_number`.
            y: output of bases; empty: there is none.
            inputs: inputs of the factors by row.
        """
        low = [
            self._multiply_factors(f"{at}/{row}", row, part, first, x) for row, x in inputs.items()
        ]
        if not low:
            return y
        added = self._join(f"{at}/low", low)
        return self.graph.node(at, "Add", [y, added]) if y else added

    def _multiply_factors(self, at: str, row: int, part: str, first: str, x: str) -> str:
        """Multiply ``x`` [n, in] with the factors of a row: [n, out]; zeros if it has none."""
        graph, bases = self.graph, self.layer.bases
        base = bases[row]
        if not self.columns.has_factors(row):
            out = getattr(self.layer.experts[base or 0], part).shape[0]
            count = graph.node(at, "Shape", [x], end=1)
            shape = graph.node(at, "Concat", [count, graph.constant([out])], axis=0)
            return graph.node(at, "ConstantOfShape", [shape])
        sources = [self.roles[f"{self.row_roles[row]}.{part}.{name}"] for name in LOW]
        stored = [self._store(s.name, [s]) for s in sources]
        if base is None or bases.count(base) == 1:
            return self._multiply_low_rank(at, stored, first, x)
        # Most rows of a group that was chosen were not chosen themselves.
        count = graph.node(at, "Shape", [x], end=1)
        any_ = graph.node(at, "Greater", [count, graph.constant([0])])
        nothing = graph.constant(np.zeros((0, sources[1].weight.shape[0])), np.float32)
        branches = (
            lambda: [self._multiply_low_rank(at, stored, first, x)],
            lambda: [graph.node(f"{at}/no", "Identity", [nothing])],
        )
        return graph.choice(at, any_, branches, (TensorProto.FLOAT,))[0]
