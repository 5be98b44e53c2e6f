"""An MLX folder, opened in mlx-lm: on a Mac's GPU, or on the CPU of Linux."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe2edge.errors import InputError, Moe2EdgeError, Unsupported, VerificationFailed, join_lines
from moe2edge.runtime.protocol import MOST_PLACED, ROTARY_DRIFT, check_id_range
from moe2edge.storage.safetensors_files import PlannedTensor, write_hollow_safetensors
from moe2edge.storage.text_files import write_json

if TYPE_CHECKING:
    from torch import Tensor

# Tokens of a prompt that run at once.
PROMPT_PART = 256
# Class of mlx-lm's cache of keys and values of all tokens, whatever their positions.
PLAIN_CACHE = "KVCache"
NOTE = "on this CPU mlx-lm runs in float32; on a Mac it runs in {}"


def import_mlx() -> tuple[Any, Any]:
    """Import MLX and mlx-lm.

    Raises:
        Unsupported: one of them is not installed.
    """
    try:
        import mlx.core as mx
        from mlx_lm import utils
    except ImportError as error:
        package = "mlx-lm" if sys.platform == "darwin" else "'mlx[cpu]' mlx-lm"
        raise Unsupported(
            f"an MLX folder needs mlx and mlx-lm, which are not installed: pip install {package}"
        ) from error
    return mx, utils


def open_mlx_runtime(folder: Path, *, exact: bool, native: bool = False) -> MlxRuntime:
    """Open a folder; ``exact`` computes in float32.

    So does a CPU, where MLX takes experts that are not quantized in no other dtype, and quantized
    ones ten times slower.

    Args:
        folder: the folder.
        exact: compute in float32 on a GPU as well.
        native: compute in the dtype of the folder on a CPU as well.

    Raises:
        Unsupported: mlx-lm is not installed.
        VerificationFailed: it refuses the folder.
    """
    mx, utils = import_mlx()
    from mlx_lm.models.cache import make_prompt_cache

    try:
        model, config = utils.load_model(folder)
    except Exception as error:  # whatever a library may raise on a folder that was changed
        raise VerificationFailed(
            f"mlx-lm cannot load {folder}: {type(error).__name__}: {join_lines(error, 500)}"
        ) from error
    plain = all(type(one).__name__ == PLAIN_CACHE for one in make_prompt_cache(model))
    near = int(config.get("max_position_embeddings") or MOST_PLACED + 1) <= MOST_PLACED
    kind = PlacedMlxRuntime if plain and near else MlxRuntime
    runtime = kind(model, int(config["vocab_size"]))
    if exact or not (native or mx.metal.is_available()):
        if not exact and runtime.dtype != "float32":
            runtime.note = NOTE.format(runtime.dtype)
        model.set_dtype(mx.float32)
        mx.eval(model.parameters())
    return runtime


def try_folder(config: Mapping[str, Any], tensors: Sequence[PlannedTensor]) -> None:
    """Let mlx-lm open a folder that is only planned; it reads no number, as MLX is lazy.

    Raises:
        Unsupported: mlx-lm refuses it.
    """
    _, utils = import_mlx()
    with tempfile.TemporaryDirectory(prefix="moe2edge-") as name:
        folder = Path(name)
        write_json(folder / "config.json", config)
        write_hollow_safetensors(folder / "model.safetensors", tensors)
        try:
            utils.load_model(folder, lazy=True)
        except Exception as error:  # whatever a library may raise on a config of any kind
            raise Unsupported(
                f"mlx-lm refuses this model, tried before any work: {type(error).__name__}: "
                f"{join_lines(error, 300)}; choose another target or recipe"
            ) from error


class MlxRuntime:
    """Runs one sequence at a time, with the cache of mlx-lm.

    Attributes:
        note: description of how it runs, in one line; empty if there is nothing to say.
    """

    def __init__(self, model: Any, vocabulary: int) -> None:
        self.note = ""
        self._model, self._vocabulary = model, vocabulary
        self._cache: Any = None

    @property
    def dtype(self) -> str:
        """Dtype of activations, which is that of the embedding."""
        from mlx.utils import tree_flatten

        mx, _ = import_mlx()
        found: Any = tree_flatten(self._model.parameters())
        floats = (mx.float32, mx.float16, mx.bfloat16)
        names = (str(tensor.dtype) for _, tensor in found if tensor.dtype in floats)
        return next(names).removeprefix("mlx.core.")

    @property
    def threads(self) -> int:
        """Processor threads that MLX may use: those of the machine."""
        return os.cpu_count() or 1

    @property
    def cache_nbytes(self) -> int:
        """Bytes of keys and values of the sequence so far."""
        from mlx.utils import tree_flatten

        total = 0
        for cache in self._cache or ():
            found: Any = tree_flatten(cache.state)
            nbytes = sum(array.nbytes for _, array in found if hasattr(array, "nbytes"))
            # It makes room for many tokens at once.
            plain = type(cache).__name__ == PLAIN_CACHE and cache.keys is not None
            total += nbytes * cache.offset // cache.keys.shape[2] if plain else nbytes
        return total

    def logits(self, ids: Tensor) -> Tensor:
        """Return logits float32 [batch, length, vocabulary] of ids int64 [batch, length]."""
        import torch

        self._check(ids.flatten().tolist())
        return torch.stack([self._run([row], None)[0] for row in ids.tolist()])

    def start(self, ids: Sequence[int]) -> Tensor:
        """Begin a sequence; return logits float32 [vocabulary] after its last token.

        Raises:
            InputError: there is no token.
        """
        from mlx_lm.models.cache import make_prompt_cache

        if not ids:
            raise InputError("a sequence needs at least one token")
        self._check(ids)
        self._cache = make_prompt_cache(self._model)
        for first in range(0, len(ids), PROMPT_PART):
            logits = self._run([list(ids[first : first + PROMPT_PART])], self._cache)
        return logits[0, -1]

    def step(self, token: int) -> Tensor:
        """Continue the sequence by one token; return logits float32 [vocabulary] after it.

        Raises:
            Moe2EdgeError: no sequence was begun.
        """
        if self._cache is None:
            raise Moe2EdgeError("step() came before start(); begin a sequence first")
        self._check([token])
        return self._run([[token]], self._cache)[0, -1]

    def _check(self, ids: Sequence[int]) -> None:
        check_id_range(min(ids), max(ids), self._vocabulary)

    def _run(self, ids: list[list[int]], cache: Any) -> Tensor:
        """Run one sequence of ids, with a cache or without; return all logits."""
        import numpy as np
        import torch

        mx, _ = import_mlx()
        logits = self._model(mx.array(ids), cache=cache).astype(mx.float32)
        return torch.from_numpy(np.array(logits))


class PlacedMlxRuntime(MlxRuntime):
    """Runs a model whose caches hold keys and values alone, so that tokens may be anywhere."""

    drift = ROTARY_DRIFT

    def logits_at(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Return logits float32 [n, vocabulary] of ids int64 [n] at ascending positions [n].

        One by one, each token sees all before it.
        """
        import torch
        from mlx_lm.models.cache import make_prompt_cache

        self._check(ids.tolist())
        caches = [PlacedCache() for _ in make_prompt_cache(self._model)]
        rows = []
        for token, position in zip(ids.tolist(), positions.tolist(), strict=True):
            for cache in caches:
                cache.offset = position
            rows.append(self._run([[token]], caches)[0, 0])
        return torch.stack(rows)


class PlacedCache:
    """Keys and values of the tokens so far.

    Attributes:
        offset: position of the next token.
    """

    def __init__(self) -> None:
        self.offset = 0
        self._held: tuple[Any, Any] | None = None

    def update_and_fetch(self, keys: Any, values: Any) -> tuple[Any, Any]:
        """Add keys and values [batch, heads, 1, size] of a token, and return all."""
        mx, _ = import_mlx()
        if self._held is not None:
            pairs = zip(self._held, (keys, values), strict=True)
            keys, values = (mx.concatenate(pair, axis=2) for pair in pairs)
        self._held = keys, values
        return keys, values
