"""Compare the tensors that GPTQModel reads from a GPTQ folder with those that moe2edge wrote.

    benchmarks/readers/gptqmodel/run.sh ENVIRONMENT FOLDER

Every matrix is dequantized by GPTQModel's own code and must equal ours to the bit, once in
bfloat16, as it computes, and once with its scales in float32. Its logits, computed in bfloat16,
must agree with those of ``moe2edge.load`` in float32 within 5 %. Exits with 1 otherwise.
"""

from __future__ import annotations

import contextlib
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from moe2edge import Model, load, open_checkpoint
from moe2edge.storage.output import open_stored_model

TOLERANCE = 0.05
SAMPLES, LENGTH, SEED = 4, 128, 0


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Compute logits, float32 [samples, length, vocabulary]."""
    out: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return out.float()


def open_theirs(folder: Path) -> Any:
    """Open the folder in GPTQModel, with the kernel that needs no compiler."""
    with contextlib.redirect_stdout(sys.stderr):  # it logs to stdout
        from gptqmodel import BACKEND, GPTQModel

        return GPTQModel.load(str(folder), device="cpu", backend=BACKEND.GPTQ_TORCH).model


def compare_weights(theirs: Any, ours: Model) -> dict[str, int]:
    """Count the matrices that are equal; one that is missing on either side is not."""
    modules = {name: m for name, m in theirs.named_modules() if hasattr(m, "qweight")}
    mine = {n.removesuffix(".weight"): w for n, _, w in ours.tensors() if w.scheme is not None}
    counts = {
        "quantized matrices, ours": len(mine),
        "quantized matrices, GPTQModel": len(modules),
        "equal in bfloat16": 0,
        "equal with scales in float32": 0,
    }
    for name in mine.keys() & modules.keys():
        want, module = mine[name].quantized().dequantize(), modules[name]
        found = module.dequantize_weight().T
        counts["equal in bfloat16"] += torch.equal(found, want.to(found.dtype))
        module.scales = module.scales.float()
        found = module.dequantize_weight().T
        exact = found.dtype == torch.float32 and torch.equal(found, want)
        counts["equal with scales in float32"] += exact
    return counts


def compare_rest(theirs: Any, ours: Model) -> tuple[int, int]:
    """Count tensors that are not quantized, and those of them that are equal."""
    state = theirs.state_dict()
    plain = [(name, w) for name, _, w in ours.tensors() if w.scheme is None]
    equal = [torch.equal(state[n].float(), w.load().float()) for n, w in plain if n in state]
    return len(plain), sum(equal)


def main(folder: Path) -> int:
    """Print a table; return 0 if everything agrees."""
    ours = open_stored_model(open_checkpoint(folder))
    ids = torch.randint(
        ours.family.geometry(ours.config).vocab,
        (SAMPLES, LENGTH),
        generator=torch.Generator().manual_seed(SEED),
    )
    # Before GPTQModel is imported, which replaces parts of transformers.
    exact = logits(load(folder, dtype=torch.float32), ids)
    usual = logits(load(folder, dtype=torch.bfloat16), ids)
    theirs = open_theirs(folder)
    found = logits(theirs, ids)
    error = float((found - exact).norm() / exact.norm())
    own_error = float((usual - exact).norm() / exact.norm())
    agreement = float((found.argmax(-1) == exact.argmax(-1)).float().mean())
    plain, plain_equal = compare_rest(theirs, ours)
    counts = compare_weights(theirs, ours)
    passed = error < TOLERANCE and plain == plain_equal and len(set(counts.values())) == 1
    rows = {
        "model": str(ours).partition("\n")[0],
        "versions": ", ".join(f"{p} {version(p)}" for p in ("gptqmodel", "transformers", "torch")),
        "machine": f"{platform.machine()}, CPU, Python {platform.python_version()}",
        **{key: str(value) for key, value in counts.items()},
        "other tensors, ours": str(plain),
        "other tensors, equal": str(plain_equal),
        "tokens compared": f"{SAMPLES} x {LENGTH}, random, seed {SEED}",
        "relative error of logits, GPTQModel": f"{error:.4f} (less than {TOLERANCE} asked for)",
        "relative error of logits, ours in bfloat16": f"{own_error:.4f}",
        "same most likely token": f"{agreement:.4f}",
        "result": "passed" if passed else "FAILED",
    }
    print("\n".join(f"{key:<44}{value}" for key, value in rows.items()))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
