"""Run a GGUF file in a process of its own, which llama.cpp may end.

``python -m moe2edge.targets._gguf_worker`` reads requests on stdin and answers on stdout: a line of
JSON each, behind which stand the bytes that it announces.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from typing import Any

from moe2edge.targets._gguf_library import Library, LibraryError, LoadedModel


def serve_model() -> None:
    """Answer requests until stdin ends."""
    with os.fdopen(os.dup(1), "wb") as out:
        os.dup2(2, 1)  # libraries may write to stdout, where replies must stand alone
        model: LoadedModel | None = None
        for line in sys.stdin.buffer:
            request = json.loads(line)
            data: list[bytes] = []
            try:
                reply: dict[str, Any]
                if request["do"] == "open":
                    library = Library()
                    model = LoadedModel(library, **request["with"])
                    reply = {"vocabulary": model.vocabulary, "version": library.version}
                else:
                    assert model is not None, "nothing is open"
                    reply, data = _answer(model, request)
            except LibraryError as error:
                reply, data = {"error": str(error)}, []
            size = sum(len(piece) for piece in data)
            out.write(json.dumps({**reply, "bytes": size}).encode() + b"\n")
            for piece in data:
                out.write(piece)
            out.flush()


def _answer(model: LoadedModel, request: Mapping[str, Any]) -> tuple[dict[str, Any], list[bytes]]:
    match request["do"]:
        case "logits":
            model.start()
            return {}, model.extend(request["ids"], everywhere=True)
        case "start":
            model.start()
            return {}, model.extend(request["ids"], everywhere=False)
        case "placed":
            return {}, model.run_at(request["ids"], request["positions"])
        case "step":
            return {}, model.extend(request["ids"], everywhere=False)
        case "cache":
            return {"cache": model.cache_nbytes}, []
        case "encode":
            special = request["special"]
            return {"ids": [model.tokenize(t, special=special) for t in request["texts"]]}, []
        case "ends":
            return {"ends": [model.ends(token) for token in request["ids"]]}, []
        case other:
            raise AssertionError(f"unknown request {other}")


if __name__ == "__main__":
    serve_model()
