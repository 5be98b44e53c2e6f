"""Compare the start-up time of two environments, run by turns in one go.

    python benchmarks/import_time.py OLD_PYTHON NEW_PYTHON [--runs 30]

Each argument is the interpreter of an environment with one version of moe2edge installed. Runs
``moe2edge --help`` and ``import moe2edge`` in both, old and new in turn, so that what else the
machine does hits both alike. Prints the medians and the median of the paired ratios, new to old,
and which of torch, transformers, onnx and numpy an ``import moe2edge`` loads.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import time

HELP = ("-m", "moe2edge", "--help")
IMPORT = ("-c", "import moe2edge")
HEAVY = ("torch", "transformers", "onnx", "numpy")
LOADED = f"import moe2edge, sys; print([n for n in {HEAVY!r} if n in sys.modules])"


def measure(python: str, arguments: tuple[str, ...]) -> float:
    """Return the seconds of one run of an interpreter with these arguments."""
    begun = time.perf_counter()
    subprocess.run([python, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begun


def main() -> None:
    """Print one line for each command, then what an import loads."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("old")
    parser.add_argument("new")
    parser.add_argument("--runs", type=int, default=30)
    given = parser.parse_args()
    for name, arguments in (("moe2edge --help", HELP), ("import moe2edge", IMPORT)):
        for python in (given.old, given.new):
            measure(python, arguments)  # writes byte code, fills the cache of files
        pairs = [
            (measure(given.old, arguments), measure(given.new, arguments))
            for _ in range(given.runs)
        ]
        old, new = (statistics.median(times) for times in zip(*pairs, strict=True))
        ratio = statistics.median(after / before for before, after in pairs)
        print(f"{name}: old {old:.3f} s, new {new:.3f} s, ratio {ratio:.3f} ({given.runs} pairs)")
    for label, python in (("old", given.old), ("new", given.new)):
        done = subprocess.run([python, "-c", LOADED], check=True, capture_output=True, text=True)
        print(f"{label}: import moe2edge loads {done.stdout.strip()} of {', '.join(HEAVY)}")


if __name__ == "__main__":
    main()
