"""Plan and export checkpoints of published shapes under a limit of memory, and compare the two.

Each model is written, planned, exported to its targets (a quarter of the experts dropped, GPTQ; 32
samples of 512 tokens), and made to generate; memory is read every 10 ms, of all processes of the
export. Whether a control group holds the limit, or only ``--max-memory`` says it, is printed. ::

    python -m benchmarks.scale.run --work DIR                         # OLMoE-1B-7B whole, 30 GB
    python -m benchmarks.scale.run --work DIR --models Mixtral-8x7B,Qwen3-30B-A3B --delete
    python -m benchmarks.scale.run --work DIR --models OLMoE-1B-7B:2  # the first two blocks

What is in DIR already is not made again; an export that was interrupted goes on, and its stages are
then those of the last run, which is said. ``--delete`` removes checkpoint and outputs of a model
before the next one; the numbers stay. The exit code is 1 if a stage takes more than it may.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.scale.exports import (
    PLANNED_TEXTS,
    RECIPE,
    export,
    find_scope,
    keep,
    measure_folder,
    measure_import,
    read_kept,
)
from benchmarks.scale.models import BLOCKS, write_shape

MOE2EDGE = (sys.executable, "-m", "moe2edge")
# Families whose graph ONNX holds get both targets.
TARGETS = {"OLMoE-1B-7B": "onnx,gptq", "Mixtral-8x7B": "onnx,gptq", "Qwen3-30B-A3B": "onnx,gptq"}
OTHERS = "gptq"
# Bytes above torch's import that a stage up to the written files may take; and of a stage in which
# a runtime holds the model, as a multiple of the weights of the output, and bytes beyond it.
ABOVE_IMPORT, OF_WEIGHTS, BEYOND_WEIGHTS = 3_000_000_000, 1.3, 1_000_000_000


def plan(source: Path, targets: str, work: Path, limit: int) -> dict[str, Any]:
    """Plan an export, and return what `plan` says of it."""
    recipe = work / "recipe.yaml"
    recipe.write_text(RECIPE)
    command = [*MOE2EDGE, "plan", str(source), "-t", targets, "-r", str(recipe)]
    command += [*PLANNED_TEXTS, "--max-memory", str(limit), "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}:\n{done.stderr[-2000:]}")
    (found,) = json.loads(done.stdout)["plans"]
    return dict(found)


def measure(name: str, work: Path, limit: int) -> dict[str, Any]:
    """Write, plan, export and run a model; return all numbers, which are kept."""
    place = name.replace(":", "-")
    numbers = work / f"{place}.json"
    if (kept := read_kept(numbers)) is not None:
        return dict(kept)
    shape, _, number = name.partition(":")
    blocks = int(number) if number else BLOCKS[shape]
    targets = TARGETS.get(shape, OTHERS)
    source = write_shape(shape, work / place, blocks)
    planned, out = plan(source, targets, work, limit), work / f"{place}-out"
    resumed = out.with_name(f"{out.name}.log").exists()
    peaks = export(sys.executable, source, targets, out, limit)
    folders = {t: out / t if "," in targets else out for t in targets.split(",")}
    found = {
        "model": name,
        "blocks": blocks,
        "plan": planned,
        "resumed": resumed,
        "stages": [vars(peak) for peak in peaks],
        "folders": {target: measure_folder(folder) for target, folder in folders.items()},
        "generated": {target: generate(folder) for target, folder in folders.items()},
    }
    keep(numbers, found)
    return found


def generate(folder: Path) -> list[int]:
    """Return eight tokens that an output generates; random ones have mostly no text."""
    command = [*MOE2EDGE, "generate", str(folder), "The sea", "-n", "8", "--no-chat", "--json"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return list(json.loads(done.stdout)["tokens"])


def list_lines(found: dict[str, Any], imported: int) -> Iterator[tuple[str, bool]]:
    """Yield the lines on a model, each with whether it is as it has to be."""
    blocks = f", {found['blocks']} blocks" if found["blocks"] else ""
    yield f"\n{found['model']}{blocks}{' (resumed)' if found['resumed'] else ''}", True
    weights = {one["target"]: one["weights"] for one in found["plan"]["targets"]}
    for one in found["plan"]["targets"]:
        size = found["folders"][one["target"]]
        off = one["disk"] / size - 1
        line = f"{one['target']} folder: planned {one['disk']}, measured {size} ({off:+.2%})"
        yield line, abs(off) <= 0.01
    for target, tokens in found["generated"].items():
        yield f"{target} generates {tokens}", bool(tokens)
    known = {stage["name"]: stage for stage in found["plan"]["export"]["stages"]}
    largest = max(stage["memory"] for stage in known.values())
    yield f"{'stage':22}{'MB':>9}{'planned':>9}{'at most':>9}{'s':>9}{'planned':>9}", True
    for stage in found["stages"]:
        kind, _, target = stage["name"].partition(" ")
        most = imported + ABOVE_IMPORT
        if kind == "running":
            most = OF_WEIGHTS * weights[target] + BEYOND_WEIGHTS
        said = known.get(stage["name"], {"memory": 0, "seconds": 0.0})
        # A plan counts what stages hold beside libraries, and both for the peak.
        memory = said["memory"] + found["plan"]["export"]["memory"] - largest
        sizes = "".join(f"{size / 1e6:9.0f}" for size in (stage["peak"], memory, most))
        times = f"{stage['seconds']:9.0f}{said['seconds']:9.0f}"
        yield f"{stage['name']:22}{sizes}{times}", stage["peak"] <= most
    peak, export_said = max(s["peak"] for s in found["stages"]), found["plan"]["export"]
    off = export_said["memory"] / peak - 1
    yield f"peak: planned {export_said['memory'] / 1e6:.0f} MB ({off:+.1%})", abs(off) <= 0.15
    seconds = sum(s["seconds"] for s in found["stages"])
    yield f"time: {seconds:.0f} s, planned {export_said['seconds']:.0f} s", True


def main() -> int:
    """Measure models, and print tables; return 1 if something is not as it has to be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--models", default="OLMoE-1B-7B")
    parser.add_argument("--limit", type=int, default=24 << 30, help="bytes of memory")
    parser.add_argument("--delete", action="store_true")
    options = parser.parse_args()
    work: Path = options.work.resolve()
    work.mkdir(exist_ok=True)
    os.environ["XDG_CACHE_HOME"] = str(work / "cache")
    if not (work / "cache").exists():
        subprocess.run([*MOE2EDGE, "plan", "--measure"], check=True, cwd=work)
    imported = measure_import()
    held = "a control group" if find_scope(options.limit) else "--max-memory alone"
    print(
        f"limit {options.limit / 2**30:.0f} GiB by {held}; importing torch {imported / 1e6:.0f} MB"
    )
    good = True
    for name in options.models.split(","):
        found = measure(name, work, options.limit)
        for line, fine in list_lines(found, imported):
            print(line if fine else f"{line}  <- not as it has to be", flush=True)
            good &= fine
        if options.delete:
            for rest in ("", "-out"):
                shutil.rmtree(work / f"{name.replace(':', '-')}{rest}", ignore_errors=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
