"""Numbers of ``moe2edge profile`` beside those of other programs on the same folders.

    python -m benchmarks.profile.references --cache CACHE --genai ENVIRONMENT --tools TOOLS
        [--rounds 5]

On the 0.94 B model of benchmarks/runtimes (CACHE is that one's), in turns, forwards and backwards:

- decoding: ``profile`` beside the loop of onnxruntime-genai and beside ``llama-bench``;
- peak memory: ``profile`` beside ``/usr/bin/time -v`` of a process that does the same
  (whole_peak.py says why it is another one);
- bytes of the weights: ``profile`` beside the sizes of the files, counted by ``stat``.

xllamacpp's library is built for AVX2. ``llama-bench`` of TOOLS (benchmarks/gguf_quality/
build_tools.sh TOOLS 2 -DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON)
must be, too: built for this processor it decodes about a tenth faster with AVX512. Prompts, threads
and the positions that tokens are decoded at are the same everywhere.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks._study import make_table
from benchmarks.runtimes.models import Subject, prepare_random, read_options
from moe2edge.evaluation.profile.environment import describe_environment
from moe2edge.evaluation.profile.interleave import Job, run_in_turns
from moe2edge.evaluation.profile.subject import measure_sizes
from moe2edge.runtime.waiting import choose_waiting

PROMPT, GENERATED, PROMPTS = 128, 48, 3
CHILD = ["-P", "-m", "moe2edge.evaluation.profile.child"]
GENAI = Path(__file__).parents[1] / "runtimes" / "read_genai.py"
WEIGHTS = ("*.safetensors", "*.gguf", "*.onnx.data")


def cut_prompts(subject: Subject) -> list[list[int]]:
    """Cut prompts, the first of which is the warm-up."""
    ids = subject.tokens.tolist()
    return [ids[n * PROMPT : (n + 1) * PROMPT] for n in range(PROMPTS + 1)]


def ask(command: Sequence[str], folder: Path, target: str, subject: Subject) -> dict[str, float]:
    """Let a child of ``profile``, or the loop of genai, decode; return rate and memory."""
    threads = os.cpu_count() or 1
    request: dict[str, Any] = {
        "folder": str(folder), "target": target, "options": read_options(folder), "dtype": None,
        "prompts": cut_prompts(subject), "gen_tokens": GENERATED, "threads": threads,
        "bandwidth": False,
    }  # fmt: skip
    done = subprocess.run(
        ["/usr/bin/time", "-v", *command],
        input=json.dumps(request), capture_output=True, text=True, env=make_environment(threads),
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr[-2000:]}")
    reply = json.loads(done.stdout)
    said = re.search(r"Maximum resident set size \(kbytes\): (\d+)", done.stderr)
    assert said is not None, "GNU time says something else"
    return {
        "decode": statistics.median(
            len(run["gaps_s"]) / sum(run["gaps_s"]) for run in reply["runs"]
        ),
        "peak": max(one["peak_rss"] for one in reply["memory"]["phases"].values()),
        "time -v": 1024 * int(said[1]),
    }


def make_environment(threads: int) -> dict[str, str]:
    """Return the environment that ``profile`` gives its processes."""
    rest = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    return {**rest, **choose_waiting({}), "OMP_NUM_THREADS": str(threads)}


def run_bench(bench: Path, file: Path) -> dict[str, float]:
    """Let ``llama-bench`` decode behind as long a text."""
    threads = os.cpu_count() or 1
    command = [str(bench), "-m", str(file), "-o", "json", "-t", str(threads), "-p", "0"]
    command += ["-n", str(GENERATED - 1), "-d", str(PROMPT), "-r", str(PROMPTS), "-ngl", "0"]
    done = subprocess.run(command, capture_output=True, text=True, env=make_environment(threads))
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr[-2000:]}")
    return {"decode": statistics.median(json.loads(done.stdout)[0]["samples_ts"])}


def compare_rates(
    found: Sequence[Mapping[str, Mapping[str, float]]], mine: str, theirs: str
) -> list[str]:
    """Return a row: both rates, and the ratio of a round, with the least and the largest."""
    pairs = [(one[mine]["decode"], one[theirs]["decode"]) for one in found]
    ratios = [a / b for a, b in pairs]
    rates = [f"{statistics.median(side):.1f}" for side in zip(*pairs, strict=True)]
    middle = statistics.median(ratios)
    verdict = "within 10 %" if abs(middle - 1) <= 0.1 else "MORE THAN 10 % OFF"
    shown = f"{middle:.3f} ({min(ratios):.2f} to {max(ratios):.2f})"
    return [f"{mine} / {theirs}", *rates, shown, verdict]


def compare_peaks(found: Sequence[Mapping[str, Mapping[str, float]]], name: str) -> list[str]:
    """Return a row: the peak of ``profile`` and that of ``/usr/bin/time -v``."""
    pairs = [(one[name]["peak"], one[f"{name}, whole"]["time -v"]) for one in found]
    worst = max((a / b for a, b in pairs), key=lambda ratio: abs(ratio - 1))
    sides = [f"{statistics.median(side) / 2**20:,.1f}" for side in zip(*pairs, strict=True)]
    verdict = "within 3 %" if abs(worst - 1) <= 0.03 else "MORE THAN 3 % OFF"
    return [name, *sides, f"{worst:.4f}", verdict]


def main() -> None:
    """Print the report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cache", type=Path, required=True, help="that of benchmarks/runtimes")
    parser.add_argument("--genai", type=Path, required=True, help="its environment")
    parser.add_argument("--tools", type=Path, required=True, help="folder of build_tools.sh")
    parser.add_argument("--rounds", type=int, default=5, help="rounds [default: 5]")
    given = parser.parse_args()
    subject = prepare_random(given.cache.resolve())
    folders = {name: subject.outputs[name, 16] for name in ("onnx", "gguf", "gptq")}
    bench = given.tools.resolve() / "build" / "bin" / "llama-bench"
    genai = [str(given.genai.absolute() / "bin" / "python"), str(GENAI)]
    jobs = [
        Job(f"profile, {name}", partial(ask, [sys.executable, *CHILD], folder, name, subject))
        for name, folder in folders.items()
    ]
    whole = [sys.executable, "-m", "benchmarks.profile.whole_peak"]
    jobs += [
        Job(f"profile, {name}, whole", partial(ask, whole, folders[name], name, subject))
        for name in ("onnx", "gptq")
    ]
    jobs += [
        Job("onnxruntime-genai", partial(ask, genai, folders["onnx"], "onnx", subject)),
        Job("llama-bench", partial(run_bench, bench, folders["gguf"] / "model.gguf")),
    ]
    env = describe_environment()
    print(
        f"# A profile beside other programs\n\n{subject.title}; {env['cpu']['model']}, "
        f"{env['cpu']['usable']} cores, load at the start {env['load_avg']:.1f}; {given.rounds} "
        f"rounds in turns, {PROMPTS} prompts of {PROMPT} tokens, {GENERATED} generated.\n",
        flush=True,
    )
    found = [one.found for one in run_in_turns(jobs, given.rounds)]
    pairs = (("profile, onnx", "onnxruntime-genai"), ("profile, gguf", "llama-bench"))
    rows = [compare_rates(found, *pair) for pair in pairs]
    print(make_table(rows, ["decode, token/s", "first", "second", "ratio of a round", ""]))
    # That of gguf is the sum of two processes, which time -v does not tell.
    peaks = [compare_peaks(found, f"profile, {name}") for name in ("onnx", "gptq")]
    print("\n" + make_table(peaks, ["peak RSS, MiB", "profile", "time -v", "worst ratio", ""]))
    lines = []
    for name, folder in folders.items():
        files = sum(p.stat().st_size for pattern in WEIGHTS for p in folder.glob(pattern))
        told = measure_sizes(folder)["weights"]
        lines.append([name, f"{told:,}", f"{files:,}", "equal" if told == files else "NOT EQUAL"])
    print("\n" + make_table(lines, ["bytes of weights", "profile", "files", ""]))


if __name__ == "__main__":
    main()
