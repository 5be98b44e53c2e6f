"""What outlives a killed export: solved blocks and the stream behind them, with a journal.

A block counts as finished when its line is in the journal. Before that its numbers and the hidden
states of all samples after it are in files of their own, each written under another name, made
durable, and renamed; a line that is cut short is no line. So a later run goes on behind the last
finished block with the very numbers that the first one had.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Any,
)

from moe2edge.errors import InputError
from moe2edge.model.model import Block
from moe2edge.storage.safetensors_files import PlannedTensor, read_tensor, write_durably
from moe2edge.storage.solved_blocks import open_handles, save

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.numerics.grid import Quantized

JOURNAL = "journal.jsonl"
HIDDEN = "hidden"


@dataclass(frozen=True)
class JournalEntry:
    """A line of the journal: one block, finished in one step of a recipe.

    Attributes:
        step: position of the pass in the recipe.
        block: index of the block in the model that the pass got.
        origins: of the block and of its experts in the source, so that it is known again.
        numbers: file with its numbers.
        schemes: of the quantized tensors by role: bits, group size, symmetric.
        patterns: of the sparse tensors by role: zeros, of how many.
        stream: file with the hidden states after the block; None if the pass looks at none.
        done: what there is to tell of it.
    """

    step: int
    block: int
    origins: tuple[int, ...]
    numbers: str
    schemes: Mapping[str, tuple[int, int, bool]]
    patterns: Mapping[str, tuple[float, int | None]]
    stream: str | None
    done: BlockResult


class Journal:
    """The finished blocks of a work folder."""

    def __init__(self, folder: Path) -> None:
        """Read what is there, and forget a last line that is cut short."""
        self.folder = folder
        self._path = folder / JOURNAL
        self.units: dict[tuple[int, int], JournalEntry] = {}
        whole = 0
        data = self._path.read_bytes() if self._path.exists() else b""
        for line in data.splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break
            self._take(json.loads(line))
            whole += len(line)
        if whole < len(data):
            os.truncate(self._path, whole)

    def _take(self, raw: dict[str, Any]) -> None:
        done = BlockResult(**{k: _tuple(v) for k, v in raw.pop("done").items()})
        unit = JournalEntry(**{k: _tuple(v) for k, v in raw.items()}, done=done)
        self.units[unit.step, unit.block] = unit

    def add(self, unit: JournalEntry) -> None:
        """Count a block as finished."""
        with self._path.open("ab") as file:
            file.write(json.dumps(asdict(unit)).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.units[unit.step, unit.block] = unit


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


@dataclass
class FileBlockJournal:
    """The finished blocks of one step.

    Attributes:
        journal: where they are listed.
        step: position of the pass in the recipe.
    """

    journal: Journal
    step: int
    _stream: str | None = field(default=None, init=False)

    def restore(self, block: Block) -> tuple[Block, BlockResult] | None:
        """A block as it was solved before, with what there is to tell; None if it was not."""
        unit = self.journal.units.get((self.step, block.index))
        if unit is None:
            return None
        if unit.origins != _origins(block):
            raise InputError(
                f"block {block.index} of the unfinished export had other experts "
                f"({unit.origins[1:]}) than are chosen now ({_origins(block)[1:]}); begin anew "
                "with --resume never"
            )
        self._stream = unit.stream
        path = self.journal.folder / unit.numbers
        found = open_handles(dict(block.weights()), path, unit.schemes, unit.patterns)
        return block.with_weights(found), unit.done

    def stream(self) -> Tensor | None:
        """Hidden states behind the last block that was restored."""
        if self._stream is None:
            return None
        return read_tensor(self.journal.folder / self._stream, HIDDEN)

    def finish(
        self,
        block: Block,
        numbers: Mapping[str, Quantized | Tensor],
        done: BlockResult,
        hidden: Tensor | None,
    ) -> Block:
        """Save a solved block and the stream behind it; the block with handles on its numbers."""
        stem = f"{self.step}-{block.index:05}"
        path = self.journal.folder / f"block-{stem}.safetensors"
        weights = dict(block.weights())
        schemes, patterns = save(path, weights, numbers)
        stream = None
        if hidden is not None:
            stream = f"stream-{stem}.safetensors"
            whole = PlannedTensor(HIDDEN, tuple(hidden.shape), "F32", hidden.cpu)
            write_durably(self.journal.folder / stream, [whole])
        unit = JournalEntry(
            self.step, block.index, _origins(block), path.name, schemes, patterns, stream, done
        )
        self.journal.add(unit)
        if self._stream is not None:
            (self.journal.folder / self._stream).unlink(missing_ok=True)
        self._stream = stream
        return block.with_weights(open_handles(weights, path, schemes, patterns))


def _origins(block: Block) -> tuple[int, ...]:
    """Where a block and its experts are from."""
    return (block.origin, *block.expert_origins)


@dataclass(frozen=True)
class BlockResult:
    """What there is to tell of a block that was solved.

    Attributes:
        changed: names on disk of the tensors that were solved.
        notes: what a user should know.
        loss: squared error of outputs on the tokens seen, and what it is relative to.
    """

    changed: tuple[str, ...]
    notes: tuple[str, ...] = ()
    loss: tuple[float, float] = (0.0, 0.0)
