"""Run the gate on real folders, on a machine that other processes keep busy.

    python -m benchmarks.gate.real_runs --work DIR > benchmarks/gate/real_runs.txt

The built-in model, exported to onnx, is compared with a copy of itself, and then with a copy whose
graphs take 15 % longer and hold 50 MB more (`benchmarks/gate/slowed`), each in fresh processes.
Five pairs are the fewest that there may be, and most open to false alarms. What DIR has of a run
that was interrupted is not made again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MOE2EDGE = [sys.executable, "-m", "moe2edge"]
EXPORT = ["export", "builtin:tiny-moe", "-t", "onnx", "-r", "w4-rtn", "--eval", "none"]
SLOWED = Path(__file__).with_name("slowed")
SLOWED_BY, SLOWED_BYTES = 0.15, 50_000_000
# Metrics that tell the slow-down and the buffer.
TOLD = ("ms_per_token", "peak_rss_decode")


@contextmanager
def keep_busy(count: int) -> Iterator[None]:
    """Let processes compute for nothing meanwhile; they end with this one, however it ends."""
    code = f"import os\nwhile os.getppid() == {os.getpid()}: sum(range(10**6))"
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def slow_folder(folder: Path) -> dict[str, str]:
    """Return the environment in which graphs of a folder are slow and hold a buffer."""
    paths = [str(SLOWED), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "SLOWED_FOLDER": str(folder),
        "SLOWED_BY": str(SLOWED_BY),
        "SLOWED_BYTES": str(SLOWED_BYTES),
    }


def compare_once(base: Path, head: Path, env: dict[str, str], pairs: int) -> dict[str, Any]:
    """Return the document of a comparison in a process of its own."""
    command = [*MOE2EDGE, "compare", str(base), str(head), "--json", "--pairs", str(pairs)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    document: dict[str, Any] = json.loads(done.stdout)
    assert document["ok"], done.stdout
    return {**document, "exit_code": done.returncode}


def count_found(work: Path, name: str, runs: int, pairs: int) -> Iterator[dict[str, Any]]:
    """Compare as often as asked; keep each result in ``work``."""
    base, head = work / "base", work / "head"
    env = slow_folder(head) if name == "slowed" else dict(os.environ)
    for number in range(runs):
        file = work / f"{name}-{number}.json"
        if not file.exists():
            file.write_text(json.dumps(compare_once(base, head, env, pairs)))
        yield json.loads(file.read_text())


def describe(found: dict[str, Any]) -> str:
    """Describe one comparison in a line."""
    rows = {row["name"]: row for row in found["metrics"]}
    told = [
        f"{name} {rows[name]['change']:+.1%} {rows[name]['judgement']}"
        for name in (*TOLD, "ttft_ms", "load_ms")
    ]
    return f"exit code {found['exit_code']}, {found['pairs']} pairs: {', '.join(told)}"


def main() -> None:
    """Compare, and print a line for each comparison and a summary."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--slowed-runs", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--busy", type=int, default=4, help="busy processes beside it")
    asked = parser.parse_args()
    base, head = asked.work / "base", asked.work / "head"
    asked.work.mkdir(parents=True, exist_ok=True)
    if not head.exists():
        shutil.rmtree(base, ignore_errors=True)
        subprocess.run([*MOE2EDGE, *EXPORT, "-o", str(base)], check=True, capture_output=True)
        shutil.copytree(base, head)
    print(f"{asked.busy} busy processes beside it, {os.cpu_count()} cores, {asked.pairs} pairs")
    with keep_busy(asked.busy):
        for name, runs in (("identical", asked.runs), ("slowed", asked.slowed_runs)):
            results = []
            for found in count_found(asked.work, name, runs, asked.pairs):
                results.append(found)
                print(f"{name}: {describe(found)}", flush=True)
            for metric in ("ms_per_token", "ttft_ms", "load_ms", "peak_rss_decode"):
                said = Counter(
                    row["judgement"] for f in results for row in f["metrics"]
                    if row["name"] == metric
                )  # fmt: skip
                print(f"{name}, {metric}: {dict(said)} of {runs}")
            print(f"{name}, exit codes: {dict(Counter(f['exit_code'] for f in results))}")


if __name__ == "__main__":
    main()
