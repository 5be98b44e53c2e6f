"""Speed, memory and size of one model in several formats, each in the runtime that it is for.

    python -m benchmarks.runtimes.run --cache CACHE
    python -m benchmarks.runtimes.run --cache CACHE --genai ENVIRONMENT --tools TOOLS --quick

The built-in model and a random one in the layout of OLMoE (0.94 B) are exported once, into CACHE:
as ONNX graph, GPTQ checkpoint and GGUF file with the same integers, and with head and embedding in
8 bits. They and the source, in transformers in bfloat16, run in turns, each time in a fresh
process: forwards, then backwards. Ratios are those of one round; the median, and the least and the
largest. ``--genai`` names an environment with onnxruntime-genai, which runs the same graphs in its
own loop; ``--tools`` the folder of benchmarks/gguf_quality/build_tools.sh, whose ``llama-bench``
runs the same files. ``--quick``: fewer rounds and tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks._study import make_table
from benchmarks.runtimes.models import (
    Subject,
    measure_size,
    prepare_builtin,
    prepare_random,
    read_options,
)
from moe2edge.evaluation.profile.environment import describe_environment

HERE = Path(__file__).parent
MODELS = {"builtin": prepare_builtin, "random": prepare_random}
# The built-in model has 512 positions, one of them for the token behind the prompt.
SHORT, LONG = 128, 511
RATES = {f"prefill{n}": f"prefill {n}" for n in (SHORT, LONG)} | {"decode": "decode"}
# Pairs of which ratios are shown, and the ratio is that of the first to the second.
SOURCE = "transformers, bfloat16"
PAIRS = (
    ("GGUF", "ONNX"), ("ONNX", "ONNX in onnxruntime-genai"), ("GGUF", "GGUF in llama-bench"),
    ("ONNX, head 8", "ONNX"), ("GGUF, head 8", "GGUF"), ("GGUF, head 8", "ONNX, head 8"),
)  # fmt: skip
NAMES = {"onnx": "ONNX", "gptq": "GPTQ", "gguf": "GGUF"}


@dataclass(frozen=True)
class Work:
    """What a process does.

    Attributes:
        gen_tokens: tokens behind each short prompt.
        prompts: prompts of each length that are timed.
        threads: processor threads.
    """

    gen_tokens: int
    prompts: int
    threads: int


@dataclass(frozen=True)
class Job:
    """A form of a model, in a runtime.

    Attributes:
        title: its name.
        size: bytes of weights and graph.
        run: measures once; returns rates in tokens a second, and bytes of memory.
    """

    title: str
    size: int
    run: Callable[[], Mapping[str, float]]


def list_jobs(subject: Subject, work: Work, genai: Path | None, bench: Path | None) -> list[Job]:
    """List the forms of a model."""
    child = [sys.executable, "-P", "-m", "moe2edge.evaluation.profile.child"]
    plain = {"folder": str(subject.source), "target": None, "dtype": "bfloat16"}
    jobs = [Job(SOURCE, measure_size(subject.source), partial(ask, child, plain, subject, work))]
    for (target, bits), folder in subject.outputs.items():
        title = NAMES[target] + ("" if bits == 16 else f", head {bits}")
        size = measure_size(folder)
        about = {"folder": str(folder), "target": target, "options": read_options(folder)}
        about["dtype"] = None
        jobs.append(Job(title, size, partial(ask, child, about, subject, work)))
        if target == "onnx" and genai is not None:
            command = [str(genai), str(HERE / "read_genai.py")]
            run = partial(ask, command, about, subject, work)
            jobs.append(Job(f"{title} in onnxruntime-genai", size, run))
        if target == "gguf" and bench is not None:
            run = partial(run_bench, bench, folder / "model.gguf", work)
            jobs.append(Job(f"{title} in llama-bench", size, run))
    return jobs


def ask(
    command: Sequence[str], about: Mapping[str, Any], subject: Subject, work: Work
) -> dict[str, float]:
    """Measure short and long prompts, in a process each."""
    short = _ask(command, about, subject, work, SHORT, work.gen_tokens)
    long = _ask(command, about, subject, work, LONG, 1)
    gaps = [gap for one in short["runs"] for gap in one["gaps_s"]]
    phases = [reply["memory"]["phases"] for reply in (short, long)]
    return {
        f"prefill{SHORT}": SHORT / statistics.median(one["ttft_s"] for one in short["runs"]),
        f"prefill{LONG}": LONG / statistics.median(one["ttft_s"] for one in long["runs"]),
        "decode": 1 / statistics.median(gaps),
        "peak": max(one["peak_rss"] for found in phases for one in found.values()),
        "libraries": max(found["import"]["rss"] for found in phases),
    }


def _ask(
    command: Sequence[str],
    about: Mapping[str, Any],
    subject: Subject,
    work: Work,
    length: int,
    gen_tokens: int,
) -> dict[str, Any]:
    ids = subject.tokens.tolist()
    stride = (len(ids) - length) // work.prompts
    prompts = [ids[n * stride : n * stride + length] for n in range(work.prompts + 1)]
    request = {**about, "prompts": prompts, "gen_tokens": gen_tokens, "threads": work.threads}
    done = subprocess.run(
        command,
        input=json.dumps(request),
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(work.threads)},
    )
    if done.returncode:
        raise SystemExit(f"{about['folder']}: {done.stderr[-2000:]}")
    reply: dict[str, Any] = json.loads(done.stdout)
    return reply


def run_bench(bench: Path, file: Path, work: Work) -> dict[str, float]:
    """Measure a file with ``llama-bench``; tokens are decoded behind a short prompt."""
    found, peak = {}, 0
    tests = [["-p", f"{SHORT},{LONG}", "-n", "0"], ["-p", "0", "-n", str(work.gen_tokens)]]
    tests[1] += ["-d", str(SHORT)]
    for test in tests:
        command = [str(bench), "-m", str(file), "-o", "json", "-t", str(work.threads), *test]
        command += ["-r", str(work.prompts), "-ngl", "0"]
        with tempfile.TemporaryFile() as out:
            child = subprocess.Popen(command, stdout=out, stderr=subprocess.DEVNULL)
            _, code, usage = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(code)
            out.seek(0)
            if code:
                raise SystemExit(f"{' '.join(command)} ended with {child.returncode}")
            for row in json.load(out):
                key = f"prefill{row['n_prompt']}" if row["n_prompt"] else "decode"
                found[key] = row["avg_ts"]
        peak = max(peak, 1024 * usage.ru_maxrss)
    return {**found, "peak": peak, "libraries": 0}


def run_in_turns(jobs: Sequence[Job], rounds: int) -> dict[str, list[Mapping[str, float]]]:
    """Run every job once a round, in turns forwards and backwards; return what each found."""
    found: dict[str, list[Mapping[str, float]]] = {job.title: [] for job in jobs}
    for number in range(rounds):
        for job in jobs[::-1] if number % 2 else jobs:
            found[job.title].append(job.run())
            print(f"round {number + 1} of {rounds}: {job.title}", file=sys.stderr, flush=True)
    return found


def format_ratio(mine: Sequence[float], theirs: Sequence[float]) -> str:
    """Return the median ratio of one round, with the least and the largest."""
    ratios = [a / b for a, b in zip(mine, theirs, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def report(subject: Subject, jobs: Sequence[Job], rounds: int) -> None:
    """Measure, and print the tables of a model."""
    found = run_in_turns(jobs, rounds)

    def collect(title: str, key: str) -> list[float]:
        return [one[key] for one in found[title]]

    print(f"\n## {subject.title}\n")
    lines = []
    for job in jobs:
        cells = [f"{statistics.median(collect(job.title, key)):,.1f}" for key in RATES]
        peak, before = (max(collect(job.title, key)) / 1e6 for key in ("peak", "libraries"))
        memory = [f"{peak:,.0f}", f"{before:,.0f}" if before else "-"]
        lines.append([job.title, f"{job.size / 1e6:,.1f}", *memory, *cells])
    heads = ["form", "MB of file", "peak RSS, MB", "of it before loading", *RATES.values()]
    print(make_table(lines, heads))
    print("\nTimes as fast, median of rounds (least to largest):\n")
    pairs = [(job.title, SOURCE) for job in jobs if job.title != SOURCE]
    pairs += [pair for pair in PAIRS if {*pair} <= found.keys()]
    ratios = [
        [f"{a} / {b}", *(format_ratio(collect(a, key), collect(b, key)) for key in RATES)]
        for a, b in pairs
    ]
    print(make_table(ratios, ["pair", *RATES.values()]), flush=True)


def describe(work: Work, rounds: int, genai: Path | None, bench: Path | None) -> str:
    """Return versions, the machine and what was run."""
    names = ("moe2edge", "onnxruntime", "xllamacpp", "torch", "transformers")
    found = [f"{name} {version(name)}" for name in names]
    if genai is not None:
        code = "import onnxruntime_genai, onnxruntime; " + (
            "print(onnxruntime_genai.__version__, 'on onnxruntime', onnxruntime.__version__)"
        )
        said = subprocess.run([genai, "-c", code], capture_output=True, text=True, check=True)
        found.append(f"onnxruntime-genai {said.stdout.strip()}")
    if bench is not None:
        found.append(f"llama-bench of {bench.parents[2].name}")
    env = describe_environment()
    cpu = env["cpu"]
    return (
        f"{', '.join(found)}\n\n{cpu['model']}, {cpu['usable']} cores, {work.threads} threads, "
        f"load at the start {env['load_avg']:.1f}; {rounds} rounds, {work.prompts} prompts of each "
        f"length in a process after one to warm up, {work.gen_tokens} tokens behind each of "
        f"{SHORT}.\n\n"
        "Prefill and decode in tokens a second, median of rounds. Of peak RSS, what is there "
        "before the model is loaded is Python and its libraries; all forms but those of other "
        "programs import PyTorch."
    )


def main() -> None:
    """Print the report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cache", type=Path, required=True, help="folder for models, kept")
    parser.add_argument("--genai", type=Path, help="environment with onnxruntime-genai")
    parser.add_argument("--tools", type=Path, help="folder of build_tools.sh")
    parser.add_argument("--rounds", type=int, help="rounds [default: 6; 2 with --quick]")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="[default: all]")
    parser.add_argument("--quick", action="store_true", help="fewer rounds and tokens")
    parser.add_argument("--only", choices=MODELS, help="one model [default: both]")
    given = parser.parse_args()
    work = Work(16 if given.quick else 64, 1 if given.quick else 3, given.threads)
    rounds = given.rounds or (2 if given.quick else 6)
    genai = given.genai and given.genai.absolute() / "bin" / "python"
    bench = given.tools and given.tools.resolve() / "build" / "bin" / "llama-bench"
    cache = given.cache.resolve()
    print("# Runtimes\n")
    print(describe(work, rounds, genai, bench), flush=True)
    for name in [given.only] if given.only else MODELS:
        subject = MODELS[name](cache)
        report(subject, list_jobs(subject, work, genai, bench), rounds)


if __name__ == "__main__":
    main()
