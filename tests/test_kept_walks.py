"""Walks that stop at any block and are begun again: the same bits, and no block runs twice."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import QUIET
from moe2edge.calibration import walk
from moe2edge.calibration.observation import Observer, Resumable
from moe2edge.calibration.router_observers import (
    OutputObserver,
    RatioObserver,
    RouterOutputObserver,
    RoutingObserver,
    SkipObserver,
)
from moe2edge.calibration.similarity import BlockSimilarityFactory, LayerSimilarityObserver
from moe2edge.evaluation.margins import MarginObserver
from moe2edge.evaluation.ranges import RangeObserver
from moe2edge.model.model import Model
from moe2edge.passes._allocation_trials import Ranker
from moe2edge.passes.expert_search import ExpertSearch
from moe2edge.pipeline.contract import PassContext
from moe2edge.storage.checkpoint import open_checkpoint
from moe2edge.storage.kept_walk import KeptWalk
from moe2edge.storage.work_folder import WorkFolder
from moe2edge.testing import InMemory, Make, TraceRecorder

BLOCKS = 4
IDS = torch.arange(6 * 24).view(6, 24) % 90
OBSERVERS: dict[str, Callable[[], Observer[Any]]] = {
    "routing": RoutingObserver,
    "outputs": OutputObserver,
    "router outputs": RouterOutputObserver,
    "ratios": RatioObserver,
    "skips": SkipObserver,
    "runs of blocks": BlockSimilarityFactory(3),
    "blocks": BlockSimilarityFactory(1),
    "layers": LayerSimilarityObserver,
    "margins": lambda: MarginObserver(9),
    "ranges": RangeObserver,
    "ranker": lambda: Ranker("reap", 0, dict.fromkeys(range(BLOCKS), 2), IDS.numel(), 50),
}


class Stopped(Exception):
    """The walk was killed."""


@pytest.fixture(scope="module")
def model(tiny: Make) -> Model:
    found = open_checkpoint(str(tiny("qwen3_moe", num_hidden_layers=BLOCKS))).model
    # One layer without a router, and one that skips.
    found = found.replace_block(found.blocks[2].keep_experts((4,), clamp_top_k=True))
    return found


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walk, "BATCH_TOKENS", 50)


def stopping_at(block: int | None, seen: list[int]) -> Callable[..., None]:
    """Report progress to a walk that is killed when it comes to a block."""

    def advance(_: str, done: int, total: int, __: str = "", /) -> None:
        if done < total:
            if done == block:
                raise Stopped
            seen.append(done)

    return advance


def describe(value: Any) -> Any:
    """Return plain data of what an observer has found, tensors as bytes."""
    if isinstance(value, Tensor):
        return str(value.dtype), tuple(value.shape), value.contiguous().numpy().tobytes()
    if isinstance(value, dict):
        return {key: describe(own) for key, own in value.items()}
    if isinstance(value, list | tuple):
        return [describe(own) for own in value]
    return describe(vars(value)) if hasattr(value, "__dict__") else value


def observed(
    model: Model, names: Sequence[str], kept: KeptWalk | None, stop: int | None = None
) -> tuple[Any, list[int]]:
    """Return what the observers found and the hidden states, and the blocks that were run."""
    seen: list[int] = []
    observers = [OBSERVERS[name]() for name in names]
    hidden = walk.observe(model, IDS, observers, stopping_at(stop, seen), "", kept=kept)
    return describe([hidden, [observer.result() for observer in observers]]), seen


def test_every_observer_is_here() -> None:
    """Each class that a walk can resume with, but for the two of `expert_search` tested below.

    Those that change blocks are in test_kept_changes.py.
    """
    tested = {type(make()) for make in OBSERVERS.values()}
    known = {kind for kind in Resumable.__subclasses__() if kind.__module__.startswith("moe2edge")}
    assert {kind.__name__ for kind in known - tested} == {
        "_Decider", "_DecidingObserver", "KeptTransform"
    }  # fmt: skip


@pytest.mark.parametrize("stop", range(BLOCKS))
def test_a_walk_resumes_behind_the_last_block_with_the_same_bits(
    model: Model, tmp_path: Path, stop: int
) -> None:
    expected = observed(model, list(OBSERVERS), None)[0]
    with pytest.raises(Stopped):
        observed(model, list(OBSERVERS), KeptWalk(tmp_path / "w"), stop)
    found, seen = observed(model, list(OBSERVERS), KeptWalk(tmp_path / "w"))
    assert found == expected
    assert seen == list(range(stop, BLOCKS))
    # A finished walk is not run again, and once more gives the same.
    for _ in range(2):
        assert observed(model, list(OBSERVERS), KeptWalk(tmp_path / "w")) == (expected, [])


def test_a_walk_that_stops_again_and_again(model: Model, tmp_path: Path) -> None:
    expected = observed(model, list(OBSERVERS), None)[0]
    for stop in range(BLOCKS):
        with pytest.raises(Stopped):
            observed(model, list(OBSERVERS), KeptWalk(tmp_path / "w"), stop)
    assert observed(model, list(OBSERVERS), KeptWalk(tmp_path / "w")) == (expected, [BLOCKS - 1])
    # The hidden states of blocks before the last are gone.
    assert len(list((tmp_path / "w").glob("passing-*"))) == 1


def test_walks_without_observers_are_kept(model: Model, tmp_path: Path) -> None:
    expected = observed(model, [], None)[0]
    with pytest.raises(Stopped):
        observed(model, [], KeptWalk(tmp_path / "w"), 2)
    assert observed(model, [], KeptWalk(tmp_path / "w")) == (expected, [2, 3])


def test_observers_that_cannot_resume_see_every_block(model: Model, tmp_path: Path) -> None:
    recorder = TraceRecorder()
    walk.observe(model, IDS, [recorder], QUIET.advance, "", kept=KeptWalk(tmp_path / "w"))
    assert not (tmp_path / "w").exists()
    assert {trace.block.index for trace in recorder.seen} == set(range(BLOCKS))


def test_another_text_or_model_is_another_walk(model: Model, tmp_path: Path) -> None:
    for ids, changed in ((IDS, model), (IDS + 1, model), (IDS, model.keep_blocks([0, 1, 3]))):
        seen: list[int] = []
        kept = KeptWalk(tmp_path / "w")
        found = walk.observe(changed, ids, (), stopping_at(None, seen), "", kept=kept)
        assert torch.equal(found, walk.observe(changed, ids, (), QUIET.advance, ""))
        assert seen == list(range(len(changed.blocks)))


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("stop", range(BLOCKS))
def test_a_search_resumes_with_the_same_decisions(
    model: Model, tmp_path: Path, progressive: bool, stop: int
) -> None:
    step = ExpertSearch(keep=3, progressive=progressive)
    context = PassContext(model, model, IDS, InMemory(), QUIET)

    def search(stop: int | None, folder: Path) -> tuple[str, Any, list[int]]:
        seen: list[int] = []
        advance = stopping_at(stop, seen)

        def blocks_only(label: str, done: int, total: int, detail: str = "", /) -> None:
            if label == "expert_search":
                advance(label, done, total)

        folder.mkdir(exist_ok=True)
        resuming = replace(
            context,
            reporter=replace(QUIET, advance=blocks_only),
            keep_walk=lambda name: KeptWalk(folder / name),
        )
        outcome = step.search(resuming)
        return str(outcome.model), (outcome.changed, outcome.notes), seen

    expected = search(None, tmp_path / "whole")
    with pytest.raises(Stopped):
        search(stop, tmp_path / "w")
    assert search(None, tmp_path / "w") == (*expected[:2], list(range(stop, BLOCKS)))
    assert search(None, tmp_path / "w") == (*expected[:2], [])


def test_no_damaged_file_of_a_walk_is_used(model: Model, tmp_path: Path) -> None:
    names = ["routing", "runs of blocks", "margins"]
    expected = observed(model, names, None)[0]
    (tmp_path / "whole").mkdir()
    kept = WorkFolder(tmp_path / "whole").kept_walk(0, "scoring")
    with pytest.raises(Stopped):
        observed(model, names, kept, 2)
    files = sorted(path.name for path in kept.folder.iterdir())
    assert len(files) == 4
    for name in files:
        size = (kept.folder / name).stat().st_size
        for at in (0, size // 3, size // 2, size - 100, size - 1, -1):
            shutil.copytree(tmp_path / "whole", tmp_path / "w")
            work = WorkFolder(tmp_path / "w")
            path = work.kept_walk(0, "scoring").folder / name
            data = bytearray(path.read_bytes())
            if at < 0:
                path.unlink()
            else:
                data[at] ^= 1 << at % 8
                path.write_bytes(data)
            work.check()
            assert work.damaged == (
                [f"walk-0-scoring/{name}"] if (at, name) != (-1, files[0]) else []
            )
            assert observed(model, names, work.kept_walk(0, "scoring")) == (expected, [0, 1, 2, 3])
            shutil.rmtree(tmp_path / "w")


def test_a_guard_that_raises_keeps_nothing(model: Model, tmp_path: Path) -> None:
    def guard() -> None:
        raise Stopped

    with pytest.raises(Stopped):
        observed(model, [], KeptWalk(tmp_path / "w", guard))
    assert not (tmp_path / "w").exists()
