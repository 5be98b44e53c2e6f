"""Scales of a cache in int8: measured on text that runs with a float32 cache, set in the graph.

The operator rounds every channel of the keys and values of a head with one scale, whatever the
text, and cuts off what is larger. Keys are cached as they are rotated: the position turns each pair
of channels. So both get the scale of the largest length of the pair, which no position changes:
short samples hold for the whole context, if there are a few thousand tokens in all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from onnx import numpy_helper

from moe2edge.errors import VerificationFailed
from moe2edge.storage.text_files import write_bytes
from moe2edge.targets._onnx_runtime import OnnxRuntime, open_runtime
from moe2edge.targets._onnx_storage import CACHE_SCALES, GRAPH_FILE, Array, load_graph

LARGEST_INT8 = 127
# Range of a channel at least, as a part of that of its head: one that was zero may not stay so.
SMALLEST_RANGE = 2.0**-8


def set_cache_scales(folder: Path, texts: Iterable[list[int]]) -> str:
    """Measure keys and values on texts, and set the scales of the graph by them.

    Args:
        folder: holds the graph, whose cache is int8.
        texts: tokens of each.

    Returns:
        The SHA-256 of the graph.

    Raises:
        VerificationFailed: onnxruntime refuses the graph, or a key or value is not finite.
    """
    scales = measure_scales(open_runtime(folder, whole_cache=True), texts)
    model = load_graph(folder)
    for tensor in model.graph.initializer:
        if tensor.name in scales:
            tensor.CopyFrom(numpy_helper.from_array(scales[tensor.name], tensor.name))
    return write_bytes(folder / GRAPH_FILE, model.SerializeToString(deterministic=True))


def measure_scales(runtime: OnnxRuntime, texts: Iterable[list[int]]) -> dict[str, Array]:
    """Measure the scales that hold all keys and values of texts, by their names in the graph.

    Raises:
        VerificationFailed: a key or value is not finite.
    """
    ranges: dict[str, Array] = {}
    for text in texts:
        runtime.start(text)
        for name, numbers in runtime.cached.items():
            _, index, part = name.split(".")
            own = measure_pairs(numbers) if part == "key" else np.abs(numbers).max(1)
            scale = CACHE_SCALES.format(index=index, part=part[0])
            ranges[scale] = np.maximum(ranges.get(scale, 0), own)
    return {name: _to_scales(name, found) for name, found in ranges.items()}


def measure_pairs(keys: Array) -> Array:
    """Measure the largest lengths of pairs of channels: [heads, tokens, size] -> [heads, size]."""
    first, second = np.split(keys, 2, axis=-1)
    return np.tile(np.hypot(first, second).max(1), 2)


def _to_scales(name: str, ranges: Array) -> Array:
    """Return scales float32 [1, heads, 1, size] for ranges [heads, size]."""
    if not np.isfinite(ranges).all():
        raise VerificationFailed(f"{name}: a key or value of the calibration text is not finite")
    least = ranges.max(-1, keepdims=True) * SMALLEST_RANGE
    ranges = np.where(least > 0, np.maximum(ranges, least), 1)
    return (ranges / LARGEST_INT8).astype(np.float32)[None, :, None]


def check_cache_scales(initializers: Mapping[str, Any], blocks: int) -> None:
    """Check that every block has scales that were measured.

    Args:
        initializers: those of the graph, by name.
        blocks: number of blocks.

    Raises:
        VerificationFailed: names what is missing, or is no scale.
    """
    for index in range(blocks):
        for part in ("k", "v"):
            name = CACHE_SCALES.format(index=index, part=part)
            if name not in initializers:
                raise VerificationFailed(f"{GRAPH_FILE} lacks {name}; export it again")
            scales = numpy_helper.to_array(initializers[name])
            if not (np.isfinite(scales) & (scales > 0)).all() or (scales == 1).all():
                raise VerificationFailed(
                    f"{name} in {GRAPH_FILE} does not hold scales of keys or values that were "
                    "measured on text; export it again"
                )
