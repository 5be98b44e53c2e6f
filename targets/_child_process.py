"""A model that another program holds open, in a process of its own, which may end.

Requests are lines of JSON on its stdin; it answers with a line of JSON each, behind which stand the
bytes that the line announces. The first request, ``open``, is answered with the vocabulary.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from moe2edge.errors import InputError, VerificationFailed
from moe2edge.runtime.protocol import check_id_range
from moe2edge.runtime.waiting import choose_waiting

if TYPE_CHECKING:
    from torch import Tensor

# Bytes that the pipe from the process holds; Linux lets everyone ask for so many.
_PIPE = 1 << 20
# What a line of the process has that says why it ended.
_TELLING = re.compile("assert|error|what\\(\\)", re.IGNORECASE)


class ModelProcess:
    """A process that has a file open; ends with this object.

    Attributes:
        opened: its answer to the request that opened the file.
    """

    def __init__(
        self, program: str, command: Sequence[str], path: Path, env: Mapping[str, str], **how: Any
    ) -> None:
        """Open a file.

        Args:
            program: name of what runs it, for messages.
            command: what starts the process.
            path: the file.
            env: further environment variables.
            how: goes into the request.

        Raises:
            VerificationFailed: the program refuses the file.
        """
        self._program, self._path = program, path
        # Open as long as the process runs.
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**os.environ, **choose_waiting(os.environ), **env},
        )
        _widen(self._process.stdout)
        self._end = weakref.finalize(self, _end, self._process, self._errors)
        self.opened, _ = self.ask("open", **{"with": {"path": str(path), **how}})
        self.vocabulary: int = self.opened["vocabulary"]

    def ask(self, do: str, **request: Any) -> tuple[dict[str, Any], bytes]:
        """Send a request; return the reply, and the bytes with it.

        Raises:
            VerificationFailed: the program refuses what was asked, or ended.
        """
        source, sink = self._process.stdout, self._process.stdin
        assert source is not None
        assert sink is not None
        try:
            sink.write(json.dumps({"do": do, **request}).encode() + b"\n")
            sink.flush()
            line = source.readline()
            reply = json.loads(line) if line.endswith(b"\n") else None
        except (BrokenPipeError, OSError):
            reply = None
        if reply is None:
            raise VerificationFailed(
                f"{self._program} ended with {self._path.name}: {self._explain()}"
            )
        data = source.read(reply["bytes"])
        if error := reply.get("error"):
            raise self.make_error(error)
        return reply, data

    def make_error(self, said: str) -> Exception:
        """Make the error for what the program says."""
        return VerificationFailed(f"{self._program} refuses {self._path.name}: {said}")

    def _explain(self) -> str:
        """Say how the process ended, with the last that it wrote."""
        code = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode("utf-8", "replace").strip().splitlines()
        telling = [line for line in lines if _TELLING.search(line)] or lines[-1:]
        said = f": {telling[-1].strip()[:200]}" if telling else ""
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return f"{how}{said}; export or download it again"

    def close(self) -> None:
        """End the process."""
        self._end()


def _widen(pipe: IO[bytes] | None) -> None:
    """Let a pipe take the logits of a token at once; two processes take turns at a small one."""
    if pipe is not None and sys.platform.startswith("linux"):
        import fcntl

        with suppress(OSError):  # the system may allow less
            fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _PIPE)


def _end(process: subprocess.Popen[bytes], errors: IO[bytes]) -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout, errors):
        if stream is not None:
            with suppress(OSError):  # what was not sent before it ended
                stream.close()


class ProcessRuntime:
    """Runs one sequence at a time in a process."""

    def __init__(
        self, process: ModelProcess, positions: int, threads: int, temporary: Path | None = None
    ) -> None:
        """Take a process that has a model open.

        Args:
            process: the process.
            positions: of the model.
            threads: number of processor threads that it uses.
            temporary: a folder to remove when the runtime is no longer used.
        """
        if temporary is not None:
            weakref.finalize(self, shutil.rmtree, temporary, ignore_errors=True)
        self._process, self._positions, self._threads = process, positions, threads
        self._length = 0

    @property
    def dtype(self) -> str:
        """Dtype of activations between operators; inside, they may be rounded."""
        return "float32"

    @property
    def threads(self) -> int:
        """Number of processor threads."""
        return self._threads

    def logits(self, ids: Tensor) -> Tensor:
        """Return logits float32 [batch, length, vocabulary] of ids int64 [batch, length]."""
        import torch

        self._length = 0
        rows = []
        for row in ids.tolist():
            self._check(row, len(row))
            rows.append(self._ask("logits", row))
        return torch.stack(rows)

    def start(self, ids: Sequence[int]) -> Tensor:
        """Start a sequence; return logits float32 [vocabulary] after its last token.

        Raises:
            InputError: there are no tokens, or more than the model has positions.
        """
        if not ids:
            raise InputError("a sequence needs at least one token")
        self._check(ids, len(ids))
        self._length = len(ids)
        return self._ask("start", ids)[0]

    def step(self, token: int) -> Tensor:
        """Continue the sequence by one token; return logits float32 [vocabulary] after it.

        Raises:
            InputError: the model has no positions left, or `start` was not called.
        """
        if not self._length:
            raise InputError("step() came before start(); begin a sequence first")
        self._check([token], self._length + 1)
        self._length += 1
        return self._ask("step", [token])[0]

    def _ask(self, do: str, ids: Sequence[int], **more: Any) -> Tensor:
        """Return logits float32 [tokens, vocabulary]."""
        import torch

        _, data = self._process.ask(do, ids=list(ids), **more)
        return torch.frombuffer(bytearray(data), dtype=torch.float32).view(
            -1, self._process.vocabulary
        )

    def _check(self, ids: Sequence[int], length: int) -> None:
        """Check ids against the vocabulary, and a length against the positions of the model."""
        check_id_range(min(ids), max(ids), self._process.vocabulary)
        if length > self._positions:
            raise InputError(
                f"{length} tokens, but the model has {self._positions} positions; shorten the text"
            )
