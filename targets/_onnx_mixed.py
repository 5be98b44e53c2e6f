"""MoE layers with tied experts or replacements, as ONNX nodes.

No expert is made whole. What the fused operator can hold it gets, with zeros for what answers
elsewhere; constants are one product of gates; every linear map, every base with factors and
the factors of every row are branches that are run only if a token chose them, and with its tokens
alone. For a single token linear maps are picked from a stack instead.
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

ANSWER = (TensorProto.FLOAT, TensorProto.INT64)
# Of a linear map or a factor, its two matrices.
LOW = ("first", "second")


@dataclass(frozen=True)
class GraphRouting:
    """What the router decided.

    Attributes:
        rows: int64 [tokens * k], rows of the router that were chosen; for what is skipped, their
            number.
        weights: float32 [tokens * k], what their answers are multiplied with.
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
    """Adds such a layer."""

    @cached_property
    def columns(self) -> Columns:
        """Which row is what."""
        return Columns(self.layer)

    @property
    def row_roles(self) -> tuple[str, ...]:
        """First part of the roles of each row's tensors."""
        return self.layer.row_roles

    @property
    def hidden(self) -> int:
        """Width of the stream."""
        return self.layer.router.weight.shape[1]

    def add(self, x: str) -> str:
        """The weighted sum of what the chosen rows put out, in the shape of ``x``."""
        graph, columns = self.graph, self.columns
        routing = self._routing(self._scores(x)[1])
        fused, constants = self._split_gates(routing.gates)
        small = []
        if columns.replaced:
            small.append(self._constants(constants))
        if columns.stacks or columns.groups:
            small.append(self._answers(x, routing))
        parts = []
        if columns.fused:
            top_k = min(self.layer.router.top_k, len(columns.fused))
            parts.append(self._operator(x, columns.fused, (fused, fused), top_k, normalize=False))
        if small:
            y = self._added("small", small)
            shape = graph.node(f"{self.at}/shape", "Shape", [x])
            parts.append(graph.node(f"{self.at}/small", "Reshape", [y, shape]))
        return self._added("all", parts)

    def _added(self, name: str, values: Sequence[str]) -> str:
        at = f"{self.at}/{name}"
        return values[0] if len(values) == 1 else self.graph.node(at, "Add", values)

    # ---- routing -------------------------------------------------------------------------------

    def _routing(self, logits: str) -> GraphRouting:
        """As the router of transformers decides: softmax over all rows, then the largest."""
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
            gates=self._gates(ids, weights),
        )

    def _gates(self, ids: str, weights: str) -> str:
        """Weights [tokens, k] by column; rows that have one in common are summed up."""
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
        """Split columns of the fused operator and of replacements; no names where there are none."""
        columns = self.columns
        sizes = [len(columns.fused), len(columns.replaced), len(columns.groups)]
        found = [size for size in sizes if size]
        if len(found) == 1:
            return (gates, "") if sizes[0] else ("", gates)
        values = iter(self.graph.split(f"{self.at}/gates", gates, found))
        fused, constants, _ = (next(values) if size else "" for size in sizes)
        return fused, constants

    # ---- replacements and tied experts ---------------------------------------------------------

    def _constants(self, gates: str) -> str:
        """Add the constants of all replacements, times their gates: [tokens, hidden]."""
        at, graph = f"{self.at}/constants", self.graph
        rows = [self.roles[f"{self.row_roles[row]}.constant"] for row in self.columns.replaced]
        flat = graph.node(at, "Concat", [graph.vector(row) for row in rows], axis=0)
        matrix = graph.node(at, "Reshape", [flat, graph.constant([len(rows), self.hidden])])
        return graph.node(at, "MatMul", [gates, matrix])

    def _answers(self, x: str, routing: GraphRouting) -> str:
        """What linear maps and groups put out, times its weights: [tokens, hidden]."""
        at, graph, columns = f"{self.at}/answers", self.graph, self.columns
        tokens = graph.node(f"{at}/tokens", "Reshape", [x, graph.constant([-1, self.hidden])])
        asked = iter(self._asked(routing.gates))
        found = [self._maps(stack, next(asked), tokens, routing) for stack in columns.stacks]
        found += [self._group(group, next(asked), tokens, routing) for group in columns.groups]
        y, places = (
            self._joined(f"{at}/{name}", values)
            for name, values in zip(("y", "places"), zip(*found, strict=True), strict=True)
        )
        last = graph.constant([-1])
        weights = graph.node(f"{at}/weights", "Gather", [routing.weights, places], axis=0)
        weights = graph.node(f"{at}/weights", "Unsqueeze", [weights, last])
        y = graph.node(at, "Mul", [y, weights])
        # Every place of a token has one answer at most. With reduction="add" ScatterND loses some
        # of those that go to one token, as threads write at once (onnxruntime 1.31).
        count = graph.node(f"{at}/all", "Shape", [routing.rows])
        hidden = graph.constant([self.hidden])
        shape = graph.node(f"{at}/all", "Concat", [count, hidden], axis=0)
        nothing = graph.node(f"{at}/all", "ConstantOfShape", [shape])
        places = graph.node(f"{at}/places", "Unsqueeze", [places, last])
        y = graph.node(at, "ScatterND", [nothing, places, y])
        by_token = graph.constant([-1, self.layer.router.top_k, self.hidden])
        y = graph.node(at, "Reshape", [y, by_token])
        return graph.node(at, "ReduceSum", [y, graph.constant([1])], keepdims=0)

    def _asked(self, gates: str) -> list[str]:
        """Whether any token chose it: bools, of each map of a stack, for each stack; of groups."""
        at, graph, columns = f"{self.at}/asked", self.graph, self.columns
        sizes = [*map(len, columns.stacks), *[1] * len(columns.groups)]
        most = graph.node(at, "ReduceMax", [gates, graph.constant([0])], keepdims=0)
        asked = graph.node(at, "Greater", [most, graph.constant(0.0, np.float32)])
        if first := max(columns.of_rows) + 1 - sum(sizes):
            return graph.split(at, asked, [first, *sizes])[1:]
        return graph.split(at, asked, sizes) if len(sizes) > 1 else [asked]

    def _places(self, at: str, row: int, routing: GraphRouting) -> str:
        """Where a row was chosen: int64 [n], among the tokens times k."""
        graph = self.graph
        same = graph.node(at, "Equal", [routing.rows, graph.constant(row)])
        places = graph.node(at, "NonZero", [same])
        return graph.node(f"{at}/places", "Reshape", [places, graph.constant([-1])])

    def _inputs(self, at: str, tokens: str, places: str) -> str:
        """Inputs of the tokens at ``places``: [n, hidden]."""
        top_k = self.graph.constant(self.layer.router.top_k)
        token = self.graph.node(at, "Div", [places, top_k])
        return self.graph.node(f"{at}/x", "Gather", [tokens, token], axis=0)

    def _nothing(self, at: str) -> tuple[str, str]:
        """The answer of what was not asked."""
        graph = self.graph
        y = graph.constant(np.zeros((0, self.hidden)), np.float32)
        return (
            graph.node(f"{at}/no_y", "Identity", [y]),
            graph.node(f"{at}/no_places", "Identity", [graph.constant(np.zeros(0))]),
        )

    def _maps(
        self, stack: Sequence[int], asked: str, tokens: str, routing: GraphRouting
    ) -> list[str]:
        """What linear maps make of their tokens, and the places of these.

        For one token alone the matrices that it needs are picked from all; for more, each map that
        was asked is a branch. benchmarks/onnx_mixed: with 64 experts picking takes about three
        quarters of the time of branches, with 8 experts it is all one.
        """
        graph, at, roles = self.graph, self._stack_path(stack), self.row_roles
        stem = f"model.layers.{self.index}.moe.{roles[stack[0]]}"
        stored = [
            self._stored(f"{stem}.{name}s", [self.roles[f"{roles[row]}.{name}"] for row in stack])
            for name in LOW
        ]
        if len(stack) == 1:
            return self._map(stack[0], 0, stored, asked, tokens, routing)

        def one_by_one() -> tuple[str, str]:
            ones = [f"{at}/Split/output_{n}" for n in range(len(stack))]
            graph.node(at, "Split", [asked], ones, axis=0, num_outputs=len(stack))
            found = [
                self._map(row, number, stored, one, tokens, routing)
                for number, (row, one) in enumerate(zip(stack, ones, strict=True))
            ]
            y, places = (
                graph.node(f"{at}/{name}", "Concat", values, axis=0)
                for name, values in zip(("y", "places"), zip(*found, strict=True), strict=True)
            )
            return y, places

        count = graph.node(at, "Shape", [tokens], end=1)
        alone = graph.node(at, "Equal", [count, graph.constant([1])])
        branches = (lambda: self._picked(stack, stored, tokens, routing)), one_by_one
        return graph.choice(at, alone, branches, ANSWER)

    def _stack_path(self, stack: Sequence[int]) -> str:
        """Return the path of the nodes of a stack of linear maps."""
        return f"{self.at}/maps.{self.layer.row_numbers[stack[0]]}"

    def _stored(self, stem: str, sources: Sequence[Source]) -> Stack:
        """Matrices of one shape and form, one behind the other."""
        like, parts = sources[0].weight, [(source,) for source in sources]
        shape = (len(sources), *like.shape)
        batch = make_plain_initializer if like.scheme is None else make_per_channel_initializers
        return Stack(*self.graph.store(batch(stem, parts, shape)))

    def _some(self, at: str, stack: Stack, which: str, *, one: bool) -> str:
        """Those of a stack at ``which``, in float32: ``one``, [out, in], or [n, out, in].

        ``which`` is a value that only a run knows: of a constant one the runtime would make
        float32 when it loads the graph, and keep that for each node that looks at it.
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

    def _number(self, at: str, asked: str, number: int) -> str:
        """``number`` as a value that only a run knows, where ``asked`` is true."""
        graph, at = self.graph, f"{at}/number"
        one = graph.node(at, "Cast", [asked], to=TensorProto.INT64)
        one = graph.node(at, "Squeeze", [one])
        return graph.node(at, "Mul", [one, graph.constant(number)])

    def _picked(
        self, stack: Sequence[int], stored: Sequence[Stack], tokens: str, routing: GraphRouting
    ) -> tuple[str, str]:
        """What the maps of a stack make, each place with matrices of its own."""
        graph, at = self.graph, f"{self._stack_path(stack)}/picked"
        numbers = {row: number for number, row in enumerate(stack)}
        of_rows = graph.constant(
            [numbers.get(row, -1) for row in range(self.layer.router_rows + 1)]
        )
        maps = graph.node(f"{at}/maps", "Gather", [of_rows, routing.rows], axis=0)
        here = graph.node(at, "GreaterOrEqual", [maps, graph.constant(0)])
        places = graph.node(at, "NonZero", [here])
        places = graph.node(f"{at}/places", "Reshape", [places, graph.constant([-1])])
        maps = graph.node(f"{at}/own", "Gather", [maps, places], axis=0)
        x = self._inputs(at, tokens, places)
        y = graph.node(at, "Unsqueeze", [x, graph.constant([1])])
        y = self._low(at, stored, maps, y, one=False)
        return graph.node(at, "Squeeze", [y, graph.constant([1])]), places

    def _map(
        self,
        row: int,
        number: int,
        stored: Sequence[Stack],
        asked: str,
        tokens: str,
        routing: GraphRouting,
    ) -> list[str]:
        """What the linear map at ``number`` makes of its tokens, and their places."""
        at = f"{self.at}/{self.row_roles[row]}"

        def answer() -> tuple[str, str]:
            places = self._places(at, row, routing)
            x = self._inputs(at, tokens, places)
            return self._low(at, stored, self._number(at, asked, number), x), places

        return self.graph.choice(at, asked, (answer, lambda: self._nothing(at)), ANSWER)

    def _low(
        self, at: str, stored: Sequence[Stack], which: str, x: str, *, one: bool = True
    ) -> str:
        """``x`` [..., n, in] times those of first and second at ``which``: [..., n, out]."""
        for name, stack in zip(LOW, stored, strict=True):
            matrices = self._some(f"{at}/{name}", stack, which, one=one)
            x = self.graph.node(f"{at}/{name}", "FusedMatMul", [x, matrices], transB=1)
        return x

    def _group(
        self, group: ColumnGroup, asked: str, tokens: str, routing: GraphRouting
    ) -> list[str]:
        """What the rows of a group make of their tokens, and their places."""
        what = f"factors.{group.rows[0]}" if group.base is None else f"experts.{group.base}"
        at = f"{self.at}/{what}"

        def answer() -> tuple[str, str]:
            first = self._number(at, asked, 0)
            found = [self._places(f"{at}/{row}", row, routing) for row in group.rows]
            places = self._joined(f"{at}/places", found)
            counts = [
                self.graph.node(f"{at}/{row}", "Shape", [own])
                for row, own in zip(group.rows, found, strict=True)
            ]
            return self._mlp(at, group, first, self._inputs(at, tokens, places), counts), places

        return self.graph.choice(at, asked, (answer, lambda: self._nothing(at)), ANSWER)

    def _joined(self, at: str, values: Sequence[str]) -> str:
        return values[0] if len(values) == 1 else self.graph.node(at, "Concat", values, axis=0)

    def _mlp(self, at: str, group: ColumnGroup, first: str, x: str, counts: Sequence[str]) -> str:
        """The MLPs of a group's rows: [n, hidden].

        Args:
            at: path of the nodes.
            group: the rows.
            first: zero, see `_number`.
            x: inputs, those of one row behind those of another, [n, hidden].
            counts: of each row how many there are, int64 [1].
        """
        graph, level, base = self.graph, self.accuracy_level, f"experts.{group.base}"
        both, y = ["", ""], ""
        own = self._by_row(f"{at}/x", group, x, counts)
        if group.base is not None:
            pair = [self.roles[f"{base}.gate"], self.roles[f"{base}.up"]]
            name = f"model.layers.{self.index}.moe.{base}.gate_up_proj.weight"
            both = add_linear_pair(graph, at, x, name, pair, level)
        gate, up = (
            self._with_factors(f"{at}/{part}", part, first, value, own)
            for part, value in zip(("gate", "up"), both, strict=True)
        )
        inside = add_gated_product(graph, at, gate, up)
        own = self._by_row(f"{at}/inside", group, inside, counts)
        if group.base is not None:
            down = self.roles[f"{base}.down"]
            y = add_linear(graph, f"{at}/down_proj", inside, down.name, [down], (), level)
        return self._with_factors(f"{at}/down", "down", first, y, own)

    def _by_row(self, at: str, group: ColumnGroup, x: str, counts: Sequence[str]) -> dict[int, str]:
        """The part of ``x`` of each row of a group; nothing if none has factors."""
        if not any(map(self.columns.has_factors, group.rows)):
            return {}
        outputs = [f"{at}/Split/output_{n}" for n in range(len(counts))]
        if len(counts) > 1:
            sizes = self.graph.node(f"{at}/sizes", "Concat", counts, axis=0)
            self.graph.node(at, "Split", [x, sizes], outputs, axis=0)
        return dict(zip(group.rows, outputs if len(counts) > 1 else [x], strict=True))

    def _with_factors(self, at: str, part: str, first: str, y: str, own: Mapping[int, str]) -> str:
        """What bases made, ``y`` [n, out] or nothing, plus what factors make of each row's own."""
        low = [self._low_of_row(f"{at}/{row}", row, part, first, x) for row, x in own.items()]
        if not low:
            return y
        added = self._joined(f"{at}/low", low)
        return self.graph.node(at, "Add", [y, added]) if y else added

    def _low_of_row(self, at: str, row: int, part: str, first: str, x: str) -> str:
        """What the factors of a row make of ``x`` [n, in]: [n, out]; zeros if it has none."""
        graph, bases = self.graph, self.layer.bases
        base = bases[row]
        if not self.columns.has_factors(row):
            out = getattr(self.layer.experts[base or 0], part).shape[0]
            count = graph.node(at, "Shape", [x], end=1)
            shape = graph.node(at, "Concat", [count, graph.constant([out])], axis=0)
            return graph.node(at, "ConstantOfShape", [shape])
        sources = [self.roles[f"{self.row_roles[row]}.{part}.{name}"] for name in LOW]
        stored = [self._stored(s.name, [s]) for s in sources]
        if base is None or bases.count(base) == 1:
            return self._low(at, stored, first, x)
        # Of a group that was chosen, most rows are not.
        count = graph.node(at, "Shape", [x], end=1)
        any_ = graph.node(at, "Greater", [count, graph.constant([0])])
        nothing = graph.constant(np.zeros((0, sources[1].weight.shape[0])), np.float32)
        branches = (
            lambda: [self._low(at, stored, first, x)],
            lambda: [graph.node(f"{at}/no", "Identity", [nothing])],
        )
        return graph.choice(at, any_, branches, (TensorProto.FLOAT,))[0]
