"""What `moe2edge plan` says beside what exports and runs take: bytes, memory and time.

The built-in model, and one of 0.49 billion random parameters, to every target whose runtime is
installed. Memory of an export is read every 10 ms (`benchmarks.plan.stages`), that of a running
output by `moe2edge profile`. ::

    python -m benchmarks.plan.compare --work DIR

What is in DIR already, of a run that was interrupted, is not made again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.plan.random_model import MODELS, write_random_model
from benchmarks.plan.stages import run_in_stages

MOE2EDGE = [sys.executable, "-m", "moe2edge"]
# Names in the folder, MODEL, and the options of its exports.
MODELS_BY_LETTER = {
    "b": ("builtin:tiny-moe", ["--set", "evaluation.samples=4"]),
    "w": ("wide", ["--eval", "none"]),
}
RECIPES = {"hf": "trim"}
TARGETS = ("onnx", "gptq", "gguf", "compressed-tensors", "hf")
# Tokens of a run of `profile --preset quick`.
PROFILED = 80


def make(work: Path, letter: str, target: str) -> None:
    """Export a model to a target, with its stages, and profile it; keep all in ``work``."""
    name, options = MODELS_BY_LETTER[letter]
    source = str(work / "wide") if name == "wide" else name
    out, log = work / f"{letter}-{target}", work / f"stage-{letter}-{target}.txt"
    command = list_arguments(source, letter, target)
    if not out.exists():
        stages, code = run_in_stages([*MOE2EDGE, "export", *command, *options, "-o", str(out)])
        lines = (f"{s.seconds:8.1f} s {s.peak / 1e6:8.0f} MB  {s.line}\n" for s in stages)
        log.write_text("".join(lines))
        assert code == 0, log.read_text()
    profile = work / f"prof-{letter}-{target}.json"
    if not profile.exists() or not profile.stat().st_size:
        done = subprocess.run(
            [*MOE2EDGE, "profile", str(out), "--preset", "quick", "--json"],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        profile.write_text(done.stdout)


def list_arguments(source: str, letter: str, target: str) -> list[str]:
    """List the arguments that an export and its plan share."""
    more = ["--set", f"calibration.samples={8 if letter == 'b' else 1}"] if target == "hf" else []
    return [source, "-t", target, "-r", RECIPES.get(target, "w4-rtn"), *more]


def compare(work: Path, letter: str, target: str) -> list[str]:
    """Return the lines of a model in a target."""
    name, options = MODELS_BY_LETTER[letter]
    source = str(work / "wide") if name == "wide" else name
    texts = options if "--set" in options else ["--set", "evaluation.text=none"]
    command = [*MOE2EDGE, "plan", *list_arguments(source, letter, target), *texts]
    command += ["--context", str(PROFILED), "--json"]
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    (plan,) = json.loads(found)["plans"]
    (said,) = plan["targets"]
    folder = work / f"{letter}-{target}"
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    log = (work / f"stage-{letter}-{target}.txt").read_text().splitlines()
    peak = max(float(line[11:20]) for line in log) * 1e6
    seconds = sum(float(line[:8]) for line in log)
    return [
        _line(f"{name} {target} folder", said["disk"], size),
        _line(f"{name} {target} running", said["resident"], _read_resident(work, letter, target)),
        _line(f"{name} {target} export", plan["export"]["memory"], peak),
        f"{f'{name} {target} seconds':45} {plan['export']['seconds']:9.0f} {seconds:9.0f}",
    ]


def _read_resident(work: Path, letter: str, target: str) -> float:
    """Return the largest resident set of a profiled output, behind its loading."""
    found = json.loads((work / f"prof-{letter}-{target}.json").read_text())
    phases: list[dict[str, Any]] = found["memory"]["phases"]
    return max(float(p["peak_rss"]) for p in phases if p["phase"] in ("prefill", "decode"))


def _line(name: str, said: float, measured: float) -> str:
    return f"{name:45} {said / 1e6:9.2f} {measured / 1e6:9.2f} {said / measured - 1:+8.1%}"


def main() -> None:
    """Compare all, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    work = parser.parse_args().work
    work.mkdir(exist_ok=True)
    if not (work / "wide").exists():
        write_random_model(MODELS["wide"], work / "wide")
    print(f"{'MB, but for seconds':45} {'planned':>9} {'measured':>9}")
    for letter in MODELS_BY_LETTER:
        for target in TARGETS:
            make(work, letter, target)
            print("\n".join(compare(work, letter, target)), flush=True)


if __name__ == "__main__":
    main()
