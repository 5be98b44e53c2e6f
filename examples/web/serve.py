"""Serve this page, and a folder of moe2edge as ``model/``: ``python serve.py FOLDER [PORT]``.

``python -m http.server`` in a folder with both does as well, with one thread: browsers give several
to pages that are cross-origin isolated, which the two headers here make this one.
"""

from __future__ import annotations

import sys
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from os import PathLike
from pathlib import Path
from urllib.parse import unquote, urlsplit

PAGE = Path(__file__).parent
HEADERS = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cache-Control": "no-cache",
}
# Types that the system's table may lack; browsers run nothing of another type.
TYPES = {".mjs": "text/javascript", ".wasm": "application/wasm"}


def make_server(model: Path, port: int = 0, page: Path = PAGE) -> ThreadingHTTPServer:
    """Make a server on this machine; port 0 is a free one."""

    class Handler(SimpleHTTPRequestHandler):
        def guess_type(self, path: str | PathLike[str]) -> str:
            return TYPES.get(Path(path).suffix) or super().guess_type(path)

        def translate_path(self, path: str) -> str:
            parts = [part for part in unquote(urlsplit(path).path).split("/") if part]
            root, rest = (model, parts[1:]) if parts[:1] == ["model"] else (page, parts)
            # A part that leads out of the folder is a name that is not there.
            return str(root.joinpath(*("-" if part == ".." else part for part in rest)))

        def end_headers(self) -> None:
            for name, value in HEADERS.items():
                self.send_header(name, value)
            super().end_headers()

        def log_message(self, *_: object) -> None:
            pass

    return ThreadingHTTPServer(("127.0.0.1", port), Handler)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    if not (folder / "onnx" / "model.onnx").is_file():
        sys.exit(f"{folder} has no onnx/model.onnx; export with -t onnx:layout=web")
    server = make_server(folder, int(sys.argv[2]) if len(sys.argv) > 2 else 8000)
    sys.stdout.write(f"http://127.0.0.1:{server.server_port}/\n")
    server.serve_forever()
