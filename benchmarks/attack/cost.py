"""Compare the time of an export before and after work was made durable, by turns in one run.

    python -m benchmarks.attack.cost OLD_PYTHON NEW_PYTHON --work DIR [--pairs 3] [--recipe w4-rtn]

Each argument is the interpreter of an environment with one version of moe2edge; commit 007197c is
the state before. The model has the layout of OLMoE, 0.9 billion random weights in bfloat16, and is
made once in DIR. What later versions check before the first block (the source, the runtimes) is no
part of the question: --no-source-check leaves the larger one out where the version has it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import time
from pathlib import Path

SIZES = {
    "hidden_size": 1024, "intermediate_size": 512, "num_hidden_layers": 8, "num_experts": 64,
    "num_experts_per_tok": 8, "num_attention_heads": 16, "num_key_value_heads": 16,
    "vocab_size": 50304, "max_position_embeddings": 4096,
}  # fmt: skip
TEXT = ("--set", "calibration.samples=16", "--set", "calibration.length=128")


def make_model(folder: Path) -> None:
    """Write the checkpoint: random weights, and the tokenizer of the tests."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from moe2edge.testing import make_tokenizer

    config = AutoConfig.for_model("olmoe", **SIZES)
    torch.manual_seed(0)
    with torch.device("cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e9:.2f} billion weights", flush=True)
    model.save_pretrained(folder, max_shard_size="500MB")
    make_tokenizer(folder)


def export(python: str, model: Path, out: Path, recipe: str, text: Path) -> float:
    """Return the seconds of one export."""
    shutil.rmtree(out, ignore_errors=True)
    arguments = ["export", str(model), "-t", "gptq", "-o", str(out), "-r", recipe, "-q"]
    arguments += ["--eval", "none", "--calib", str(text), *TEXT]
    shown = subprocess.run(
        [python, "-m", "moe2edge", "export", "--help"], capture_output=True, text=True, check=True
    )
    if "--no-source-check" in shown.stdout:
        arguments.append("--no-source-check")
    begun = time.perf_counter()
    subprocess.run([python, "-m", "moe2edge", *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begun


def main() -> None:
    """Print the seconds of each export, the medians, and the median ratio of pairs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("old")
    parser.add_argument("new")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--recipe", default="w4-rtn")
    given = parser.parse_args()
    model, text = given.work / "olmoe-0.9b", given.work / "text.txt"
    given.work.mkdir(parents=True, exist_ok=True)
    text.write_text("".join(chr(33 + (n * n + n // 7) % 90) for n in range(40000)))
    if not (model / "tokenizer.json").exists():
        make_model(model)
    rows = []
    for pair in range(given.pairs):
        order = (given.old, given.new) if pair % 2 == 0 else (given.new, given.old)
        seconds = {p: export(p, model, given.work / "out", given.recipe, text) for p in order}
        rows.append((seconds[given.old], seconds[given.new]))
        print(json.dumps({"old": rows[-1][0], "new": rows[-1][1]}), flush=True)
    old, new = (statistics.median(times) for times in zip(*rows, strict=True))
    ratio = statistics.median(after / before for before, after in rows)
    print(f"{given.recipe}: old {old:.1f} s, new {new:.1f} s, median ratio of pairs {ratio:.3f}")


if __name__ == "__main__":
    main()
