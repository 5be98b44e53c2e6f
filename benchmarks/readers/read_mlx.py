"""Run folders of target mlx in mlx-lm, and compare with transformers.

    python benchmarks/readers/read_mlx.py > benchmarks/readers/read_mlx.txt

Tiny random models of every family of the target, rounded to 4 bits in groups of 32, with several
rotary embeddings; trained models, and the dtype in which a Mac runs them, are in five_folders.py.
Needs ``pip install -e '.[mlx,test]'``. Errors are those of logits, relative, to float32
transformers with the same integers: a whole text, then in steps with the cache.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from every_family import IDS, make_folder
from moe2edge.errors import Unsupported
from moe2edge.evaluation import verify
from moe2edge.numerics.scheme import Scheme
from moe2edge.pipeline.registry import find_target
from moe2edge.runtime.load import build_transformers_model
from moe2edge.runtime.torch_runtime import TorchRuntime
from moe2edge.storage.checkpoint import open_checkpoint
from moe2edge.targets._mlx_rows import ROWS
from moe2edge.testing import quantize

TARGET = find_target("mlx")
PREFILL = 10
LONG = {"original_max_position_embeddings": 4096, "rope_theta": 5e5}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 5e5},
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5},
    "llama3": {
        "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32, "rope_theta": 5e5,
    },
    "yarn": {"rope_type": "yarn", "factor": 32.0, **LONG},
    "yarn with mscale": {
        "rope_type": "yarn", "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.5, **LONG,
    },
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    **{name: {"sliding_window": None} for name in ("mixtral", "qwen2_moe", "qwen3_moe")},
    "lfm2_moe": {"tie_word_embeddings": True},
}


def compare(family: str, rope: dict[str, Any] | None) -> str:
    """Write a folder, run it both ways, and return a line on what was found."""
    with tempfile.TemporaryDirectory() as name:
        source, out = Path(name) / "source", Path(name) / "out"
        changes = {} if rope is None else {"rope_parameters": dict(rope)}
        make_folder(source, family, **changes, **OWN.get(family, {}))
        model = open_checkpoint(str(source)).model
        weights = (pair for block in model.blocks for pair in block.weights())
        odd = {role for role, w in weights if len(w.shape) == 2 and w.shape[1] % 32}
        model = quantize(model, Scheme(4, 32), lambda r: r not in odd and "kv_b_proj" not in r)
        try:
            TARGET.accepts(model)
        except Unsupported as error:
            return f"refused: {str(error).partition(',')[0]}"
        out.mkdir()
        TARGET.write(model, out)
        tensors = verify.audit(TARGET, out, TARGET.stored(model))
        stock = build_transformers_model(model, torch.float32, packed=False)
        expected, runtime = TorchRuntime(stock).logits(IDS), TARGET.reopen(out, exact=True)
        whole = runtime.logits(IDS)
        steps = []
        for row in IDS.tolist():
            steps.append(runtime.start(row[:PREFILL]))
            steps += [runtime.step(token) for token in row[PREFILL:]]
    stepped = torch.stack(steps).view(len(IDS), -1, expected.shape[-1])
    errors = [
        float((found - wanted).norm() / wanted.norm())
        for found, wanted in ((whole, expected), (stepped, expected[:, PREFILL - 1 :]))
    ]
    return f"{tensors} tensors equal, errors {errors[0]:.1e}, {errors[1]:.1e}"


def main() -> None:
    """Print a line for each family and rotary embedding."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    names = ("mlx", "mlx-lm", "transformers", "torch")
    print(", ".join(f"{name} {version(name)}" for name in names))
    for family in ROWS:
        own = family == "mellum"  # it has settings by the kind of layer
        for name, rope in {"its own": None}.items() if own else ROPES.items():
            print(f"{family}, rope {name}: {compare(family, rope)}", flush=True)


if __name__ == "__main__":
    main()
