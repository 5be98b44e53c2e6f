"""Helpers that many tests share: the command line, exports, plans, searches and logits."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor

from moe2edge.calibration import walk
from moe2edge.calibration.tokens import Tokens
from moe2edge.cli.main import main
from moe2edge.commands.preflight import refuse_early
from moe2edge.commands.texts import resolve_recipe
from moe2edge.errors import Moe2EdgeError
from moe2edge.model.family import FAMILIES
from moe2edge.model.model import Model
from moe2edge.numerics.scheme import Scheme
from moe2edge.pipeline import recipe, registry
from moe2edge.pipeline.contract import Outcome, Pass, PassContext, Search
from moe2edge.pipeline.decisions import Decisions
from moe2edge.pipeline.recipe import Recipe
from moe2edge.pipeline.runner import run_passes
from moe2edge.pipeline.stages import plan_passes
from moe2edge.pipeline.work import Store
from moe2edge.progress import Reporter
from moe2edge.runtime.memory import Memory, find_limit
from moe2edge.storage.checkpoint import open_checkpoint
from moe2edge.storage.text_files import write_json
from moe2edge.storage.work_folder import WorkFolder
from moe2edge.testing import InMemory

QUIET = Reporter(lambda _: None, lambda *_: None)
NO_TOKENS = torch.empty(0, 0, dtype=torch.int64)
SCHEME = Scheme(group_size=32)
# Tests of other things leave the source check out: it has tests of its own.
NO_CHECK = "--no-source-check"
# Sizes of the texts of an export, as the command line takes them.
TEXT = ["--set", "calibration.samples=12", "--set", "calibration.length=48"]
LESS = ["--set", "evaluation.samples=2", "--set", "evaluation.length=48", "-q", "--json"]
SMALL = [
    "--set", "calibration.samples=8", "--set", "calibration.length=64",
    "--set", "evaluation.samples=3", "--set", "evaluation.length=64",
]  # fmt: skip
# A recipe for every pass, with the passes that it wants before it; new ones go to the end.
RECIPES: dict[str, list[dict[str, Any]]] = {
    "apply_decisions": [],  # needs a file: see `list_steps`
    "awq": [{"awq": {"steps": 4}}],
    "block_drop": [{"block_drop": {"drop": 1}}],
    "expert_budget": [{"expert_budget": {"keep": 4}}],
    "expert_drop": [{"expert_drop": {"keep": [6, 3, 0]}}],
    "expert_merge": [{"expert_merge": {"method": "ream", "keep": 4}}],
    "expert_replace": [{"expert_replace": {"with": "linear", "keep": 4}}],
    "expert_search": [{"expert_search": {"keep": 4, "progressive": True}}],
    "expert_skip": [{"expert_skip": {}}],
    "gptq": [{"gptq": {}}],
    "layer_drop": [{"layer_drop": {"drop": 1, "norm": False}}],
    "recover": [
        {"expert_drop": {"keep": 4}},
        {"recover": {"steps": 4, "batch": 4, "held_out": 4, "eval_every": 2}},
    ],
    "routing": [{"expert_drop": {"keep": 3}}, {"routing": {}}],
    "rtn": [{"rtn": {}}],
    "sparsify": [{"sparsify": {"method": "sparsegpt", "pattern": "2:4"}}],
}
# A pass that needs no options here has no line.
RECIPES |= {name: [{name: {}}] for name in registry.list_passes() if name not in RECIPES}
# Each pass with one family. Its name decides, so that a new pass changes no other one's.
FAMILY_OF = {name: sorted(FAMILIES)[crc32(name.encode()) % len(FAMILIES)] for name in RECIPES}


# ---- what is slow --------------------------------------------------------------------------------


def each_family(*fast: str) -> list[Any]:
    """Return all families as parameters of a test; all but ``fast`` are slow."""
    return slow_except(sorted(FAMILIES), *fast)


def slow_except(values: Iterable[Any], *fast: Any) -> list[Any]:
    """Return parameters of a test; all but ``fast`` are slow. A tuple is several in one."""
    return [
        pytest.param(
            *(value if isinstance(value, tuple) else (value,)),
            marks=() if value in fast else pytest.mark.slow,
        )
        for value in values
    ]


def ignore(*_: object) -> None:
    """Take progress, and do nothing about it."""


# ---- the command line ----------------------------------------------------------------------------


def run(*arguments: object) -> Result:
    """Run a command of moe2edge in this process."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def save_decisions(found: Decisions, path: Path) -> None:
    """Write decisions as `moe2edge decide` does."""
    write_json(path, found.to_json())


def write_text(path: Path) -> Path:
    """Write a text of 4,000 characters that the tiny tokenizer knows; return its path."""
    path.write_text("".join(chr(33 + (n * n + n // 7) % 90) for n in range(4000)))
    return path


def export(
    folder: Path, out: Path, steps: Sequence[Any], target: str, *more: object
) -> tuple[int, str, Any]:
    """Export with a recipe of these passes; return exit code, stderr, and the report if it is 0."""
    file = out.with_suffix(".json")
    file.write_text(json.dumps({"passes": steps}))
    result = run(
        "export", folder, "-t", target, "-o", out, "-r", file, *TEXT, *LESS, NO_CHECK, *more
    )
    report = json.loads(result.stdout) if result.exit_code == 0 else None
    return result.exit_code, result.stderr, report


def list_steps(name: str, folder: Path, scratch: Path) -> list[dict[str, Any]]:
    """Return the recipe of a pass for a checkpoint, with a file of decisions if it reads one."""
    if name != "apply_decisions":
        fields = registry.find_pass(name).model_fields
        missing = [option for option, field in fields.items() if field.is_required()]
        given: dict[str, Any] = next((step[name] for step in RECIPES[name] if name in step), {})
        assert given or not missing, (
            f"{name} needs {missing}: add a line for it to RECIPES in tests/helpers.py"
        )
        return list(RECIPES[name])
    file, sets = scratch / "decide.json", scratch / "sets.json"
    file.write_text(json.dumps({"passes": [{"expert_drop": {"keep": 5}}]}))
    decided = run("decide", folder, "-r", file, "-o", sets, *TEXT)
    assert decided.exit_code == 0, decided.output
    return [{"apply_decisions": {"file": str(sets)}}]


# ---- models and passes ---------------------------------------------------------------------------


def plan(steps: Sequence[Pass], model: Model) -> Model:
    """Check the passes and return the shape of their result; nothing is read."""
    return plan_passes(steps, model).result


def parse_passes(steps: Sequence[Any], model: Model) -> tuple[Pass, ...]:
    """Return the passes of a recipe for a model, with every choice made."""
    return recipe.parse(json.dumps({"passes": steps})).resolve(model).passes


def run_recipe(
    parsed: Recipe,
    model: Model,
    tokens: Tokens | None,
    folder: Path,
    training: Tokens | None = None,
) -> Model:
    """Run the passes of a resolved recipe with a work folder, and return the result."""
    found, _ = run_passes(model, parsed, tokens, WorkFolder(folder), QUIET, training=training)
    return found


def check_early(
    folder: Path,
    out: Path,
    steps: Sequence[Any],
    targets: str,
    settings: Sequence[str],
    materialize: bool,
) -> None:
    """Do all that an export does before it begins to work: it reads headers alone."""
    checkpoint = open_checkpoint(str(folder))
    given = recipe.parse(json.dumps({"passes": steps}), settings)
    parsed = resolve_recipe(checkpoint, given, QUIET)
    wanted, memory = registry.parse_targets(targets), Memory.from_limit(find_limit(None))
    refuse_early(checkpoint, parsed, wanted, out, memory, materialize=materialize)


def refuse(
    folder: Path,
    out: Path,
    steps: Sequence[Any],
    targets: str,
    *settings: str,
    materialize: bool = False,
) -> Moe2EdgeError:
    """Return the error of an export that is refused before it begins: one line, and no output.

    Args:
        folder: the source.
        out: where the output would go.
        steps: passes of the recipe.
        targets: as for ``-t``.
        settings: as for ``--set``.
        materialize: as ``--materialize``.
    """
    with pytest.raises(Moe2EdgeError) as caught:
        check_early(folder, out, steps, targets, settings, materialize)
    assert "\n" not in str(caught.value)
    assert not out.exists()
    return caught.value


def make_context(
    model: Model,
    tokens: Tensor = NO_TOKENS,
    source: Model | None = None,
    reporter: Reporter = QUIET,
    store: Store | None = None,
    **more: Any,
) -> PassContext:
    """Return the context of a pass that drives walks of its own.

    Args:
        model: what the pass gets.
        tokens: for calibration, int64 [samples, length].
        source: the model before the first pass; None: ``model``.
        reporter: receives progress.
        store: keeps numbers; None: in memory.
        more: other fields of the context.
    """
    return PassContext(source or model, model, tokens, store or InMemory(), reporter, **more)


def search(step: Search, *context: Any, **more: Any) -> Outcome:
    """Run such a pass; what follows it goes to `make_context`."""
    return step.search(make_context(*context, **more))


def compute_logits(model: Model, ids: Tensor) -> Tensor:
    """Return logits [samples, length, vocabulary] of a walk over the model."""
    hidden = walk.observe(model, ids, (), ignore, "")
    return torch.stack(list(walk.compute_logits(model, hidden)))


@torch.no_grad()
def run_module(model: Any, ids: Tensor) -> Tensor:
    """Return logits [samples, length, vocabulary] of a transformers model, without a cache."""
    out: Tensor = model(ids, use_cache=False).logits
    return out
