"""Run ONNX folders by onnxruntime alone, without our session, and compare with PyTorch.

    python benchmarks/readers/read_onnxruntime.py > benchmarks/readers/read_onnxruntime.txt

Tiny random models of the four families, in every scheme that the graph holds; those that the
installed onnxruntime is too old for are named. A prefill and single steps with the cache that the
session returns are run by `onnxruntime.InferenceSession`, and compared with PyTorch on the same
numbers: the error of logits is relative, median over positions. Activations are int8 in quantized
operators, and float32 in the lines that say so. Exits with 1 if one is larger than the limit.
"""

from __future__ import annotations

import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnxruntime
import torch

from moe2edge.errors import Unsupported
from moe2edge.model.family import FAMILIES
from moe2edge.numerics.scheme import Scheme
from moe2edge.pipeline.registry import make_target
from moe2edge.runtime.load import build_transformers_model
from moe2edge.runtime.torch_runtime import TorchRuntime
from moe2edge.storage.checkpoint import open_checkpoint
from moe2edge.testing import make_checkpoint, quantize

SCHEMES: dict[str, tuple[Scheme, Scheme, int]] = {
    # of experts, of the rest, accuracy_level
    "4 bits": (Scheme(4, 32), Scheme(4, 32), 4),
    "4 bits, float32 activations": (Scheme(4, 32), Scheme(4, 32), 0),
    "8 bits": (Scheme(8, 32), Scheme(8, 32), 4),
    "2 bits": (Scheme(2, 32), Scheme(2, 32), 4),
    "4 bits, asymmetric": (Scheme(4, 32, False), Scheme(4, 32, False), 4),
    "3 bits, others in 4": (Scheme(3, 32), Scheme(4, 32), 4),
}
PREFILL, LIMIT, EXACT = 16, 0.05, 1e-4
IDS = torch.randint(1, 96, (24,), generator=torch.Generator().manual_seed(0))
KINDS = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int8)": np.int8}


def compute_logits(folder: Path) -> torch.Tensor:
    """Compute logits [positions, vocabulary] behind a prefill and each step."""
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    names = [one.name for one in session.get_outputs()]
    cache = {}
    for one in session.get_inputs():
        if one.name.startswith("past"):
            # A batch of one, no tokens yet.
            sizes = [1, one.shape[1], 0, one.shape[3]]
            cache[one.name] = np.zeros(sizes, KINDS[one.type])
    steps, seen = [], 0
    for part in (IDS[:PREFILL], *IDS[PREFILL:, None]):
        seen += len(part)
        inputs = {
            "input_ids": part.numpy()[None],
            "attention_mask": np.ones((1, seen), np.int64),
        }
        found = dict(zip(names, session.run(None, inputs | cache), strict=True))
        cache = {name: found[name.replace("past_key_values", "present")] for name in cache}
        steps.append(torch.from_numpy(found["logits"][0, -1]).float())
    return torch.stack(steps)


def compare(family: str, experts: Scheme, others: Scheme, level: int) -> tuple[str, bool]:
    """Write a folder and run it; return what was found, and whether it is within the limit."""
    target = make_target("onnx", {"accuracy_level": level})
    with tempfile.TemporaryDirectory() as name:
        source, out = Path(name) / "source", Path(name) / "out"
        make_checkpoint(source, family, initializer_range=0.05)
        model = open_checkpoint(str(source)).model
        model = quantize(model, experts, lambda role: role.startswith("experts"))
        model = quantize(model, others, lambda role: not role.startswith("experts"))
        try:
            target.accepts(model)
            target.check_runtime(model)
        except Unsupported as error:
            return f"refused: {error}", True
        out.mkdir()
        target.write(model, out)
        found = compute_logits(out)
        reference = TorchRuntime(build_transformers_model(model, torch.float32))
        wanted = reference.logits(IDS[None])[0, PREFILL - 1 :]
    error = float(((found - wanted).norm(dim=-1) / wanted.norm(dim=-1)).median())
    limit = LIMIT if level else EXACT
    return f"error {error:.1e}", error <= limit


def main() -> int:
    """Print a line for each family and scheme; return the exit code."""
    passed = True
    print(", ".join(f"{name} {version(name)}" for name in ("onnxruntime", "torch")))
    for family in FAMILIES:
        for name, (experts, others, level) in SCHEMES.items():
            said, ok = compare(family, experts, others, level)
            print(f"{family}, {name}: {said}{'' if ok else ', FAILED'}", flush=True)
            passed &= ok
    return int(not passed)


if __name__ == "__main__":
    sys.exit(main())
