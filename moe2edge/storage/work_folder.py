"""Folder of computed numbers, which outlive a killed export until a target packs them."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from moe2edge.model.block import Block
from moe2edge.model.weights import Weight
from moe2edge.progress import Reporter
from moe2edge.storage.journal import JOURNAL, FileBlockJournal, Journal
from moe2edge.storage.kept_results import RESULTS
from moe2edge.storage.kept_walk import WALKED, KeptWalk
from moe2edge.storage.records import STATE, find_damaged, read_records
from moe2edge.storage.solved_blocks import open_handles, save

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.numerics.grid import Quantized

# Prefix of the names of folders of passes.
SCRATCH, WALK = "pass-", "walk-"


def _find_damage(record: Path) -> str | None:
    """Find the first damaged file of those that a record in a folder speaks of, itself included."""
    records, damaged = read_records(record)
    if damaged or len(records) != 1:
        return record.name
    return find_damaged(record.parent, records[0].get("files", {}))


def count_kept_blocks(folder: Path) -> dict[tuple[int, str], int]:
    """Count the blocks in a work folder, of which nothing is changed or compared with digests.

    Returns:
        Blocks by the position of the pass and the name of the walk. The name is empty for finished
        blocks, and for other saved work, which counts none.
    """
    found = Counter({(int(path.name.split("-")[1]), ""): 0 for path in folder.glob(f"{SCRATCH}*")})
    found.update((record["step"], "") for record in read_records(folder / JOURNAL)[0])
    for path in folder.glob(f"{WALK}*"):
        step, _, name = path.name.removeprefix(WALK).partition("-")
        records, _ = read_records(path / WALKED)
        found[int(step), name] = sum(len(record["origins"]) for record in records)
    return dict(found)


def has_results(folder: Path) -> bool:
    """Return whether a work folder holds results that a run had before it was opened."""
    return (folder / RESULTS).is_file()


@dataclass
class WorkFolder:
    """Folder where an export keeps computed numbers until a target packs them.

    Attributes:
        folder: the folder.
        journal: its finished blocks.
        damaged: files that were found damaged, and with what came after them are computed again.
    """

    folder: Path
    journal: Journal = field(init=False)
    damaged: list[str] = field(default_factory=list)
    _guard: Callable[[], None] = field(default_factory=lambda: lambda: None, init=False)
    _count: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.journal = Journal(self.folder)

    def watch(self, guard: Callable[[], None]) -> None:
        """Call ``guard`` before anything counts as finished; it raises if an input has changed."""
        self._guard = self.journal.guard = guard

    def check(self) -> None:
        """Compare all that is kept with its digests; forget what differs and what came after it."""
        if self.journal.damaged:
            self.damaged.append(JOURNAL)
            self._forget_after(max((step for step, _ in self.journal.units), default=-1))
        if found := self.journal.find_damage():
            self.damaged = self.damaged or [found[1]]
            self._forget_after(found[0][0])
            self.journal.forget_from(found[0])
        for step, folder in self._list_scratch():
            record = folder / STATE
            if record.exists() and (name := _find_damage(record)):
                self.damaged.append(f"{folder.name}/{name}")
                self._forget_after(step)
                record.unlink()
                break
        # Whatever was computed from what is kept of a walk still holds: again, it gives the same.
        for folder in sorted(self.folder.glob(f"{WALK}*")):
            if name := KeptWalk(folder).find_damage():
                self.damaged.append(f"{folder.name}/{name}")
                shutil.rmtree(folder)

    def _forget_after(self, step: int) -> None:
        """Forget what was computed by the passes behind ``step``."""
        self.journal.forget_from((step + 1, 0))
        for position, folder in self._list_scratch():
            if position > step:
                shutil.rmtree(folder)

    def _list_scratch(self) -> list[tuple[int, Path]]:
        """List the folders of passes by position."""
        found = [
            (int(path.name.removeprefix(SCRATCH).partition("-")[0]), path)
            for path in self.folder.glob(f"{SCRATCH}*")
        ]
        return sorted(found)

    def ledger(self, step: int) -> FileBlockJournal:
        """Return the journal of the pass at position ``step``."""
        return FileBlockJournal(self.journal, step)

    def scratch(self, step: int, name: str) -> Path:
        """Return a folder for the pass ``name`` at position ``step``; its files outlive a kill."""
        folder = self.folder / f"{SCRATCH}{step}-{name}"
        folder.mkdir(exist_ok=True)
        return folder

    @property
    def kept(self) -> str:
        """Description of the work that can be resumed; empty if there is none."""
        parts = [f"{count} finished blocks"] if (count := len(self.journal.units)) else []
        for folder in sorted(self.folder.glob(f"{SCRATCH}*")):
            # A file that does not have its final name yet is incomplete.
            if any(path.suffix != ".tmp" for path in folder.iterdir()):
                parts.append(f"the saved work of {folder.name.rpartition('-')[2]}")
        if not parts and any(self.folder.glob(f"{WALK}*/{WALKED}")):
            walks = [KeptWalk(path) for path in self.folder.glob(f"{WALK}*")]
            parts.append(f"{sum(len(walk.origins) for walk in walks)} observed blocks")
        return " and ".join(parts)

    def kept_walk(self, step: int, name: str) -> KeptWalk:
        """Return the folder of a walk of the pass at position ``step``, by a name for it."""
        return KeptWalk(self.folder / f"{WALK}{step}-{name}", self._guard)

    def report(self, reporter: Reporter) -> None:
        """Report what an earlier run has left, and what of it is computed again."""
        if self.damaged:
            reporter.log(
                f"{' and '.join(self.damaged)} in {self.folder} is not what was written: it is "
                "computed again, with what came after it"
            )
        if self.kept:
            reporter.log(f"resuming after {self.kept} of an earlier run")

    def put(self, block: Block, numbers: Mapping[str, Quantized | Tensor]) -> Block:
        """Save numbers of a block by role; a pass computes them again if the export is resumed.

        A tensor that is not quantized takes the dtype of the one that it replaces.
        """
        path = self.folder / f"put-{self._count:05}.safetensors"
        self._count += 1
        weights = dict(block.weights())
        return block.with_weights(open_handles(weights, path, *save(path, weights, numbers)))

    def put_rest(
        self, rest: Mapping[str, Weight], numbers: Mapping[str, Quantized | Tensor]
    ) -> dict[str, Weight]:
        """Save numbers of tensors outside of blocks by name.

        Return all of the tensors, those that were saved with new handles.
        """
        path = self.folder / f"put-{self._count:05}.safetensors"
        self._count += 1
        return {**rest, **open_handles(rest, path, *save(path, rest, numbers))}
