"""Run an ONNX folder in onnxruntime-genai and hold it against what the export recorded.

The folder's recorded tokens go in, a prefill and then one by one; the logits must agree with the
recorded ones, which PyTorch made from the same packed numbers, within 5 % (median over positions,
as `moe2edge verify` asks of the shipped graph). A greedy continuation must be the one that
`moe2edge generate` gives. Exits with 1 otherwise.
"""

from __future__ import annotations

import platform
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnxruntime_genai as og
import torch

from moe2edge import registry
from moe2edge.generate import generate
from moe2edge.verify import SHIPPED_TOLERANCE, Reference

TOKENS = 48


def recorded_logits(model: og.Model, reference: Reference) -> torch.Tensor:
    """Logits in the shape of ``reference.logits``."""
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


def greedy(model: og.Model, prompt: list[int]) -> list[int]:
    """``TOKENS`` tokens after the prompt; an end token does not end them."""
    params = og.GeneratorParams(model)
    length = len(prompt) + TOKENS
    params.set_search_options(max_length=length, min_length=length, do_sample=False)
    generator = og.Generator(model, params)
    generator.append_tokens(np.array([prompt], np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)[len(prompt) :]]


def main() -> int:
    folder = Path(sys.argv[1])
    reference = Reference.read(folder)
    model = og.Model(str(folder))
    found, want = recorded_logits(model, reference), reference.logits
    errors = (found - want).norm(dim=-1) / want.norm(dim=-1)
    prompt = reference.ids[0, : reference.prefill].tolist()
    theirs = greedy(model, prompt)
    ours = list(generate(registry.target("onnx").reopen(folder), prompt, max_tokens=TOKENS))
    ok = float(errors.median()) <= SHIPPED_TOLERANCE and theirs == ours
    rows = {
        "versions": ", ".join(
            f"{name} {version(name)}" for name in ("onnxruntime-genai", "onnxruntime")
        ),
        "machine": f"{platform.machine()}, CPU, Python {platform.python_version()}",
        "recorded tokens": f"{len(want)} x {reference.ids.shape[1]}, prefill {reference.prefill}",
        "relative error of logits": f"{float(errors.median()):.4f} (median; at most 0.05)",
        "greedy tokens, equal": f"{sum(map(int.__eq__, theirs, ours))} of {TOKENS}",
        "result": "passed" if ok else "failed",
    }
    for name, value in rows.items():
        print(f"{name:26} {value}")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
