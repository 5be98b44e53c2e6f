"""Weights of a web folder: limits of browsers, and files that these read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe2edge.errors import Unsupported
from moe2edge.targets._onnx_storage import Batch, compute_offsets, write_data
from moe2edge.targets._web_layout import GRAPH_FOLDER, name_web_data

# Browsers read a file into one buffer; Chromium's fetch takes less than 2 GiB.
FILE_BYTES = (1 << 31) - 1
# Bytes of weights that were opened, of the 4 GiB that wasm can address; with 3.8e9 it failed.
MODEL_BYTES = 3_400_000_000


def accept_sizes(batches: Sequence[Batch], memory: int) -> None:
    """Refuse a graph that wasm cannot hold.

    Args:
        batches: its weights.
        memory: bytes that they take once they are opened.

    Raises:
        Unsupported: with the sizes.
    """
    largest = max((slot for batch in batches for slot in batch.slots), key=lambda s: s.nbytes)
    if memory > MODEL_BYTES or largest.nbytes > FILE_BYTES:
        what = (
            f"the graph takes {memory / 1e9:.1f} GB in memory, and onnxruntime-web holds at most "
            f"{MODEL_BYTES / 1e9:.1f} GB of weights in the 4 GiB of wasm"
            if memory > MODEL_BYTES
            else f"{largest.name} takes {largest.nbytes / 1e9:.1f} GB, and a browser reads less "
            f"than {FILE_BYTES / 1e9:.1f} GB into one buffer"
        )
        raise Unsupported(
            f"{what}; prune more experts, choose fewer bits (also for head and embedding), or "
            "leave layout=web out"
        )


def split_web_data(batches: Sequence[Batch]) -> list[list[Batch]]:
    """Split weights into files that browsers read, in their order."""
    files: list[list[Batch]] = [[]]
    for batch in batches:
        if compute_offsets([*files[-1], batch])[1] > FILE_BYTES:
            files.append([])
        files[-1].append(batch)
    return files


def count_data_bytes(batches: Sequence[Batch]) -> int:
    """Count the bytes of all files of data."""
    return sum(compute_offsets(part)[1] for part in split_web_data(batches))


def write_web_data(batches: Sequence[Batch], folder: Path) -> tuple[list[Any], dict[str, str]]:
    """Write all weights; return their initializers, and the digests of the files."""
    (folder / GRAPH_FOLDER).mkdir()
    protos: list[Any] = []
    digests: dict[str, str] = {}
    for n, part in enumerate(split_web_data(batches)):
        name = f"{GRAPH_FOLDER}/{name_web_data(n)}"
        made, digests[name] = write_data(part, folder / name)
        protos += made
    return protos, digests
