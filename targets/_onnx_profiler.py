"""Times of operators and choices of routers of an ONNX graph, apart from all that is timed."""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from moe2edge.model.layers import MoELayer
from moe2edge.runtime.operator_times import (
    FallbackNode,
    OperatorCall,
    OperatorTime,
    PhaseTimes,
    classify_place,
    find_layer,
    sum_operators,
)
from moe2edge.runtime.router_choices import RouterChoices
from moe2edge.targets._onnx_outline import outline_graph
from moe2edge.targets._onnx_runtime import CHUNK, open_runtime, open_session
from moe2edge.targets._onnx_storage import load_graph

_KERNEL = "_kernel_time"
_ROUTER = re.compile(r"/layers\.(\d+)/moe/router/Reshape$")


def profile_graph(folder: Path, ids: Sequence[int], gen_tokens: int) -> tuple[PhaseTimes, ...]:
    """Run a prompt and a greedy continuation with the profiler of ONNX Runtime.

    Args:
        folder: folder of the graph.
        ids: the prompt.
        gen_tokens: tokens to generate, at least two.

    Returns:
        The operators of prefill and decode.
    """
    with tempfile.TemporaryDirectory(prefix="moe2edge-") as place:
        runtime = open_runtime(folder, times=Path(place) / "times")
        runtime.step(int(runtime.start(ids).argmax()))  # the first runs also reserve memory
        begin = time.perf_counter()
        logits = runtime.start(ids)
        middle = time.perf_counter()
        for _ in range(gen_tokens - 1):
            logits = runtime.step(int(logits.argmax()))
        end = time.perf_counter()
        events = json.loads(runtime.end_profiling().read_text("utf-8"))
        asked = runtime.provider
    first = -(-len(ids) // CHUNK)
    runs = list(_split_runs(events))[first + 1 :]
    phases = (
        ("prefill", len(ids), middle - begin, runs[:first]),
        ("decode", gen_tokens - 1, end - middle, runs[first:]),
    )
    return tuple(
        PhaseTimes(
            name,
            tokens,
            seconds,
            _sum_runs(part),
            _list_calls(part[-1]),
            find_fallbacks([event for run in part for event in run], asked),
        )
        for name, tokens, seconds, part in phases
    )


def _split_runs(events: Sequence[Mapping[str, Any]]) -> Iterator[list[Mapping[str, Any]]]:
    """Yield the events of the operators of each run, in order."""
    runs = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e.get("name") == "model_run")
    nodes = [e for e in events if e.get("cat") == "Node" and e["name"].endswith(_KERNEL)]
    for begin, end in runs:
        yield [event for event in nodes if begin <= event["ts"] <= end]


def _list_calls(run: Sequence[Mapping[str, Any]]) -> tuple[OperatorCall, ...]:
    """Return the calls of one run, in order."""
    ordered = sorted(run, key=lambda event: event["ts"])
    begin = ordered[0]["ts"] if ordered else 0
    calls = []
    for event in ordered:
        place, op = event["name"].removesuffix(_KERNEL), str(event["args"]["op_name"])
        times = ((event["ts"] - begin) / 1e6, event["dur"] / 1e6)
        calls.append(OperatorCall(op, classify_place(place, op), find_layer(place), *times))
    return tuple(calls)


def _sum_runs(runs: Sequence[Sequence[Mapping[str, Any]]]) -> tuple[OperatorTime, ...]:
    def list_calls() -> Iterator[tuple[str, str, int | None, float]]:
        for event in (event for run in runs for event in run):
            place, op = event["name"].removesuffix(_KERNEL), str(event["args"]["op_name"])
            yield op, classify_place(place, op), find_layer(place), event["dur"] / 1e6

    return sum_operators(list_calls())


def find_fallbacks(events: Sequence[Mapping[str, Any]], asked: str) -> tuple[FallbackNode, ...]:
    """Find the nodes that ran on another provider than the first that was asked for.

    Args:
        events: of operators, as the profiler of ONNX Runtime writes them.
        asked: name of that provider.

    Returns:
        The nodes, the slowest first.
    """
    sums: dict[tuple[str, str, str], float] = {}
    for event in events:
        name, about = event["name"].removesuffix(_KERNEL), event["args"]
        if (got := about["provider"]) != asked:
            key = (name, str(about["op_name"]), str(got))
            sums[key] = sums.get(key, 0.0) + event["dur"] / 1e6
    found = [FallbackNode(node, op, asked, got, s) for (node, op, got), s in sums.items()]
    return tuple(sorted(found, key=lambda one: -one.seconds))


# ---- choices of routers -------------------------------------------------------------------------


def list_router_choices(folder: Path, place: Path, ids: Sequence[int]) -> dict[int, RouterChoices]:
    """List the rows of routers that the tokens of a text choose, by layer.

    The scores of the routers are further outputs of the graph.

    Args:
        folder: folder of the config.
        place: folder of the graph.
        ids: the text.

    Returns:
        Choices of a layer's router, by the layer's index.
    """
    graph, model = load_graph(place), outline_graph(folder, place)
    scores = {
        node.output[0]: int(found[1])
        for node in graph.graph.node
        if (found := _ROUTER.search(node.name))
    }
    for name in scores:
        value = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
        graph.graph.output.append(value)
    session = open_session(place, graph=graph.SerializeToString())
    feeds: dict[str, Any] = {
        "input_ids": np.asarray([ids], np.int64),
        "attention_mask": np.ones((1, len(ids)), np.int64),
    }
    for one in session.get_inputs():
        if one.name.startswith("past_key_values."):
            dtype = np.int8 if one.type == "tensor(int8)" else np.float32
            feeds[one.name] = np.zeros((1, one.shape[1], 0, one.shape[3]), dtype)
    found = session.run(list(scores), feeds)
    layers = {block.index: layer for block, layer in model.moe_blocks}
    return {
        index: _choose_rows(torch.from_numpy(values), layers[index])
        for index, values in zip(scores.values(), found, strict=True)
    }


def _choose_rows(scores: torch.Tensor, layer: MoELayer) -> RouterChoices:
    """Choose the rows of each token, of scores [tokens, rows]."""
    probability, ids = scores.float().softmax(-1).topk(layer.router.top_k)
    below = torch.tensor([0.0, *layer.router.skip_below])
    if layer.router.skip_below:
        ids = ids.where(probability >= probability[:, :1] * below, layer.router_rows)
    return RouterChoices.collect(layer.router_rows, ids, scores)
