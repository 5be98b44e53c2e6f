"""Run GPTQ folders with the config of auto-round in stock transformers, packed, and compare.

    python benchmarks/readers/read_auto_round.py [FAMILY ...] > OUTPUT

Needs ``pip install -e '.[test]' auto-round==0.16.1``. Tiny random models of every family, rounded
to 4 bits in groups of 32: of families that the target refuses, the output says what transformers
does. Then schemes that differ by module, and the built-in model over 2,044 tokens, in bfloat16.
Errors are those of logits, relative, to ``moe2edge.load`` in float32: the scales and all else of
transformers' model are converted to float32 after loading, as the library computes in 16 bits.
"""

from __future__ import annotations

import logging
import multiprocessing
import sys
import tempfile
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import builtin
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from every_family import GENERIC, IDS, LATENT, OWN, TABLED, make_folder
from moe2edge.errors import InputError, Unsupported
from moe2edge.evaluation import verify
from moe2edge.model.model import Model
from moe2edge.model.transformers_config import find_class
from moe2edge.numerics.scheme import Scheme
from moe2edge.pipeline.registry import make_target
from moe2edge.runtime.torch_runtime import TorchRuntime
from moe2edge.storage.checkpoint import open_checkpoint
from moe2edge.testing import quantize

TARGET = make_target("gptq", {"config": "auto-round"})
W4, W8 = Scheme(4, 32), Scheme(8, 32)
# Sizes that 32 divides, which the library asks for.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("shared_intermediate_size", "shared_expert_intermediate_size"), 64),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "v_head_dim", "index_head_dim"), 32),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim"), 32),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 32),
}
Schemes = Callable[[str], Scheme | None]
MIXED: dict[str, Schemes] = {
    "attention in 8 bits": lambda role: W8 if role.startswith("attention") else W4,
    "experts in 8 bits": lambda role: W8 if role.startswith("experts") else W4,
    "down of experts in 8 bits": lambda role: W8 if role.endswith("down") else W4,
    "one expert in 8 bits": lambda role: W8 if role.startswith("experts.1.") else W4,
    "experts alone": lambda role: W4 if role.startswith("experts") else None,
    "attention alone": lambda role: W4 if role.startswith("attention") else None,
    "2 bits": lambda _: Scheme(2, 32),
    "groups of 64 in attention": lambda r: Scheme(4, 64) if r.startswith("attention") else W4,
}


def measure(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Return the relative error of logits."""
    return float((found.float() - wanted).norm() / wanted.norm())


def round_all(model: Model, choose: Schemes) -> Model:
    """Round each matrix of 32-fold sizes to the scheme that is chosen for its role."""
    weights = [pair for block in model.blocks for pair in block.weights()]
    odd = {role for role, w in weights if any(n % 32 for n in w.shape)}
    for scheme in sorted({s for role, _ in weights if (s := choose(role))}, key=str):
        model = quantize(
            model, scheme, lambda r, scheme=scheme: r not in odd and choose(r) == scheme
        )
    return model


def write_source(folder: Path, family: str, **sizes: Any) -> None:
    """Write a model whose numbers are exact in the dtype in which the library opens it."""
    make_folder(folder, family, **sizes).to(torch.bfloat16).save_pretrained(folder)


def open_stock(folder: Path) -> tuple[Any, dict[str, Any]]:
    """Open a folder in transformers; return the model, and what it reports of tensors."""
    config = transformers.AutoConfig.from_pretrained(folder)
    stock, report = find_class(config).from_pretrained(
        folder, dtype=torch.bfloat16, output_loading_info=True
    )
    return stock, {kind: len(names) for kind, names in report.items() if names}


def compare(family: str, choose: Schemes) -> str:
    """Write a folder, read it both ways, and return a line on what was found."""
    with tempfile.TemporaryDirectory() as name:
        source, out = Path(name) / "source", Path(name) / "out"
        sizes = SIZES | ({"head_dim": 32} if LATENT.items() <= OWN.get(family, {}).items() else {})
        try:
            write_source(source, family, **sizes)
            model = open_checkpoint(str(source)).model
        except (RuntimeError, ValueError, TypeError, InputError):
            write_source(source, family)
            model = open_checkpoint(str(source)).model
        model = round_all(model, choose)
        held = ""
        try:
            TARGET.accepts(model)
        except Unsupported as error:
            held = f"refused ({str(error).partition(';')[0]})"
            if "not seen" not in held:  # a form, not a family
                return held
            held += "; else "
        out.mkdir()
        try:
            TARGET.write(model, out)
        except Unsupported as error:
            return f"refused ({str(error).partition(';')[0]})"
        tensors = verify.audit(TARGET, out, TARGET.stored(model))
        expected = TARGET.reopen(out, exact=True).logits(IDS)
        try:
            stock, wrong = open_stock(out)
            torch.nn.Module.float(stock)  # the library itself computes in 16 bits
            with torch.inference_mode():
                error = measure(stock(IDS, use_cache=False).logits, expected)
        except Exception as raised:  # whatever it may raise
            return f"{held}{tensors} tensors equal, transformers raises {type(raised).__name__}"
    packed = sum(hasattr(module, "qweight") for module in stock.modules())
    verdict = "runs" if error < 1e-4 and not wrong else f"WRONG, {wrong}:"
    return (
        f"{held}{tensors} tensors equal, transformers {verdict} {packed} packed matrices, error "
        f"{error:.1e}"
    )


def run_case(case: tuple[str, str]) -> str:
    """Compare a family in one of the ways to choose schemes."""
    family, name = case
    return f"{family}, {name}: {compare(family, MIXED.get(name, lambda _: W4))}"


def run_builtin() -> None:
    """Compare the built-in model in stock transformers and in moe2edge.load, as they run it."""
    with tempfile.TemporaryDirectory() as name:
        out = Path(name) / "out"
        builtin.export("gptq:config=auto-round", out)
        exact, loaded = TARGET.reopen(out, exact=True), TARGET.reopen(out)
        stock = TorchRuntime(open_stock(out)[0])
        builtin.describe(
            out, exact, {}, {"moe2edge.load": loaded, "transformers with auto-round": stock}
        )


def main() -> None:
    """Print a line for each family, and for each way to mix schemes."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    names = ("transformers", "auto-round", "torch")
    print(", ".join(f"{name} {version(name)}" for name in names))
    # The library changes transformers for good: what it does not open fails behind it.
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        cases = [(family, "4 bits") for family in sys.argv[1:] or (*TABLED, *GENERIC)]
        cases += [(family, name) for family in ("mixtral", "qwen2_moe") for name in MIXED]
        for said in pool.imap(run_case, cases, chunksize=1):
            print(said, flush=True)
    run_builtin()


if __name__ == "__main__":
    main()
