"""Times of operators, as profilers of runtimes report them, by the part of a model they serve."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

# Parts of a model that operators serve.
KINDS = ("attention", "experts", "router", "mlp", "norm", "head", "other")
_LAYER = re.compile(r"layers?[./](\d+)")
_NORMS = re.compile(r"norm", re.IGNORECASE)


@dataclass(frozen=True)
class OperatorTime:
    """Time of the calls of one operator in one part of a model.

    Attributes:
        op: name of the operator.
        kind: one of `KINDS`.
        layer: index of the block; None outside of blocks.
        calls: number of calls.
        seconds: time of all calls, without that of operators that it calls.
    """

    op: str
    kind: str
    layer: int | None
    calls: int
    seconds: float


@dataclass(frozen=True)
class OperatorCall:
    """One call of an operator.

    Attributes:
        op: name of the operator.
        kind: one of `KINDS`.
        layer: index of the block; None outside of blocks.
        begin: seconds from the begin of the token.
        seconds: its time.
    """

    op: str
    kind: str
    layer: int | None
    begin: float
    seconds: float


@dataclass(frozen=True)
class FallbackNode:
    """A node that ran on another provider of the runtime than the first that was asked for.

    Attributes:
        node: its name in the graph.
        op: name of the operator.
        wanted, got: names of the two providers.
        seconds: time of all its calls.
    """

    node: str
    op: str
    wanted: str
    got: str
    seconds: float


@dataclass(frozen=True)
class PhaseTimes:
    """Operators of one phase.

    Attributes:
        phase: ``prefill`` or ``decode``.
        tokens: tokens of the phase.
        seconds: time from its begin to its end, with the profiler at work.
        operators: operators, the slowest first.
        last: calls of the last token of decoding, in order.
        fallbacks: nodes that fell back to another provider; None: the runtime does not tell.
    """

    phase: str
    tokens: int
    seconds: float
    operators: tuple[OperatorTime, ...]
    last: tuple[OperatorCall, ...] = ()
    fallbacks: tuple[FallbackNode, ...] | None = None


def classify_place(place: str, op: str = "") -> str:
    """Return the part of a model that an operator serves, by its place in module or graph names.

    >>> classify_place("/model/layers.0/attn/o_proj/MatMulNBits", "MatMulNBits")
    'attention'
    >>> classify_place("model.layers.3.mlp.gate"), classify_place("model.layers.3.mlp.experts")
    ('router', 'experts')
    """
    parts = [part.lower() for part in re.split(r"[./]", place) if part]
    last = parts[-1] if parts else ""
    if _NORMS.search(op) or any(_NORMS.search(part) for part in parts):
        return "norm"
    if any("lm_head" in part for part in parts):
        return "head"
    if any(part.startswith(("attn", "self_attn", "attention", "linear_attn")) for part in parts):
        return "attention"
    if any("shared" in part for part in parts):
        return "mlp"
    if any(part in ("router", "mass", "gate") for part in parts):
        return "router"
    if op in ("QMoE", "MoE") or any(part in ("experts", "moe", "small", "half") for part in parts):
        return "experts"
    if any(part in ("mlp", "feed_forward", "ffn") for part in parts) and last != "mlp":
        return "mlp"
    return "mlp" if last in ("mlp", "feed_forward") else "other"


def find_layer(place: str) -> int | None:
    """Return the index of the block in a name of a module or a node; None: it is outside.

    >>> find_layer("/model/layers.12/moe/QMoE"), find_layer("/lm_head/FusedMatMul")
    (12, None)
    """
    found = _LAYER.search(place)
    return int(found[1]) if found else None


def sum_operators(
    found: Iterable[tuple[str, str, int | None, float]],
) -> tuple[OperatorTime, ...]:
    """Sum up single calls, the slowest operators first.

    Args:
        found: operator, kind, layer and seconds of each call.
    """
    sums: dict[tuple[str, str, int | None], list[float]] = {}
    for op, kind, layer, seconds in found:
        sums.setdefault((op, kind, layer), []).append(seconds)
    times = [OperatorTime(*key, len(calls), sum(calls)) for key, calls in sums.items()]
    return tuple(sorted(times, key=lambda one: -one.seconds))
