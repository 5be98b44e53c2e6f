"""Measure how far equal runs differ, and the tolerances of `gate.yaml` that follow.

    python -m benchmarks.gate.tolerances [--also FOLDER] > benchmarks/gate/tolerances.txt

The built-in model is exported to onnx, and run 20 times with 1, 2 and 4 threads each: in fresh
processes for memory, and for quality in one. A tolerance is twice the largest
difference between any two runs, of whatever threads, and no less than what `LEAST` says: a gate
meets processors and versions of the system that this machine does not show. With --also, another
folder is run as well, 5 times, to see if differences grow with the model.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from moe2edge.calibration.builtin_texts import BUILTIN_TEXT
from moe2edge.calibration.sources import TextSource
from moe2edge.evaluation.gate.rules import MEMORY, QUALITY, SIZE_METRICS, WATCHED_PHASES
from moe2edge.evaluation.profile.measure import profile_folder
from moe2edge.evaluation.profile.metrics import Phase
from moe2edge.evaluation.profile.settings import PRESETS
from moe2edge.evaluation.profile.subject import open_subject

MIB = 1 << 20
THREADS = (1, 2, 4)
# Exports with each number of threads; two equal ones differ in their reports alone.
EXPORTS = 2
EXPORT = ["export", "builtin:tiny-moe", "-t", "onnx", "-r", "w4-rtn"]
# Samples of the text of which quality is measured: few, which differ by more than many.
SAMPLES = 2
# Tolerances that no measurement goes below: a fraction, or bytes of memory.
LEAST = {"folder": 0.005, "perplexity": 0.002, "kl": 0.02, "top1": 0.005}
LEAST_MEMORY, LEAST_MEMORY_PART = 4 * MIB, 0.005

Values = dict[str, list[float]]


def measure_memory(folder: Path, threads: int, runs: int) -> Values:
    """Return the memory of runs of a folder, by the names of metrics."""
    settings = replace(PRESETS["ci"], explain=False, threads=threads, repeats=runs)
    found = profile_folder(folder, text=TextSource(text=BUILTIN_TEXT), settings=settings)
    values: Values = {}
    phases = {phase.name: phase for phase in found.phases}
    for name in WATCHED_PHASES:
        for run in range(runs):
            one = Phase(name, phases[name].samples[run : run + 1], phases[name].floor[run:][:1])
            for kind, value in (
                ("peak_rss", one.largest.peak_rss),
                ("rss_anon", one.largest.rss_anon),
                ("above_floor", one.subtract_floor("peak_rss")),
            ):
                assert value is not None
                values.setdefault(f"{kind}_{name}", []).append(float(value))
    return values


def measure_exports(work: Path, threads: int) -> Values:
    """Export some times; return the sizes."""
    values: Values = {}
    for run in range(EXPORTS):
        out = work / f"{threads}-{run}"
        call([*EXPORT, "--eval", "none", "-o", str(out)], threads)
        subject = open_subject(out)
        read = subject.count_reads()[0]
        assert read is not None
        sizes = (sum(subject.sizes.values()), subject.sizes["weights"], sum(read.values()))
        for name, value in zip(SIZE_METRICS, sizes, strict=True):
            values.setdefault(name, []).append(float(value))
    return values


def measure_quality(folder: Path, threads: int, runs: int) -> Values:
    """Return the quality of a folder, measured again and again in one process."""
    command = [sys.executable, "-m", "benchmarks.gate.tolerances", "--quality", str(folder)]
    env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(
        [*command, "--runs", str(runs)], env=env, check=True, capture_output=True, text=True
    )
    values: Values = json.loads(done.stdout)
    return values


def print_quality(folder: Path, runs: int) -> None:
    """Measure quality, and print it as JSON; the threads are those of the environment."""
    from moe2edge.evaluation.output_quality import evaluate_output
    from moe2edge.progress import QUIET
    from moe2edge.storage.checkpoint import open_checkpoint

    text = TextSource(text=BUILTIN_TEXT, samples=SAMPLES)
    reference = open_checkpoint("builtin:tiny-moe")
    found = [evaluate_output(folder, text, reference, QUIET) for _ in range(runs)]
    print(json.dumps({name: [getattr(one, name) for one in found] for name in QUALITY}))


def call(arguments: Sequence[str], threads: int) -> None:
    """Run moe2edge."""
    env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    subprocess.run(
        [sys.executable, "-m", "moe2edge", *arguments], env=env, check=True, capture_output=True
    )


def derive_tolerance(name: str, values: Sequence[float]) -> str:
    """Return the tolerance that follows from values of equal runs."""
    widest = max(values) - min(values)
    part = 2 * widest / min(values)
    if name in MEMORY:
        absolute = max(LEAST_MEMORY, math.ceil(2 * widest / MIB) * MIB)
        return f"{LEAST_MEMORY_PART:.3f}, or {absolute / MIB:.0f} MiB"
    return f"{max(part, LEAST.get(name, 0)):.3f}"


def print_rows(found: Mapping[int, Values]) -> None:
    """Print a row for each metric: spread with each number of threads, of all, and tolerance."""
    print(f"{'metric':20} {'smallest':>12}  largest difference with", end=" ")
    print(" ".join(f"{threads:>7} thr." for threads in found), f"{'of all':>12}  tolerance")
    for name in next(iter(found.values())):
        of_each = [values[name] for values in found.values()]
        every = [value for values in of_each for value in values]
        print(f"{name:20} {_format(name, min(every)):>12} {'':24}", end=" ")
        for values in (*of_each, every):
            print(f"{_format(name, max(values) - min(values)):>12}", end="")
        print(f"  {derive_tolerance(name, every)}", flush=True)


def _format(name: str, value: float) -> str:
    return f"{value:.6f}" if name in QUALITY else f"{value / MIB:.3f} MiB"


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--also", type=Path, help="another folder")
    parser.add_argument("--quality", type=Path, help="print the quality of this folder")
    asked = parser.parse_args()
    if asked.quality:
        print_quality(asked.quality, asked.runs)
        return
    with tempfile.TemporaryDirectory() as place:
        sizes = {threads: measure_exports(Path(place), threads) for threads in THREADS}
        out = Path(place) / f"{THREADS[0]}-0"
        found = {
            threads: sizes[threads]
            | measure_memory(out, threads, asked.runs)
            | measure_quality(out, threads, asked.runs)
            for threads in THREADS
        }
    print(f"builtin:tiny-moe, onnx, {asked.runs} runs with each number of threads")
    print_rows(found)
    if asked.also:
        print(f"\nanother folder, {asked.also.name}, 5 runs with each number of threads")
        print_rows({threads: measure_memory(asked.also, threads, 5) for threads in THREADS})


if __name__ == "__main__":
    main()
