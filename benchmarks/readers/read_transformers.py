"""Open folders of targets hf and gptq in stock transformers and in moe2edge.load, and compare.

    TORCHDYNAMO_DISABLE=1 python benchmarks/readers/read_transformers.py > OUTPUT

Needs the environment that `gptqmodel/run.sh` makes, with ``pip install --no-deps optimum==2.3.0``
and the requirements of moe2edge: transformers asks for both where a folder is GPTQ. Tiny random
models of every family, rounded to 4 bits in groups of 32. Errors are those of logits in
float32, relative, to transformers on the numbers that the integers stand for (hf:dequantize=true).
"""

from __future__ import annotations

import logging
import sys
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers

import moe2edge

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from every_family import GENERIC, IDS, TABLED, make_folder
from moe2edge.model.transformers_config import find_class
from moe2edge.numerics.scheme import Scheme
from moe2edge.pipeline.registry import make_target
from moe2edge.runtime.torch_runtime import TorchRuntime
from moe2edge.storage.checkpoint import open_checkpoint
from moe2edge.testing import quantize

FOLDERS: dict[str, dict[str, Any]] = {
    "hf": {"dequantize": True},
    "gptq": {},
    "compressed-tensors": {"layout": "natural"},
}


def open_stock(folder: Path) -> tuple[Any, dict[str, int]]:
    """Open a folder in transformers; return the model, and counts of what it reports."""
    config = transformers.AutoConfig.from_pretrained(folder)
    stock, report = find_class(config).from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, experts_implementation="eager"
    )
    return stock, {kind: len(names) for kind, names in report.items() if names}


def measure(found: torch.Tensor, wanted: torch.Tensor) -> str:
    """Return the relative error of logits as text."""
    return f"{float((found.float() - wanted).norm() / wanted.norm()):.1e}"


def describe_stock(folder: Path, wanted: torch.Tensor) -> str:
    """Say what transformers makes of a GPTQ folder."""
    try:
        stock, report = open_stock(folder)
        with torch.inference_mode():
            error = measure(stock(IDS, use_cache=False).logits, wanted)
    except Exception as raised:  # whatever it may raise
        return f"raises {type(raised).__name__}"
    return f"error {error}, {report}"


def compare(family: str) -> str:
    """Write the folders of a family, and return a line on what was found."""
    with tempfile.TemporaryDirectory() as name:
        make_folder(Path(name) / "source", family)
        model = open_checkpoint(str(Path(name) / "source")).model
        weights = [pair for block in model.blocks for pair in block.weights()]
        odd = {role for role, w in weights if any(n % 32 for n in w.shape)}
        model = quantize(model, Scheme(4, 32), lambda role: role not in odd)
        found = {}
        for target, options in FOLDERS.items():
            folder, writer = Path(name) / target, make_target(target, options)
            writer.accepts(model)
            folder.mkdir()
            writer.write(model, folder)
            loaded = moe2edge.load(folder, dtype=torch.float32)
            found[target] = TorchRuntime(loaded).logits(IDS)
        stock, report = open_stock(Path(name) / "hf")
        wanted = TorchRuntime(stock).logits(IDS)
        loads = ", ".join(f"{target} {measure(logits, wanted)}" for target, logits in found.items())
        packed = describe_stock(Path(name) / "gptq", wanted)
    opened = f"reports {report}" if report else "reports nothing"
    return f"hf {opened}; moe2edge.load: {loads}; transformers on gptq {packed}"


def main() -> None:
    """Print a line for each family."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    names = ("transformers", "optimum", "gptqmodel", "torch")
    print(", ".join(f"{name} {version(name)}" for name in names))
    for family in (*TABLED, *GENERIC):
        print(f"{family}: {compare(family)}", flush=True)


if __name__ == "__main__":
    main()
