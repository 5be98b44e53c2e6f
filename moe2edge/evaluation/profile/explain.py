"""Explain a folder in a process of its own, in which nothing is timed but a cold load.

Memory is sampled, operators are profiled and choices of experts are counted here, since all of
that slows a runtime down.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe2edge.errors import Moe2EdgeError, join_lines
from moe2edge.evaluation.profile.expert_use import describe_expert_use, list_expert_choices
from moe2edge.evaluation.profile.memory import count_faults, subtract_faults
from moe2edge.evaluation.profile.page_cache import evict_files
from moe2edge.evaluation.profile.timeline import Timeline
from moe2edge.runtime.generation import generate
from moe2edge.storage.manifest import list_files

if TYPE_CHECKING:
    from moe2edge.runtime.operator_times import OperatorCall, PhaseTimes
    from moe2edge.runtime.protocol import Runtime

# Tokens that are generated in a profiler: it keeps each call, of which there are many.
MOST_PROFILED = 9
# Calls of the last token that a document holds.
MOST_CALLS = 2000
NO_PROVIDERS = "the runtime has no providers that operators are divided among"
NO_PROFILER = "the runtime of target {} has no profiler of operators that can be read"


def explain_once(
    request: Mapping[str, Any],
    *,
    import_libraries: Callable[[], None],
    open_runtime: Callable[[], Runtime],
) -> dict[str, Any]:
    """Load a folder that no cache holds, run a prompt, and look at what happens.

    Args:
        request: ``folder``, ``target``, ``options``, ``prompts`` and ``gen_tokens``.
        import_libraries: imports the libraries that the runtime needs.
        open_runtime: loads the folder.

    Returns:
        ``cold_load``: seconds, page faults up to the first token, and what the system's cache
        still held; ``timeline`` of memory; ``experts``: use of each; ``breakdown``: times of
        operators. Each has a ``reason`` that is not null where it is not known.
    """
    prompt = request["prompts"][-1]
    with Timeline() as timeline:
        import_libraries()
        eviction = evict_files(list_files(Path(request["folder"])).values())
        timeline.begin("load")
        before, begin = count_faults(), time.perf_counter()
        runtime = open_runtime()
        load_s = time.perf_counter() - begin
        timeline.begin("prefill")
        tokens: list[int] = []
        after: dict[str, int] = {}
        for token in generate(runtime, prompt, max_tokens=request["gen_tokens"]):
            if not tokens:
                after = count_faults()
                timeline.begin("decode")
            tokens.append(token)
        timeline.begin("after")
    del runtime
    return {
        "cold_load": {
            "seconds": load_s,
            "major_faults": subtract_faults(after, before),
            **asdict(eviction),
        },
        "timeline": timeline.to_json(),
        "experts": _explain(lambda: _use_experts(request, [*prompt, *tokens[:-1]])),
        "breakdown": _explain(lambda: _break_down(request, prompt)),
    }


def _explain(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what ``run`` finds, with a reason that is null; or the reason why it finds nothing."""
    try:
        return {"reason": None, **run()}
    except Moe2EdgeError as error:
        return {"reason": join_lines(error)}


def _use_experts(request: Mapping[str, Any], ids: Sequence[int]) -> dict[str, Any]:
    return describe_expert_use(list_expert_choices(request, ids))


def _break_down(request: Mapping[str, Any], prompt: Sequence[int]) -> dict[str, Any]:
    folder, name = Path(request["folder"]), request["target"]
    tokens = min(request["gen_tokens"], MOST_PROFILED)
    if tokens < 2:
        raise Moe2EdgeError("one token per prompt was generated; it takes at least two")
    if name is None:
        from moe2edge.runtime.torch_profiler import profile_torch
        from moe2edge.runtime.torch_runtime import open_source

        runtime = open_source(folder, dtype=request["dtype"])
        phases: tuple[PhaseTimes, ...] | None = profile_torch(runtime, prompt, tokens)
    else:
        from moe2edge.pipeline.registry import make_target

        target = make_target(name, request.get("options", {}))
        phases = target.profile_operators(folder, prompt, tokens)
    if phases is None:
        raise Moe2EdgeError(NO_PROFILER.format(name))
    return {"phases": [_describe_phase(phase) for phase in phases], **describe_fallbacks(phases)}


def describe_fallbacks(phases: Sequence[PhaseTimes]) -> dict[str, Any]:
    """Describe the nodes that ran on another provider than the first that was asked for.

    Each with its percentage of the time of all phases; or the reason why they are not known.
    """
    sums: dict[tuple[str, str, str, str], float] = {}
    for phase in phases:
        if phase.fallbacks is None:
            return {"fallback_nodes": None, "fallback_reason": NO_PROVIDERS}
        for one in phase.fallbacks:
            key = (one.node, one.op, one.wanted, one.got)
            sums[key] = sums.get(key, 0.0) + one.seconds
    whole = sum(phase.seconds for phase in phases)
    names = ("node", "op", "wanted_ep", "got_ep")
    found = [
        {**dict(zip(names, key, strict=True)), "pct": 100 * seconds / whole}
        for key, seconds in sorted(sums.items(), key=lambda item: -item[1])
    ]
    return {"fallback_nodes": found, "fallback_reason": None}


def _choose_calls(calls: Sequence[OperatorCall]) -> list[OperatorCall]:
    """Return the longest calls, in order, where there are very many."""
    longest = sorted(calls, key=lambda call: -call.seconds)[:MOST_CALLS]
    return sorted(longest, key=lambda call: call.begin)


def _describe_phase(phase: PhaseTimes) -> dict[str, Any]:
    """Return the times of a phase by kind, operator and layer; the gap is what is left."""
    from moe2edge.runtime.operator_times import KINDS

    kinds = dict.fromkeys(KINDS, 0.0)
    operators: dict[str, list[float]] = {}
    layers: dict[int, float] = {}
    for one in phase.operators:
        kinds[one.kind] += one.seconds
        calls, seconds = operators.get(one.op, [0, 0.0])
        operators[one.op] = [calls + one.calls, seconds + one.seconds]
        if one.layer is not None:
            layers[one.layer] = layers.get(one.layer, 0.0) + one.seconds
    gap = max(0.0, phase.seconds - sum(kinds.values()))
    by_time = sorted(operators.items(), key=lambda item: -item[1][1])
    return {
        "phase": phase.phase,
        "tokens": phase.tokens,
        "ms": phase.seconds * 1000,
        "by_kind": {**{k: s * 1000 for k, s in kinds.items()}, "gap": gap * 1000},
        "by_operator": [
            {"op": op, "calls": int(calls), "ms": seconds * 1000}
            for op, (calls, seconds) in by_time
        ],
        "last_token": [
            {
                "op": c.op,
                "kind": c.kind,
                "layer": c.layer,
                "begin_ms": c.begin * 1000,
                "ms": c.seconds * 1000,
            }
            for c in _choose_calls(phase.last)
        ],
        "by_layer": [{"layer": n, "ms": s * 1000} for n, s in sorted(layers.items())],
    }
