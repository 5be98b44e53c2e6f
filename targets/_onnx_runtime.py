"""A folder with an ONNX graph, opened in ONNX Runtime on the CPU."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe2edge.errors import InputError, Unsupported, VerificationFailed, get_first_line
from moe2edge.runtime.protocol import check_id_range
from moe2edge.runtime.waiting import ONNX_KEY, ONNX_MOMENT_US
from moe2edge.targets._onnx_exact import convert_to_float, use_float_experts
from moe2edge.targets._onnx_storage import (
    DATA_NAME,
    GRAPH_FILE,
    HALF_BITS,
    HALF_KEY,
    POSITIONS_KEY,
    ROTARY_TABLES,
    load_graph,
    read_values,
)

OLDEST = (1, 31)
# The oldest version with experts of 3 bits.
OLDEST_WITH_3_BITS = (1, 32)
# Positions in the first cache of a sequence.
SMALLEST_CACHE = 256
# Tokens of a prompt that run at once. It bounds the buffer of logits, [tokens, vocabulary].
CHUNK = 256
INSTALL = "pip install 'onnxruntime>=1.31'"
INSTALL_WITH_3_BITS = "pip install 'onnxruntime>=1.32'"
FOLDER_KEY = "session.model_external_initializers_file_folder_path"
# The runtime raises every error that it logs, so its log would only repeat them.
LOG_NOTHING = 4


def import_onnxruntime() -> Any:
    """Import onnxruntime and check its version.

    Raises:
        Unsupported: it is missing or too old.
    """
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise Unsupported(
            f"an ONNX graph needs onnxruntime, which is not installed: {INSTALL}"
        ) from error
    if _is_older(ort, OLDEST):
        oldest = ".".join(map(str, OLDEST))
        raise Unsupported(
            f"onnxruntime {ort.__version__} lacks operators of this graph, which needs {oldest} or "
            f"newer: {INSTALL}, or onnxruntime-gpu of that version if that is the one in use"
        )
    return ort


def _is_older(ort: Any, version: tuple[int, int]) -> bool:
    return tuple(int(number) for number in re.findall(r"\d+", ort.__version__)[:2]) < version


def check_3_bits() -> None:
    """Refuse experts of 3 bits if the installed onnxruntime does not run them.

    Raises:
        Unsupported: it is missing or too old.
    """
    ort = import_onnxruntime()
    if _is_older(ort, OLDEST_WITH_3_BITS):
        oldest = ".".join(map(str, OLDEST_WITH_3_BITS))
        raise Unsupported(
            f"experts of {HALF_BITS} bits need onnxruntime {oldest} or newer, and "
            f"{ort.__version__} is installed: {INSTALL_WITH_3_BITS}, or choose 2, 4 or 8 bits"
        )


def check_onnxruntime(folder: Path) -> None:
    """Refuse a folder that the installed onnxruntime does not run.

    Raises:
        Unsupported: it is missing or too old.
    """
    ort = import_onnxruntime()
    if _is_older(ort, OLDEST_WITH_3_BITS) and _has_3_bits(folder):
        check_3_bits()


def open_session(
    folder: Path,
    *,
    exact: bool = False,
    whole_cache: bool = False,
    graph: bytes | None = None,
    times: Path | None = None,
) -> Any:
    """Open a session on ``model.onnx``, with as many threads as torch uses.

    Args:
        folder: folder of the graph.
        exact: compute with float32 activations and cache throughout, whatever the graph allows.
        whole_cache: cache keys and values in float32, whatever the graph allows.
        graph: serialized graph to run instead of the folder's, with the folder's weights.
        times: begin of the name of the file that the runtime's profiler writes; None: it is off.

    Raises:
        Unsupported: onnxruntime is missing or too old.
        VerificationFailed: onnxruntime refuses the graph.
    """
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = LOG_NOTHING
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry(ONNX_KEY, ONNX_MOMENT_US)
    if times is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(times)
    source: str | bytes = graph or str(folder / GRAPH_FILE)
    numbers: dict[str, np.ndarray[Any, Any]] = {}
    check_onnxruntime(folder)
    if exact or whole_cache or graph:
        # The real files: in the hub's cache the folder holds links, which a session on a graph in
        # memory does not follow.
        data = {p.name: p.resolve() for p in folder.iterdir() if DATA_NAME.fullmatch(p.name)}
        if not graph:
            names = {name: path.name for name, path in data.items()}
            source, numbers = convert_to_float(folder, names, activations=exact)
        place = next((path.parent for path in data.values()), folder)
        options.add_session_config_entry(FOLDER_KEY, str(place))
    values = [ort.OrtValue.ortvalue_from_numpy(value) for value in numbers.values()]
    options.add_external_initializers(list(numbers), values)
    with _translate_errors("refuses"), use_float_experts() if exact else nullcontext():
        session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    # It reads the memory of these as long as it lives.
    session.numbers = numbers
    return session


def _has_3_bits(folder: Path) -> bool:
    """Return whether a graph has experts of 3 bits."""
    nodes = (node for node in load_graph(folder).graph.node if node.op_type == "QMoE")
    bits = {a.i for node in nodes for a in node.attribute if a.name == "expert_weight_bits"}
    return HALF_BITS in bits


@contextmanager
def _translate_errors(verb: str) -> Iterator[None]:
    """Raise errors of onnxruntime as errors of the folder.

    Raises:
        VerificationFailed: so.
    """
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    refusals = (
        state.EPFail, state.EngineError, state.Fail, state.InvalidArgument, state.InvalidGraph,
        state.InvalidProtobuf, state.NoSuchFile, state.NotImplemented, state.RuntimeException,
    )  # fmt: skip
    try:
        yield
    except refusals as error:
        raise VerificationFailed(
            f"onnxruntime {verb} {GRAPH_FILE}: {get_first_line(error)}"
        ) from error


def open_runtime(
    folder: Path,
    *,
    exact: bool = False,
    whole_cache: bool = False,
    graph: bytes | None = None,
    times: Path | None = None,
) -> OnnxRuntime:
    """Open the runtime of a folder; arguments and errors are those of `open_session`."""
    session = open_session(folder, exact=exact, whole_cache=whole_cache, graph=graph, times=times)
    metadata = session.get_modelmeta().custom_metadata_map
    positions = metadata.get(POSITIONS_KEY, "")
    if not positions.isdigit():
        raise VerificationFailed(
            f"{GRAPH_FILE} does not record its number of positions as {POSITIONS_KEY}; export it "
            "again"
        )
    if exact:
        return ExactOnnxRuntime(session, int(positions), folder)
    return OnnxRuntime(session, int(positions), in_half=HALF_KEY in metadata)


class OnnxRuntime:
    """Runs one sequence at a time, with a cache that the operators update in place."""

    def __init__(self, session: Any, max_positions: int, *, in_half: bool = False) -> None:
        """Take a session, and whether its experts compute in float16, which may overflow."""
        self._in_half = in_half
        inputs = session.get_inputs()
        self._session = session
        self._binding = session.io_binding()
        self._max_positions = max_positions
        self._past = {i.name: i.shape for i in inputs if i.name.startswith("past_key_values.")}
        rounded = any(i.type == "tensor(int8)" for i in inputs)
        self._cache_dtype = np.int8 if rounded else np.float32
        self._caches: dict[str, np.ndarray[Any, Any]] = {}
        self._vocabulary: int = session.get_outputs()[0].shape[-1]
        self._length = 0

    @property
    def dtype(self) -> str:
        """Dtype of activations between operators; inside, accuracy level 4 rounds them to int8."""
        return "float32"

    @property
    def threads(self) -> int:
        """Processor threads that operators of the session share."""
        count: int = self._session.get_session_options().intra_op_num_threads
        return count

    def logits(self, ids: Tensor) -> Tensor:
        """Return logits float32 [batch, length, vocabulary] of ids int64 [batch, length].

        The cache is not used.
        """
        return self._run_once(ids, {})

    def _run_once(self, ids: Tensor, replaced: Mapping[str, np.ndarray[Any, Any]]) -> Tensor:
        """Run ``ids`` as `logits` does, with other values for some initializers."""
        batch, length = ids.shape
        self._check(ids.numpy(), length)
        feeds: dict[str, np.ndarray[Any, Any]] = {
            name: np.zeros((batch, heads, 0, size), self._cache_dtype)
            for name, (_, heads, _, size) in self._past.items()
        }
        feeds["input_ids"] = ids.numpy().astype(np.int64)
        feeds["attention_mask"] = np.ones((batch, length), np.int64)
        with _translate_errors("cannot run"):
            (logits,) = self._session.run(["logits"], {**feeds, **replaced})
        self._check_finite(logits)
        return torch.from_numpy(logits)

    def _check_finite(self, logits: np.ndarray[Any, Any]) -> None:
        """Refuse logits that float16 made infinite or NaN.

        Raises:
            Unsupported: so.
        """
        if self._in_half and not np.isfinite(logits).all():
            raise Unsupported(
                f"experts of {HALF_BITS} bits compute in float16, whose largest number is 65504, "
                "and this model needs larger ones; choose 2, 4 or 8 bits for them"
            )

    def start(self, ids: Sequence[int]) -> Tensor:
        """Start a sequence; return logits float32 [vocabulary] after its last token.

        A long sequence runs in chunks, each of which continues the cache of the one before.

        Raises:
            InputError: there are no tokens, or more than the model has positions.
        """
        if not ids:
            raise InputError("a sequence needs at least one token")
        self._length = 0
        prompt = np.asarray([ids], np.int64)
        self._check(prompt, prompt.shape[1])
        self._reserve(prompt.shape[1])
        for first in range(0, prompt.shape[1], CHUNK):
            logits = self._extend(np.ascontiguousarray(prompt[:, first : first + CHUNK]))
        return logits

    def step(self, token: int) -> Tensor:
        """Continue the sequence by one token; return logits float32 [vocabulary] after it.

        Raises:
            InputError: the model has no positions left, or `start` was not called.
        """
        if not self._length:
            raise InputError("step() came before start(); begin a sequence first")
        ids = np.asarray([[token]], np.int64)
        self._check(ids, self._length + 1)
        return self._extend(ids)

    def _check(self, ids: np.ndarray[Any, Any], length: int) -> None:
        """Check ids against the vocabulary, and a length against the positions of the model."""
        check_id_range(int(ids.min()), int(ids.max()), self._vocabulary)
        if length > self._max_positions:
            raise InputError(
                f"{length} tokens, but the model has {self._max_positions} positions; "
                "shorten the text"
            )

    def _extend(self, ids: np.ndarray[Any, Any]) -> Tensor:
        """Run checked ``ids`` [1, new] after the cached tokens; return logits after the last."""
        total = self._length + ids.shape[1]
        self._reserve(total)
        logits = np.empty((1, ids.shape[1], self._vocabulary), np.float32)
        self._binding.bind_cpu_input("input_ids", ids)
        self._binding.bind_cpu_input("attention_mask", np.ones((1, total), np.int64))
        self._bind_output("logits", logits)
        with _translate_errors("cannot run"):
            self._session.run_with_iobinding(self._binding)
        self._check_finite(logits[0, -1])
        self._length = total
        # Copied, so that the buffer with the logits of all other tokens can be freed.
        return torch.from_numpy(logits[0, -1].copy())

    def _reserve(self, total: int) -> None:
        """Make room for ``total`` tokens; caches double in size, so that they are copied rarely."""
        room = min((cache.shape[2] for cache in self._caches.values()), default=0)
        if total <= room:
            return
        room = min(max(2 * total, SMALLEST_CACHE), self._max_positions)
        for name, (_, heads, _, size) in self._past.items():
            cache = np.zeros((1, heads, room, size), self._cache_dtype)
            if name in self._caches:
                cache[:, :, : self._length] = self._caches[name][:, :, : self._length]
            self._caches[name] = cache
            self._binding.bind_cpu_input(name, cache)
            # The same memory as input and output: attention appends to it in place.
            self._bind_output(name.replace("past_key_values", "present"), cache)

    def _bind_output(self, name: str, array: np.ndarray[Any, Any]) -> None:
        where = list(array.shape), array.ctypes.data
        self._binding.bind_output(name, "cpu", 0, array.dtype.type, *where)

    def end_profiling(self) -> Path:
        """End the profiler; return the file that it wrote."""
        return Path(self._session.end_profiling())

    @property
    def provider(self) -> str:
        """Name of the first provider that was asked for."""
        return str(self._session.get_providers()[0])

    @property
    def cache_nbytes(self) -> int:
        """Bytes of keys and values of the sequence so far."""
        return sum(cache.nbytes for cache in self.cached.values())

    @property
    def cached(self) -> dict[str, np.ndarray[Any, Any]]:
        """Keys and values of the sequence so far, [heads, tokens, size], by their inputs."""
        return {name: cache[0, :, : self._length] for name, cache in self._caches.items()}


class ExactOnnxRuntime(OnnxRuntime):
    """Runs a graph with float32 activations, whose rotary tables can be replaced."""

    drift = 0.0

    def __init__(self, session: Any, max_positions: int, folder: Path) -> None:
        super().__init__(session, max_positions)
        self._folder = folder

    def logits_at(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Return logits float32 [n, vocabulary] of ids int64 [n] at ascending positions [n].

        Attention takes the first rows of the rotary tables, so it gets those of the positions.

        Raises:
            VerificationFailed: the graph lacks a table, or one is too short.
        """
        graph, rows = load_graph(self._folder), {}
        for name in ROTARY_TABLES:
            table = read_values(self._folder, graph, name)
            if int(positions.max()) >= len(table):
                raise VerificationFailed(
                    f"table {name} has {len(table)} positions, but position "
                    f"{int(positions.max())} was recorded; export it again"
                )
            rows[name] = table[positions].numpy()
        return self._run_once(ids[None], rows)[0]
