"""Layout of web folders: that of transformers.js, for onnxruntime-web.

What npm has of onnxruntime is older than what PyPI has, and its builds differ: that for WebGPU,
which transformers.js takes in browsers whatever the device, casts no bfloat16 on the processor. So
the folder holds float32 in place of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from moe2edge.errors import Unsupported, VerificationFailed
from moe2edge.model.model import Model
from moe2edge.model.weights import Weight

# Folder of the graph and its data, in which transformers.js looks.
GRAPH_FOLDER = "onnx"
# Name of the first file of data; further ones have _1, _2 ... behind.
WEB_DATA = "model.onnx_data"
# Operators and attributes that onnxruntime on npm does not know; without this one experts compute
# with float32 activations, as with accuracy_level 0.
OMITTED = (("QMoE", "accuracy_level"),)
# Types of the families that transformers.js does not know, and one that it treats alike.
UNKNOWN_TYPES, SIMILAR_TYPE = ("mixtral", "olmoe"), "qwen3_moe"
CONFIG_KEY = "transformers.js_config"


def widen_bfloat16(model: Model) -> Model:
    """Return the model with float32 numbers in place of bfloat16 ones."""
    for block in model.blocks:
        new = {role: _widen(w) for role, w in block.weights() if _is_narrow(w)}
        model = model.replace_block(block.with_weights(new))
    rest = {name: _widen(w) if _is_narrow(w) else w for name, w in model.rest.items()}
    return replace(model, rest=rest)


def _is_narrow(weight: Weight) -> bool:
    return weight.scheme is None and weight.dtype == "BF16"


def _widen(weight: Weight) -> Weight:
    return replace(weight, dtype="F32", load=lambda: weight.load().float())


def accept_web_expert(name: str, weight: Weight) -> None:
    """Refuse a matrix of an expert that onnxruntime on npm computes wrong, or refuses.

    It takes zero points of less than a byte for such of another layout where a row has one alone.

    Args:
        name: its name on disk.
        weight: the matrix.

    Raises:
        Unsupported: so, with what to choose instead.
    """
    scheme = weight.scheme
    if scheme is None or scheme.symmetric or scheme.bits == 8:
        return
    if scheme.groups(weight.shape[1]) == 1:
        raise Unsupported(
            f"{name} is {scheme}, one group for each row, of which onnxruntime 1.30 on npm "
            "computes noise; choose a smaller group_size, symmetric: true, or leave layout=web out"
        )


def list_web_remarks(model: Model) -> Iterator[str]:
    """Yield what a user should know of a web folder."""
    yield (
        "experts compute with float32 activations, as onnxruntime on npm knows no accuracy_level "
        "of them; the export runs the folder in onnxruntime for Python, moe2edge verify in "
        "onnxruntime-web as well, where it is installed"
    )
    if any(_is_narrow(weight) for _, _, weight in model.tensors()):
        yield (
            "bfloat16 numbers are float32, twice as large, as transformers.js cannot read them; "
            "head: 8 and embedding: 8 of the quantizing pass make these a quarter"
        )


def name_web_data(n: int) -> str:
    """Return the name of the n-th file of data, as transformers.js asks for it."""
    return f"{WEB_DATA}_{n}" if n else WEB_DATA


def build_web_config(config: Mapping[str, Any], files: int) -> dict[str, Any]:
    """Add to a config what transformers.js reads: which graph to take, and its files of data."""
    return {**config, CONFIG_KEY: {"dtype": "fp32", "use_external_data_format": files}}


def check_web_config(config: Mapping[str, Any], place: Path) -> None:
    """Compare what a config says to transformers.js with the files of data that are there.

    Raises:
        VerificationFailed: it says something else.
    """
    files = len([path for path in place.iterdir() if path.name.startswith(WEB_DATA)])
    found, expected = config.get(CONFIG_KEY), build_web_config({}, files)[CONFIG_KEY]
    if found != expected:
        raise VerificationFailed(
            f"config.json has {found!r} as {CONFIG_KEY}, the files of data ask for {expected!r}; "
            "export it again"
        )


def describe_use(model_type: str) -> str:
    """Return lines of JavaScript that run a folder, for its card."""
    given = ""
    before = ""
    if model_type in UNKNOWN_TYPES:
        before = (
            f"// transformers.js does not know {model_type}, of which it needs the cache alone.\n"
            "const config = await AutoConfig.from_pretrained(folder);\n"
            f'const alike = {{ ...config, model_type: "{SIMILAR_TYPE}" }};\n'
        )
        given = ", { config: alike }"
    names = "AutoConfig, AutoModelForCausalLM" if before else "AutoModelForCausalLM"
    return (
        f'import {{ {names}, AutoTokenizer, TextStreamer }} from "@huggingface/transformers";\n\n'
        'const folder = "NAME"; // on the hub, or below env.localModelPath\n'
        f"{before}"
        "const tokenizer = await AutoTokenizer.from_pretrained(folder);\n"
        f"const model = await AutoModelForCausalLM.from_pretrained(folder{given});\n"
        "const streamer = new TextStreamer(tokenizer, { skip_prompt: true });\n"
        'await model.generate({ ...tokenizer("Once upon a time"), max_new_tokens: 64, streamer });'
        "\n"
    )
