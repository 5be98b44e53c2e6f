"""Passes that change or judge a model, stopped and begun again: same bits, no block twice."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from helpers import QUIET, write_text
from killing import run_child
from moe2edge.calibration.block_runner import BlockRunner
from moe2edge.model.block import Block
from moe2edge.model.model import Model
from moe2edge.passes.expert_budget import ExpertBudget
from moe2edge.passes.expert_merge import ExpertMerge
from moe2edge.passes.expert_replace import ExpertReplace
from moe2edge.passes.routing import Routing
from moe2edge.pipeline.contract import Outcome, PassContext, Search
from moe2edge.pipeline.facts import UntiedModel
from moe2edge.pipeline.kept_transform import KeptTransform
from moe2edge.storage.checkpoint import open_checkpoint
from moe2edge.storage.kept_walk import KeptWalk
from moe2edge.storage.work_folder import WorkFolder
from moe2edge.testing import Make

IDS = torch.randint(1, 90, (8, 24), generator=torch.Generator().manual_seed(0))


def replacing(kind: str, **options: Any) -> Search:
    return ExpertReplace.model_validate({"with": kind, **options})


STEPS: dict[str, Search] = {
    "hc-smoe": ExpertMerge(method="hc-smoe", keep=3),
    "m-smoe, with orders of neurons": ExpertMerge(method="m-smoe", keep=3),
    "ream, on intact inputs": ExpertMerge(method="ream", keep=3, fitted_on="intact"),
    "linear": replacing("linear", keep=4, rank=2, min_tokens=0),
    "linear by a budget": replacing("linear", budget=0.6, min_tokens=0, fitted_on="intact"),
    "constant": replacing("constant", keep=[4, 6, 3], criterion="frequency"),
    "base": replacing("base", budget=0.6, factors="svd", rank=2),
    "svd": replacing("svd", budget=0.7, rank=2),
    "routing": Routing(ridge=0.001, damping=0.1, margin=0),
    "budget": ExpertBudget(keep=4, clamp_top_k=True),
    "budget by kl": ExpertBudget(keep=4, sensitivity="kl", points=3, clamp_top_k=True),
}


class Stopped(Exception):
    """The run was killed."""


@pytest.fixture(scope="module")
def source(tiny: Make) -> Model:
    return open_checkpoint(str(tiny("qwen3_moe"))).model


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """List the blocks that are loaded to be run."""
    seen: list[int] = []
    original = BlockRunner.__init__

    def load(self: BlockRunner, model: Model, block: Block, *dtype: torch.dtype) -> None:
        seen.append(block.index)
        original(self, model, block, *dtype)

    monkeypatch.setattr(BlockRunner, "__init__", load)
    return seen


@contextlib.contextmanager
def stopping_after(count: int) -> Iterator[list[int]]:
    """Stop as soon as so many blocks are kept; gives the number that were."""
    added, done = KeptWalk.add, [0]

    def adding(self: KeptWalk, *more: Any) -> None:
        added(self, *more)
        done[0] += 1
        if done[0] == count:
            raise Stopped

    with pytest.MonkeyPatch.context() as inner:
        inner.setattr(KeptWalk, "add", adding)
        yield done


def run(step: Search, source: Model, folder: Path) -> Outcome:
    """Run a pass as an export does that begins, or goes on, in a work folder."""
    folder.mkdir(exist_ok=True)
    work = WorkFolder(folder)
    work.check()
    assert not work.damaged
    model = source
    if isinstance(step, Routing):  # what there is to fit
        model = source.replace_block(source.blocks[0].keep_experts((0, 2, 3)))
    keep_walk = lambda name: work.kept_walk(0, name)  # noqa: E731
    return step.run(PassContext(source, model, IDS, work, QUIET, keep_walk=keep_walk))


def describe(outcome: Outcome) -> Any:
    """Return all that a pass has found, numbers as bytes."""
    models = [outcome.model, *(f.model for f in outcome.facts if isinstance(f, UntiedModel))]
    numbers = [
        (index, role, weight.load().float().numpy().tobytes())
        for model in models
        for index, role, weight in model.tensors()
    ]
    return [list(map(str, models)), numbers, outcome.changed, outcome.notes]


@pytest.mark.parametrize("name", STEPS)
def test_a_pass_resumes_behind_the_last_block_with_the_same_bits(
    source: Model, tmp_path: Path, loads: list[int], name: str
) -> None:
    step = STEPS[name]
    with stopping_after(-1) as kept:
        expected = describe(run(step, source, tmp_path / "whole"))
    assert kept[0] >= len(source.blocks)
    needed = sorted(loads)
    for count in {1, kept[0] // 2, kept[0]}:
        loads.clear()
        with stopping_after(count), pytest.raises(Stopped):
            run(step, source, tmp_path / f"{count}")
        before = len(loads)
        assert describe(run(step, source, tmp_path / f"{count}")) == expected
        assert sorted(loads) == needed
        assert (len(loads) == before) is (count == kept[0])
    loads.clear()
    assert describe(run(step, source, tmp_path / "whole")) == expected
    assert loads == []


def test_every_transform_is_here() -> None:
    assert {kind.__name__ for kind in KeptTransform.__subclasses__()} == {
        "Builder", "Fitter", "_Fitter", "_Merger"
    }  # fmt: skip


def test_damaged_numbers_are_computed_again(source: Model, tmp_path: Path) -> None:
    step = STEPS["linear"]
    expected = describe(run(step, source, tmp_path / "w"))
    path = tmp_path / "w" / "walk-0-fitting" / "numbers-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    work = WorkFolder(tmp_path / "w")
    work.check()
    assert work.damaged == ["walk-0-fitting/numbers-00001.safetensors"]
    assert describe(run(step, source, tmp_path / "w")) == expected
    assert path.exists()


# ---- whole exports -------------------------------------------------------------------------------

RECIPES: dict[str, Any] = {
    "merge": {"expert_merge": {"method": "ream", "keep": 4}},
    "linear": {"expert_replace": {"with": "linear", "keep": 4, "rank": 2}},
    "budget": {"expert_budget": {"keep": 4, "clamp_top_k": True}},
}


def export(model: Path, folder: Path, count: int = -1) -> int:
    """Run tests/killed_export.py; its exit code, or minus the signal that it died of."""
    arguments = [
        "export", str(model), "-t", "hf:layout=natural", "-o", str(folder / "out"),
        "--threads", "1",
        "-r", "recipe.yaml", "--calib", "text.txt", "--eval", "none",
        "--set", "calibration.samples=6", "--set", "calibration.length=32",
    ]  # fmt: skip
    kind = "walk" if count >= 0 else ""
    given: dict[str, Any] = {"KIND": kind, "COUNT": count, "FOLDER": str(folder)}
    given |= {"SOLVED": "", "WALKED": str(folder / "walked"), "ARGUMENTS": arguments}
    return run_child(given)


def read_walked(folder: Path) -> list[str]:
    """Read which blocks of which walks were kept, and forget it."""
    lines = (folder / "walked").read_text().splitlines()
    (folder / "walked").unlink()
    return lines


@pytest.mark.slow
@pytest.mark.parametrize("kind", RECIPES)
def test_a_killed_export_runs_no_block_again(tiny: Make, tmp_path: Path, kind: str) -> None:
    folder = tmp_path / f"{kind}"
    folder.mkdir()
    write_text(folder / "text.txt")
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"passes": [RECIPES[kind]]}))
    assert export(tiny("qwen3_moe"), folder) == 0
    whole, walked = folder / "whole", read_walked(folder)
    (folder / "out").rename(whole)
    assert export(tiny("qwen3_moe"), folder, 2) == -signal.SIGKILL
    assert read_walked(folder) == walked[:2]
    assert not (folder / "out").exists()
    assert export(tiny("qwen3_moe"), folder) == 0
    assert read_walked(folder) == walked[2:]
    for path in whole.iterdir():
        if path.name not in ("report.json", "manifest.json"):
            assert (folder / "out" / path.name).read_bytes() == path.read_bytes(), path.name
    assert not (folder / "out.partial").exists()
