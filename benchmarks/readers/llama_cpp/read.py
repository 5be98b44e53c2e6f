"""Read a GGUF folder with the library gguf, and run it by xllamacpp's own class, without our code.

    benchmarks/readers/llama_cpp/run.sh ENVIRONMENT FOLDER

Every tensor that the library dequantizes must equal ours to the bit. Probabilities of the next
token, which llama.cpp's server gives, must be those of the same numbers in PyTorch: within 0.1 in
the logarithm at the 20 likeliest of each of some positions. The server's greedy text and a chat
turn through the template in the file are shown. Exits with 1 where something differs.
"""

from __future__ import annotations

import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import xllamacpp

import moe2edge
from moe2edge.model.model import Model
from moe2edge.numerics.grid import Quantized
from moe2edge.pipeline.registry import find_target
from moe2edge.runtime.generation import generate
from moe2edge.runtime.load import build_transformers_model
from moe2edge.runtime.torch_runtime import TorchRuntime
from moe2edge.storage.tokenizer import load_tokenizer
from moe2edge.targets import _gguf_model
from moe2edge.targets._gguf_forms import find_places

TEXT = "The quick brown fox jumps over the lazy dog. def main():\n    return 42\n"
LIKELIEST, TOLERANCE, CHAT_TOKENS = 20, 0.1, 16
# Tokens of greedy text, and samples of the text that both run.
GREEDY, ROWS, ROW = 64, 8, 256
AGREEMENT = 0.98


def compare_tensors(folder: Path) -> tuple[int, dict[str, int]]:
    """Compare all tensors; return their number, and those of each type."""
    model: Model = find_target("gguf").streamed(folder)  # type: ignore[assignment]
    found = {one.name: one for one in gguf.GGUFReader(folder / "model.gguf").tensors}
    layout = _gguf_model.find_layout(model)
    places = find_places(
        model,
        lambda block: layout.forms(model.config, block),
        _gguf_model.get_rest_forms(layout, model),
    )
    numbers = {name: weight for name, _, weight in model.tensors()}
    for name, place in places.items():
        value = numbers[name].quantized() if numbers[name].scheme else numbers[name].load()
        for held, part in zip(place.names, place.form.cut(value), strict=True):
            theirs = gguf.dequantize(found[held].data, found[held].tensor_type)
            theirs = theirs if place.expert is None else theirs[place.expert]
            own = part.dequantize() if isinstance(part, Quantized) else part.float()
            np.testing.assert_array_equal(theirs, own.numpy(), err_msg=held)
    kinds: dict[str, int] = {}
    for one in found.values():
        kinds[one.tensor_type.name] = kinds.get(one.tensor_type.name, 0) + 1
    return len(found), kinds


def start_server(folder: Path) -> Any:
    """Start llama.cpp's server on the file, by the class of xllamacpp."""
    settings = xllamacpp.CommonParams()
    settings.model.path = str(folder / "model.gguf")
    settings.n_ctx, settings.n_gpu_layers, settings.n_parallel = 512, 0, 1
    settings.warmup = settings.cache_prompt = False
    settings.cpuparams.n_threads = torch.get_num_threads()
    return xllamacpp.Server(settings)


def ask(answer: Any) -> dict[str, Any]:
    """Return an answer of the server as plain data."""
    return answer if isinstance(answer, dict) else json.loads(answer)


def compare_probabilities(folder: Path, server: Any) -> tuple[float, int, int]:
    """Compare log-probabilities; return the largest difference, equal first tokens, positions."""
    model: Model = find_target("gguf").streamed(folder)  # type: ignore[assignment]
    reference = build_transformers_model(_gguf_model.widen(model), torch.float32)
    ids = load_tokenizer(folder)(TEXT, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        expected = reference(torch.tensor([ids])).logits[0].log_softmax(-1)
    worst, same, places = 0.0, 0, range(2, len(ids), max(1, len(ids) // 8))
    for at in places:
        reply = ask(
            server.handle_completions(
                {"prompt": ids[: at + 1], "n_predict": 1, "n_probs": 400, "temperature": -1.0}
            )
        )
        found = reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        theirs = {one["id"]: one["logprob"] for one in found}
        best = expected[at].topk(LIKELIEST)
        for token, value in zip(best.indices.tolist(), best.values.tolist(), strict=True):
            if token in theirs:
                worst = max(worst, abs(theirs[token] - value))
        same += max(theirs, key=lambda token: theirs[token]) == int(best.indices[0])
    return worst, same, len(places)


def compare_texts(folder: Path) -> tuple[int, float, int]:
    """Compare greedy text in float32, and the likeliest tokens of the file as shipped.

    Returns:
        Tokens until the texts differ, agreement on the likeliest token, and tokens of that text.
    """
    target = find_target("gguf")
    model: Model = target.streamed(folder)  # type: ignore[assignment]
    reference = TorchRuntime(build_transformers_model(_gguf_model.widen(model), torch.float32))
    tokenizer = load_tokenizer(folder)
    prompt = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    texts = [
        list(generate(runtime, prompt, max_tokens=GREEDY))
        for runtime in (reference, target.reopen(folder, exact=True))
    ]
    same = next((n for n in range(GREEDY) if texts[0][n] != texts[1][n]), GREEDY)
    texts_of = sorted((Path(moe2edge.__file__).parent / "builtin/general").glob("evaluation-*"))
    text = "\n\n".join(path.read_text("utf-8")[:2000] for path in texts_of)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"][: ROWS * ROW]
    rows = torch.tensor(ids).view(ROWS, ROW)
    expected = reference.logits(rows).argmax(-1)
    agreeing = (target.reopen(folder).logits(rows).argmax(-1) == expected).double().mean()
    return same, float(agreeing), rows.numel()


def main(folder: Path) -> int:
    """Print what was compared; return the exit code."""
    names = ("gguf", "xllamacpp", "torch", "transformers")
    print(", ".join(f"{name} {version(name)}" for name in names), platform.machine())
    count, kinds = compare_tensors(folder)
    said = ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items()))
    print(f"tensors that the library reads as we do, to the bit: {count} ({said})")
    server = start_server(folder)
    worst, first, places = compare_probabilities(folder, server)
    print(
        f"log-probabilities of llama.cpp's server: largest difference {worst:.4f} at the "
        f"{LIKELIEST} likeliest, first token equal at {first} of {places} positions"
    )
    prompt = {"prompt": "def read_json(path):", "n_predict": CHAT_TOKENS, "temperature": -1.0}
    same, agreeing, tokens = compare_texts(folder)
    print(f"greedy text in float32 is that of PyTorch for {same} of {GREEDY} tokens")
    print(
        f"likeliest token as shipped and in PyTorch: equal for {agreeing:.1%} of {tokens:,} tokens"
    )
    print("greedy:", repr(ask(server.handle_completions(prompt))["choices"][0]["text"]))
    if load_tokenizer(folder).chat_template:
        chat = {"messages": [{"role": "user", "content": "Hi!"}], "max_tokens": CHAT_TOKENS}
        reply = ask(server.handle_chat_completions({**chat, "temperature": 0}))
        print("chat:", repr(reply["choices"][0]["message"]["content"]))
    return int(worst > TOLERANCE or first < places - 1 or same < GREEDY or agreeing < AGREEMENT)


if __name__ == "__main__":
    torch.manual_seed(0)
    sys.exit(main(Path(sys.argv[1])))
