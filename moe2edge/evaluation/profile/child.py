"""Load an output in a fresh process, run prompts, and return times and memory.

``python -m moe2edge.evaluation.profile.child`` reads one JSON request on stdin and writes one JSON
reply on stdout. It imports little at the top, because all of it counts as memory of the process.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe2edge.errors import Moe2EdgeError
from moe2edge.evaluation.profile.energy import NO_RAPL, EnergyMeter
from moe2edge.evaluation.profile.memory import MemoryReading, Meter
from moe2edge.evaluation.profile.sensors import compare_sensors, read_sensors
from moe2edge.runtime.generation import count_cache_bytes, describe_runtime, generate
from moe2edge.storage.text_files import read_json

if TYPE_CHECKING:
    from moe2edge.runtime.protocol import Runtime


class Phases:
    """Records the memory of each phase; a phase that repeats keeps its largest values."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._readings: dict[str, MemoryReading] = {}

    def start(self) -> None:
        """Begin a phase."""
        self._meter.start()

    def end(self, name: str, *, shares: bool = False) -> None:
        """End the phase and record it under a name.

        Args:
            name: of the phase.
            shares: read also what takes a walk over all pages, which leaves the caches of the
                processor cold; what follows should not be timed. Once for a phase.
        """
        reading, before = self._meter.read(), self._readings.get(name)
        if shares:
            reading = self._meter.add_shares(reading)
        if before is not None:
            whole = reading if shares else before
            known = {"pss": whole.pss, "private_dirty": whole.private_dirty}
            reading = replace(before.merge(reading), **known)
        self._readings[name] = reading

    def to_json(self) -> dict[str, Any]:
        """Return the method of measuring and the values of each phase."""
        return {
            "method": self._meter.method,
            "reason": self._meter.reason,
            "shares_reason": self._meter.shares_reason,
            "phases": {name: asdict(reading) for name, reading in self._readings.items()},
        }


def measure_once(
    request: dict[str, Any],
    *,
    import_libraries: Callable[[], None],
    open_runtime: Callable[[], Runtime],
    phases: Phases,
    clock: Callable[[], float] = time.perf_counter,
    look_after: Callable[[Runtime], dict[str, Any]] = lambda _: {},
    energy: EnergyMeter | None = None,
) -> dict[str, Any]:
    """Measure once: import, load, a warm-up run, then each prompt.

    Args:
        request: ``prompts`` (token ids; the first is the warm-up) and ``gen_tokens``.
        import_libraries: imports the libraries that the runtime needs.
        open_runtime: loads the output.
        phases: records the memory.
        clock: returns the time in seconds.
        look_after: measures more when all that is timed is over; part of the result.
        energy: measures the energy of each decoding; None: nothing does.

    Returns:
        ``import_s`` and ``load_s``; ``first_s`` to the first token of the warm-up; ``runs``, each
        as `run_prompt` returns it;
        ``memory``; and ``dtype``, ``threads`` and ``note`` of the runtime.
    """
    phases.start()
    begin = clock()
    import_libraries()
    import_s = clock() - begin
    phases.end("import", shares=True)
    phases.start()
    begin = clock()
    runtime = open_runtime()
    load_s = clock() - begin
    phases.end("load", shares=True)
    sensors = [read_sensors()]
    if energy is not None:
        energy.look_for_gpus()
    prompts = request["prompts"]
    # Nothing that is timed follows the prefill of the warm-up, or the last token.
    places = {"prefill": 0, "decode": len(prompts) - 1}
    runs = [
        run_prompt(
            runtime, prompt, request["gen_tokens"], phases, clock, energy,
            [name for name, place in places.items() if place == n],
        )
        for n, prompt in enumerate(prompts)
    ]  # fmt: skip
    sensors.append(read_sensors())
    return {
        "import_s": import_s,
        "load_s": load_s,
        "first_s": runs[0]["ttft_s"],
        "runs": runs[1:],
        "memory": phases.to_json(),
        "dtype": runtime.dtype,
        "threads": runtime.threads,
        "note": describe_runtime(runtime),
        "sensors": {**compare_sensors(sensors), "energy_of": energy.names if energy else []},
        "energy_reason": NO_RAPL if energy is None else energy.reason,
        **look_after(runtime),
    }


def run_prompt(
    runtime: Runtime,
    prompt: Sequence[int],
    gen_tokens: int,
    phases: Phases,
    clock: Callable[[], float],
    energy: EnergyMeter | None = None,
    shares: Collection[str] = (),
) -> dict[str, Any]:
    """Continue one prompt greedily, and time it.

    Args:
        runtime: the model.
        prompt: token ids.
        gen_tokens: tokens to generate.
        phases: records the memory of ``prefill`` and ``decode``.
        clock: returns the time in seconds.
        energy: measures the energy of decoding; None: nothing does.
        shares: phases of which `Phases.end` reads shares.

    Returns:
        ``ttft_s``, seconds to the first token; ``gaps_s``, seconds between tokens; ``tokens``;
        ``joules`` of all tokens but the first, None where they are not known.
    """
    tokens = generate(runtime, prompt, max_tokens=gen_tokens)
    phases.start()
    begin = clock()
    chosen = [next(tokens)]
    ttft_s = clock() - begin
    phases.end("prefill", shares="prefill" in shares)
    # Memory is read between phases, not between tokens, because reading it takes time.
    phases.start()
    if energy is not None:
        energy.start()
    marks = [clock()]
    for token in tokens:
        chosen.append(token)
        marks.append(clock())
    joules = None if energy is None else energy.read()
    phases.end("decode", shares="decode" in shares)
    gaps = [after - before for before, after in pairwise(marks)]
    return {"ttft_s": ttft_s, "gaps_s": gaps, "tokens": chosen, "joules": joules}


def serve_request() -> int:
    """Serve one request and return the exit code.

    An error is written to stderr as one line, and its exit code returned.
    """
    # Libraries may write to stdout, where the reply must stand alone.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as stdout:
        os.dup2(2, 1)
        try:
            json.dump(_serve(json.load(sys.stdin)), stdout)
        except Moe2EdgeError as error:
            sys.stderr.write(f"{error}\n")
            return error.exit_code
    return 0


def _serve(request: dict[str, Any]) -> dict[str, Any]:
    import_libraries, open_runtime = _make_loaders(request)
    if request.get("explain"):
        from moe2edge.evaluation.profile.explain import explain_once

        return explain_once(request, import_libraries=import_libraries, open_runtime=open_runtime)
    phases = Phases(Meter())
    return measure_once(
        request,
        import_libraries=import_libraries,
        open_runtime=open_runtime,
        phases=phases,
        # It takes an array of memory, which a comparison with other programs has no use for.
        look_after=_look_after if request.get("bandwidth", True) else lambda _: {},
        energy=EnergyMeter(),
    )


def _look_after(runtime: Runtime) -> dict[str, Any]:
    """Return the bytes of the cache, and the bandwidth that the threads of the runtime have."""
    from moe2edge.evaluation.profile.bandwidth import measure_bandwidth

    cache = count_cache_bytes(runtime)
    return {"cache_bytes": cache, "bandwidth": measure_bandwidth(runtime.threads).to_json()}


def _make_loaders(request: dict[str, Any]) -> tuple[Callable[[], None], Callable[[], Runtime]]:
    """Return two functions that import the libraries and open the folder of a request."""
    folder, name, threads = Path(request["folder"]), request["target"], request["threads"]

    def import_libraries() -> None:
        from moe2edge.pipeline.registry import find_target

        # A source checkpoint needs the same libraries as an output of the target hf.
        _import_modules(find_target(name or "hf").libraries, folder)
        if threads is not None:
            import torch

            torch.set_num_threads(threads)

    def open_runtime() -> Runtime:
        from moe2edge.pipeline.registry import make_target

        if name is None:
            from moe2edge.runtime.torch_runtime import open_source

            return open_source(folder, dtype=request["dtype"])
        return make_target(name, request.get("options", {})).reopen(folder)

    return import_libraries, open_runtime


def _import_modules(names: Sequence[str], folder: Path) -> None:
    """Import modules; with transformers, also the code of the model in the folder."""
    for name in names:
        # A missing module is reported, with a remedy, where it is used.
        with suppress(ImportError):
            importlib.import_module(name)
    config = folder / "config.json"
    if not any(name.startswith("transformers") for name in names) or not config.is_file():
        return
    import transformers

    # transformers imports the code of a model on the first access to its class.
    for name in read_json(config).get("architectures") or ():
        getattr(transformers, name, None)


if __name__ == "__main__":
    sys.exit(serve_request())
