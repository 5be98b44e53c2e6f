"""Time of prompts and tokens with keys and values in int8, and in float32, in one folder.

``moe2edge export builtin:tiny-moe -t onnx:kv_cache=int8 -r w4-rtn -o out``, then
``OMP_NUM_THREADS=1 python benchmarks/onnx_cache.py out 440``.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from moe2edge.targets._onnx_runtime import OnnxRuntime, open_runtime

TOKENS, RUNS = 50, 9


def measure(runtime: OnnxRuntime, prompt: int) -> tuple[float, float]:
    """Return milliseconds of a prompt, and of each of the tokens after it."""
    begun = time.perf_counter()
    runtime.start([5 + n % 90 for n in range(prompt)])
    first = time.perf_counter()
    for _ in range(TOKENS):
        runtime.step(7)
    return 1e3 * (first - begun), 1e3 * (time.perf_counter() - first) / TOKENS


def main() -> None:
    """Run both in turns, and print the best of each."""
    folder, prompt = Path(sys.argv[1]), int(sys.argv[2])
    both = {
        name: open_runtime(folder, whole_cache=name == "float32") for name in ("int8", "float32")
    }
    times = [
        {name: measure(runtime, prompt) for name, runtime in both.items()} for _ in range(RUNS)
    ]
    for name, runtime in both.items():
        size = sum(cache.nbytes for cache in runtime.cached.values()) // (prompt + TOKENS)
        start, token = (min(run[name][n] for run in times) for n in range(2))
        print(f"{name}: {size} bytes a token, prompt {start:.1f} ms, token {token:.2f} ms")


if __name__ == "__main__":
    main()
