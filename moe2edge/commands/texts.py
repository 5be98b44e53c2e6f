"""Texts for calibration, evaluation and training, as tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moe2edge.calibration.sources import TextSource
from moe2edge.calibration.tokens import BUILTIN_TEXT
from moe2edge.pipeline.recipe import Recipe
from moe2edge.pipeline.stages import group_stages
from moe2edge.progress import Reporter
from moe2edge.storage.checkpoint import Checkpoint

if TYPE_CHECKING:
    from moe2edge.calibration.tokens import Tokens

# Values of the option text: for calibration, text that the model writes; for evaluation, none.
SELF, NO_TEXT = "self", "none"


@dataclass(frozen=True)
class Texts:
    """The texts of an export, as tokens.

    Attributes:
        calibration: text that passes read for calibration; None: no pass needs it.
        evaluation: text that the report is about.
        training: text that passes train on; None: no pass trains.
    """

    calibration: Tokens | None
    evaluation: Tokens
    training: Tokens | None

    def describe(self) -> dict[str, Any]:
        """Return where the texts are from, as plain data for reports."""
        texts = {key: getattr(self, key) for key in ("calibration", "evaluation", "training")}
        return {key: tokens.provenance if tokens else None for key, tokens in texts.items()}


def load_texts(checkpoint: Checkpoint, recipe: Recipe, reporter: Reporter) -> Texts:
    """Load all texts of an export.

    Raises:
        InputError: a text is missing or unsuitable.
        DoesNotFit: the model should write one and cannot be run.
    """
    calibration = load_calibration(checkpoint, recipe, reporter)
    evaluation = load_evaluation(checkpoint, recipe)
    return Texts(calibration, evaluation, load_training(checkpoint, recipe))


def load_calibration(checkpoint: Checkpoint, recipe: Recipe, reporter: Reporter) -> Tokens | None:
    """Load the tokens for calibration, if a pass needs any.

    Raises:
        InputError: the text is missing or unsuitable.
        DoesNotFit: the model should write it and cannot be run.
    """
    from moe2edge.calibration.tokens import check_text_files

    source = recipe.calibration
    if not any(stage.needs_tokens for stage in group_stages(recipe.passes)):
        if source.text != SELF:
            check_text_files(source, "calibration")
        return None
    if source.text == SELF:
        from moe2edge.calibration import self_sampling

        return self_sampling.sample_tokens(checkpoint, source, reporter)
    return _load_tokens(checkpoint, source, "calibration")


def load_evaluation(checkpoint: Checkpoint, recipe: Recipe) -> Tokens:
    """Load the tokens for the figures of the report; without figures, a few for verification.

    Raises:
        InputError: the text is missing or unsuitable.
    """
    from moe2edge.evaluation import verify

    source = recipe.evaluation
    if source.text == NO_TEXT:
        longest = checkpoint.model.family.geometry(checkpoint.model.config).max_positions
        length = min(longest, verify.PREFILL + verify.PARITY_STEPS)
        source = TextSource(text=BUILTIN_TEXT, samples=verify.SAMPLES, length=length)
    return _load_tokens(checkpoint, source, "evaluation")


def load_training(checkpoint: Checkpoint, recipe: Recipe) -> Tokens | None:
    """Load the tokens to train on, if a pass does.

    Raises:
        InputError: the text is missing or unsuitable.
    """
    return _load_tokens(checkpoint, recipe.training, "training") if recipe.training else None


def _load_tokens(checkpoint: Checkpoint, source: TextSource, purpose: str) -> Tokens:
    from moe2edge.calibration.tokens import load_tokens
    from moe2edge.storage.tokenizer import load_tokenizer

    geometry = checkpoint.model.family.geometry(checkpoint.model.config)
    limits = (geometry.max_positions, geometry.vocab)
    return load_tokens(source, load_tokenizer(checkpoint.folder), purpose, limits)
