"""Run web folders in onnxruntime-web, onnxruntime-node and transformers.js; see run.sh.

Tiny random models in the schemes and forms of the target: logits of onnxruntime-web (wasm, by Node)
against those of onnxruntime for Python with float32 activations, of a whole text and in steps. Then
greedy text of 24 tokens by each program, of tiny models and of the built-in one, and the
milliseconds of the fastest token, with one thread, on two cores that others use as well.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import torch

sys.path.insert(0, str(Path(__file__).parents[3] / "tests"))

import moe2edge
from moe2edge.errors import Moe2EdgeError
from moe2edge.model.model import Model
from moe2edge.numerics.scheme import Scheme
from moe2edge.runtime.generation import generate
from moe2edge.storage.checkpoint import open_checkpoint
from moe2edge.targets._web_runtime import find_modules
from moe2edge.targets.onnx import Onnx
from moe2edge.testing import make_checkpoint, make_tokenizer, quantize, quantize_ends
from test_onnx_mixed import FORMS, formed

WEB, CACHE = Onnx(layout="web"), Onnx(0, "int8", "web")
# The case whose keys and values are cached in int8.
CACHED = "cache in int8"
IDS = torch.randint(0, 96, (2, 40), generator=torch.Generator().manual_seed(5))
TEXTS = torch.randint(0, 96, (60, 40), generator=torch.Generator().manual_seed(3)).tolist()
PROMPT = "def read_json(path):\n"
COUNT = 24
W4 = Scheme(group_size=32)
# Families of the target.
NAMES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe")


def rounded(*scheme: int, symmetric: bool = True) -> Callable[[Model], Model]:
    """Return what rounds a model to a scheme."""
    return lambda model: quantize(model, Scheme(*scheme, symmetric=symmetric))


def reformed(form: str, *, skip: bool = False) -> Callable[[Model], Model]:
    """Return what gives layers a form, and rounds them."""
    return lambda model: quantize(formed(model, FORMS[form], skip), W4)


CASES: dict[str, tuple[str, Callable[[Model], Model]]] = {
    **{family: (family, rounded(4, 32)) for family in NAMES},
    "4 bits, asymmetric": ("mixtral", rounded(4, 16, symmetric=False)),
    "4 bits, asymmetric, one group": ("mixtral", rounded(4, 32, symmetric=False)),
    "8 bits, asymmetric, one group": ("mixtral", rounded(8, 32, symmetric=False)),
    "2 bits, asymmetric": ("mixtral", rounded(2, 16, symmetric=False)),
    CACHED: ("olmoe", rounded(4, 32)),
    "4 bits, groups of 16": ("mixtral", rounded(4, 16)),
    "8 bits": ("qwen3_moe", rounded(8, 32)),
    "2 bits": ("qwen3_moe", rounded(2, 32)),
    "not quantized": ("olmoe", lambda model: model),
    "head and embedding in 8 bits": (
        "olmoe",
        lambda model: quantize_ends(quantize(model, W4), Scheme(8, 32)),
    ),
    "dynamic skipping": ("mixtral", reformed("every base with factors", skip=True)),
    "replaced experts": ("mixtral", reformed("maps of several ranks")),
    "tied experts": ("qwen2_moe", reformed("tied rows and replacements")),
}


def main() -> None:
    """Print a line for each case and program."""
    torch.set_num_threads(1)
    print(f"onnxruntime for Python {onnxruntime.__version__}, onnxruntime-web {find_modules()[1]}")
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        for n, (said, (family, change)) in enumerate(CASES.items()):
            source = work / "sources" / family
            if not source.exists():
                make_checkpoint(source, family, dtype="bfloat16")
                make_tokenizer(source)
            folder = work / f"case{n}"
            folder.mkdir()
            compare_logits(said, change(open_checkpoint(str(source)).model), folder)
            if said == CACHED:
                compare_text(f"{said} (random)", folder, list(range(5, 17)), CACHE)
            if said == family:
                compare_text(f"{family} (random)", folder, list(range(5, 17)))
        folder = work / "builtin"
        settings = ["evaluation.samples=2"]
        moe2edge.export(
            "builtin:tiny-moe", moe2edge.parse_recipe("w4-rtn", settings), "onnx:layout=web", folder
        )
        from tokenizers import Tokenizer

        prompt = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(PROMPT).ids
        compare_text("built-in model", folder, prompt)


def compare_logits(said: str, model: Model, folder: Path) -> None:
    """Compare logits of onnxruntime-web with those of onnxruntime."""
    target = CACHE if said == CACHED else WEB
    try:
        target.accepts(model)
        target.write(model, folder)
        target.calibrate(folder, TEXTS)
        # exact would not round the cache; level 0 rounds nothing else.
        wanted = target.reopen(folder, exact=said != CACHED).logits(IDS)
        runtime = target.reopen_elsewhere(folder)
        assert runtime is not None
        found = runtime.logits(IDS)
        row = IDS[1].tolist()
        steps = torch.stack([runtime.start(row[:30]), *map(runtime.step, row[30:])])
    except Moe2EdgeError as error:
        print(f"{said}: {error}")
        return
    errors = (
        float((a - b).norm() / b.norm()) for a, b in ((found, wanted), (steps, wanted[1, 29:]))
    )
    print(f"{said}: relative errors of logits {', '.join(f'{e:.1e}' for e in errors)}")


def compare_text(said: str, folder: Path, prompt: list[int], target: Onnx = WEB) -> None:
    """Compare greedy text of each program with that of onnxruntime for Python."""
    # On a processor products of MatMulNBits are rounded to int8, as in onnxruntime for Python.
    exact, shipped = (
        list(generate(target.reopen(folder, exact=e), prompt, max_tokens=COUNT))
        for e in (True, False)
    )
    whole = shipped if target is CACHE else exact
    for program, wanted in (("node", shipped), ("wasm", whole), ("transformers", shipped)):
        command = ["node", str(Path(__file__).with_name("read.mjs")), program, str(folder)]
        run = subprocess.run(
            [*command, str(COUNT), json.dumps(prompt)], capture_output=True, text=True, check=False
        )
        if run.returncode:
            print(f"{said}, {program}: {run.stderr.strip()[-200:]}")
            continue
        found = json.loads(run.stdout.splitlines()[-1])
        same = "equal" if found["ids"] == wanted else f"DIFFERS: {found['ids']}, {wanted}"
        speed = f"{found['ms']:.1f} ms the fastest token"
        print(f"{said}, {found['version']}: greedy text {same}, {speed}")


if __name__ == "__main__":
    main()
