"""Compare the walk over models in two environments, run by turns in one go.

    python benchmarks/walk_speed.py OLD_PYTHON NEW_PYTHON [--rounds 3] > benchmarks/walk_speed.txt

Each argument is the interpreter of an environment with one version of moe2edge installed. Models of
the families of the table (8 blocks, hidden 256, random) are walked over with 4,096 tokens, four
times in each process, by one thread. Prints the medians of the processor's seconds without the
first walk of a process, and their ratio, new to old.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

COMMON = {"hidden_size": 256, "num_hidden_layers": 8, "num_attention_heads": 8, "vocab_size": 512,
          "num_key_value_heads": 4, "max_position_embeddings": 512}  # fmt: skip
SIZES = {
    "mixtral": {"num_local_experts": 8, "intermediate_size": 256, "num_experts_per_tok": 2},
    "olmoe": {"num_experts": 32, "intermediate_size": 256, "num_experts_per_tok": 8},
    "qwen2_moe": {"num_experts": 32, "moe_intermediate_size": 128, "num_experts_per_tok": 4},
    "qwen3_moe": {"num_local_experts": 32, "moe_intermediate_size": 128, "num_experts_per_tok": 8},
}
WALK = """
import sys, time, torch
torch.set_num_threads(1)
from moe2edge.storage.checkpoint import open_checkpoint
from moe2edge.calibration import walk
model = open_checkpoint(sys.argv[1]).model
ids = torch.randint(1, 90, (16, 256), generator=torch.Generator().manual_seed(0))
for _ in range(4):
    begun = time.process_time()
    walk.observe(model, ids, (), lambda *_: None, "")
    print(time.process_time() - begun)
"""


def measure(python: str, folder: Path) -> list[float]:
    """Return the seconds of a processor of all walks but the first."""
    done = subprocess.run(
        [python, "-c", WALK, str(folder)], check=True, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return [float(line) for line in done.stdout.split()][1:]


def main() -> None:
    """Print one line for each family."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("old")
    parser.add_argument("new")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    from moe2edge.testing import make_checkpoint

    for family, sizes in SIZES.items():
        with tempfile.TemporaryDirectory() as work:
            folder = make_checkpoint(Path(work, family), family, **COMMON, **sizes)
            times: dict[str, list[float]] = {given.old: [], given.new: []}
            for _ in range(given.rounds):
                for python, found in times.items():
                    found += measure(python, folder)
        old, new = (statistics.median(found) for found in times.values())
        print(f"{family}: old {old:.3f} s, new {new:.3f} s, ratio {new / old:.3f}")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
