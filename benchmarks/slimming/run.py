"""GPTQ of moe2edge and of two peers: time, memory and quality; see README.md here.

    python benchmarks/slimming/run.py --models DIR --data DIR --peers DIR

Rows are appended to results.jsonl, and a row that is there is not run again, so that a run can be
stopped and goes on where it was; then results.md and results.png are made from them. Everything
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
from pathlib import Path
from typing import Any

from measuring import Cost, measure

HERE = Path(__file__).parent
BUILTIN = HERE.parent.parent / "moe2edge" / "builtin" / "tiny-moe"
TINY, RANDOM = "tiny-moe", "random"
GROUP_SIZE = 128
IMPORTS_REPEATED = 3

Row = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One run of a tool.

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
        """Name of its row."""
        return f"{self.model}-{self.scope}-{self.bits}-{self.tool}-t{self.threads}-r{self.repeat}"


# ---- how each tool is run ----------------------------------------------------------------------


def ours(job: Job, model: Path, tokens: Path, out: Path, python: Path) -> list[str | Path]:
    """The command line of moe2edge; GPTQ checkpoints do not hold 3 bits, plain weights do."""
    said = json.loads((tokens / "tokens.json").read_text())["calibration"]
    step = "rtn" if job.tool.endswith("rtn") else "gptq"
    held = job.bits != 3
    settings = [f"{step}.bits={job.bits}", f"{step}.group_size={GROUP_SIZE}"]
    if job.scope == "experts":
        settings.append(f"{step}.rules=[{{match: self_attn, bits: 16}}]")
    settings += [f"calibration.{name}={said[name]}" for name in ("samples", "length", "seed")]
    command: list[str | Path] = [python, "-m", "moe2edge", "export", model, "-o", out]
    command += ["-t", "gptq" if held else "hf:dequantize=true"]
    command += ["-r", "w4-rtn" if step == "rtn" else "w4", "--calib", said["text"]]
    # Held-out text for a report is no part of quantizing, and no run goes on behind another one.
    command += ["--eval", "none", "--resume", "never"]
    for setting in settings:
        command += ["--set", setting]
    return [*command, "--threads", str(job.threads), "--quiet"]


def peer(job: Job, model: Path, tokens: Path, out: Path, python: Path) -> list[str | Path]:
    """The command line of a peer's script."""
    script = HERE / f"peer_{environment(job.tool)}.py"
    command: list[str | Path] = [python, script, model, tokens / "calibration.npy", out]
    command += ["--bits", str(job.bits), "--group-size", str(GROUP_SIZE)]
    command += ["--threads", str(job.threads), *VARIANTS.get(job.tool, ())]
    return [*command, "--experts-only"] if job.scope == "experts" else command


# What a peer does not do by default, but can.
VARIANTS = {
    "llmcompressor-mse": ("--observer", "memoryless_mse"),
    "llmcompressor-offload": ("--offload",),
    "gptqmodel-mse": ("--mse", "2.4"),
}
TOOLS = {
    "moe2edge": ours,
    "moe2edge-rtn": ours,
    "llmcompressor": peer,
    "llmcompressor-mse": peer,
    "llmcompressor-offload": peer,
    "gptqmodel": peer,
    "gptqmodel-mse": peer,
}
# What each environment imports before it can begin, and the packages whose versions count.
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


def environment(tool: str) -> str:
    """The environment that a tool runs in."""
    return tool.split("-")[0]


# ---- one run after another ---------------------------------------------------------------------


class Runner:
    """Runs jobs and keeps their rows."""

    def __init__(self, options: argparse.Namespace, work: Path) -> None:
        self._options, self._work = options, work
        self._data = options.data.resolve()
        self._results: Path = options.results
        self._done = {
            row["key"] for row in read(self._results) if not (options.retry and "failed" in row)
        }
        self._warm: set[str] = set()
        self._versions: dict[str, dict[str, str]] = {}

    def python(self, name: str) -> Path:
        """Interpreter of an environment."""
        if name == "moe2edge":
            return Path(sys.executable)
        return self._options.peers.absolute() / name / "bin" / "python"

    def cost(self, command: Sequence[str | Path], threads: int, name: str) -> Cost:
        """Run a command with so many threads, on so many processors."""
        cores = sorted(os.sched_getaffinity(0))[-threads:] if self._options.pin else []
        counts = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
        # TMPDIR, so that what a tool leaves behind goes with the work folder.
        env = dict.fromkeys(counts, str(threads)) | {"TMPDIR": str(self._scratch())}
        return measure(command, self.log(name), self._scratch(), env, cores)

    def log(self, name: str) -> Path:
        """Where a command's output goes."""
        return self._work / "logs" / f"{name}.log"

    def _scratch(self) -> Path:
        folder = self._work / "scratch"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def helper(self, script: str, *arguments: str | Path) -> str:
        """Output of a script of this folder.

        Raises:
            SystemExit: it failed.
        """
        command = [sys.executable, HERE / script, *arguments]
        env = {**os.environ, "TQDM_DISABLE": "1"}
        found = subprocess.run(command, capture_output=True, text=True, env=env)
        if found.returncode:
            raise SystemExit(f"{script} {' '.join(map(str, arguments))}:\n{found.stderr[-2000:]}")
        return found.stdout

    def versions(self, name: str) -> dict[str, str]:
        """Versions of what counts in an environment."""
        if name not in self._versions:
            code = "import sys, json, importlib.metadata as m; " + (
                "print(json.dumps({p: m.version(p) for p in sys.argv[1:]}))"
            )
            command = [self.python(name), "-c", code, *PACKAGES[name]]
            self._versions[name] = json.loads(subprocess.check_output(command, text=True))
        return self._versions[name]

    def keep(self, row: Row) -> None:
        """Append a row."""
        with self._results.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self._done.add(row["key"])
        told = row.get("failed") or f"{row['seconds']} s, {row['peak_bytes'] / 1e6:.0f} MB"
        print(f"{row['key']}: {told} {row.get('quality', '')}", flush=True)

    def model(self, name: str) -> Path:
        """Folder of a model; the random one is made when it is first asked for."""
        if name == TINY:
            return BUILTIN
        if name != RANDOM:
            return Path(self._options.models.resolve() / name)
        folder = self._work / RANDOM
        if not (folder / "config.json").exists():
            self.helper("make_random.py", folder, "--blocks", str(self._options.random_blocks))
        return folder

    def tokens(self, name: str) -> Path:
        """Folder of the tokens of a model."""
        folder = self._work / "tokens" / name
        if not (folder / "tokens.json").exists():
            # The random model is for time and memory; so many tokens take minutes, not an hour, and
            # moe2edge alone gets them as text, which is no longer than it need be.
            few = ["--samples", "16", "--bytes", "100000"]
            more = {TINY: ["--builtin"], RANDOM: few}.get(name, [])
            self.helper("tokens.py", self.model(name), self._data, folder, *more)
        return folder

    def imports(self, name: str, threads: int) -> None:
        """Row of what importing costs: the best of several times."""
        key = f"imports-{name}-t{threads}"
        if key in self._done:
            return
        command = [self.python(name), "-c", IMPORTS[name]]
        costs = [self.cost(command, threads, key) for _ in range(1 + IMPORTS_REPEATED)][1:]
        best = min(costs, key=lambda cost: cost.seconds)
        row = {"key": key, "kind": "imports", "tool": name, "threads": threads}
        self.keep({**row, **self.figures(best, key), "versions": self.versions(name)})

    def figures(self, cost: Cost, name: str) -> Row:
        """What a run took, and how it failed if it did."""
        found: Row = {
            "seconds": round(cost.seconds, 2),
            "cpu_seconds": round(cost.cpu_seconds, 2),
            "peak_bytes": cost.peak_bytes,
        }
        if cost.code:
            lines = self.log(name).read_text("utf-8", "replace").strip().splitlines()
            found["failed"] = f"exit status {cost.code}: {lines[-1][-300:] if lines else ''}"
        return found

    def warm_up(self, job: Job) -> None:
        """Run a tool once on very little, because GPTQModel compiles its packing when first run."""
        if job.tool in self._warm:
            return
        small = self._work / "small"
        if not (small / "config.json").exists():
            size = ("--blocks", "1", "--hidden", "256", "--width", "256", "--experts", "4")
            self.helper("make_random.py", small, *size)
        out = self._work / "warm"
        command = TOOLS[job.tool](
            Job("small", job.tool, 4, "all", job.threads, 0),
            small,
            self.tokens(job.model),
            out,
            self.python(environment(job.tool)),
        )
        self.cost(command, job.threads, f"warm-{job.tool}")
        shutil.rmtree(out, ignore_errors=True)
        self._warm.add(job.tool)

    def run(self, job: Job) -> None:
        """Row of a job, unless it is there."""
        if job.key in self._done:
            return
        model, tokens, out = self.model(job.model), self.tokens(job.model), self._work / "out"
        shutil.rmtree(out, ignore_errors=True)
        name = environment(job.tool)
        self.warm_up(job)
        command = TOOLS[job.tool](job, model, tokens, out, self.python(name))
        cost = self.cost(command, job.threads, job.key)
        said = json.loads((tokens / "tokens.json").read_text())["calibration"]
        row: Row = {
            "key": job.key,
            "kind": "run",
            **vars(job),
            "group_size": GROUP_SIZE,
            "calibration": {k: said[k] for k in ("samples", "length", "seed", "sha256")},
            "source_bytes": weight_bytes(model),
            **self.figures(cost, job.key),
            "versions": self.versions(name),
        }
        if "failed" not in row:
            row["output_bytes"] = weight_bytes(out)
            row["dequantized"] = "quantization_config" not in (out / "config.json").read_text()
            if job.model != RANDOM:
                row["quality"] = self.quality(model, out, tokens)
        self.keep(row)
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(self._scratch())

    def quality(self, model: Path, out: Path, tokens: Path) -> dict[str, float]:
        """Perplexities and KL of an output."""
        plain = self._work / "plain"
        shutil.rmtree(plain, ignore_errors=True)
        self.helper("dequantize.py", out, plain)
        said = self.helper("quality.py", model, plain, tokens / "evaluation.npy")
        shutil.rmtree(plain)
        found: dict[str, float] = json.loads(said)
        return found


def read(path: Path) -> list[Row]:
    """All rows so far."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def weight_bytes(folder: Path) -> int:
    """Bytes of the weight files of a folder."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def jobs(options: argparse.Namespace) -> Iterator[Job]:
    """Every run, tool after tool of one cell, so that they see the machine in the same state."""
    trained = sorted(path.parent.name for path in options.models.glob("*/config.json"))
    scopes = ("all", "experts") if options.experts_only else ("all",)
    for model in (*trained, TINY, RANDOM):
        for scope in scopes if model != RANDOM else ("all",):
            for bits in (4, 3, 2) if model != RANDOM else (4,):
                for repeat in range(options.repeats):
                    for tool in TOOLS:
                        if _is_of_use(tool, model):
                            yield Job(model, tool, bits, scope, options.threads, repeat)


def _is_of_use(tool: str, model: str) -> bool:
    """Offloading is for the large model; scales matter only where quality is measured."""
    useless = "-mse" if model == RANDOM else "-offload"
    return not tool.endswith(useless)


def main() -> None:
    """Run what has no row yet, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", type=Path, required=True, help="folder of checkpoints")
    parser.add_argument("--data", type=Path, required=True, help="folder of texts")
    parser.add_argument("--peers", type=Path, required=True, help="folder of install_peers.sh")
    parser.add_argument("--work", type=Path, help="folder for what is made on the way")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--random-blocks", type=int, default=11, help="0.18 GB each")
    parser.add_argument("--experts-only", action="store_true", help="attention in 16 bits as well")
    parser.add_argument("--only", default="", help="rows whose key holds this")
    parser.add_argument("--retry", action="store_true", help="run again what failed")
    parser.add_argument(
        "--no-pin", dest="pin", action="store_false", help="let tools use every processor"
    )
    parser.add_argument("--results", type=Path, default=HERE / "results.jsonl")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = (options.work or Path(folder)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        runner = Runner(options, work)
        wanted = [job for job in jobs(options) if options.only in job.key]
        for name in dict.fromkeys(environment(job.tool) for job in wanted):
            runner.imports(name, options.threads)
        for job in wanted:
            runner.run(job)
    subprocess.run([sys.executable, HERE / "report.py", options.results], check=True)


if __name__ == "__main__":
    main()
