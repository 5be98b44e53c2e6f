"""Times of operators of a transformers model, by torch.profiler."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from moe2edge.runtime.operator_times import (
    OperatorCall,
    OperatorTime,
    PhaseTimes,
    classify_place,
    find_layer,
    sum_operators,
)

if TYPE_CHECKING:
    from moe2edge.runtime.torch_runtime import TorchRuntime

# Begins the labels of modules among the events.
_LABEL = "moe2edge:"

Sums = tuple[OperatorTime, ...]
Calls = tuple[OperatorCall, ...]


def profile_torch(
    runtime: TorchRuntime, ids: Sequence[int], gen_tokens: int
) -> tuple[PhaseTimes, ...]:
    """Run a prompt and a greedy continuation in torch.profiler.

    Args:
        runtime: the model.
        ids: the prompt.
        gen_tokens: tokens to generate, at least two.

    Returns:
        The operators of prefill and decode; each serves the innermost module that called it.
    """
    runtime.step(int(runtime.start(ids).argmax()))  # the first runs also prepare kernels
    with label_modules(runtime.model):
        logits, prefill = _profile(lambda: runtime.start(ids))

        def decode() -> None:
            now = logits
            for _ in range(gen_tokens - 1):
                now = runtime.step(int(now.argmax()))

        _, steps = _profile(decode)
    return (
        PhaseTimes("prefill", len(ids), *prefill),
        PhaseTimes("decode", gen_tokens - 1, *steps),
    )


@contextmanager
def label_modules(model: Any) -> Iterator[None]:
    """Name, to torch.profiler, the module of each event."""
    from torch.autograd.profiler import record_function

    handles, open_labels = [], []

    def begin(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            label = record_function(f"{_LABEL}{name}")
            label.__enter__()  # type: ignore[no-untyped-call]
            open_labels.append(label)

        return hook

    def end(*_: Any) -> None:
        open_labels.pop().__exit__(None, None, None)

    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(begin(name)))
        handles.append(module.register_forward_hook(end))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _profile(run: Callable[[], Any]) -> tuple[Any, tuple[float, Sums, Calls]]:
    """Run something; return its result, the seconds that it took, operators, and last calls."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        begin = time.perf_counter()
        result = run()
        seconds = time.perf_counter() - begin
    events = list(profiler.events() or ())
    placed = [(event, _find_module(event)) for event in events if not _is_label(event)]
    sums = sum_operators(
        (event.name, classify_place(place), find_layer(place), event.self_cpu_time_total / 1e6)
        for event, place in placed
    )
    # The label of the whole model has no name; the last of them is of the last token.
    starts = [event.time_range.start for event in events if event.name == _LABEL]
    begin_us = max(starts, default=0)
    calls = (
        OperatorCall(
            event.name,
            classify_place(place),
            find_layer(place),
            (event.time_range.start - begin_us) / 1e6,
            event.time_range.elapsed_us() / 1e6,
        )
        for event, place in placed
        if event.time_range.start >= begin_us
    )
    return result, (seconds, sums, tuple(sorted(calls, key=lambda call: call.begin)))


def _is_label(event: Any) -> bool:
    return str(event.name).startswith(_LABEL)


def _find_module(event: Any) -> str:
    """Return the name of the innermost module that an event is in."""
    above = event.cpu_parent
    while above is not None:
        if _is_label(above):
            return str(above.name).removeprefix(_LABEL)
        above = above.cpu_parent
    return ""
