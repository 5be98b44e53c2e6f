"""Exports and generation beside busy processes, by how threads wait for each other.

    python -m benchmarks.load.run --cache CACHE [--rounds 5] [--busy 4] [--only export|decode]

Threads that wait for others spin, which is fast where each has a processor of its own and takes
that processor from others where not. Measured in turns, forwards and backwards, alone and beside
busy processes: an export of the built-in model with ``generate`` behind it, and decoding of the
0.94 B model of benchmarks/runtimes (its folders are taken from CACHE, or made there). CACHE is that
of benchmarks/runtimes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks._study import make_table
from benchmarks.runtimes.models import prepare_random, read_options
from moe2edge.evaluation.profile.environment import describe_environment
from moe2edge.evaluation.profile.interleave import Job, run_in_turns
from moe2edge.storage.checkpoint import BUILTIN

# libgomp's count where nothing is set; so many rounds of a loop take about a millisecond.
OWN_COUNT = "300000"
WAITING = {
    "sleep": {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"},
    "spin 2 us, then sleep": {"GOMP_SPINCOUNT": "100"},
    "spin 6 us, then sleep": {"GOMP_SPINCOUNT": "300"},
    "spin 20 us, then sleep": {"GOMP_SPINCOUNT": "1000"},
    "as the library does": {"GOMP_SPINCOUNT": OWN_COUNT},
}
SPINNING = {"sleep": {"SPINNING": "0"}, "as the library does": {"SPINNING": "1"}}
EXPORTS = {
    "as moe2edge does": {},
    "as the library does": {"OMP_WAIT_POLICY": "active", "GOMP_SPINCOUNT": OWN_COUNT},
}
# What a caller may have set must not decide.
SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS", "SPINNING")
PROMPT, GENERATED, PROMPTS = 64, 32, 2


@contextmanager
def keep_busy(count: int) -> Iterator[None]:
    """Run processes that do nothing but take a processor."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def make_environment(settings: Mapping[str, str]) -> dict[str, str]:
    """Return the environment with none of the settings but those given."""
    rest = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    return {**rest, **settings}


def export_once(settings: Mapping[str, str]) -> dict[str, float]:
    """Export the built-in model and let the folder generate; return the seconds of both."""
    with tempfile.TemporaryDirectory() as place:
        out = f"{place}/out"
        export = ["export", BUILTIN, "-t", "onnx", "-o", out, "--eval", "none", "--quiet"]
        generate = ["generate", out, "def f", "-n", "64"]
        return {
            "export, s": run_command(export, settings),
            "generate, s": run_command(generate, settings),
        }


def run_command(arguments: list[str], settings: Mapping[str, str]) -> float:
    """Run a command of moe2edge; return the seconds.

    Raises:
        SystemExit: it failed.
    """
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "moe2edge", *arguments],
        env=make_environment(settings), capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}:\n{done.stdout}{done.stderr}")
    return time.perf_counter() - begin


def decode_once(
    folder: Path, target: str, ids: list[int], settings: Mapping[str, str]
) -> dict[str, float]:
    """Decode in a fresh process; return tokens a second."""
    threads = os.cpu_count() or 1
    request: dict[str, Any] = {
        "folder": str(folder), "target": target, "options": read_options(folder), "dtype": None,
        "prompts": [ids[n * PROMPT : (n + 1) * PROMPT] for n in range(PROMPTS + 1)],
        "gen_tokens": GENERATED, "threads": threads,
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-P", "-m", "moe2edge.evaluation.profile.child"]
        if "SPINNING" not in settings
        else [sys.executable, "-m", "benchmarks.load.decode_once"],
        input=json.dumps(request), capture_output=True, text=True,
        env=make_environment({**settings, "OMP_NUM_THREADS": str(threads)}),
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{folder}: {done.stderr[-2000:]}")
    runs = json.loads(done.stdout)["runs"]
    return {
        "prefill, token/s": PROMPT / statistics.median(run["ttft_s"] for run in runs),
        "decode, token/s": statistics.median(len(r["gaps_s"]) / sum(r["gaps_s"]) for r in runs),
    }


def report(title: str, jobs: Mapping[str, Callable[[], dict[str, float]]], given: Any) -> None:
    """Measure alone and beside busy processes, and print a table."""
    found = {}
    for busy in (0, given.busy):
        with keep_busy(busy):
            rounds = run_in_turns([Job(name, run) for name, run in jobs.items()], given.rounds)
        found[busy] = {name: [one.found[name] for one in rounds] for name in jobs}
    keys = list(found[0][next(iter(jobs))][0])
    heads = ["threads wait"]
    for key in keys:
        heads += [f"{key}, alone", f"beside {given.busy} busy", "beside / alone"]
    rows = []
    for name in jobs:
        row = [name]
        for key in keys:
            values = [[one[key] for one in found[busy][name]] for busy in found]
            alone, beside = (statistics.median(each) for each in values)
            row += [format_spread(each) for each in values] + [f"{beside / alone:.2f}"]
        rows.append(row)
    print(f"\n## {title}\n\n{make_table(rows, heads)}", flush=True)


def format_spread(values: list[float]) -> str:
    """Return the median, with the least and the largest."""
    return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def main() -> None:
    """Print the report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cache", type=Path, required=True, help="that of benchmarks/runtimes")
    parser.add_argument("--rounds", type=int, default=5, help="rounds [default: 5]")
    parser.add_argument("--busy", type=int, default=4, help="busy processes [default: 4]")
    parser.add_argument("--only", choices=("export", "decode"), help="one part [default: both]")
    parser.add_argument("--targets", default="onnx,gguf,gptq", help="for decoding")
    given = parser.parse_args()
    env = describe_environment()
    print(
        f"# Beside busy processes\n\n{env['cpu']['model']}, {env['cpu']['usable']} cores, load at "
        f"the start {env['load_avg']:.1f}; median of {given.rounds} rounds (least to largest), in "
        "turns."
    )
    if given.only != "decode":
        jobs = {name: partial(export_once, settings) for name, settings in EXPORTS.items()}
        report("Export of the built-in model to onnx, and 64 tokens of its folder", jobs, given)
    if given.only != "export":
        subject = prepare_random(given.cache.resolve())
        ids = subject.tokens.tolist()
        for target in given.targets.split(","):
            folder = subject.outputs[target, 16]
            ways = SPINNING if target == "onnx" else WAITING
            jobs = {
                name: partial(decode_once, folder, target, ids, settings)
                for name, settings in ways.items()
            }
            report(f"{subject.title}: {target}", jobs, given)


if __name__ == "__main__":
    main()
