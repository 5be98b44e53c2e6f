"""An export with its memory and time by stage, under a stated limit of memory."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.plan.stages import Stage, run_in_stages

RECIPE = "passes: [expert_drop: {keep: 0.75}, gptq]\n"
TEXTS = ("--set", "calibration.samples=32", "--set", "calibration.length=512", "--eval", "none")
PLANNED_TEXTS = (*TEXTS[:-2], "--set", "evaluation.text=none")
_PREFIX = re.compile(r"^\[[^\]]*\] ")
_PROGRESS = re.compile(r"^(?P<label>.+?): \d+ of \d+")


@dataclass(frozen=True)
class Peak:
    """Seconds and peak resident set of a stage of an export."""

    name: str
    seconds: float
    peak: int


def name_stage(line: str, before: str) -> str:
    """Return the stage of a plan that a line of an export begins, or ``before`` if it begins none.

    >>> name_stage("[  15.4 s] expert_drop, block_drop: scoring: 0 of 6", "starting")
    'expert_drop'
    >>> name_stage("checking the tensors of onnx", "writing onnx")
    'checking onnx'
    """
    line = _PREFIX.sub("", line)
    if line.startswith("writing "):
        return line
    if line.startswith("checking the tensors of "):
        return f"checking {line.rsplit(' ', 1)[1]}"
    if line.startswith("running ") and line.endswith(" in its runtime"):
        return line.removesuffix(" in its runtime")
    if line.startswith("recording the reference"):
        return "evaluation: result"
    found = _PROGRESS.match(line)
    if found is None:
        return before
    label = found["label"]
    kind, _, what = label.partition(": ")
    if kind != "evaluation":
        return kind.split(",")[0]
    return label if what in ("source", "result") else f"running {what}"


def join_lines(stages: Sequence[Stage]) -> list[Peak]:
    """Join what lies between lines of an export to the stages of a plan."""
    found: dict[str, Peak] = {}
    name = "starting"
    for stage in stages:
        name = name_stage(stage.line, name)
        known = found.get(name, Peak(name, 0.0, 0))
        found[name] = Peak(name, known.seconds + stage.seconds, max(known.peak, stage.peak))
    return list(found.values())


@cache
def find_scope(limit: int) -> tuple[str, ...]:
    """Return the command that runs another one in a control group of ``limit`` bytes; or none."""
    if shutil.which("systemd-run") is None:
        return ()
    limits = ("-p", f"MemoryMax={limit}", "-p", "MemorySwapMax=0")
    command = ("systemd-run", "--scope", "--quiet", *limits)
    tried = subprocess.run([*command, "true"], capture_output=True)
    return command if tried.returncode == 0 else ()


def export(python: str, source: Path, targets: str, out: Path, limit: int) -> list[Peak]:
    """Export a checkpoint; what an interrupted run left is gone on with.

    Args:
        python: interpreter with moe2edge.
        source: the checkpoint.
        targets: the targets.
        out: the output; beside it the recipe, and the log of all lines.
        limit: bytes of memory.

    Raises:
        RuntimeError: it fails.
    """
    recipe = out.with_name("recipe.yaml")
    recipe.write_text(RECIPE)
    # Not what lies in the current folder: the build of that interpreter.
    command = [python, "-P", "-m", "moe2edge", "export", str(source), "-t", targets]
    command += ["-r", str(recipe)]
    scope = find_scope(limit)
    options = [*TEXTS, "-o", str(out), "--max-memory", str(limit)]
    stages, code = run_in_stages([*scope, *command, *options])
    log = "".join(f"{s.seconds:8.1f} s {s.peak / 1e6:8.0f} MB  {s.line}\n" for s in stages)
    with out.with_name(f"{out.name}.log").open("a") as file:
        file.write(log)
    if code:
        raise RuntimeError(f"{' '.join(command)}: exit code {code}\n{log[-2000:]}")
    return join_lines(stages)


def measure_import(python: str = sys.executable) -> int:
    """Measure the peak resident set of importing torch, in bytes."""
    code = "import torch, resource as r;print(r.getrusage(r.RUSAGE_SELF).ru_maxrss * 1024)"
    done = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True)
    return int(done.stdout)


def read_kept(path: Path) -> Any:
    """Read what an earlier run kept; None if there is none."""
    return json.loads(path.read_text()) if path.is_file() else None


def keep(path: Path, data: Mapping[str, Any]) -> None:
    """Keep data for a later run."""
    path.write_text(json.dumps(data, indent=1) + "\n")


def measure_folder(folder: Path) -> int:
    """Return the bytes of all files of a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
