"""Run an ONNX folder in onnxruntime-genai and compare it with the logits that the export recorded.

    ENVIRONMENT/bin/python benchmarks/readers/onnxruntime_genai/read.py FOLDER

The folder's recorded tokens go in, a prefill and then one by one. The logits must agree with those
of our own session on the same graph within 2 % (median of positions; exactly, if both sum in the
same order, which depends on the number of threads and decides how an activation is rounded to
int8), and with the recorded ones, which PyTorch made from the same packed numbers, within 25 %, as
`moe2edge verify` asks. A greedy continuation must be that of `moe2edge generate`. Exits with 1
otherwise.
"""

from __future__ import annotations

import platform
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnxruntime_genai as og
import torch

from moe2edge.evaluation.reference import Reference
from moe2edge.evaluation.verify import SHIPPED_TOLERANCE, run_recorded_tokens
from moe2edge.pipeline import registry
from moe2edge.runtime.generation import generate
from moe2edge.storage.tokenizer import read_stop_ids

TOKENS, LIMIT = 48, 0.02


def compute_logits(model: og.Model, reference: Reference) -> torch.Tensor:
    """Compute logits in the shape of ``reference.logits``."""
    rows = []
    for row in reference.ids.numpy().astype(np.int32):
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=len(row) + 1)
        generator = og.Generator(model, params)
        steps = []
        for part in (row[: reference.prefill], *row[reference.prefill :, None]):
            generator.append_tokens(part[None])
            steps.append(np.array(generator.get_logits())[0, -1])
        rows.append(torch.from_numpy(np.stack(steps)).float())
    return torch.stack(rows)


def continue_greedily(model: og.Model, prompt: list[int]) -> list[int]:
    """Return at most ``TOKENS`` tokens after the prompt, an end token included."""
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=len(prompt) + TOKENS, do_sample=False)
    generator = og.Generator(model, params)
    generator.append_tokens(np.array([prompt], np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)[len(prompt) :]]


def compare(folder: Path) -> tuple[dict[str, str], bool]:
    """Return the figures of a folder, and True if they are within the limits."""
    reference = Reference.read(folder)
    model = og.Model(str(folder))
    found, want = compute_logits(model, reference), reference.logits
    runtime = registry.find_target("onnx").reopen(folder)
    ours = run_recorded_tokens(reference, runtime)
    difference, error = (
        float(((found - other).norm(dim=-1) / other.norm(dim=-1)).median())
        for other in (ours, want)
    )
    prompt = reference.ids[0, : reference.prefill].tolist()
    stop = read_stop_ids(folder)
    theirs = [token for token in continue_greedily(model, prompt) if token not in stop]
    mine = list(generate(runtime, prompt, max_tokens=TOKENS, stop=stop))
    ok = difference <= LIMIT and error <= SHIPPED_TOLERANCE and theirs == mine
    rows = {
        "versions": ", ".join(
            f"{name} {version(name)}" for name in ("onnxruntime-genai", "onnxruntime")
        ),
        "machine": f"{platform.machine()}, CPU, Python {platform.python_version()}",
        "recorded tokens": f"{len(want)} x {reference.ids.shape[1]}, prefill {reference.prefill}",
        "logits, to our session": f"{difference:.4f} relative, median (at most {LIMIT})",
        "logits, to PyTorch": f"{error:.4f} relative, median (int8 activations)",
        "greedy tokens, equal": f"{sum(map(int.__eq__, theirs, mine))} of {len(mine)}",
        "result": "passed" if ok else "failed",
    }
    return rows, ok


def main() -> int:
    """Print a table; return the exit code."""
    rows, ok = compare(Path(sys.argv[1]))
    for name, value in rows.items():
        print(f"{name:26} {value}")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
