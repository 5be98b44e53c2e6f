"""Compare the KL after GPTQ in two environments, on draws of calibration samples.

    python -m benchmarks.solve_quality OLD_PYTHON NEW_PYTHON [--model FOLDER]
        > benchmarks/solve_quality.txt

Each argument is the interpreter of an environment with one version of moe2edge installed. A model
(by default the built-in one) is quantized to 4 bits in groups of 64, `compute: bfloat16`, with 16
of 24 samples of 256 tokens of the built-in text, three draws. Prints the KL to the source in nats a
token, on 8 held-out samples of 512 tokens. Differences between draws are the noise.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

SOLVE = """
import sys, torch
torch.set_num_threads(1)
from moe2edge.calibration import walk
from moe2edge.calibration.sources import TextSource
from moe2edge.calibration.tokens import load_tokens
from moe2edge.numerics import metrics
from moe2edge.passes.gptq import Gptq
from moe2edge.pipeline.blockwise import solve_blocks
from moe2edge.storage.checkpoint import open_checkpoint
from moe2edge.storage.tokenizer import load_tokenizer
from moe2edge.testing import InMemory
ignore = lambda *_: None
checkpoint = open_checkpoint(sys.argv[1])
model, tokenizer = checkpoint.model, load_tokenizer(checkpoint.folder)
def load(purpose, samples, length):
    source = TextSource(text="builtin", samples=samples, length=length)
    return load_tokens(source, tokenizer, purpose, (512, model.vocabulary)).ids
held_out, text = load("evaluation", 8, 512), load("calibration", 24, 256)
def run(model):
    return walk.compute_logits(model, walk.observe(model, held_out, (), ignore, ""))
source, found = list(run(model)), []
for seed in range(3):
    some = text[torch.randperm(24, generator=torch.Generator().manual_seed(seed))[:16]]
    step = Gptq(bits=4, group_size=64, compute="bfloat16").resolve(model)
    after, _, _ = solve_blocks(model, some, step.solver(model), InMemory(), ignore, "")
    found.append(metrics.measure(held_out, run(after), iter(source)).kl)
print(*(f"{kl:.5f}" for kl in found), f"mean {sum(found) / 3:.5f}")
"""


def main() -> None:
    """Print a line for each environment."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("old")
    parser.add_argument("new")
    parser.add_argument("--model", default="builtin:tiny-moe")
    given = parser.parse_args()
    model = given.model if given.model.startswith("builtin") else str(Path(given.model).resolve())
    with tempfile.TemporaryDirectory() as work:
        for name, python in (("old", given.old), ("new", given.new)):
            done = subprocess.run(
                [python, "-c", SOLVE, model], check=True, capture_output=True, text=True, cwd=work,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
            print(f"{Path(model).name}, {name}: {done.stdout.splitlines()[-1]}")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
