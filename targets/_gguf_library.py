"""The C functions of llama.cpp that xllamacpp's library exports, for logits at every position.

xllamacpp's own class gives probabilities of generated tokens only. Structures that are handed over
by value are not a promise from version to version, so the defaults that the library itself fills in
are compared with those that this file knows, before anything is called with them.
"""

from __future__ import annotations

import ctypes
import glob
import importlib.util
import itertools
import os
import struct
from collections.abc import Sequence
from typing import Any, Literal

# The version that the layouts below were read from, and that tests run.
TESTED = "2026.10.11549"
INSTALL_LLAMA = "pip install 'xllamacpp>=2026.10'"
# Tokens that run at once.
_BATCH = 512
_OPAQUE = 512
_F32, _F16 = 0, 1
_NO_MAP = 0
Part = Literal["all", "shapes", "vocabulary"]
# Levels of log lines.
_WARNING, _ERROR, _CONTINUED = 3, 4, 5
_LINES_KEPT = 20


class LibraryError(Exception):
    """The library is missing, unknown, or refuses something; the text says which."""


class _Opaque(ctypes.Structure):
    """A structure that the library fills in, with room for later fields."""

    _fields_ = [("data", ctypes.c_ubyte * _OPAQUE)]

    def get(self, form: str, at: int) -> Any:
        return struct.unpack_from(f"<{form}", bytes(self.data), at)[0]

    def put(self, form: str, at: int, value: Any) -> None:
        struct.pack_into(f"<{form}", self.data, at, value)


class _Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


# Fields that are set: name, form as `struct` has it, offset.
_MODEL = {
    "gpu_layers": ("i", 16), "load_mode": ("i", 24), "vocab_only": ("?", 72), "no_alloc": ("?", 76),
}  # fmt: skip
_CONTEXT = {
    "n_ctx": ("I", 0), "n_batch": ("I", 4), "n_ubatch": ("I", 8), "n_seq_max": ("I", 12),
    "n_threads": ("i", 28), "n_threads_batch": ("i", 32), "flash_attn": ("i", 52),
    "type_k": ("i", 104), "type_v": ("i", 108),
}  # fmt: skip
# What the library fills in, which tells its layout: form, offset, value.
_MODEL_DEFAULTS = (
    ("i", 16, -1), ("i", 20, 1), ("i", 24, -1), ("i", 32, 0), ("?", 72, False), ("?", 73, False),
    ("?", 74, True), ("?", 75, False), ("?", 76, False),
)  # fmt: skip
_CONTEXT_DEFAULTS = (
    ("I", 0, 512), ("I", 4, 2048), ("I", 8, 512), ("I", 12, 1), ("i", 28, 4), ("i", 32, 4),
    ("i", 40, -1), ("i", 44, -1), ("i", 48, -1), ("i", 52, -1), ("f", 64, -1.0), ("f", 84, -1.0),
    ("i", 104, _F16), ("i", 108, _F16), ("?", 136, False), ("?", 137, True),
)  # fmt: skip

_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_NAMES: dict[str, tuple[Any, list[Any]]] = {
    "llama_backend_init": (None, []),
    "llama_model_default_params": (_Opaque, []),
    "llama_context_default_params": (_Opaque, []),
    "llama_model_load_from_file": (ctypes.c_void_p, [ctypes.c_char_p, _Opaque]),
    "llama_init_from_model": (ctypes.c_void_p, [ctypes.c_void_p, _Opaque]),
    "llama_free": (None, [ctypes.c_void_p]),
    "llama_model_get_vocab": (ctypes.c_void_p, [ctypes.c_void_p]),
    "llama_vocab_n_tokens": (ctypes.c_int32, [ctypes.c_void_p]),
    "llama_vocab_is_eog": (ctypes.c_bool, [ctypes.c_void_p, ctypes.c_int32]),
    "llama_get_memory": (ctypes.c_void_p, [ctypes.c_void_p]),
    "llama_memory_clear": (None, [ctypes.c_void_p, ctypes.c_bool]),
    "llama_memory_can_shift": (ctypes.c_bool, [ctypes.c_void_p]),
    "llama_memory_seq_add": (None, [ctypes.c_void_p, *[ctypes.c_int32] * 4]),
    "llama_state_seq_get_size": (ctypes.c_size_t, [ctypes.c_void_p, ctypes.c_int32]),
    "llama_state_seq_get_data": (
        ctypes.c_size_t, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_int32],
    ),
    "llama_state_seq_set_data": (
        ctypes.c_size_t, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_int32],
    ),
    "llama_decode": (ctypes.c_int32, [ctypes.c_void_p, _Batch]),
    "llama_get_logits": (ctypes.POINTER(ctypes.c_float), [ctypes.c_void_p]),
    "llama_batch_init": (_Batch, [ctypes.c_int32] * 3),
    "llama_log_set": (None, [_LOG, ctypes.c_void_p]),
    "llama_tokenize": (
        ctypes.c_int32,
        [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32, ctypes.POINTER(ctypes.c_int32),
         ctypes.c_int32, ctypes.c_bool, ctypes.c_bool],
    ),
}  # fmt: skip


def find_version() -> str:
    """Return the version of xllamacpp.

    Raises:
        LibraryError: it is not installed.
    """
    from importlib import metadata

    try:
        return metadata.version("xllamacpp")
    except metadata.PackageNotFoundError as error:
        raise LibraryError(
            f"a GGUF file runs in llama.cpp, of xllamacpp, which is not installed: {INSTALL_LLAMA}"
        ) from error


class Library:
    """The library, loaded and checked."""

    def __init__(self) -> None:
        """Load it.

        Raises:
            LibraryError: it is missing, or of a version whose structures are not known.
        """
        self.version = find_version()
        self.lines: list[str] = []
        place = importlib.util.find_spec("xllamacpp")
        folders = place.submodule_search_locations if place else None
        found = [
            path
            for folder in folders or ()
            for path in glob.glob(os.path.join(glob.escape(folder), "xllamacpp*"))
            if path.endswith((".so", ".pyd", ".dylib"))
        ]
        if not found:
            raise LibraryError(f"xllamacpp {self.version} has no library; install it again")
        try:
            self._library = ctypes.CDLL(found[0])
            for name, (result, arguments) in _NAMES.items():
                function = getattr(self._library, name)
                function.restype, function.argtypes = result, arguments
        except (AttributeError, OSError) as error:
            raise self._make_unknown(str(error)) from error
        self._check()
        self._log = _LOG(self._keep_line)
        self.call("log_set", self._log, None)
        self.call("backend_init")

    def call(self, name: str, *arguments: Any) -> Any:
        """Call a function of the library, by its name without ``llama_``."""
        return getattr(self._library, f"llama_{name}")(*arguments)

    def _make_unknown(self, reason: str) -> LibraryError:
        return LibraryError(
            f"xllamacpp {self.version} is not one that this version of moe2edge knows ({reason}): "
            f"pip install xllamacpp=={TESTED}"
        )

    def _check(self) -> None:
        """Compare the defaults that the library fills in with those known.

        Raises:
            LibraryError: they differ.
        """
        for name, known in (("model", _MODEL_DEFAULTS), ("context", _CONTEXT_DEFAULTS)):
            found = self.call(f"{name}_default_params")
            for form, at, value in known:
                if found.get(form, at) != value:
                    raise self._make_unknown(f"its {name} parameters differ at byte {at}")
        batch = self.call("batch_init", 1, 0, 1)
        pointers = (batch.token, batch.pos, batch.n_seq_id, batch.seq_id, batch.logits)
        if batch.n_tokens != 0 or batch.embd or not all(pointers):
            raise self._make_unknown("its batches differ")

    def _keep_line(self, level: int, text: bytes, _: Any) -> None:
        """Keep a line of the log that may say why something failed."""
        line = text.decode("utf-8", "replace").strip()
        if line and _WARNING <= level <= _CONTINUED:
            self.lines = [*self.lines[-_LINES_KEPT:], line]

    def explain(self) -> str:
        """Return what the library wrote last that says why something failed."""
        failed = [line for line in self.lines if "error" in line.lower() or "fail" in line.lower()]
        return failed[0] if failed else (self.lines or ["it wrote no message"])[-1]


class LoadedModel:
    """A file, opened; runs one sequence at a time."""

    def __init__(
        self, library: Library, path: str, *, exact: bool, threads: int, part: Part
    ) -> None:
        """Open the file.

        Args:
            library: the library.
            path: the file.
            exact: keep what attention remembers in float32, and use no fused attention.
            threads: processor threads.
            part: what to read: all, all but the numbers, or the vocabulary alone.

        Raises:
            LibraryError: llama.cpp refuses it.
        """
        self._library, self._exact, self._threads = library, exact, threads
        parameters = library.call("model_default_params")
        parameters.put(*_MODEL["gpu_layers"], 0)
        parameters.put(*_MODEL["vocab_only"], part == "vocabulary")
        if part == "shapes":
            parameters.put(*_MODEL["load_mode"], _NO_MAP)
            parameters.put(*_MODEL["no_alloc"], True)
        self._model = library.call("model_load_from_file", os.fsencode(path), parameters)
        if not self._model:
            raise LibraryError(library.explain())
        self._vocabulary = library.call("model_get_vocab", self._model)
        self.vocabulary: int = library.call("vocab_n_tokens", self._vocabulary)
        self._context: Any = None
        self._room = 0
        self._tokens: list[int] = []

    def tokenize(self, text: str, *, special: bool) -> list[int]:
        """Return the ids of a text; ``special``: as a user's text with what is added to it."""
        data = text.encode()
        room = len(data) + 16
        ids = (ctypes.c_int32 * room)()
        count = self._library.call(
            "tokenize", self._vocabulary, data, len(data), ids, room, special, True
        )
        if count < 0:
            raise LibraryError("it cannot encode a text")
        return list(ids[:count])

    def ends(self, token: int) -> bool:
        """Return whether generation stops at a token."""
        return bool(self._library.call("vocab_is_eog", self._vocabulary, token))

    def start(self) -> None:
        """Forget the sequence."""
        self._tokens = []
        if self._context:
            self._library.call(
                "memory_clear", self._library.call("get_memory", self._context), True
            )

    @property
    def cache_nbytes(self) -> int:
        """Bytes of the state of the sequence: keys and values, or what stands in their place."""
        if not self._context:
            return 0
        size: int = self._library.call("state_seq_get_size", self._context, 0)
        return size

    def extend(self, ids: Sequence[int], *, everywhere: bool) -> list[Any]:
        """Continue the sequence; return logits as arrays of bytes, of all tokens or the last."""
        total = len(self._tokens) + len(ids)
        if total > self._room:
            before = self._tokens
            self._open(max(2 * total, _BATCH))
            self._run(before, everywhere=False)
        found = self._run(ids, everywhere=everywhere)
        return found if everywhere else found[-1:]

    def _open(self, room: int) -> None:
        """Open a context with room for so many tokens."""
        library = self._library
        if self._context:
            library.call("free", self._context)
        parameters = library.call("context_default_params")
        threads = self._threads
        settings = {"n_ctx": room, "n_threads": threads, "n_threads_batch": threads}
        settings |= {"n_batch": _BATCH, "n_ubatch": _BATCH, "n_seq_max": 1}
        if self._exact:
            settings |= {"type_k": _F32, "type_v": _F32, "flash_attn": 0}
        for name, value in settings.items():
            parameters.put(*_CONTEXT[name], value)
        self._context = library.call("init_from_model", self._model, parameters)
        if not self._context:
            raise LibraryError(library.explain())
        self._room, self._tokens = room, []

    def _run(self, ids: Sequence[int], *, everywhere: bool) -> list[Any]:
        """Run tokens behind those of the sequence, some at once."""
        found: list[Any] = []
        for first in range(0, len(ids), _BATCH):
            part = list(ids[first : first + _BATCH])
            found += self._decode(part, len(self._tokens), everywhere=everywhere)
            self._tokens += part
        return found

    def run_at(self, ids: Sequence[int], positions: Sequence[int]) -> list[Any]:
        """Run tokens at ascending positions; return the logits of all as arrays of bytes."""
        self.start()
        if len(ids) > self._room:
            self._open(max(len(ids), _BATCH))
        gaps = [n for n in range(1, len(ids)) if positions[n] != positions[n - 1] + 1]
        found: list[Any] = []
        for first, end in itertools.pairwise([0, *gaps, len(ids)]):
            if first:
                self._move_last(positions[first - 1], positions[first] - 1)
            found += self._decode(list(ids[first:end]), positions[first], everywhere=True)
        return found

    def _move_last(self, old: int, new: int) -> None:
        """Let the last token stand at another position, with the key that it has.

        llama.cpp takes no token but at the position behind the last one. It would turn the key
        when it runs the next token; but what is saved before that has the key as it is.
        """
        call, memory = self._library.call, self._library.call("get_memory", self._context)
        if not call("memory_can_shift", memory):
            return  # with positions in several dimensions, it takes any that is larger
        call("memory_seq_add", memory, 0, old, old + 1, new - old)
        size = call("state_seq_get_size", self._context, 0)
        saved = ctypes.create_string_buffer(size)
        kept = call("state_seq_get_data", self._context, saved, size, 0)
        call("memory_clear", memory, True)
        if kept != size or call("state_seq_set_data", self._context, saved, size, 0) != size:
            raise LibraryError("it cannot take up what attention remembers")

    def _decode(self, ids: list[int], begin: int, *, everywhere: bool) -> list[Any]:
        """Run tokens at the positions from ``begin`` on; return logits of all or the last."""
        count = len(ids)
        numbers = ctypes.c_int32 * count
        sequence = (ctypes.c_int32 * 1)(0)
        pointer = ctypes.cast(sequence, ctypes.POINTER(ctypes.c_int32))
        sequences = (ctypes.POINTER(ctypes.c_int32) * count)(*[pointer] * count)
        wanted = (ctypes.c_int8 * count)(*[int(everywhere)] * (count - 1), 1)
        batch = _Batch(
            count, numbers(*ids), None, numbers(*range(begin, begin + count)),
            numbers(*[1] * count), sequences, wanted,
        )  # fmt: skip
        if code := self._library.call("decode", self._context, batch):
            raise LibraryError(f"it cannot run {count} tokens (code {code})")
        rows = count if everywhere else 1
        logits = self._library.call("get_logits", self._context)
        size = 4 * self.vocabulary
        address = ctypes.cast(logits, ctypes.c_void_p).value
        assert address is not None
        return [ctypes.string_at(address + n * size, size) for n in range(rows)]
