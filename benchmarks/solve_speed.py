"""Compare the GPTQ solve of a block in two environments, run by turns in one go.

    python -m benchmarks.solve_speed OLD_PYTHON NEW_PYTHON [--rounds 3] > benchmarks/solve_speed.txt

Each argument is the interpreter of an environment with one version of moe2edge installed. One block
of OLMoE-1B-7B with 48 of its 64 experts and random weights is solved with 32 samples of 512 tokens
by two threads. Prints for each run the seconds of the processor, which other work on the machine
changes little, those of the clock, and the peak memory; and the medians of the ratios of a round,
new to old. Takes about 1 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.plan.random_model import write_random_model
from benchmarks.plan.shapes import SHAPES

SOLVE = """
import json, resource, sys, time, torch
torch.set_num_threads(2)
from moe2edge.passes.gptq import Gptq
from moe2edge.pipeline.blockwise import solve_blocks
from moe2edge.storage.checkpoint import open_checkpoint
from moe2edge.testing import InMemory
model = open_checkpoint(sys.argv[1]).model
ids = torch.randint(1, 4000, (32, 512), generator=torch.Generator().manual_seed(0))
solver = Gptq(compute=sys.argv[2]).resolve(model).solver(model)
begun = time.process_time(), time.perf_counter()
solve_blocks(model, ids, solver, InMemory(), lambda *_: None, "")
ended = time.process_time(), time.perf_counter()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
print(json.dumps([ended[0] - begun[0], ended[1] - begun[1], peak]))
"""


def measure(python: str, folder: Path, compute: str) -> list[float]:
    """Return seconds of the processor and of the clock, and GB of memory, of one run."""
    done = subprocess.run(
        [python, "-c", SOLVE, str(folder), compute], check=True, capture_output=True, text=True,
        cwd=folder.parent, env={**os.environ, "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"},
    )  # fmt: skip
    found: list[float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Print one line for each run, and the medians."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("old")
    parser.add_argument("new")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compute", default="auto", choices=["auto", "float32", "bfloat16"])
    given = parser.parse_args()
    config = {**SHAPES["OLMoE-1B-7B"], "num_hidden_layers": 1, "num_experts": 48}
    ratios = []
    with tempfile.TemporaryDirectory() as work:
        folder = write_random_model(config, Path(work, "block"))
        for _ in range(given.rounds):
            runs = [measure(python, folder, given.compute) for python in (given.old, given.new)]
            for name, (processor, clock, peak) in zip(("old", "new"), runs, strict=True):
                print(f"{name}: processor {processor:.1f} s, clock {clock:.1f} s, {peak:.2f} GB")
            ratios.append([new / old for old, new in zip(*runs, strict=True)])
            sys.stdout.flush()
    processor, clock, peak = (statistics.median(each) for each in zip(*ratios, strict=True))
    print(f"new to old: processor {processor:.3f}, clock {clock:.3f}, memory {peak:.3f}")


if __name__ == "__main__":
    main()
