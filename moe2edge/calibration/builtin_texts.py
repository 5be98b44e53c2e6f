"""The texts that come with moe2edge, and which one is the default for a model."""

from __future__ import annotations

from pathlib import Path

from moe2edge.storage.checkpoint import BUILTIN, BUILTIN_FOLDER

# Values of the option text: chosen for the model; the code beside the built-in model; the mix.
DEFAULT_TEXT, BUILTIN_TEXT, GENERAL_TEXT = "default", "builtin", "general"
GENERAL_KINDS = ("code", "docs", "problems", "dialogues", "articles")
GENERAL_FOLDER = BUILTIN_FOLDER.parent / "general"
# Names of the files by purpose. The report measures a text that was not trained on.
FILE_NAMES = {"calibration": "calibration", "evaluation": "evaluation", "training": "calibration"}


def choose_default_text(model: str) -> str:
    """Return the text that a model gets where none was given.

    >>> choose_default_text("builtin:tiny-moe"), choose_default_text("org/name")
    ('builtin', 'general')
    """
    return BUILTIN_TEXT if model == BUILTIN else GENERAL_TEXT


def name_general_parts() -> tuple[str, ...]:
    """Return the names of the parts of the general text; no file is called so.

    >>> name_general_parts()[0]
    'general (code)'
    """
    return tuple(f"{GENERAL_TEXT} ({kind})" for kind in GENERAL_KINDS)


def find_builtin_file(text: str, purpose: str) -> Path | None:
    """Return the file of a built-in text, or of a part of the general one; None: it is neither."""
    name = FILE_NAMES[purpose]
    if text == BUILTIN_TEXT:
        return BUILTIN_FOLDER / f"{name}.txt"
    files = {
        part: GENERAL_FOLDER / f"{name}-{kind}.txt"
        for part, kind in zip(name_general_parts(), GENERAL_KINDS, strict=True)
    }
    return files.get(text)
