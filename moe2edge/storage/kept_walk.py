"""Folder of a walk: what observers gathered, block by block, and the hidden states on the way.

Blocks that the walk changes have their numbers there too.

A killed run resumes behind the last block that was kept, with the same bits. A record names each
file with its digest, so nothing is forced to the disk: what a power loss damages is not used.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe2edge.model.block import Block
from moe2edge.storage.records import append_record, find_damaged, recover_records
from moe2edge.storage.safetensors_files import PlannedTensor, read_tensor, write_safetensors
from moe2edge.storage.solved_blocks import open_handles, save

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.numerics.grid import Quantized

WALKED = "blocks.jsonl"
# Key of the place of a tensor in what is kept as JSON.
_TENSOR = "tensor"


@dataclass
class KeptWalk:
    """Folder of a walk.

    Attributes:
        folder: the folder, made when the first block is kept.
        guard: called before a block counts; raises if an input has changed under way.
    """

    folder: Path
    guard: Callable[[], None] = lambda: None
    _records: list[dict[str, Any]] = field(init=False)
    _damaged: bool = field(init=False)
    _key: str = field(default="", init=False)
    # Files of numbers that no record names yet, by the index of the block.
    _put: dict[str, dict[str, Any]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self._records, self._damaged = recover_records(self.folder / WALKED)

    @property
    def origins(self) -> list[list[int]]:
        """Origins of each kept block and of its experts."""
        return [origins for record in self._records for origins in record["origins"]]

    def find_damage(self) -> str | None:
        """Find a file that is not what was written."""
        if self._damaged:
            return WALKED
        for record in self._records:
            if name := find_damaged(self.folder, record["files"]):
                return name
        last = self._records[-1:]
        return next(filter(None, (find_damaged(self.folder, r["passing"]) for r in last)), None)

    def read_gathered(self) -> list[Any]:
        """Read what was gathered in each kept block."""
        found: list[Any] = []
        for n, record in enumerate(self._records):
            path = self.folder / f"gathered-{n:05}.safetensors"
            found += _put_tensors(record["gathered"], path)
        return found

    def read_passing(self) -> Any:
        """Read what was kept to go on behind the last block: hidden states and the like.

        Its tensors are on the disk until they are copied.
        """
        n = len(self._records) - 1
        return _put_tensors(self._records[n]["state"], self.folder / f"passing-{n:05}.safetensors")

    def begin(self, key: str) -> None:
        """Forget what was kept of another walk.

        Args:
            key: stands for all that the walk depends on.
        """
        if any(record["key"] != key for record in self._records):
            shutil.rmtree(self.folder)
            self._records = []
        self._key = key

    def put(self, block: Block, numbers: Mapping[str, Quantized | Tensor]) -> Block:
        """Save numbers of a block that the walk has changed, by role; return it with handles.

        They count once the block is kept.
        """
        self.folder.mkdir(exist_ok=True)
        path, weights = self.folder / f"numbers-{block.index:05}.safetensors", dict(block.weights())
        sha256, schemes, patterns = save(path, weights, numbers)
        self._put[str(block.index)] = {
            "file": path.name,
            "sha256": sha256,
            "schemes": schemes,
            "patterns": patterns,
        }
        return block.with_weights(open_handles(weights, path, sha256, schemes, patterns))

    def reopen(self, block: Block) -> Block:
        """Return a kept block, in the shape that the walk gave it, with handles on its numbers."""
        index = str(block.index)
        found = next(r["numbers"][index] for r in self._records if index in r["numbers"])
        path, parts = self.folder / found["file"], (found["schemes"], found["patterns"])
        handles = open_handles(dict(block.weights()), path, found["sha256"], *parts)
        return block.with_weights(handles)

    def add(self, origins: Sequence[Sequence[int]], gathered: Sequence[Any], state: Any) -> None:
        """Keep some more blocks.

        Args:
            origins: origins of each block and of its experts.
            gathered: what was gathered in each: plain data and tensors.
            state: what is needed to go on behind the last one, likewise, in place of what was.
        """
        self.guard()
        self.folder.mkdir(exist_ok=True)
        n = len(self._records)
        kept, files = self._write(f"gathered-{n:05}", list(gathered))
        passing, passing_files = self._write(f"passing-{n:05}", state)
        record = {
            "key": self._key,
            "origins": [list(each) for each in origins],
            "gathered": kept,
            "files": files | {put["file"]: put["sha256"] for put in self._put.values()},
            "numbers": self._put,
            "state": passing,
            "passing": passing_files,
        }
        append_record(self.folder / WALKED, record, durable=False)
        for name in self._records[-1]["passing"] if self._records else ():
            (self.folder / name).unlink(missing_ok=True)
        self._records.append(record)
        self._put = {}

    def _write(self, stem: str, data: Any) -> tuple[Any, dict[str, str]]:
        """Write the tensors in plain data to a file; return the rest, and digests by name."""
        tensors: list[Tensor] = []
        rest = _take_tensors(data, tensors)
        if not tensors:
            return rest, {}
        name = f"{stem}.safetensors"
        planned = [_plan(str(n), tensor) for n, tensor in enumerate(tensors)]
        return rest, {name: write_safetensors(self.folder / name, planned, durable=False)}


def _plan(name: str, tensor: Tensor) -> PlannedTensor:
    import torch

    spellings = {torch.float32: "F32", torch.int64: "I64"}
    return PlannedTensor(name, tuple(tensor.shape), spellings[tensor.dtype], tensor.cpu)


def _take_tensors(data: Any, tensors: list[Tensor]) -> Any:
    """Return plain data in which places of tensors stand for them."""
    import torch

    if isinstance(data, torch.Tensor):
        double = data.dtype == torch.float64  # stored as integers, bit for bit
        tensors.append(data.contiguous().view(torch.int64) if double else data)
        return {_TENSOR: len(tensors) - 1, "double": double}
    if isinstance(data, Mapping):
        return {key: _take_tensors(value, tensors) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_take_tensors(value, tensors) for value in data]
    return data


def _put_tensors(data: Any, path: Path) -> Any:
    """Return the data with tensors in their places again."""
    import torch

    if isinstance(data, dict):
        if _TENSOR in data:
            tensor = read_tensor(path, str(data[_TENSOR]))
            return tensor.view(torch.float64) if data["double"] else tensor
        return {key: _put_tensors(value, path) for key, value in data.items()}
    return [_put_tensors(value, path) for value in data] if isinstance(data, list) else data
