"""Compare logits of every family in every target that holds it, in the target's own runtime.

    pip install -c constraints.txt -e '.[cpu,gguf,mlx,test]'
    python -m benchmarks.readers.matrix [--only FAMILY ...] > benchmarks/readers/matrix.txt

Tiny random models, rounded to 4 bits in groups of 32 where these fit. A cell is the
error of logits, relative to float32 transformers with the same integers, of the folder with
activations in float32; it has to be below 1e-4. A `-` stands for a target that refuses the family
or what its tiny model has. Exits with 1 where an error is larger.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from every_family import GENERIC, IDS, TABLED, keep_six, make_folder
from moe2edge.errors import Unsupported
from moe2edge.evaluation import verify
from moe2edge.model.model import Model
from moe2edge.numerics.scheme import Scheme
from moe2edge.pipeline.registry import find_target
from moe2edge.runtime.load import build_transformers_model
from moe2edge.runtime.torch_runtime import TorchRuntime
from moe2edge.storage.checkpoint import open_checkpoint
from moe2edge.testing import quantize
from test_target_gguf import FEWER
from test_target_gguf import GENERIC as FOR_GGUF
from test_target_gguf import WORKING as FOR_GGUF_TOO
from test_target_mlx import SETTINGS as FOR_MLX

TARGETS = ("onnx", "gptq", "gguf", "compressed-tensors", "mlx")
MOST = 1e-4
PLAIN: dict[str, Any] = {"sliding_window": None}
# What each target has of these families; its page lists the other forms, which it refuses.
CHANGES: dict[str, dict[str, dict[str, Any]]] = {
    "gguf": {**FOR_GGUF_TOO, **FOR_GGUF, "mixtral": PLAIN},
    "mlx": {**dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe"), PLAIN), **FOR_MLX},
}


def make_model(folder: Path, family: str, target: str) -> Model:
    """Make a model of a family as a target holds it, with matrices rounded."""
    make_folder(folder, family, **CHANGES.get(target, {}).get(family, {}))
    model = keep_six(open_checkpoint(str(folder)).model)
    if target == "gguf":
        model = model.keep_blocks(FEWER.get(family, range(len(model.blocks))))
    weights = (pair for block in model.blocks for pair in block.weights())
    odd = {r for r, w in weights if len(w.shape) == 2 and (w.shape[1] % 32 or w.shape[0] % 8)}
    return quantize(model, Scheme(4, 32), lambda role: role not in odd and "kv_b" not in role)


def measure(family: str, name: str) -> float | None:
    """Return the error of a family in a target; None: the target refuses it."""
    target = find_target(name)
    with tempfile.TemporaryDirectory() as place:
        model = make_model(Path(place, "source"), family, name)
        if not target.supports(model.family):
            return None
        try:
            target.accepts(model)
        except Unsupported as error:
            print(f"{family}, {name}: {error}", file=sys.stderr)
            return None
        out = Path(place, "out")
        out.mkdir()
        target.write(model, out)
        verify.audit(target, out, target.stored(model))
        expected = TorchRuntime(build_transformers_model(model, torch.float32, packed=False))
        wanted = expected.logits(IDS)
        found = target.reopen(out, exact=True).logits(IDS)
    return float((found - wanted).norm() / wanted.norm())


def main() -> int:
    """Print the table; return 1 if an error is too large."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="+", help="families")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    names = ("onnxruntime", "xllamacpp", "compressed-tensors", "mlx-lm", "transformers", "torch")
    print(", ".join(f"{name} {version(name)}" for name in names))
    print(f"{'family':<20}" + "".join(f"{name:>20}" for name in TARGETS))
    largest = 0.0
    for family in given.only or (*TABLED, *GENERIC):
        errors = [measure(family, name) for name in TARGETS]
        cells = ["-" if error is None else f"{error:.1e}" for error in errors]
        print(f"{family:<20}" + "".join(f"{cell:>20}" for cell in cells), flush=True)
        largest = max([largest, *(error for error in errors if error is not None)])
    print(f"largest error {largest:.1e}, asked for: less than {MOST:.0e}")
    return int(largest >= MOST)


if __name__ == "__main__":
    sys.exit(main())
