"""Journal of solved blocks and the hidden states after them, which outlive a killed export.

A block counts as finished when its line is in the journal. Before that its numbers and the hidden
states of all samples after it are in files of their own, each written under another name, made
durable, and renamed; a line that is cut short does not count. So a later run resumes after the last
finished block with exactly the numbers of the first run.

A line has the digests of its files, and one of its own. What does not match is forgotten, with all
that was computed after it, and so it is computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe2edge.errors import WorkDamaged
from moe2edge.model.block import Block
from moe2edge.storage.records import append_record, is_sound, recover_records, write_records
from moe2edge.storage.safetensors_files import PlannedTensor, read_tensor, write_durably
from moe2edge.storage.solved_blocks import open_handles, save

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.numerics.grid import Quantized

JOURNAL = "journal.jsonl"
HIDDEN = "hidden"


@dataclass(frozen=True)
class JournalEntry:
    """Line of the journal: one block, finished in one step of a recipe.

    Attributes:
        step: position of the pass in the recipe.
        block: index of the block in the model that the pass got.
        origins: origins of the block and of its experts in the source, to recognize the block.
        numbers: file with its numbers.
        schemes: schemes of the quantized tensors by role: bits, group size, symmetric.
        patterns: patterns of the sparse tensors by role: zeros, length of a run.
        stream: file with the hidden states after the block; None if the pass needs none.
        files: SHA-256 of these files by name.
        done: result to report.
    """

    step: int
    block: int
    origins: tuple[int, ...]
    numbers: str
    schemes: Mapping[str, tuple[int, int, bool]]
    patterns: Mapping[str, tuple[float, int | None]]
    stream: str | None
    files: Mapping[str, str]
    done: BlockResult


class Journal:
    """Finished blocks of a work folder.

    Attributes:
        folder: the work folder.
        units: entries by step and block, in the order in which they were finished.
        damaged: whether a line was damaged, which is forgotten with those after it.
        guard: called before a block counts; raises if an input has changed under way.
    """

    def __init__(self, folder: Path) -> None:
        """Read the entries in the folder, and remove a last line that is cut short."""
        self.folder = folder
        self.guard: Callable[[], None] = lambda: None
        self._path = folder / JOURNAL
        self.units: dict[tuple[int, int], JournalEntry] = {}
        records, self.damaged = recover_records(self._path)
        try:
            for record in records:
                self._read_entry(record)
        except (AttributeError, LookupError, TypeError):  # of another version
            self.damaged = True
        if self.damaged:
            self._rewrite()

    def _read_entry(self, raw: dict[str, Any]) -> None:
        """Parse a record of the journal."""
        done = BlockResult(**{k: _convert_to_tuple(v) for k, v in raw.pop("done").items()})
        entry = JournalEntry(**{k: _convert_to_tuple(v) for k, v in raw.items()}, done=done)
        self.units[entry.step, entry.block] = entry

    def add(self, entry: JournalEntry) -> None:
        """Record a block as finished."""
        self.guard()
        append_record(self._path, asdict(entry))
        self.units[entry.step, entry.block] = entry

    def find_damage(self) -> tuple[tuple[int, int], str] | None:
        """Find the step and block from which on nothing can be used, and the damaged file.

        Blocks of a step follow from each other. Only the hidden states after the last one are kept,
        so if they cannot be used, or do not follow the last sound block, the step begins again.
        """
        damage: tuple[tuple[int, int], str] | None = None
        last: dict[int, JournalEntry] = {}
        for key, entry in self.units.items():
            if not is_sound(self.folder / entry.numbers, entry.files.get(entry.numbers)):
                damage = key, entry.numbers
                break
            last[entry.step] = entry
        for step, entry in last.items():
            stream = entry.stream
            if stream and not is_sound(self.folder / stream, entry.files.get(stream)):
                return (step, 0), damage[1] if damage else stream
        return damage

    def forget_from(self, place: tuple[int, int]) -> None:
        """Forget a block, by step and index, and those after it."""
        kept = {key: entry for key, entry in self.units.items() if key < place}
        if len(kept) < len(self.units):
            self.units = kept
            self._rewrite()

    def _rewrite(self) -> None:
        """Write the file again, with the entries alone."""
        write_records(self._path, [asdict(entry) for entry in self.units.values()])


def _convert_to_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


@dataclass
class FileBlockJournal:
    """Finished blocks of one step, with their numbers in files.

    Attributes:
        journal: journal of all steps.
        step: position of the pass in the recipe.
    """

    journal: Journal
    step: int
    _stream: str | None = field(default=None, init=False)

    def restore(self, block: Block) -> tuple[Block, BlockResult] | None:
        """Restore a block that was solved before, with its result; None if it was not."""
        entry = self.journal.units.get((self.step, block.index))
        if entry is None:
            return None
        if entry.origins != _list_origins(block):
            raise WorkDamaged(
                f"block {block.index} of the unfinished export had other experts "
                f"({entry.origins[1:]}) than are chosen now ({_list_origins(block)[1:]}); start "
                "over with --resume never"
            )
        self._stream = entry.stream
        path = self.journal.folder / entry.numbers
        sha256 = entry.files[entry.numbers]
        handles = open_handles(dict(block.weights()), path, sha256, entry.schemes, entry.patterns)
        return block.with_weights(handles), entry.done

    def stream(self) -> Tensor | None:
        """Read the hidden states after the last restored block; None if there are none."""
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
        """Save a solved block and the hidden states after it.

        Return the block with handles on its numbers.
        """
        stem = f"{self.step}-{block.index:05}"
        path = self.journal.folder / f"block-{stem}.safetensors"
        weights = dict(block.weights())
        sha256, schemes, patterns = save(path, weights, numbers)
        stream, files = None, {path.name: sha256}
        if hidden is not None:
            stream = f"stream-{stem}.safetensors"
            planned = PlannedTensor(HIDDEN, tuple(hidden.shape), "F32", hidden.cpu)
            files[stream] = write_durably(self.journal.folder / stream, [planned])
        entry = JournalEntry(
            step=self.step,
            block=block.index,
            origins=_list_origins(block),
            numbers=path.name,
            schemes=schemes,
            patterns=patterns,
            stream=stream,
            files=files,
            done=done,
        )
        self.journal.add(entry)
        if self._stream is not None:
            (self.journal.folder / self._stream).unlink(missing_ok=True)
        self._stream = stream
        return block.with_weights(open_handles(weights, path, sha256, schemes, patterns))


def _list_origins(block: Block) -> tuple[int, ...]:
    """List the origins of a block and of its experts."""
    return (block.origin, *block.expert_origins)


@dataclass(frozen=True)
class BlockResult:
    """Result of solving a block, to report.

    Attributes:
        changed: names on disk of the tensors that were solved.
        notes: notes for the user.
        loss: squared error of the outputs on the tokens seen, and the square it is relative to.
    """

    changed: tuple[str, ...]
    notes: tuple[str, ...] = ()
    loss: tuple[float, float] = (0.0, 0.0)
