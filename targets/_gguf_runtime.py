"""A GGUF file, opened in llama.cpp in a process of its own."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe2edge.errors import Unsupported
from moe2edge.runtime.protocol import ROTARY_DRIFT
from moe2edge.targets._child_process import ModelProcess, ProcessRuntime
from moe2edge.targets._gguf_library import LibraryError, find_version

if TYPE_CHECKING:
    from torch import Tensor


def check_llama() -> None:
    """Refuse to begin without llama.cpp.

    Raises:
        Unsupported: xllamacpp is not installed.
    """
    try:
        find_version()
    except LibraryError as error:
        raise Unsupported(str(error)) from error


class LlamaProcess(ModelProcess):
    """A process that has a file open in llama.cpp; ends with this object."""

    def __init__(self, path: Path, **how: Any) -> None:
        """Open a file; ``how`` is that of `LoadedModel`.

        Raises:
            Unsupported: xllamacpp is missing, or of a version that is not known.
            VerificationFailed: llama.cpp refuses the file.
        """
        check_llama()
        # -P: import nothing from the working folder, which is the user's.
        command = [sys.executable, "-P", "-m", "moe2edge.targets._gguf_worker"]
        super().__init__("llama.cpp", command, path, {"GGML_NO_BACKTRACE": "1"}, **how)

    def make_error(self, said: str) -> Exception:
        """Make the error for what llama.cpp or xllamacpp says."""
        return Unsupported(said) if said.startswith("xllamacpp ") else super().make_error(said)


class GgufRuntime(ProcessRuntime):
    """Runs one sequence at a time in llama.cpp."""

    def __init__(
        self, path: Path, positions: int, *, exact: bool = False, temporary: Path | None = None
    ) -> None:
        """Open a file.

        Args:
            path: the file.
            positions: of the model.
            exact: compute with float32 activations, in what attention remembers, too.
            temporary: a folder to remove when the runtime is no longer used.
        """
        import torch

        threads = torch.get_num_threads()
        process = LlamaProcess(path, exact=exact, threads=threads, part="all")
        super().__init__(process, positions, threads, temporary)

    @property
    def cache_nbytes(self) -> int:
        """Bytes of what llama.cpp remembers of the sequence so far."""
        count: int = self._process.ask("cache")[0]["cache"]
        return count


class PlacedGgufRuntime(GgufRuntime):
    """Runs tokens at positions that are given, too."""

    drift = ROTARY_DRIFT

    def logits_at(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Return logits float32 [n, vocabulary] of ids int64 [n] at ascending positions [n]."""
        tokens: list[int] = ids.tolist()
        self._check(tokens, int(positions.max()) + 1)
        self._length = 0
        return self._ask("placed", tokens, positions=positions.tolist())
