"""Head and embedding in 16 and in 8 bits: KL to the source, bytes, and time of a token in ONNX.

``python -m benchmarks.onnx_ends quality MODEL ...`` rounds only head and embedding, then all else
to 4 bits in groups of 32 as well, and measures the KL to the source on the built-in held-out text,
with float32 activations. ``python -m benchmarks.onnx_ends speed`` makes a random model of two
blocks (Qwen3-MoE, vocabulary 151,936, width 2,048; embedding and head apart), writes one graph of
each form, and times tokens in turn, in one process a form.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks._held_out import load_samples
from benchmarks._study import QUIET
from moe2edge import Model, open_checkpoint
from moe2edge.calibration import walk
from moe2edge.calibration.block_runner import BlockRunner
from moe2edge.numerics import metrics
from moe2edge.passes.rtn import Rtn
from moe2edge.pipeline.contract import PassContext
from moe2edge.targets.onnx import Onnx
from moe2edge.testing import InMemory, make_checkpoint

FORMS: dict[str, dict[str, Any]] = {
    "16, 16": {},
    "head 8": {"head": 8},
    "embedding 8": {"embedding": 8},
    "8, 8": {"head": 8, "embedding": 8},
}
SAMPLES = {"samples": 16, "length": 512, "seed": 0}
ROUNDS, STEPS, PROMPT = 5, 12, 16
SIZES = {
    "vocab_size": 151936, "hidden_size": 2048, "num_hidden_layers": 2, "num_attention_heads": 16,
    "num_key_value_heads": 4, "head_dim": 128, "moe_intermediate_size": 768,
    "num_experts_per_tok": 4, "tie_word_embeddings": False,
}  # fmt: skip


def quantize(model: Model, **options: Any) -> Model:
    """Return a model as `rtn` makes it."""
    store = InMemory()
    context = PassContext(model, model, torch.empty(0, 0).long(), store, QUIET, journal=store)
    return Rtn(group_size=32, scales="mse", **options).run(context).model


def compute_all(model: Model, ids: torch.Tensor) -> list[torch.Tensor]:
    """Return the logits of each sample."""
    hidden = walk.embed(model, ids)
    for block in model.blocks:
        hidden = BlockRunner(model, block).run(hidden)
    return list(walk.compute_logits(model, hidden))


def measure_quality(name: str) -> None:
    """Print KL and bytes of each form of a model."""
    checkpoint = open_checkpoint(name)
    ids = load_samples(checkpoint, "evaluation", SAMPLES).ids
    source = compute_all(checkpoint.model, ids)
    tied = checkpoint.model.head == checkpoint.model.architecture.embedding
    for blocks in (16, 4):
        for form in ("16, 16", "8, 8") if tied else FORMS:
            rules = [{"bits": 16}] if blocks == 16 else []
            if blocks == 16 and not FORMS[form]:
                continue
            model = quantize(checkpoint.model, rules=rules, **FORMS[form])
            found = metrics.measure(ids, compute_all(model, ids), source)
            print(
                f"{Path(name).name}, blocks in {blocks} bits, {form}: KL {found.kl:.6f}, top-1 "
                f"{found.top1:.2%}, {model.nbytes / 1e6:.2f} MB",
                flush=True,
            )


def measure_speed() -> None:
    """Print bytes and milliseconds of a token of each form, in turn."""
    with tempfile.TemporaryDirectory() as folder:
        source = open_checkpoint(
            str(make_checkpoint(Path(folder) / "source", "qwen3_moe", dtype="bfloat16", **SIZES))
        )
        places = {}
        for form, options in FORMS.items():
            place = places[form] = Path(folder) / form.replace(", ", "-").replace(" ", "-")
            place.mkdir()
            Onnx().write(quantize(source.model, **options), place)
        times: dict[str, list[float]] = {form: [] for form in FORMS}
        peaks = {}
        for _ in range(ROUNDS):
            for form, place in places.items():
                command = [sys.executable, "-m", "benchmarks.onnx_ends", "time", str(place)]
                out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                found, peaks[form] = map(float, out.split()[-2:])
                times[form].append(found)
        for form, found in times.items():
            size = (places[form] / "model.onnx.data").stat().st_size
            print(
                f"{form}: {statistics.median(found):.1f} ms a token (from {min(found):.1f} to "
                f"{max(found):.1f}), {size / 1e6:.0f} MB, {peaks[form]:.0f} MB resident"
            )


def time_steps(place: Path) -> None:
    """Print the median milliseconds of a token, and the resident MB after it."""
    runtime = Onnx().reopen(place)
    runtime.start(list(range(1, 1 + PROMPT)))
    found = []
    for token in range(STEPS):
        begun = time.perf_counter()
        runtime.step(1 + token)
        found.append(1e3 * (time.perf_counter() - begun))
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    print(statistics.median(found), pages * 4096 / 1e6)


def main() -> None:
    """Run what the first argument names."""
    what, *names = sys.argv[1:]
    if what == "quality":
        for name in names:
            measure_quality(name)
    elif what == "speed":
        measure_speed()
    else:
        time_steps(Path(names[0]))


if __name__ == "__main__":
    main()
