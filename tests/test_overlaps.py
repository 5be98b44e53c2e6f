"""What sets of decisions have in common."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from helpers import run, save_decisions
from moe2edge.evaluation.decision_overlap import compare
from moe2edge.pipeline.decisions import BlockDecision, Decisions, SourceModel


def made(kept: list[list[int] | None], family: str = "olmoe", sha256: str = "0") -> Decisions:
    """Decisions that keep these of six experts of each block; None: the block is dropped."""
    blocks = []
    for origin, own in enumerate(kept):
        block = BlockDecision(origin=origin, experts_before=6, dropped=True)
        if own is not None:
            form = {"mlp": "moe", "experts": tuple(own), "top_k": 1} if own else {"mlp": "none"}
            block = BlockDecision.model_validate({"origin": origin, "experts_before": 6, **form})
        blocks.append(block)
    return Decisions(
        source=SourceModel(model="m", revision=None, sha256=sha256, family=family),
        recipe="passes: []\n",
        calibration=None,
        versions={},
        blocks=tuple(blocks),
    )


def test_overlap_is_that_of_sets() -> None:
    kept: list[list[list[int] | None]] = [
        [[0, 1, 2], [0, 1, 4, 5], []],
        [[1, 2, 3, 5], [0, 1, 4, 5], None],
        [[4, 5], None, [1, 2]],
    ]
    found = {name: made(own) for name, own in zip("xyz", kept, strict=True)}
    overlaps = compare(found)
    assert [(own.a_name, own.b_name) for own in overlaps] == [("x", "y"), ("x", "z"), ("y", "z")]
    for own, (a, b) in zip(overlaps, itertools.combinations(kept, 2), strict=True):
        union = both = 0
        for layer, left, right in zip(own.layers, a, b, strict=True):
            one, two = set(left or ()), set(right or ())
            union, both = union + len(one | two), both + len(one & two)
            # The mean over all pairs of sets of these sizes, counted out.
            sizes = [
                len(set(p) & set(q))
                for p in itertools.combinations(range(6), len(one))
                for q in itertools.combinations(range(6), len(two))
            ]
            assert layer.expected == pytest.approx(sum(sizes) / len(sizes))
            assert layer.both == len(one & two)
            assert layer.jaccard == (len(one & two) / len(one | two) if one | two else 1)
            assert layer.identical == (one == two)
        assert own.both == both
        assert own.jaccard == pytest.approx(both / union)
        assert own.expected == pytest.approx(sum(layer.expected for layer in own.layers))
    assert overlaps[0].identical == [1, 2]


def test_compare_on_the_command_line(tmp_path: Path) -> None:
    files = []
    sets: list[list[list[int] | None]] = [
        [[0, 1], [2, 3, 4], None],
        [[0, 1], [3, 4, 5], [1, 2]],
        [[0, 1], [0, 1, 2], [1]],
    ]
    for n, kept in enumerate(sets):
        files.append(tmp_path / f"{n}.json")
        save_decisions(made(kept), files[-1])
    result = run("decisions", "compare", *files[:2], "--json")
    assert result.exit_code == 0, result.output
    (own,) = json.loads(result.stdout)["overlaps"]
    assert own["layers"][1] == {
        "origin": 1, "experts": 6, "a": 3, "b": 3, "both": 2, "expected": 1.5, "jaccard": 0.5,
        "identical": False,
    }  # fmt: skip
    assert own["overall"] == {
        "a": 5, "b": 7, "both": 4, "expected": pytest.approx(4 / 6 + 1.5), "jaccard": 0.5,
        "identical_layers": [0],
    }  # fmt: skip
    plain = run("decisions", "compare", *files)
    assert plain.exit_code == 0, plain.output
    assert plain.stdout.count("in both") == 4  # three pairs, and all of them together
    assert "1 of 3" in plain.stdout


def test_decisions_that_cannot_be_compared(tmp_path: Path) -> None:
    one, other, deep = tmp_path / "one.json", tmp_path / "other.json", tmp_path / "deep.json"
    save_decisions(made([[0, 1], [2]]), one)
    save_decisions(made([[0, 1], [2]], family="mixtral"), other)
    save_decisions(made([[0, 1], [2], [3]]), deep)
    for files in ([one], [one, one]):
        result = run("decisions", "compare", *files)
        assert result.exit_code == 2
        assert "two different files" in result.stderr
    for second in (other, deep):
        result = run("decisions", "compare", one, second)
        assert result.exit_code == 2
        assert "only decisions for models of the same shape" in result.stderr
        assert len(result.stderr.splitlines()) == 1
    result = run("decisions", "compare", one, tmp_path / "none.json")
    assert result.exit_code == 2
    assert "cannot be read" in result.stderr


def test_decisions_about_two_models_of_one_shape_are_noted(tmp_path: Path) -> None:
    save_decisions(made([[0, 1], [2]]), tmp_path / "a.json")
    save_decisions(made([[0, 2], [2]], sha256="1"), tmp_path / "b.json")
    result = run("decisions", "compare", tmp_path / "a.json", tmp_path / "b.json")
    assert result.exit_code == 0
    assert result.stderr == "note: the files were made for different models of the same shape\n"
