"""Time of `moe2edge plan` beside importing torch and transformers, for configs of five models.

Both are processes of their own, by turns; the import includes the class of the model, which
transformers imports when it is first used. Seconds are those of the processor, so that other work
on the machine counts little. Python keeps its bytecode, as it does for anybody, whatever the
environment says. ::

    python -m benchmarks.plan.speed [--rounds 5] [--target gguf]
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.plan.shapes import SHAPES, write_config

CLASSES = {"qwen3_5_moe": "Qwen3_5MoeForCausalLM"}


def measure(command: list[str]) -> float:
    """Run a command, and return the processor seconds that it took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    own = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    subprocess.run(
        command, check=True, env=own, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Measure each shape, and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--target", default="gptq")
    options = parser.parse_args()
    print(f"{'model':18} {'import':>8} {'plan':>8} {'ratio':>6}")
    with tempfile.TemporaryDirectory() as place:
        for name, config in SHAPES.items():
            folder = write_config(name, Path(place) / name)
            kind = CLASSES.get(str(config["model_type"]), config["architectures"][0])
            code = f"import torch, transformers; transformers.{kind}"
            plan = ["-m", "moe2edge", "plan", str(folder), "-t", options.target]
            times: list[tuple[float, float]] = []
            for _ in range(options.rounds):
                first = measure([sys.executable, "-c", code])
                times.append((first, measure([sys.executable, *plan])))
            ratio = statistics.median(b / a for a, b in times)
            one, other = (statistics.median(each) for each in zip(*times, strict=True))
            print(f"{name:18} {one:7.2f}s {other:7.2f}s {ratio:6.2f}", flush=True)


if __name__ == "__main__":
    main()
