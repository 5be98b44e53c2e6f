"""Times of operators of a transformers model, by torch.profiler."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from moe2edge.runtime.operator_times import (
    PhaseTimes,
    classify_place,
    find_layer,
    sum_operators,
)

if TYPE_CHECKING:
    from moe2edge.runtime.torch_runtime import TorchRuntime

# Begins the labels of modules among the events.
_LABEL = "moe2edge:"


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
    with label_modules(runtime.model):
        logits, prefill = _profile(lambda: runtime.start(ids))

        def decode() -> None:
            now = logits
            for _ in range(gen_tokens - 1):
                now = runtime.step(int(now.argmax()))

        _, steps = _profile(decode)
    return (
        PhaseTimes("prefill", len(ids), prefill[0], prefill[1]),
        PhaseTimes("decode", gen_tokens - 1, steps[0], steps[1]),
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


def _profile(run: Callable[[], Any]) -> tuple[Any, tuple[float, Any]]:
    """Run something; return its result, the seconds that it took, and the operators."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        begin = time.perf_counter()
        result = run()
        seconds = time.perf_counter() - begin
    events = list(profiler.events() or ())
    return result, (seconds, sum_operators(_list_calls(events)))


def _list_calls(events: Sequence[Any]) -> Iterator[tuple[str, str, int | None, float]]:
    """Yield operator, kind, layer and own seconds of each event within a module."""
    for event in events:
        place, above = "", event.cpu_parent
        if event.name.startswith(_LABEL):
            continue
        while above is not None:
            if above.name.startswith(_LABEL):
                place = above.name.removeprefix(_LABEL)
                break
            above = above.cpu_parent
        seconds = event.self_cpu_time_total / 1e6
        yield event.name, classify_place(place), find_layer(place), seconds
