"""Files of a work folder that are cut, emptied, deleted or changed: never used, and said."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from moe2edge.errors import WorkDamaged
from moe2edge.model.model import Model
from moe2edge.passes._recover_state import Line, Progress, Saved, States
from moe2edge.storage.checkpoint import open_checkpoint
from moe2edge.storage.journal import JOURNAL, BlockResult
from moe2edge.storage.records import append_record, read_records, seal, unseal
from moe2edge.storage.work_folder import WorkFolder
from moe2edge.testing import Make

ROLE = "router.weight"
# Blocks of the model, and how many of each step are finished.
BLOCKS, FINISHED = 3, (3, 2)


def numbers(step: int, block: int) -> torch.Tensor:
    """Numbers of a block that a step has finished."""
    return torch.full((6, 64), step + block / 8)


def hidden(step: int, block: int) -> torch.Tensor:
    """Hidden states after it."""
    return torch.full((2, 3, 8), 100.0 * step + block)


@pytest.fixture(scope="module")
def model(tiny: Make) -> Model:
    return open_checkpoint(str(tiny("qwen3_moe"))).model


def finish(work: WorkFolder, model: Model, step: int, index: int, *, streams: bool = True) -> None:
    ahead = hidden(step, index) if streams and index + 1 < BLOCKS else None
    result = BlockResult((f"block {index}",), loss=(0.1, 1 / 3))
    ledger = work.ledger(step)
    for before in model.blocks[:index]:
        ledger.restore(before)
    ledger.finish(model.blocks[index], {ROLE: numbers(step, index)}, result, ahead)


def fill(folder: Path, model: Model, *, streams: bool = True) -> WorkFolder:
    """Make a work folder with a finished step, one that is half finished, and a training."""
    folder.mkdir()
    work = WorkFolder(folder)
    for step, count in enumerate(FINISHED):
        for index in range(count):
            finish(work, model, step, index, streams=streams)
    states, line = States(work.scratch(2, "recover")), Line(2, None, 1.5, 0.1)
    weights = {"w": torch.arange(40.0)}
    states.save(Saved(Progress(2, 2, 0, (0.5,), (line,)), weights, weights))
    return work


def check(folder: Path, model: Model, *, streams: bool = True) -> tuple[list[int], int, list[str]]:
    """Return the blocks of each step and the step of the training that are used, and what is said.

    All that is used is proved to be what was written.
    """
    work = WorkFolder(folder)
    work.check()
    counts = []
    for step in range(len(FINISHED)):
        ledger, found = work.ledger(step), []
        for block in model.blocks:
            if restored := ledger.restore(block):
                loaded = dict(restored[0].weights())[ROLE].load()
                assert torch.equal(loaded, numbers(step, block.index))
                assert restored[1] == BlockResult((f"block {block.index}",), loss=(0.1, 1 / 3))
                found.append(block.index)
        assert found == list(range(len(found)))
        if streams and 0 < len(found) < BLOCKS:
            ahead = ledger.stream()
            assert ahead is not None
            assert torch.equal(ahead, hidden(step, found[-1]))
        counts.append(len(found))
    saved = States(work.scratch(2, "recover")).load()
    if saved is not None:
        assert torch.equal(saved.best["w"], torch.arange(40.0))
        assert torch.equal(saved.now["w"], torch.arange(40.0))
        assert saved.progress.losses == (0.5,)
    return counts, saved.progress.step if saved else 0, work.damaged


def list_files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def flip(at: int) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[at % len(data)] ^= 1 << at % 8
        path.write_bytes(data)

    return change


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def list_damages(path: Path) -> Iterator[Callable[[Path], None]]:
    """Yield ways to damage a file; flips of bits come by every region of it."""
    yield from (cut, empty, Path.unlink)
    size = path.stat().st_size
    yield from (flip(at) for at in {*range(0, size, -(-size // 16)), *range(size - 3, size)})


@pytest.mark.parametrize("streams", [True, False])
def test_no_damaged_file_is_used(model: Model, tmp_path: Path, streams: bool) -> None:
    fill(tmp_path / "whole", model, streams=streams)
    everything = [*FINISHED], 2, list[str]()
    assert check(tmp_path / "whole", model, streams=streams) == everything
    names = list_files(tmp_path / "whole")
    assert len(names) == (10 if streams else 9)
    for name in names:
        for damage in list_damages(tmp_path / "whole" / name):
            shutil.copytree(tmp_path / "whole", tmp_path / "w")
            damage(tmp_path / "w" / name)
            counts, step, said = check(tmp_path / "w", model, streams=streams)
            assert (counts, step) != everything[:2], name
            # A journal or state that is gone, or cut between two lines, is as if it never was.
            gone = not (tmp_path / "w" / name).exists() or damage in (cut, empty)
            assert said or (gone and Path(name).name in (JOURNAL, "state.json")), name
            # What is forgotten is forgotten for good, and all that followed from it.
            assert check(tmp_path / "w", model, streams=streams) == (counts, step, [])
            if counts[0] < FINISHED[0]:
                assert counts[1] == 0
            if said and counts != [*FINISHED]:
                assert step == 0
            shutil.rmtree(tmp_path / "w")


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("block-0-00001.safetensors", [0, 0]),  # the hidden states before it are gone
        ("block-1-00000.safetensors", [3, 0]),
        ("stream-1-00001.safetensors", [3, 0]),
    ],
)
def test_a_step_begins_again_where_blocks_follow_from_each_other(
    model: Model, tmp_path: Path, name: str, counts: list[int]
) -> None:
    work = fill(tmp_path / "w", model)
    flip(500)(work.folder / name)
    assert check(work.folder, model) == (counts, 0, [name])
    again = WorkFolder(work.folder)
    for step, count in enumerate(counts):
        for index in range(count, BLOCKS):
            finish(again, model, step, index)
    assert check(work.folder, model) == ([3, 3], 0, [])


def test_blocks_that_are_independent_are_kept(model: Model, tmp_path: Path) -> None:
    work = fill(tmp_path / "w", model, streams=False)
    empty(work.folder / "block-1-00001.safetensors")
    assert check(work.folder, model, streams=False)[0] == [3, 1]


def test_a_damaged_line_forgets_those_behind_it(model: Model, tmp_path: Path) -> None:
    work = fill(tmp_path / "w", model)
    lines = (work.folder / JOURNAL).read_bytes().splitlines(keepends=True)
    (work.folder / JOURNAL).write_bytes(b"".join(lines[:3]) + b"?" + b"".join(lines[3:]))
    assert check(work.folder, model) == ([3, 0], 0, [JOURNAL])


def test_numbers_that_change_while_an_export_runs(model: Model, tmp_path: Path) -> None:
    (tmp_path / "w").mkdir()
    work = WorkFolder(tmp_path / "w")
    done = work.ledger(0).finish(model.blocks[0], {ROLE: numbers(0, 0)}, BlockResult(()), None)
    flip(500)(work.folder / "block-0-00000.safetensors")
    with pytest.raises(WorkDamaged, match="is not what was written to it"):
        dict(done.weights())[ROLE].load()


def test_records(tmp_path: Path) -> None:
    path, record = tmp_path / "x.jsonl", {"a": [1, 0.1], "b": None}
    assert read_records(path) == ([], False)
    for _ in range(2):
        append_record(path, record)
    whole = path.read_bytes()
    assert read_records(path) == ([record, record], False)
    for end in range(len(whole)):  # cut short, as by a kill
        path.write_bytes(whole[:end])
        records, damaged = read_records(path)
        assert len(records) == whole[:end].count(b"\n")
        assert not damaged or b'"digest"' in whole[:end].split(b"\n")[-1]
    for at in range(8 * len(whole)):
        data = bytearray(whole)
        data[at // 8] ^= 1 << at % 8
        path.write_bytes(data)
        assert read_records(path) == ([record] if at // 8 >= len(whole) // 2 else [], True)
    assert unseal(seal(record)) == record
    assert unseal(b"\n") is None
