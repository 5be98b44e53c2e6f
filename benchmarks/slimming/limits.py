"""Memory of an export: flat in the number of blocks, and less than the model.

    python -m benchmarks.slimming.limits [--work DIR]

Makes random-weight models of 8 and 16 blocks of the same width, quantizes both, and compares the
peak RSS; then quantizes the larger one with the data segment of the process limited (RLIMIT_DATA)
to less than the model's size. Results are printed, and written to limits.json.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
BLOCKS = (8, 16)


def make_model(folder: Path, blocks: int) -> int:
    """Make a random-weight model, and return its bytes."""
    if not (folder / "config.json").exists():
        # In a child: the memory of this process counts as that of its children.
        script = [sys.executable, "-m", "benchmarks.slimming.make_random", str(folder.resolve())]
        subprocess.run([*script, "--blocks", str(blocks)], check=True, cwd=ROOT)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def measure_export(model: Path, out: Path, most: int, *, hard: bool) -> dict[str, Any]:
    """Quantize in a child process with a limit of ``most`` bytes: an option, or a hard one."""
    command = [
        sys.executable, "-m", "moe2edge", "export", str(model), "-t", "gptq", "-o", str(out),
        "--set", "calibration.samples=16", "--set", "calibration.length=256", "--eval", "none",
        "--force", "--quiet", "--resume", "never", "--max-memory", str(most),
    ]  # fmt: skip

    def limit() -> None:
        if hard:
            resource.setrlimit(resource.RLIMIT_DATA, (most, most))

    begun = time.perf_counter()
    child = subprocess.Popen(command, preexec_fn=limit, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(child.pid, 0)
    code = os.waitstatus_to_exitcode(status)
    if code:
        raise SystemExit(f"{' '.join(command)} ended with {code}")
    return {
        "seconds": round(time.perf_counter() - begun, 1),
        "peak_rss": used.ru_maxrss * 1024,
        "max_memory": most,
        "rlimit_data": most if hard else None,
    }


def main() -> None:
    """Make the models, measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, help="folder for the models")
    parser.add_argument("--limit", type=int, default=1300, help="MB that each may take")
    options = parser.parse_args()
    most = options.limit * 1_000_000
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        found: dict[str, Any] = {}
        for blocks in BLOCKS:
            model = work / f"random-{blocks}"
            size = make_model(model, blocks)
            row = measure_export(model, work / "out", most, hard=False)
            found[f"{blocks} blocks"] = {"model_bytes": size, **row}
            print(f"{blocks} blocks, {size / 1e9:.2f} GB: {row}", flush=True)
        peaks = [found[f"{blocks} blocks"]["peak_rss"] for blocks in BLOCKS]
        found["ratio"] = round(peaks[1] / peaks[0], 3)
        print(f"peak RSS of 16 blocks over that of 8: {found['ratio']:.3f}", flush=True)
        row = measure_export(model, work / "out", most, hard=True)
        found["limited"] = {"model_bytes": size, **row}
        print(f"16 blocks with RLIMIT_DATA {options.limit} MB: {row}", flush=True)
    (HERE / "limits.json").write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
