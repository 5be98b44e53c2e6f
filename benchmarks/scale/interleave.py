"""Time of whole exports of two blocks of OLMoE-1B-7B by two builds, by turns: A B, B A, ...

Each build is an interpreter in which it is installed. The model is written once, by the build that
runs this; exports are those of `benchmarks.scale.run`, to ONNX and GPTQ. ::

    python -m benchmarks.scale.interleave --work DIR OLD_PYTHON NEW_PYTHON [--rounds 2]

Times are kept in DIR, so that a run that was interrupted goes on; outputs are removed.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
from pathlib import Path

from benchmarks.scale.exports import export, keep, read_kept
from benchmarks.scale.models import write_shape

MODEL, BLOCKS, SIDES = "OLMoE-1B-7B", 2, ("old", "new")


def main() -> None:
    """Export by turns, and print the times and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--limit", type=int, default=24 << 30, help="bytes of memory")
    parser.add_argument("--targets", default="onnx,gptq")
    parser.add_argument("python", nargs=2)
    options = parser.parse_args()
    work: Path = options.work.resolve()
    work.mkdir(exist_ok=True)
    source = write_shape(MODEL, work / f"{MODEL}-{BLOCKS}", BLOCKS)
    times: dict[str, dict[str, float]] = {}
    for turn in range(2 * options.rounds):
        # A B, B A: what a machine does over time counts for both.
        side = (turn + turn // 2) % 2
        name = f"{SIDES[side]}-{turn // 2}"
        path = work / f"{name}.json"
        found = read_kept(path)
        if found is None:
            # One that was interrupted begins again: its time is wanted as a whole.
            for rest in work.glob(f"{name}-out*"):
                shutil.rmtree(rest) if rest.is_dir() else rest.unlink()
            out = work / f"{name}-out"
            stages = export(options.python[side], source, options.targets, out, options.limit)
            found = {stage.name: stage.seconds for stage in stages}
            keep(path, found)
            shutil.rmtree(out)
        times[name] = found
        print(f"{name:8} {sum(found.values()):8.1f} s", flush=True)
    names = dict.fromkeys(stage for one in times.values() for stage in one)
    print(f"{'stage':22} {'old':>8} {'new':>8} {'new/old':>8}")
    for stage in (*names, "all"):
        old, new = (
            statistics.median(
                sum(one.values()) if stage == "all" else one.get(stage, 0.0)
                for name, one in times.items()
                if name.startswith(side)
            )
            for side in SIDES
        )
        ratio = f"{new / old:8.2f}" if old else " " * 8
        print(f"{stage:22} {old:7.1f}s {new:7.1f}s {ratio}")


if __name__ == "__main__":
    main()
