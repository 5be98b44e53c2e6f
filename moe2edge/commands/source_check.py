"""Prove the numbers of a source before anything is built on them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from moe2edge.commands.texts import SELF
from moe2edge.errors import InputError, Unsupported
from moe2edge.model.model import EMBEDDING
from moe2edge.pipeline.contract import Pass, Slim
from moe2edge.pipeline.recipe import Recipe
from moe2edge.pipeline.target import Target
from moe2edge.progress import Reporter
from moe2edge.storage.checkpoint import Checkpoint
from moe2edge.storage.kept_results import KeptResults

if TYPE_CHECKING:
    from moe2edge.calibration.tokens import Tokens
    from moe2edge.evaluation.source_check import Agreement

Loaded = TypeVar("Loaded")
# Option that leaves the check out.
LEFT_OUT = "--no-source-check"
# Name of its result among those that are kept.
PROOF = "source check"
# Largest number of float16.
LARGEST_FLOAT16 = 65504.0


@dataclass(frozen=True)
class SourceProof:
    """Result of the source check.

    Attributes:
        status: whether the walk agrees with stock transformers, or was not compared with it.
        reason: why it was not compared.
        transformers: version that it was compared with; empty if it was not.
        tokens: length of the text.
        difference: largest relative difference.
        called: experts that no token reached, and that were called directly.
        window: tokens of a window of attention that the text was too short for; 0: there is none.
    """

    status: Literal["passed", "not run", "left out"]
    reason: str = ""
    transformers: str = ""
    tokens: int = 0
    difference: float = 0.0
    called: int = 0
    window: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return all as plain data."""
        return asdict(self)

    def to_record(self) -> dict[str, Any]:
        """Return what does not differ between two equal runs, as plain data."""
        lasting = ("status", "reason", "transformers", "window")
        return {key: value for key in lasting if (value := getattr(self, key))}


def prove_source(
    checkpoint: Checkpoint,
    reporter: Reporter,
    *,
    wanted: bool = True,
    targets: Sequence[Target] = (),
    within: int | None = None,
    kept: KeptResults | None = None,
) -> SourceProof:
    """Compare what is computed for a source with stock transformers, and say so.

    Args:
        checkpoint: the source.
        reporter: receives the result and the time that it took.
        wanted: False leaves it out.
        targets: the targets, some of which may run in float16.
        within: bytes for the whole process; None: what the machine has.
        kept: may hold the result of an earlier run, and gets that of this one.

    Raises:
        VerificationFailed: they differ; the first block that does is named.
        InputError: the source holds numbers that are not finite.
        Unsupported: hidden states are beyond float16, in which a target would run.
    """
    if not wanted:
        reporter.log(f"warning: source check left out ({LEFT_OUT})")
        return SourceProof("left out", LEFT_OUT)
    import transformers

    from moe2edge.evaluation.stock_blocks import StockFailed

    begun, kept = time.perf_counter(), kept or KeptResults()
    found = _recall(kept)
    recalled = found is not None
    try:
        found = found or _compare(checkpoint, reporter, within)
    except StockFailed as error:
        reporter.log(f"warning: source check not run: {error}")
        return SourceProof("not run", str(error))
    kept.put(PROOF, {}, asdict(found))
    version = transformers.__version__
    called = f"; {found.called} experts called directly" if found.called else ""
    cost = "of an earlier run" if recalled else f"{time.perf_counter() - begun:.1f} s"
    reporter.log(
        f"source check: as transformers {version} computes it, on {found.tokens} tokens (largest "
        f"relative difference {found.difference:.1e}{called}; {cost})"
    )
    if found.window:
        reporter.log(f"source check: {describe_window(found.window)}")
    _check_float16(found.peaks, checkpoint, targets)
    return SourceProof(
        "passed", "", version, found.tokens, found.difference, found.called, found.window
    )


def _compare(checkpoint: Checkpoint, reporter: Reporter, within: int | None) -> Agreement:
    """Compare, whatever an earlier run has found."""
    from moe2edge.evaluation.source_check import compare_with_stock

    reporter.begin("source check")
    return compare_with_stock(
        checkpoint.model,
        checkpoint.folder,
        without=checkpoint.broken_ids,
        within=within,
        advance=reporter.advance,
    )


def _recall(kept: KeptResults) -> Agreement | None:
    """Return what an earlier run has found for the same source; None: none has."""
    from moe2edge.evaluation.source_check import Agreement

    found = kept.get(PROOF, {})
    if found is None or found.keys() != {each.name for each in fields(Agreement)}:
        return None
    return Agreement(**{**found, "peaks": tuple(found["peaks"])})


def describe_window(window: int) -> str:
    """Say that the text of the check was too short for a window of attention."""
    return f"windows of {window} tokens were not reached"


def _check_float16(
    peaks: Sequence[float], checkpoint: Checkpoint, targets: Sequence[Target]
) -> None:
    """Refuse hidden states beyond float16 where an output would run in it.

    Raises:
        Unsupported: so.
    """
    block = next((n for n, peak in enumerate(peaks) if peak > LARGEST_FLOAT16), None)
    for target in targets:
        if block is not None and target.find_dtype(checkpoint.model) == "float16":
            raise Unsupported(
                f"the hidden states of block {block} reach {peaks[block]:.0f} and overflow in "
                f"float16, whose largest number is {LARGEST_FLOAT16:.0f}, in which target "
                f"{target.name} would run; convert the source to bfloat16 (dtype=torch.bfloat16 in "
                "from_pretrained, then save_pretrained), and export that"
            )


def prove_and_load(
    recipe: Recipe, prove: Callable[[], SourceProof], load: Callable[[], Loaded]
) -> tuple[SourceProof, Loaded]:
    """Prove the source and load the texts, in the order in which faults are found early.

    The model runs first where it writes the text; any other text is looked at before that.
    """
    if recipe.calibration.text == SELF:
        return prove(), load()
    loaded = load()
    return prove(), loaded


def report_notes(checkpoint: Checkpoint, reporter: Reporter) -> None:
    """Report what of the files of a source was read, or not, where that may surprise."""
    for note in checkpoint.notes:
        reporter.log(f"warning: {checkpoint.source}: {note}")


def check_ids(
    checkpoint: Checkpoint,
    texts: Mapping[str, Tokens | None],
    reporter: Reporter,
    passes: Sequence[Pass] = (),
) -> None:
    """Refuse texts that reach rows of the embedding that are not finite; name other such rows.

    Args:
        checkpoint: the source.
        texts: the texts by their purpose.
        reporter: receives a warning.
        passes: what will be done with it.

    Raises:
        InputError: a text has the id of such a row, or a pass quantizes the embedding.
    """
    import torch

    if not checkpoint.broken_ids:
        return
    model = checkpoint.model
    for step in passes:
        if isinstance(step, Slim) and model.architecture.embedding in step.end_solver(model).early:
            raise InputError(
                f"row {checkpoint.broken_ids[0]} of {EMBEDDING} holds numbers that are not finite, "
                f"which have no scale: leave embedding out of {step.name}, or get the checkpoint "
                "again, which is damaged"
            )
    broken = torch.tensor(checkpoint.broken_ids)
    for purpose, tokens in texts.items():
        if tokens is None:
            continue
        if (found := broken[torch.isin(broken, tokens.ids)]).numel():
            raise InputError(
                f"row {int(found[0])} of {EMBEDDING} holds numbers that are not finite, and the "
                f"{purpose} text has its id; the checkpoint is damaged, get it again"
            )
    shown = ", ".join(map(str, checkpoint.broken_ids[:5]))
    count = len(checkpoint.broken_ids)
    reporter.log(
        f"warning: {count} rows of {EMBEDDING} hold numbers that are not finite (ids {shown}"
        f"{', ...' if count > 5 else ''}); no text has these ids, and prompts must not have them"
    )
