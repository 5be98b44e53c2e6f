"""GPTQ of moe2edge and of two peers: time, memory and quality; see README.md here.

    python -m benchmarks.slimming.run --models DIR --data DIR --peers DIR

Rows are appended to results.jsonl, and a row that is there is not made again, so that a run can be
stopped and continues where it was; then results.md and results.png are made from them. Everything
runs in child processes and this one stays small, because a child's peak counts from its parent's.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks._study import Job, Row, Study, list_checkpoints, make_parser
from benchmarks.slimming.measuring import Cost, measure

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
BUILTIN = ROOT / "moe2edge" / "builtin" / "tiny-moe"
TINY, RANDOM = "tiny-moe", "random"
GROUP_SIZE = 128
IMPORTS_REPEATED = 3


@dataclass(frozen=True)
class Run:
    """A run of a tool.

    Attributes:
        model: name of the model.
        tool: a key of `TOOLS`.
        bits: per weight.
        scope: ``all`` (attention and experts) or ``experts``.
        threads: of the processor.
        repeat: 0, 1, ...
    """

    model: str
    tool: str
    bits: int
    scope: str
    threads: int
    repeat: int

    @property
    def key(self) -> str:
        """The name of its row."""
        return f"{self.model}-{self.scope}-{self.bits}-{self.tool}-t{self.threads}-r{self.repeat}"


# ---- command lines of the tools ----------------------------------------------------------------


def build_our_command(
    run: Run, model: Path, tokens: Path, out: Path, python: Path
) -> list[str | Path]:
    """Return the command line of moe2edge; GPTQ folders do not hold 3 bits, plain ones do."""
    said = json.loads((tokens / "tokens.json").read_text())["calibration"]
    step = "rtn" if run.tool.endswith("rtn") else "gptq"
    held = run.bits != 3
    settings = [f"{step}.bits={run.bits}", f"{step}.group_size={GROUP_SIZE}"]
    if run.scope == "experts":
        settings.append(f"{step}.rules=[{{match: self_attn, bits: 16}}]")
    settings += [f"calibration.{name}={said[name]}" for name in ("samples", "length", "seed")]
    command: list[str | Path] = [python, "-m", "moe2edge", "export", model, "-o", out]
    command += ["-t", "gptq" if held else "hf:dequantize=true"]
    command += ["-r", "w4-rtn" if step == "rtn" else "w4", "--calib", said["text"]]
    # Held-out text for a report is no part of quantizing, and no run continues another one.
    command += ["--eval", "none", "--resume", "never"]
    for setting in settings:
        command += ["--set", setting]
    return [*command, "--threads", str(run.threads), "--quiet"]


def build_peer_command(
    run: Run, model: Path, tokens: Path, out: Path, python: Path
) -> list[str | Path]:
    """Return the command line of a peer's script."""
    script = HERE / f"peer_{get_environment(run.tool)}.py"
    command: list[str | Path] = [python, script, model, tokens / "calibration.npy", out]
    command += ["--bits", str(run.bits), "--group-size", str(GROUP_SIZE)]
    command += ["--threads", str(run.threads), *VARIANTS.get(run.tool, ())]
    return [*command, "--experts-only"] if run.scope == "experts" else command


# Options of a peer that are off by default.
VARIANTS = {
    "llmcompressor-mse": ("--observer", "memoryless_mse"),
    "llmcompressor-offload": ("--offload",),
    "gptqmodel-mse": ("--mse", "2.4"),
}
TOOLS = {
    "moe2edge": build_our_command,
    "moe2edge-rtn": build_our_command,
    "llmcompressor": build_peer_command,
    "llmcompressor-mse": build_peer_command,
    "llmcompressor-offload": build_peer_command,
    "gptqmodel": build_peer_command,
    "gptqmodel-mse": build_peer_command,
}
# Imports of each environment before it can begin, and the packages whose versions count.
IMPORTS = {
    "moe2edge": "import torch, transformers.modeling_utils, "
    "transformers.models.mixtral.modeling_mixtral, moe2edge.cli.main, moe2edge.commands.export, "
    "moe2edge.pipeline.blockwise, moe2edge.evaluation.verify",
    "llmcompressor": "import numpy, torch; from datasets import Dataset; "
    "from llmcompressor import oneshot; from llmcompressor.modifiers.gptq import GPTQModifier; "
    "from llmcompressor.utils import load_context; "
    "from transformers import AutoModelForCausalLM, AutoTokenizer",
    "gptqmodel": "import numpy, torch; from gptqmodel import GPTQModel, QuantizeConfig",
}
PACKAGES = {
    "moe2edge": ("moe2edge", "torch", "transformers"),
    "llmcompressor": ("llmcompressor", "compressed-tensors", "torch", "transformers"),
    "gptqmodel": ("gptqmodel", "torch", "transformers"),
}


def get_environment(tool: str) -> str:
    """Return the environment that a tool runs in."""
    return tool.split("-")[0]


# ---- one run after another ---------------------------------------------------------------------


class Runner:
    """Makes the rows of runs, in a work folder."""

    def __init__(self, options: argparse.Namespace, work: Path) -> None:
        self._options, self._work = options, work
        self._data = options.data.resolve()
        self._warm: set[str] = set()
        self._versions: dict[str, dict[str, str]] = {}

    def find_python(self, name: str) -> Path:
        """Return the interpreter of an environment."""
        if name == "moe2edge":
            return Path(sys.executable)
        return self._options.peers.absolute() / name / "bin" / "python"

    def run_command(self, command: Sequence[str | Path], threads: int, name: str) -> Cost:
        """Run a command with so many threads, on so many processors."""
        cores = sorted(os.sched_getaffinity(0))[-threads:] if self._options.pin else []
        counts = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
        # TMPDIR, so that leftovers of a tool are removed with the work folder.
        env = dict.fromkeys(counts, str(threads)) | {"TMPDIR": str(self._make_scratch())}
        return measure(command, self.find_log(name), self._make_scratch(), env, cores)

    def find_log(self, name: str) -> Path:
        """Return the file of a command's output."""
        return self._work / "logs" / f"{name}.log"

    def _make_scratch(self) -> Path:
        folder = self._work / "scratch"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def run_script(self, script: str, *arguments: str | Path) -> str:
        """Return the output of a script of this folder.

        Raises:
            SystemExit: it failed.
        """
        command = [sys.executable, "-m", f"benchmarks.slimming.{script}", *arguments]
        env = {**os.environ, "TQDM_DISABLE": "1"}
        found = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)
        if found.returncode:
            raise SystemExit(f"{script} {' '.join(map(str, arguments))}:\n{found.stderr[-2000:]}")
        return found.stdout

    def find_versions(self, name: str) -> dict[str, str]:
        """Return the versions of the packages that matter in an environment."""
        if name not in self._versions:
            code = "import sys, json, importlib.metadata as m; " + (
                "print(json.dumps({p: m.version(p) for p in sys.argv[1:]}))"
            )
            command = [self.find_python(name), "-c", code, *PACKAGES[name]]
            self._versions[name] = json.loads(subprocess.check_output(command, text=True))
        return self._versions[name]

    def make_model(self, name: str) -> Path:
        """Return the folder of a model; the random one is made when it is first needed."""
        if name == TINY:
            return BUILTIN
        if name != RANDOM:
            return Path(self._options.models.resolve() / name)
        folder = self._work / RANDOM
        if not (folder / "config.json").exists():
            self.run_script("make_random", folder, "--blocks", str(self._options.random_blocks))
        return folder

    def make_tokens(self, name: str) -> Path:
        """Return the folder of the tokens of a model."""
        folder = self._work / "tokens" / name
        if not (folder / "tokens.json").exists():
            # The random model is for time and memory; so many tokens take minutes, not an hour, and
            # moe2edge alone gets them as text, which is no longer than it need be.
            few = ["--samples", "16", "--bytes", "100000"]
            more = {TINY: ["--builtin"], RANDOM: few}.get(name, [])
            self.run_script("tokens", self.make_model(name), self._data, folder, *more)
        return folder

    def measure_imports(self, name: str, threads: int, key: str) -> Row:
        """Return the row of what importing costs: the best of several times."""
        command = [self.find_python(name), "-c", IMPORTS[name]]
        costs = [self.run_command(command, threads, key) for _ in range(1 + IMPORTS_REPEATED)][1:]
        best = min(costs, key=lambda cost: cost.seconds)
        row = {"kind": "imports", "tool": name, "threads": threads}
        return {**row, **self.describe_cost(best, key), "versions": self.find_versions(name)}

    def describe_cost(self, cost: Cost, name: str) -> Row:
        """Return time and memory of a run, and the last line of its log if it failed."""
        found: Row = {
            "seconds": round(cost.seconds, 2),
            "cpu_seconds": round(cost.cpu_seconds, 2),
            "peak_bytes": cost.peak_bytes,
        }
        if cost.code:
            lines = self.find_log(name).read_text("utf-8", "replace").strip().splitlines()
            found["failed"] = f"exit status {cost.code}: {lines[-1][-300:] if lines else ''}"
        return found

    def warm_up(self, run: Run) -> None:
        """Run a tool once on very little, because GPTQModel compiles its packing when first run."""
        if run.tool in self._warm:
            return
        small = self._work / "small"
        if not (small / "config.json").exists():
            size = ("--blocks", "1", "--hidden", "256", "--width", "256", "--experts", "4")
            self.run_script("make_random", small, *size)
        out = self._work / "warm"
        command = TOOLS[run.tool](
            Run("small", run.tool, 4, "all", run.threads, 0),
            small,
            self.make_tokens(run.model),
            out,
            self.find_python(get_environment(run.tool)),
        )
        self.run_command(command, run.threads, f"warm-{run.tool}")
        shutil.rmtree(out, ignore_errors=True)
        self._warm.add(run.tool)

    def measure_run(self, run: Run) -> Row:
        """Return the row of a run."""
        model, tokens = self.make_model(run.model), self.make_tokens(run.model)
        out = self._work / "out"
        shutil.rmtree(out, ignore_errors=True)
        name = get_environment(run.tool)
        self.warm_up(run)
        command = TOOLS[run.tool](run, model, tokens, out, self.find_python(name))
        cost = self.run_command(command, run.threads, run.key)
        said = json.loads((tokens / "tokens.json").read_text())["calibration"]
        row: Row = {
            "kind": "run",
            **vars(run),
            "group_size": GROUP_SIZE,
            "calibration": {k: said[k] for k in ("samples", "length", "seed", "sha256")},
            "source_bytes": count_weight_bytes(model),
            **self.describe_cost(cost, run.key),
            "versions": self.find_versions(name),
        }
        if "failed" not in row:
            row["output_bytes"] = count_weight_bytes(out)
            row["dequantized"] = "quantization_config" not in (out / "config.json").read_text()
            if run.model != RANDOM:
                row["quality"] = self.measure_quality(model, out, tokens)
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(self._make_scratch())
        return row

    def measure_quality(self, model: Path, out: Path, tokens: Path) -> dict[str, float]:
        """Return perplexities and KL of an output."""
        plain = self._work / "plain"
        shutil.rmtree(plain, ignore_errors=True)
        self.run_script("dequantize", out, plain)
        said = self.run_script("quality", model, plain, tokens / "evaluation.npy")
        shutil.rmtree(plain)
        found: dict[str, float] = json.loads(said)
        return found


def count_weight_bytes(folder: Path) -> int:
    """Return the bytes of the weight files of a folder."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def list_runs(options: argparse.Namespace) -> Iterator[Run]:
    """Yield every run, tool after tool of one cell, so that they see the machine in one state."""
    scopes = ("all", "experts") if options.experts_only else ("all",)
    for model in (*list_checkpoints(options.models), TINY, RANDOM):
        for scope in scopes if model != RANDOM else ("all",):
            for bits in (4, 3, 2) if model != RANDOM else (4,):
                for repeat in range(options.repeats):
                    for tool in TOOLS:
                        if _is_of_use(tool, model):
                            yield Run(model, tool, bits, scope, options.threads, repeat)


def _is_of_use(tool: str, model: str) -> bool:
    """Tell if a tool says something about a model.

    Offloading is for the large model; scales matter only where quality is measured.
    """
    useless = "-mse" if model == RANDOM else "-offload"
    return not tool.endswith(useless)


def list_jobs(runner: Runner, options: argparse.Namespace) -> Iterator[Job]:
    """Yield every row: imports of each environment first."""
    runs = [run for run in list_runs(options) if options.only in run.key]
    for name in dict.fromkeys(get_environment(run.tool) for run in runs):
        key = f"imports-{name}-t{options.threads}"
        yield Job(None, key, partial(runner.measure_imports, name, options.threads, key))
    for run in runs:
        yield Job(run.model, run.key, partial(runner.measure_run, run))


def describe_row(row: Row) -> str:
    """Return what is printed about a row."""
    measured = f"{row['seconds']} s, {row['peak_bytes'] / 1e6:.0f} MB {row.get('quality', '')}"
    return str(row.get("failed") or measured).strip()


def main() -> None:
    """Make the rows that are missing, and write the tables."""
    parser = make_parser(__doc__, HERE / "results.jsonl")
    parser.add_argument("--peers", type=Path, required=True, help="folder of install_peers.sh")
    parser.add_argument("--work", type=Path, help="folder for intermediate files")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--random-blocks", type=int, default=11, help="0.18 GB each")
    parser.add_argument("--experts-only", action="store_true", help="attention in 16 bits as well")
    parser.add_argument("--retry", action="store_true", help="run again what failed")
    parser.add_argument(
        "--no-pin", dest="pin", action="store_false", help="let tools use every processor"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = (options.work or Path(folder)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        runner = Runner(options, work)
        study = Study(options.results, retry_failed=options.retry)
        study.run(list_jobs(runner, options), describe_row)
    # In a process of its own, because matplotlib would count as a child's memory.
    report = [sys.executable, "-m", "benchmarks.slimming.report", options.results.resolve()]
    subprocess.run(report, check=True, cwd=ROOT)


if __name__ == "__main__":
    main()
