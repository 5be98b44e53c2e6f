"""Read folders of target compressed-tensors by stock transformers with that library, and compare.

    python benchmarks/readers/read_compressed.py > benchmarks/readers/read_compressed.txt

Tiny random models of every family, rounded to 4 bits in groups of 8, in layout natural, which holds
all: of families that transformers does not read, the output says what it does. Then schemes that
differ by module, on two families, and the built-in model over 2,044 tokens. Needs
``pip install -e '.[test]'``. The error is that of logits, relative, to those of ``moe2edge.load``
in float32.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import builtin
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from every_family import GENERIC, IDS, TABLED, make_folder
from moe2edge.evaluation import verify
from moe2edge.model.model import Model
from moe2edge.model.transformers_config import find_class
from moe2edge.numerics.scheme import Scheme
from moe2edge.pipeline.registry import make_target
from moe2edge.runtime.torch_runtime import TorchRuntime
from moe2edge.storage.checkpoint import open_checkpoint
from moe2edge.testing import quantize

TARGET = make_target("compressed-tensors", {"layout": "natural"})
W4, W8 = Scheme(4, 16), Scheme(8, 16)
Schemes = Callable[[str], Scheme | None]
MIXED: dict[str, Schemes] = {
    "attention in 8 bits": lambda role: W8 if role.startswith("attention") else W4,
    "experts in 8 bits": lambda role: W8 if role.startswith("experts") else W4,
    "shared experts in 8 bits": lambda role: W8 if role.startswith("shared") else W4,
    "experts alone": lambda role: W4 if role.startswith("experts") else None,
    "2 bits": lambda _: Scheme(2, 16),
    "3 bits": lambda _: Scheme(3, 16),
    "8 bits, whole rows": lambda _: Scheme(8, -1),
    "attention alone": lambda role: W4 if role.startswith("attention") else None,
    "asymmetric": lambda _: Scheme(4, 16, symmetric=False),
    "down of experts in 8 bits": lambda role: W8 if role.endswith("down") else W4,
}


def round_all(model: Model, choose: Schemes) -> Model:
    """Round each matrix to the scheme that is chosen for its role."""
    roles = {role for block in model.blocks for role, _ in block.weights()}
    for scheme in sorted({s for role in roles if (s := choose(role))}, key=str):
        model = quantize(model, scheme, lambda role, scheme=scheme: choose(role) == scheme)
    return model


def compare(family: str, choose: Schemes) -> str:
    """Write a folder, read it both ways, and return a line on what was found."""
    with tempfile.TemporaryDirectory() as name:
        source, out = Path(name) / "source", Path(name) / "out"
        make_folder(source, family)
        model = round_all(open_checkpoint(str(source)).model, choose)
        TARGET.accepts(model)
        out.mkdir()
        TARGET.write(model, out)
        tensors = verify.audit(TARGET, out, TARGET.stored(model))
        expected = TARGET.reopen(out, exact=True).logits(IDS)
        try:
            config = transformers.AutoConfig.from_pretrained(out)
            stock, report = find_class(config).from_pretrained(
                out, dtype=torch.float32, output_loading_info=True
            )
        except Exception as error:  # whatever it may raise
            return f"{tensors} tensors equal, transformers raises {type(error).__name__}"
        wrong = {kind: len(names) for kind, names in report.items() if names}
        with torch.inference_mode():
            stock(IDS, use_cache=False)  # decompresses attention
            torch.nn.Module.float(stock)  # experts have the dtype of the scales
            logits = stock(IDS, use_cache=False).logits
    error = float((logits - expected).norm() / expected.norm())
    verdict = "reads" if error < 2e-2 and not wrong else f"WRONG, no error, {wrong}:"
    return f"{tensors} tensors equal, transformers {verdict} {error:.1e}"


def run_builtin() -> None:
    """Compare the built-in model in stock transformers and in moe2edge.load, as they run it."""
    with tempfile.TemporaryDirectory() as name:
        out = Path(name) / "out"
        builtin.export("compressed-tensors", out)
        exact, loaded = TARGET.reopen(out, exact=True), TARGET.reopen(out)
        kinds = {}
        for dtype in (torch.float32, torch.bfloat16):
            stock = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=dtype)
            with torch.inference_mode():
                stock(IDS)  # decompresses attention
            kinds[dtype] = TorchRuntime(torch.nn.Module.to(stock, dtype))
        others = {"transformers in float32": kinds[torch.float32]}
        shipped = {
            "moe2edge.load in bfloat16": loaded,
            "transformers in bfloat16": kinds[torch.bfloat16],
        }
        builtin.describe(out, exact, others, shipped)


def main() -> None:
    """Print a line for each family, and for each way to mix schemes."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    names = ("transformers", "compressed-tensors", "torch")
    print(", ".join(f"{name} {version(name)}" for name in names))
    for family in (*TABLED, *GENERIC):
        print(f"{family}: {compare(family, lambda _: Scheme(4, 8))}", flush=True)
    for family in ("mixtral", "glm4_moe"):
        for name, choose in MIXED.items():
            print(f"{family}, {name}: {compare(family, choose)}", flush=True)
    run_builtin()


if __name__ == "__main__":
    main()
