"""A profile as a trace for Perfetto and chrome://tracing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from moe2edge.evaluation.profile.views.parts import Document, list_profiles

_MS = 1000  # microseconds, which the format counts in
_EXPLAINED, _LAST = 0, 1
_FIRST_TIMED = 2
_MIB = 2**20

Event = dict[str, Any]


def build_trace(document: Document) -> dict[str, Any]:
    """Build the trace of one folder, or of the folders of a set one after the other.

    The timed processes have a track each, with import, load, prompts and tokens; memory over time
    and the operators of one token are of the process that is not timed.
    """
    events: list[Event] = []
    for n, (_, profile) in enumerate(list_profiles(document)):
        first = n * 1000
        target = profile["artifact"].get("target") or "source"
        for event in _list_events(profile):
            event["pid"] += first
            if event["name"] == "process_name":
                event["args"]["name"] = f"{target}: {event['args']['name']}"
            events.append(event)
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _list_events(profile: Document) -> Iterator[Event]:
    yield from _list_memory(profile["memory"]["timeline"].get("samples") or ())
    for phase in profile["breakdown"].get("phases") or ():
        if phase["phase"] == "decode":
            yield from _list_calls(phase["last_token"])
    yield from _list_processes(profile)


def _list_memory(samples: Sequence[Document]) -> Iterator[Event]:
    if samples:
        yield _name_process(_EXPLAINED, "memory, not timed")
    for sample in samples:
        sizes = {
            "anonymous MiB": sample["rss_anon"] / _MIB,
            "mapped MiB": sample["rss_file"] / _MIB,
        }
        yield {"ph": "C", "name": "resident", "pid": _EXPLAINED, "tid": 0,
               "ts": sample["t_s"] * 1e6, "args": sizes}  # fmt: skip


def _list_calls(calls: Sequence[Document]) -> Iterator[Event]:
    """Yield the operators of one token, with a track for each kind."""
    if calls:
        yield _name_process(_LAST, "operators of the last token, not timed")
    kinds = list(dict.fromkeys(call["kind"] for call in calls))
    for n, kind in enumerate(kinds):
        yield {"ph": "M", "name": "thread_name", "pid": _LAST, "tid": n, "args": {"name": kind}}
    for call in calls:
        yield _make_span(
            call["op"], (_LAST, kinds.index(call["kind"])), call["begin_ms"], call["ms"],
            {"layer": call["layer"]},
        )  # fmt: skip


def _list_processes(profile: Document) -> Iterator[Event]:
    """Yield import, load, prompts and tokens of each timed process."""
    work, metrics = profile["workload"], profile["metrics"]
    prompts, gaps = work["prompts"], work["gen_tokens"] - 1
    for n in range(work["processes"]):
        process = _FIRST_TIMED + n
        yield _name_process(process, f"process {n + 1}")
        now = 0.0
        for name in ("import_ms", "load_ms"):
            took = metrics[name]["samples"][n]
            yield _make_span(name.removesuffix("_ms"), (process, 0), now, took)
            now += took
        for prompt in range(n * prompts, (n + 1) * prompts):
            took = metrics["ttft_ms"]["samples"][prompt]
            yield _make_span("prefill", (process, 0), now, took, {"tokens": work["prompt_tokens"]})
            now += took
            times = metrics["ms_per_token"]["samples"][prompt * gaps : (prompt + 1) * gaps]
            for token, took in enumerate(times):
                yield _make_span("token", (process, 0), now, took, {"token": token + 2})
                now += took


def _make_span(
    name: str, track: tuple[int, int], begin: float, took: float, args: Event | None = None
) -> Event:
    """Make an event of some milliseconds."""
    return {"ph": "X", "name": name, "pid": track[0], "tid": track[1], "ts": begin * _MS,
            "dur": took * _MS, "args": args or {}}  # fmt: skip


def _name_process(number: int, name: str) -> Event:
    return {"ph": "M", "name": "process_name", "pid": number, "tid": 0, "args": {"name": name}}
