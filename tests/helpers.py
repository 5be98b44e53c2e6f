"""Helpers that many tests share: the command line, exports, plans, searches and logits."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from click.testing import CliRunner, Result
from torch import Tensor

from moe2edge.calibration import walk
from moe2edge.cli.main import main
from moe2edge.model.model import Model
from moe2edge.numerics.scheme import Scheme
from moe2edge.pipeline.contract import Outcome, Pass, PassContext, Search
from moe2edge.pipeline.stages import plan_passes
from moe2edge.pipeline.work import Store
from moe2edge.progress import Reporter
from moe2edge.testing import InMemory

QUIET = Reporter(lambda _: None, lambda *_: None)
NO_TOKENS = torch.empty(0, 0, dtype=torch.int64)
SCHEME = Scheme(group_size=32)
# Sizes of the texts of an export, as the command line takes them.
TEXT = ["--set", "calibration.samples=12", "--set", "calibration.length=48"]
LESS = ["--set", "evaluation.samples=2", "--set", "evaluation.length=48", "-q", "--json"]
SMALL = [
    "--set", "calibration.samples=8", "--set", "calibration.length=64",
    "--set", "evaluation.samples=3", "--set", "evaluation.length=64",
]  # fmt: skip


def ignore(*_: object) -> None:
    """Take progress, and do nothing about it."""


# ---- the command line ----------------------------------------------------------------------------


def run(*arguments: object) -> Result:
    """Run a command of moe2edge in this process."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def write_text(path: Path) -> Path:
    """Write a text of 4,000 characters that the tiny tokenizer knows; return its path."""
    path.write_text("".join(chr(33 + (n * n + n // 7) % 90) for n in range(4000)))
    return path


def export(
    folder: Path, out: Path, steps: Sequence[Any], target: str, *more: object
) -> tuple[int, str, Any]:
    """Export with a recipe of these passes; return exit code, stderr, and the report if it is 0."""
    recipe = out.with_suffix(".json")
    recipe.write_text(json.dumps({"passes": steps}))
    result = run("export", folder, "-t", target, "-o", out, "-r", recipe, *TEXT, *LESS, *more)
    report = json.loads(result.stdout) if result.exit_code == 0 else None
    return result.exit_code, result.stderr, report


# ---- models and passes ---------------------------------------------------------------------------


def plan(steps: Sequence[Pass], model: Model) -> Model:
    """Check the passes and return the shape of their result; nothing is read."""
    return plan_passes(steps, model)


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
