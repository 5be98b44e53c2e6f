"""Size and time of an MoE layer in ONNX Runtime when half of its experts are replaced.

One layer of random numbers, router included, as the target `onnx` writes it; forms that it does
not write are measured as well. Every run feeds other tokens, so that other experts are chosen, and
forms are run in turn.

    python benchmarks/onnx_mixed/measure.py > benchmarks/onnx_mixed/results.txt
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from onnx import TensorProto

from moe2edge.model.block import Block, is_low_rank
from moe2edge.model.experts import (
    PARTS,
    Constant,
    Expert,
    Factors,
    Full,
    Linear,
    Replacement,
    Row,
    Tied,
)
from moe2edge.model.layers import MoELayer, Router
from moe2edge.model.weights import Weight
from moe2edge.numerics.grid import Quantized
from moe2edge.numerics.rounding import round_to_nearest
from moe2edge.numerics.scheme import LOW_RANK, Scheme
from moe2edge.storage.solved_blocks import attach_numbers
from moe2edge.targets._onnx_columns import ColumnGroup, Columns
from moe2edge.targets._onnx_experts import MoEWriter
from moe2edge.targets._onnx_graph import Graph
from moe2edge.targets._onnx_mixed import MixedWriter
from moe2edge.targets._onnx_storage import Source, write_data

# One: more of them wait for each other on a machine that has other work.
THREADS = 1
INT4, PROMPT, DECODED, PREFILLED = Scheme(group_size=128), 128, 300, 21
DRAW = torch.Generator().manual_seed(0)


@dataclass(frozen=True)
class Size:
    """The size of a layer."""

    hidden: int
    width: int
    experts: int
    top_k: int
    scheme: Scheme | None = INT4

    def __str__(self) -> str:
        kind = "int4, groups of 128" if self.scheme else "float32"
        return (
            f"hidden {self.hidden}, {self.experts} experts of width {self.width}, top-{self.top_k}"
            f", {kind}"
        )


# ---- layers ------------------------------------------------------------------------------------


def dense(name: str, *shape: int) -> Weight:
    """Make random numbers in bfloat16, as replacements and factors are stored."""
    numbers = (0.02 * torch.randn(shape, generator=DRAW)).bfloat16()
    return Weight(name, shape, "BF16", lambda: numbers)


def matrix(name: str, size: Size, *shape: int) -> Weight:
    """Make a random matrix of an expert, drawn when it is written."""
    if size.scheme is None:
        return Weight(name, shape, "F32", lambda: 0.02 * torch.randn(shape, generator=DRAW))
    scheme = size.scheme
    groups = shape[1] // scheme.group_size

    def load() -> Quantized:
        q = torch.randint(0, 16, shape, dtype=torch.uint8, generator=DRAW)
        return Quantized(q, torch.full((shape[0], groups), 0.005), scheme, None)

    return Weight(name, shape, "BF16", lambda: load().dequantize(), scheme, load)


def plain(size: Size) -> MoELayer:
    """Make a layer without replaced experts."""
    router = Weight(
        "router",
        (size.experts, size.hidden),
        "F32",
        lambda: torch.randn(size.experts, size.hidden, generator=torch.Generator().manual_seed(1)),
    )
    shapes = dict(
        zip(PARTS, [(size.width, size.hidden)] * 2 + [(size.hidden, size.width)], strict=True)
    )
    experts = [
        Expert(**{p: matrix(f"{n}.{p}", size, *s) for p, s in shapes.items()}, origin=n)
        for n in range(size.experts)
    ]
    return MoELayer.make_plain(Router(router, size.top_k, True), tuple(experts))


def replaced(size: Size, *ranks: int) -> MoELayer:
    """Replace every second expert by maps of these ranks in turn; 0: by constants."""

    def replacement(n: int, rank: int) -> Replacement:
        constant = dense(f"{n}.constant", size.hidden)
        if not rank:
            return Constant(n, constant)
        first = dense(f"{n}.first", rank, size.hidden)
        return Linear(n, constant, first, dense(f"{n}.second", size.hidden, rank))

    maps = {
        n: replacement(n, rank)
        for n, rank in zip(range(1, size.experts, 2), itertools.cycle(ranks))
    }
    # Rows of the router stay in their old order: they are random.
    return plain(size).replace_experts(maps)


def merged(size: Size, rank: int) -> MoELayer:
    """Give groups of three, about half of the experts, one base, with or without factors."""
    layer, groups = plain(size), max(1, round(size.experts / 6))
    rows: list[Row] = []
    bases: list[Expert] = []
    for n in range(size.experts):
        if n < 3 * groups and n % 3:
            base = len(bases) - 1
        else:
            base = len(bases)
            bases.append(layer.experts[n])
        own = n < 3 * groups and rank
        low = factors(n, layer.experts[n], rank) if own else {}
        rows.append(Tied(n, base, low) if own else Full(n, base))
    return replace(layer, experts=tuple(bases), rows=tuple(rows))


def alone(size: Size, rank: int) -> MoELayer:
    """Replace every second expert by factors alone."""
    layer = plain(size)
    rows = (
        Tied(n, None, factors(n, expert, rank)) if n % 2 else Full(n, n // 2)
        for n, expert in enumerate(layer.experts)
    )
    return replace(layer, experts=layer.experts[::2], rows=tuple(rows))


def factors(n: int, expert: Expert, rank: int) -> Mapping[str, Factors]:
    found = {}
    for part in PARTS:
        outs, ins = getattr(expert, part).shape
        first = dense(f"{n}.{part}.first", rank, ins)
        found[part] = Factors(first, dense(f"{n}.{part}.second", outs, rank))
    return found


# ---- forms that the target does not write -------------------------------------------------------


class NoStacks(Columns):
    """Linear maps are none of their own."""

    @property
    def stacks(self) -> tuple[tuple[int, ...], ...]:
        return ()

    @property
    def replaced(self) -> tuple[int, ...]:
        return self.layer.replaced


class AtOnce(MixedWriter):
    """All linear maps side by side, every token through all of them."""

    @cached_property
    def columns(self) -> Columns:
        return NoStacks(self.layer)

    def add(self, x: str) -> str:
        self.__dict__["x"] = x
        return super().add(x)

    def _add_constants(self, gates: str) -> str:
        graph, at = self.graph, f"{self.at}/at_once"
        rows = self.columns.replaced
        rank, count = self.layer.rows[rows[0]].rank, len(rows)
        first, second = (
            graph.node(f"{at}/{name}", "Concat", self._matrices(name), axis=axis)
            for name, axis in (("first", 0), ("second", 1))
        )
        x = graph.node(f"{at}/x", "Reshape", [self.__dict__["x"], self._shape(-1, self.hidden)])
        inside = graph.node(f"{at}/inside", "FusedMatMul", [x, first], transB=1)
        inside = graph.node(f"{at}/apart", "Reshape", [inside, self._shape(-1, count, rank)])
        each = graph.node(f"{at}/gates", "Unsqueeze", [gates, self._shape(-1)])
        inside = graph.node(f"{at}/gated", "Mul", [inside, each])
        inside = graph.node(f"{at}/joined", "Reshape", [inside, self._shape(-1, count * rank)])
        y = graph.node(f"{at}/y", "FusedMatMul", [inside, second], transB=1)
        return graph.node(at, "Add", [y, super()._add_constants(gates)])

    def _matrices(self, name: str) -> list[str]:
        sources = [self.roles[f"{self.row_roles[row]}.{name}"] for row in self.columns.replaced]
        return [self.graph.stored(s.name, [(s,)], s.weight.shape) for s in sources]

    def _shape(self, *sizes: int) -> str:
        return self.graph.constant(sizes)


class Apart(Columns):
    """A writer with a stack for each linear map."""

    @property
    def stacks(self) -> tuple[tuple[int, ...], ...]:
        return tuple((n,) for stack in super().stacks for n in stack)


class Branches(MixedWriter):
    """A writer with a branch for each linear map, for one token as well."""

    @cached_property
    def columns(self) -> Columns:
        return Apart(self.layer)


class AllFused(Columns):
    """A writer whose ``MoE`` operator holds unquantized experts as well."""

    def _fuses(self, group: ColumnGroup) -> bool:
        return True


class Masked(MixedWriter):
    """Logits of what was not chosen are low, and the sum of weights is put back."""

    @cached_property
    def columns(self) -> Columns:
        return AllFused(self.layer)

    def _operator(self, x: str, experts: Any, routing: Any, top_k: int, *, normalize: bool) -> str:
        at, graph = f"{self.at}/masked", self.graph
        least = graph.constant(1e-37, np.float32)
        logits = graph.node(at, "Log", [graph.node(at, "Max", [routing[0], least])])
        y = super()._operator(x, experts, (logits, ""), top_k, normalize=True)
        return graph.node(at, "Mul", [y, self._sum(at, routing[0])])


# ---- timing ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Form:
    """A layer, and its writer."""

    title: str
    make: Callable[[Size], MoELayer]
    writer: type[MoEWriter] = MixedWriter

    def block(self, size: Size) -> Block:
        """Return a block with nothing but the layer."""
        return Block(0, 0, {}, {}, self.make(size))


@dataclass(frozen=True)
class EightBits(Form):
    """Quantize factors and linear maps to 8 bits."""

    def block(self, size: Size) -> Block:
        block = super().block(size)
        low = {role: weight for role, weight in block.weights() if is_low_rank(role)}
        return attach_numbers(
            block, {r: round_to_nearest(w.load(), LOW_RANK) for r, w in low.items()}
        )


def linear_forms(rank: int) -> list[Form]:
    title = f"half linear, rank {rank}"
    writers = {"": MixedWriter, ", a branch each *": Branches, ", at once *": AtOnce}
    return [
        *(
            Form(title + more, lambda size: replaced(size, rank), writer)
            for more, writer in writers.items()
        ),
        EightBits(f"{title}, 8 bits", lambda size: replaced(size, rank)),
    ]


def merged_form(rank: int, kind: type[Form] = Form) -> Form:
    what = f"a base and factors of rank {rank}" if rank else "one expert, no factors"
    more = ", 8 bits" if kind is EightBits else ""
    return kind(f"in groups of 3: {what}{more}", lambda size: merged(size, rank))


FORMS = (
    Form("all real", plain, MoEWriter),
    Form("half constants", lambda size: replaced(size, 0)),
    Form("half constants, only masked *", lambda size: replaced(size, 0), Masked),
    *linear_forms(16),
    *linear_forms(64),
    Form("half linear, ranks 4, 8, ... 124", lambda size: replaced(size, *range(4, 128, 4))),
    Form("half factors alone, rank 16", lambda size: alone(size, 16)),
    Form("half factors alone, rank 64", lambda size: alone(size, 64)),
    merged_form(0),
    merged_form(16),
    merged_form(64),
    merged_form(64, EightBits),
)
SIZES = (
    (Size(1024, 3584, 8, 2), FORMS),
    (Size(2048, 1024, 64, 8), FORMS),
    (Size(1024, 1792, 8, 2, None), FORMS[:3]),
)


def session(form: Form, size: Size, folder: Path) -> tuple[Any, int]:
    """Open the layer in ONNX Runtime, and return the session and the bytes of its weights."""
    block = form.block(size)
    layer = block.mlp
    assert isinstance(layer, MoELayer)
    graph, hidden = Graph(), size.hidden
    graph.input("x", TensorProto.FLOAT, [1, "tokens", hidden])
    roles = {role: Source(f"{role}.weight", weight) for role, weight in block.weights()}
    y = form.writer(graph, "/moe", roles, layer, 0, 4).add("x")
    graph.node("/y", "Identity", [y], [graph.output("y", [1, "tokens", hidden])])
    folder.mkdir()
    proto = graph.proto(write_data(graph.batches, folder / "model.onnx.data")[0], {})
    (folder / "model.onnx").write_bytes(proto.SerializeToString())
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = THREADS
    opened = ort.InferenceSession(folder / "model.onnx", options, ["CPUExecutionProvider"])
    return opened, (folder / "model.onnx.data").stat().st_size


def times(sessions: list[Any], hidden: int, tokens: int, runs: int) -> list[float]:
    """Return the median milliseconds of each session."""
    taken: list[list[float]] = [[] for _ in sessions]
    draw = np.random.default_rng(tokens)
    for run in range(runs + 2):
        x = draw.standard_normal((1, tokens, hidden)).astype(np.float32)
        for n, one in enumerate(sessions):
            begun = time.perf_counter()
            one.run(None, {"x": x})
            if run > 1:
                taken[n].append(1e3 * (time.perf_counter() - begun))
    return [statistics.median(values) for values in taken]


def measure(size: Size, forms: tuple[Form, ...]) -> None:
    print(f"\n{size}")
    print(f"{'':52}{'MB':>7}{'a token, ms':>14}{'':>7}{f'{PROMPT} tokens, ms':>18}{'':>7}")
    with tempfile.TemporaryDirectory() as parent:
        opened = [session(f, size, Path(parent) / str(n)) for n, f in enumerate(forms)]
        sessions = [one for one, _ in opened]
        decode = times(sessions, size.hidden, 1, DECODED)
        prefill = times(sessions, size.hidden, PROMPT, PREFILLED)
    for form, (_, nbytes), one, many in zip(forms, opened, decode, prefill, strict=True):
        ratios = f"{one / decode[0]:.2f}", f"{many / prefill[0]:.2f}"
        print(
            f"{form.title:52}{nbytes / 1e6:7.1f}{one:14.2f}{ratios[0]:>7}{many:18.1f}{ratios[1]:>7}"
        )


def main() -> None:
    print(f"# onnxruntime {ort.__version__}, CPU provider, {THREADS} thread, int8 activations")
    print(f"# medians of {DECODED} tokens and of {PREFILLED} prompts, by turns; behind each, the")
    print(
        "# part of what all real experts take. MB: the data file. * is not what the target writes."
    )
    for size, forms in SIZES:
        measure(size, forms)


if __name__ == "__main__":
    main()
