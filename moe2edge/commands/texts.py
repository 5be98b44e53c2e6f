"""Texts for calibration, evaluation and training, as tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from moe2edge.calibration.builtin_texts import BUILTIN_TEXT, DEFAULT_TEXT, choose_default_text
from moe2edge.calibration.mixes import check_text_files, refuse_row_options
from moe2edge.calibration.sources import TextSource
from moe2edge.pipeline.recipe import Recipe
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

    @property
    def by_purpose(self) -> dict[str, Tokens | None]:
        """The texts by the names of what they are for."""
        return {key: getattr(self, key) for key in ("calibration", "evaluation", "training")}

    def describe(self) -> dict[str, Any]:
        """Return where the texts are from, as plain data for reports."""
        texts = self.by_purpose.items()
        return {purpose: tokens.provenance if tokens else None for purpose, tokens in texts}


# ---- the default -------------------------------------------------------------------------------


def list_default_texts(recipe: Recipe) -> tuple[str, ...]:
    """Return the purposes for which a recipe names no text, and needs one."""
    named = {
        "calibration": recipe.calibration if recipe.needs_calibration else None,
        "evaluation": recipe.evaluation,
        "training": recipe.training,
    }
    return tuple(
        purpose
        for purpose, source in named.items()
        if source is not None and source.text == DEFAULT_TEXT
    )


def choose_text(source: TextSource, model: str) -> TextSource:
    """Return a text section that names a text: the default for a model where it named none.

    Args:
        source: the section.
        model: the source, as the user names it.
    """
    if source.text != DEFAULT_TEXT:
        return source
    return source.model_copy(update={"text": choose_default_text(model)})


def resolve_recipe(checkpoint: Checkpoint, recipe: Recipe, reporter: Reporter) -> Recipe:
    """Return the recipe with every choice made that depends on the source, its texts included.

    Says which texts are defaults, and warns where one decides what stays of the model.
    """
    defaults, model = list_default_texts(recipe), checkpoint.source
    chosen = replace(
        recipe.resolve(checkpoint.model),
        calibration=choose_text(recipe.calibration, model),
        evaluation=choose_text(recipe.evaluation, model),
        training=choose_text(recipe.training, model) if recipe.training else None,
    )
    for purpose in defaults:
        reporter.log(f"{purpose} text: {getattr(chosen, purpose).text} (the default)")
    names = [step.name for step in chosen.passes if step.needs_tokens and not step.computes_numbers]
    if "calibration" in defaults and names:
        reporter.log(
            f"warning: {' and '.join(dict.fromkeys(names))} choose{'s' * (len(names) == 1)} what "
            "stays by the default calibration text; give text of the task that the model is for, "
            "with --calib"
        )
    return chosen


# ---- loading -----------------------------------------------------------------------------------


def load_texts(checkpoint: Checkpoint, recipe: Recipe, reporter: Reporter) -> Texts:
    """Load all texts of an export.

    Raises:
        InputError: a text is missing or unsuitable.
        DoesNotFit: the model should write one and cannot be run.
    """
    # First all that is quick to find out: calibration may take long, where the model writes it.
    check_texts(recipe)
    evaluation = load_evaluation(checkpoint, recipe, reporter)
    training = load_training(checkpoint, recipe, reporter)
    return Texts(load_calibration(checkpoint, recipe, reporter), evaluation, training)


def check_texts(recipe: Recipe) -> None:
    """Check that the files of all texts exist and are texts, reading their beginnings alone.

    A default that depends on the source, and is not chosen yet, is left out.

    Raises:
        InputError: so.
    """
    sections = {"calibration": recipe.calibration, "evaluation": recipe.evaluation}
    sections |= {"training": recipe.training} if recipe.training else {}
    for purpose, source in sections.items():
        if (purpose, source.text) in (("calibration", SELF), ("evaluation", NO_TEXT)):
            refuse_row_options(source, purpose)
        elif source.text != DEFAULT_TEXT:
            check_text_files(source, purpose)


def load_calibration(checkpoint: Checkpoint, recipe: Recipe, reporter: Reporter) -> Tokens | None:
    """Load the tokens for calibration, if a pass needs any.

    Raises:
        InputError: the text is missing or unsuitable.
        DoesNotFit: the model should write it and cannot be run.
    """
    source = recipe.calibration
    if source.text == SELF:
        refuse_row_options(source, "calibration")
    else:
        check_text_files(source, "calibration")
    if not recipe.needs_calibration:
        return None
    if source.text == SELF:
        from moe2edge.calibration import self_sampling

        _ = checkpoint.sha256  # it looks at every number, before the model runs
        return self_sampling.sample_tokens(checkpoint, source, reporter)
    return _load_tokens(checkpoint, source, "calibration", reporter)


def load_evaluation(checkpoint: Checkpoint, recipe: Recipe, reporter: Reporter) -> Tokens:
    """Load the tokens for the figures of the report; without figures, a few for verification.

    Raises:
        InputError: the text is missing or unsuitable.
    """
    from moe2edge.evaluation.margins import SAMPLES
    from moe2edge.evaluation.reference import PARITY_STEPS, PREFILL

    source = recipe.evaluation
    if source.text == NO_TEXT:
        longest = checkpoint.model.family.geometry(checkpoint.model.config).max_positions
        length = min(longest, PREFILL + PARITY_STEPS)
        source = TextSource(text=BUILTIN_TEXT, samples=SAMPLES, length=length)
    return _load_tokens(checkpoint, source, "evaluation", reporter)


def load_training(checkpoint: Checkpoint, recipe: Recipe, reporter: Reporter) -> Tokens | None:
    """Load the tokens to train on, if a pass does.

    Raises:
        InputError: the text is missing or unsuitable.
    """
    if recipe.training is None:
        return None
    return _load_tokens(checkpoint, recipe.training, "training", reporter)


def _load_tokens(
    checkpoint: Checkpoint, source: TextSource, purpose: str, reporter: Reporter
) -> Tokens:
    from moe2edge.calibration.tokens import load_tokens
    from moe2edge.storage.tokenizer import load_tokenizer

    geometry = checkpoint.model.family.geometry(checkpoint.model.config)
    limits = (geometry.max_positions, geometry.vocab)
    tokenizer = load_tokenizer(checkpoint.folder)
    return load_tokens(source, tokenizer, purpose, limits, reporter=reporter)
