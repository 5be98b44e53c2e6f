"""Memory and speed of a GPTQ folder that runs in 4 bits, beside its source in transformers.

    python -m benchmarks.slimming.packed --folder OUT --source MODEL [--tokens 32] [--repeats 5]
                                         [--device cuda]
    python -m benchmarks.slimming.packed --rows

Each model has a process of its own, and both decode in turn, so that they are timed under the same
conditions and their memory is apart; a third process only imports. On a GPU, memory is that which
torch has allocated there. ``--rows`` measures the number of rows from which on a matrix is better
dequantized than multiplied in 4 bits (``moe2edge.runtime.int4.MANY_ROWS``). Prints a table and one
line of JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

PROMPT = 32
# [out, in] of gate and up of an expert, of its last matrix, and of attention.
SHAPES = ((7168, 1024), (1024, 3584), (2048, 2048))
ROWS = (1, 4, 16, 32, 48, 64, 96, 128, 256, 512)


# ---- a process with one model ------------------------------------------------------------------


def serve(kind: str, place: str, device: str) -> None:
    """Load a model, then decode once for each line on stdin; each answer is a line of JSON."""
    import psutil
    import torch
    import transformers.models.mixtral.modeling_mixtral  # noqa: F401

    from moe2edge import load
    from moe2edge.runtime.torch_runtime import TorchRuntime, open_source

    def memory() -> dict[str, int]:
        if device == "cpu":
            return {"rss": psutil.Process().memory_info().rss, "peak": read_peak()}
        return {"rss": torch.cuda.memory_allocated(), "peak": torch.cuda.max_memory_allocated()}

    begin = time.perf_counter()
    runtime = None
    if kind == "folder":
        runtime = TorchRuntime(load(place, dtype=torch.bfloat16))
    elif kind == "source":
        runtime = open_source(Path(place))
    if runtime is not None:
        runtime.model.to(device)
    send({"load_s": time.perf_counter() - begin, **memory()})
    for line in sys.stdin:
        assert runtime is not None
        send(decode(runtime, int(line)) | memory())


def decode(runtime: Any, tokens: int) -> dict[str, float]:
    """Return the seconds for a prompt, and per token after it."""
    begin = time.perf_counter()
    logits = runtime.start([1 + n % 90 for n in range(PROMPT)])
    prefill = time.perf_counter() - begin
    gaps = []
    for _ in range(tokens):
        begin = time.perf_counter()
        logits = runtime.step(int(logits.argmax()))
        gaps.append(time.perf_counter() - begin)
    return {"prefill_s": prefill, "token_s": statistics.median(gaps)}


def read_peak() -> int:
    """Return the largest resident set so far, in bytes (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def send(data: dict[str, float]) -> None:
    """Write one line of JSON."""
    print("answer", json.dumps(data), flush=True)


class Child:
    """A process that serves one model."""

    def __init__(self, kind: str, place: str, device: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--serve", kind, "--place", place, "--device", device],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.loaded = self._read()

    def decode(self, tokens: int) -> dict[str, float]:
        """Let it decode so many tokens."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{tokens}\n")
        self._process.stdin.flush()
        return self._read()

    def end(self) -> None:
        """Close its stdin and wait for its end."""
        self._process.communicate()

    def _read(self) -> dict[str, float]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("answer "):
                found: dict[str, float] = json.loads(line.removeprefix("answer "))
                return found
        raise SystemExit(f"the process of a model ended with {self._process.wait()}")


# ---- the two measurements ----------------------------------------------------------------------


def compare(folder: str, source: str, tokens: int, repeats: int, device: str) -> dict[str, Any]:
    """Measure memory and time of both, in turn."""
    bare = Child("nothing", "", device)
    bare.end()
    places = {"folder": folder, "source": source}
    children = {name: Child(name, place, device) for name, place in places.items()}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in children}
    for turn in range(repeats + 1):
        for name, child in children.items():
            found = child.decode(tokens)
            if turn:  # the first one warms up
                runs[name].append(found)
    for child in children.values():
        child.end()
    result: dict[str, Any] = {
        "device": device,
        "tokens": tokens,
        "repeats": repeats,
        "import_rss": bare.loaded["rss"],
    }
    for name, found in runs.items():
        size = sum(path.stat().st_size for path in Path(places[name]).glob("*.safetensors"))
        rss = max(run["rss"] for run in found)
        own = rss - result["import_rss"]
        result[name] = {
            "file": size,
            "rss": rss,
            "peak": max(run["peak"] for run in found),
            "own_to_file": own / size,
            "load_s": children[name].loaded["load_s"],
            "prefill_s": statistics.median(run["prefill_s"] for run in found),
            "token_s": statistics.median(run["token_s"] for run in found),
        }
    pairs = zip(runs["source"], runs["folder"], strict=True)
    result["speedups"] = [theirs["token_s"] / ours["token_s"] for theirs, ours in pairs]
    return result


def show(result: dict[str, Any]) -> None:
    """Print the table."""
    print(
        f"{result['device']}; import of torch and transformers: {result['import_rss'] / 1e9:.2f} GB"
    )
    heads = ("file GB", "RSS GB", "peak GB", "own/file", "load s", "prefill ms", "ms/token")
    print(f"{'':8}" + "".join(f"{head:>11}" for head in heads))
    for name in ("folder", "source"):
        row = result[name]
        values = [row["file"] / 1e9, row["rss"] / 1e9, row["peak"] / 1e9, row["own_to_file"]]
        values += [row["load_s"], row["prefill_s"] * 1e3, row["token_s"] * 1e3]
        print(f"{name:8}" + "".join(f"{value:11.2f}" for value in values))
    ratios = result["speedups"]
    print(
        f"decode, source / folder: median {statistics.median(ratios):.2f} "
        f"({min(ratios):.2f} to {max(ratios):.2f})"
    )


def measure_rows() -> dict[str, Any]:
    """Return by shape and number of rows the time in 4 bits over that of dequantizing first."""
    import torch

    from moe2edge.numerics.rounding import round_to_nearest
    from moe2edge.numerics.scheme import Scheme
    from moe2edge.runtime import int4
    from moe2edge.runtime.int4 import PackedLinear

    found: dict[str, Any] = {}
    for outs, ins in SHAPES:
        linear = PackedLinear([round_to_nearest(torch.randn(outs, ins), Scheme())])

        ratios = {}
        for count in ROWS:
            x = torch.randn(count, ins).to(torch.bfloat16)

            def run(many: int, x: torch.Tensor = x, linear: PackedLinear = linear) -> None:
                int4.MANY_ROWS = many
                linear(x)

            ratios[count] = compare_times(partial(run, count + 1), partial(run, 1))
        found[f"{outs} x {ins}"] = ratios
        print(f"{outs} x {ins}: " + ", ".join(f"{n}: {r:.2f}" for n, r in ratios.items()))
    return found


def compare_times(one: Callable[[], None], other: Callable[[], None], repeats: int = 15) -> float:
    """Return the processor time of one over that of the other, the best of several runs each."""
    best = [float("inf")] * 2
    for _ in range(repeats):
        for n, function in enumerate((one, other)):
            begin = time.process_time()
            function()
            best[n] = min(best[n], time.process_time() - begin)
    return best[0] / best[1]


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--folder", help="an output of target gptq")
    parser.add_argument("--source", help="the checkpoint that it was made of")
    parser.add_argument("--tokens", type=int, default=32, help="decoded in a repeat")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rows", action="store_true", help="measure MANY_ROWS instead")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--place", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve(given.serve, given.place, given.device)
        return
    if given.rows:
        result = measure_rows()
    elif given.folder and given.source:
        result = compare(given.folder, given.source, given.tokens, given.repeats, given.device)
        show(result)
    else:
        parser.error("give --folder and --source, or --rows")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
