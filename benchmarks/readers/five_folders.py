"""Write five folders from one solve, and prove that they hold one model.

    pip install -c constraints.txt -e '.[cpu,gguf,mlx,test]'     # the last for compressed-tensors
    python -m benchmarks.readers.five_folders [MODEL] [--recipe NAME ...] [--out OUT] [--on-cpu]

MODEL (builtin:tiny-moe if not given) is exported to onnx, gptq, gguf, compressed-tensors and mlx at
once, by each recipe: a bundled one, or `merged`. Then

- integers and scales of every matrix have to be equal in all five folders;
- without rounding of activations, greedy text has to be equal in all, and that of the float32
  reference, a PyTorch model of the dequantized integers: ONNX Runtime with accuracy_level 0,
  `moe2edge.load` in float32, llama.cpp on a GGUF in F32 with a float32 cache, MLX in float32;
- as shipped, the likeliest token has to be that of the reference for 98 % of the evaluation text.

MLX computes in 16 bits on a Mac, whose kernels sum in float32 by source inspection (not run); its
kernels for CPUs sum in 16 bits, thirty times slower than in float32. So it is compared with sums
in float32 of numbers in 16 bits; and with --on-cpu as a CPU sums, too, on a quarter of the text.
Exits with 1 where something is not as said.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import moe2edge
from benchmarks.readers.builtin import LENGTH, PROMPT, SAMPLES, compare
from moe2edge.calibration.builtin_texts import (
    choose_default_text,
    find_builtin_file,
    name_general_parts,
)
from moe2edge.numerics.grid import Quantized
from moe2edge.pipeline.registry import find_target, make_target
from moe2edge.pipeline.target import Target
from moe2edge.runtime.generation import generate
from moe2edge.runtime.load import build_transformers_model
from moe2edge.runtime.protocol import Runtime
from moe2edge.runtime.torch_runtime import TorchRuntime
from moe2edge.storage.manifest import open_artifact
from moe2edge.storage.tokenizer import load_tokenizer
from moe2edge.targets._mlx_runtime import import_mlx, open_mlx_runtime

TARGETS = ("onnx", "gptq", "gguf", "compressed-tensors", "mlx")
SETTINGS = ("gptq.group_size=32", "evaluation.samples=2")
# Recipes beside those that come with moe2edge.
MERGED = {"passes": [{"expert_merge": {"method": "ream", "keep": 0.75}}, "gptq"]}
GREEDY, AGREEMENT = 64, 0.98
PACKAGES = (
    "onnxruntime", "xllamacpp", "gguf", "compressed-tensors", "mlx", "mlx-lm", "transformers",
    "torch",
)  # fmt: skip


def open_target(folder: Path) -> Target:
    """Return the target of a folder, with its options."""
    artifact = open_artifact(folder)
    return make_target(artifact.target, artifact.options)


def compare_integers(out: Path) -> tuple[int, list[str]]:
    """Compare integers and scales of all folders; return how many matrices, and what differs."""
    numbers: dict[str, dict[str, Quantized]] = {
        name: {
            key: value
            for key, value in open_target(out / name).tensors(out / name)
            if isinstance(value, Quantized)
        }
        for name in TARGETS
    }
    first, *others = TARGETS
    wrong = []
    for name in others:
        if numbers[name].keys() != numbers[first].keys():
            wrong.append(f"{name} has other matrices than {first}")
            continue
        for key, own in numbers[name].items():
            expected = numbers[first][key]
            if not (torch.equal(own.q, expected.q) and torch.equal(own.scales, expected.scales)):
                wrong.append(f"{name}: {key}")
    return len(numbers[first]), wrong


def list_prompts(tokenizer: Any) -> list[list[int]]:
    """Return the prompts whose greedy text is compared."""
    return [
        tokenizer(text, add_special_tokens=False)["input_ids"]
        for text in (PROMPT, "Once upon a time", "A train leaves at 9 o'clock and")
    ]


def read_text(model: str, tokenizer: Any) -> Tensor:
    """Return the evaluation text of a model, int64 [samples, length]."""
    kind = choose_default_text(model)
    parts = [kind] if kind == "builtin" else list(name_general_parts())
    share = -(-SAMPLES * LENGTH // len(parts))
    ids: list[int] = []
    for part in parts:
        file = find_builtin_file(part, "evaluation")
        assert file is not None
        text = file.read_text("utf-8")[: 20 * share]
        ids += tokenizer(text, add_special_tokens=False)["input_ids"][:share]
    return torch.tensor(ids[: SAMPLES * LENGTH]).view(SAMPLES, LENGTH)


@contextmanager
def summing_in_float32() -> Iterator[None]:
    """Let MLX sum products of quantized matrices in float32, and round the sums as before."""
    mx, _ = import_mlx()

    def widen(function: Callable[..., Any]) -> Callable[..., Any]:
        def widened(x: Any, w: Any, scales: Any, biases: Any, *rest: Any, **more: Any) -> Any:
            wide = (one.astype(mx.float32) for one in (scales, biases))
            return function(x.astype(mx.float32), w, *wide, *rest, **more).astype(x.dtype)

        return widened

    names = ("quantized_matmul", "gather_qmm")
    before = {name: getattr(mx, name) for name in names}
    try:
        for name, function in before.items():
            setattr(mx, name, widen(function))
        yield
    finally:
        for name, function in before.items():
            setattr(mx, name, function)


def list_shipped(out: Path, *, on_cpu: bool) -> Iterator[tuple[str, Runtime, int]]:
    """Yield every folder as it is used, with its name and the samples that it runs."""
    said = {
        "onnx": "onnxruntime, activations of matrices in int8",
        "gptq": "moe2edge.load in bfloat16",
        "gguf": "llama.cpp, activations of matrices in int8, cache in float16",
        "compressed-tensors": "moe2edge.load in bfloat16",
    }
    for name, how in said.items():
        yield f"{name} ({how})", open_target(out / name).reopen(out / name), SAMPLES
    native = open_mlx_runtime(out / "mlx", exact=False, native=True)
    with summing_in_float32():
        yield f"mlx (mlx-lm in {native.dtype}, summing in float32)", native, SAMPLES
    if on_cpu:
        yield f"mlx (mlx-lm in {native.dtype} on a CPU, which sums in it)", native, 1


def check(
    model: str, recipe: str, out: Path, *, on_cpu: bool, dtype: str
) -> Iterator[tuple[bool, str]]:
    """Export a model, and yield what was compared: whether it is as said, and a line."""
    if not out.exists():
        chosen: Any = MERGED if recipe == "merged" else recipe
        targets = ",".join(TARGETS).replace("mlx", f"mlx:dtype={dtype}")
        moe2edge.export(model, moe2edge.parse_recipe(chosen, SETTINGS), targets, out)
    count, wrong = compare_integers(out)
    said = f"differ: {wrong[:3]}" if wrong else "are equal in all five folders"
    yield not wrong, f"integers and scales of {count} matrices {said}"
    gptq: Any = find_target("gptq").streamed(out / "gptq")
    reference = TorchRuntime(build_transformers_model(gptq, torch.float32, packed=False))
    tokenizer = load_tokenizer(out / "gptq")
    prompts = list_prompts(tokenizer)
    expected = [list(generate(reference, prompt, max_tokens=GREEDY)) for prompt in prompts]
    for name in TARGETS:
        runtime = open_target(out / name).reopen(out / name, exact=True)
        found = [list(generate(runtime, prompt, max_tokens=GREEDY)) for prompt in prompts]
        same = sum(a == b for a, b in zip(found, expected, strict=True))
        yield (
            same == len(prompts),
            f"{name} in float32: greedy text of {GREEDY} tokens equal for {same} of {len(prompts)} "
            "prompts",
        )
    rows = read_text(model, tokenizer)
    wanted = torch.cat([reference.logits(row[None])[0] for row in rows])
    for name, runtime, count in list_shipped(out, on_cpu=on_cpu):
        found = torch.cat([runtime.logits(row[None])[0] for row in rows[:count]])
        agreement, error = compare(found, wanted[: len(found)])
        yield (
            agreement >= AGREEMENT,
            f"{name}: likeliest token equal for {agreement:.1%} of {len(found):,} tokens, "
            f"mean relative error {error:.2%}",
        )


def main() -> int:
    """Print what was compared; return 1 if something is not as said."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", default="builtin:tiny-moe")
    parser.add_argument("--recipe", nargs="+", default=["w4"], help="bundled ones, or merged")
    parser.add_argument(
        "--out", type=Path, help="keep the folders here, and take those that are there"
    )
    parser.add_argument("--on-cpu", action="store_true", help="run MLX as a CPU sums, too")
    parser.add_argument("--mlx-dtype", default="auto", help="option dtype of target mlx")
    parser.add_argument("--name", help="of the model, in the output")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    print(", ".join(f"{name} {version(name)}" for name in PACKAGES))
    failed = 0
    for recipe in given.recipe:
        print(f"\n{given.name or given.model}, recipe {recipe}, groups of 32:", flush=True)
        begun = time.time()
        with tempfile.TemporaryDirectory() as folder:
            out = Path(given.out or folder) / recipe
            out.parent.mkdir(parents=True, exist_ok=True)
            for right, line in check(
                given.model, recipe, out, on_cpu=given.on_cpu, dtype=given.mlx_dtype
            ):
                failed += not right
                print(f"  {'' if right else 'NOT AS SAID: '}{line}", flush=True)
        print(f"{recipe}: {time.time() - begun:.0f} s", file=sys.stderr)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
