"""A server with one model that answers as the hub does, ranges included, and counts its bytes."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

NAME = "org/some-moe"


class FakeHub(ThreadingHTTPServer):
    """The server.

    Attributes:
        folder: the files of the model.
        commit: its commit.
        sent: bytes that were sent of each file.
    """

    folder: Path
    commit: str
    sent: dict[str, int]

    @classmethod
    @contextmanager
    def serve(cls, folder: Path, commit: str) -> Iterator[FakeHub]:
        """Serve a folder, which may be filled later."""
        with cls(("127.0.0.1", 0), _Handler) as server:
            server.folder, server.commit, server.sent = folder, commit, {}
            threading.Thread(target=server.serve_forever, daemon=True).start()
            yield server
            server.shutdown()

    @property
    def address(self) -> str:
        """Where it answers."""
        return f"http://127.0.0.1:{self.server_port}"

    def list_names(self) -> list[str]:
        """List the files of the model."""
        found = (path for path in self.folder.rglob("*") if path.is_file())
        return sorted(path.relative_to(self.folder).as_posix() for path in found)


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        """Answer without a body."""
        self._answer()

    def do_GET(self) -> None:
        """Answer."""
        self._answer()

    def _answer(self) -> None:
        hub = self.server
        path, files = self.path.partition("?")[0], f"/{NAME}/resolve/{hub.commit}/"
        if path.startswith(f"/api/models/{NAME}/tree"):
            names = hub.list_names()
            sizes = {name: (hub.folder / name).stat().st_size for name in names}
            tree = [{"type": "file", "path": n, "size": sizes[n], "oid": n} for n in names]
            self._reply(json.dumps(tree).encode())
        elif path.startswith(f"/api/models/{NAME}"):
            info: dict[str, Any] = {"id": NAME, "sha": hub.commit}
            info["siblings"] = [{"rfilename": name} for name in hub.list_names()]
            self._reply(json.dumps(info).encode())
        elif path.startswith(files) and (hub.folder / path.removeprefix(files)).is_file():
            self._send_file(path.removeprefix(files))
        else:
            self._reply(b"", 404)

    def _send_file(self, name: str) -> None:
        data, code = (self.server.folder / name).read_bytes(), 200
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            data, code = data[int(asked[1]) : int(asked[2] or len(data)) + 1], 206
        if self.command == "GET":
            self.server.sent[name] = self.server.sent.get(name, 0) + len(data)
        self._reply(data, code)

    def _reply(self, data: bytes, code: int = 200) -> None:
        self.send_response(code)
        if code == 404:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{self.path.rpartition("/")[2]}"')
        self.send_header("X-Repo-Commit", self.server.commit)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)
