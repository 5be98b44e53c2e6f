"""Mixes of texts: their parts, weights and files, and which of their options are read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from moe2edge.calibration.builtin_texts import (
    BUILTIN_TEXT,
    DEFAULT_TEXT,
    GENERAL_TEXT,
    find_builtin_file,
    name_general_parts,
)
from moe2edge.calibration.sources import IN_RECIPE, NamedText, Spelling
from moe2edge.calibration.text_formats import TextFile, recognize_text
from moe2edge.errors import InputError, suggest

if TYPE_CHECKING:
    from moe2edge.calibration.sources import TextSource

# Options that say how a row becomes a document.
_ROW_OPTIONS = ("field", "template", "chat", "chat_template")


@dataclass(frozen=True)
class TextPart:
    """One text of a mix.

    Attributes:
        name: name of the part in the mix.
        text: ``builtin``, a part of ``general``, or a file.
        form: how rows become documents.
        place: section of the recipe that has these options.
        weight: weight above 0, relative to the weights of the other parts.
    """

    name: str
    text: str
    form: NamedText
    place: str
    weight: float


def list_parts(source: TextSource, purpose: str) -> tuple[TextPart, ...]:
    """List the parts of a text: one, or several for ``NAME:WEIGHT,NAME:WEIGHT``.

    A text that is the name of a source or a file as a whole is not split. The general text has
    equal parts of its own.

    Raises:
        InputError: a part is unknown or named twice, or a weight is not a number above 0.
    """
    if _is_known(source.text, source):
        entries: list[tuple[str, float | None]] = [(source.text, None)]
    else:
        entries = [_parse_entry(entry.strip(), source, purpose) for entry in source.text.split(",")]
    names = [name for name, _ in entries]
    if twice := {name for name in names if names.count(name) > 1}:
        raise InputError(
            f"{purpose} text {source.text} has {min(twice)} twice; name it once, with the sum of "
            "the weights"
        )
    unweighted = [name for name, weight in entries if weight is None]
    if 0 < len(unweighted) < len(entries):
        raise InputError(
            f"{purpose} text {source.text}: {unweighted[0]} has no weight, but other parts have; "
            "give every part a weight, or none"
        )
    parts = [_make_part(name, weight or 1.0, source, purpose) for name, weight in entries]
    return tuple(own for part in parts for own in _split_general(part))


def _split_general(part: TextPart) -> list[TextPart]:
    """Return the parts of the general text; another one as it is."""
    if part.text == DEFAULT_TEXT:
        raise InputError(
            f"text {DEFAULT_TEXT} is no part of a mix and no source; name {BUILTIN_TEXT} or "
            f"{GENERAL_TEXT}"
        )
    if part.text != GENERAL_TEXT:
        return [part]
    names = name_general_parts()
    return [replace(part, name=n, text=n, weight=part.weight / len(names)) for n in names]


def open_parts(
    source: TextSource, purpose: str, spelling: Spelling = IN_RECIPE
) -> list[tuple[TextPart, TextFile]]:
    """List the parts of a text with their files, whose formats are recognized.

    Raises:
        InputError: the mix is wrong, a file is missing or no text, or there is an option for rows
            and no file with rows that it is for.
    """
    parts = list_parts(source, purpose)
    found = [(part, recognize_text(_find_file(part, purpose), purpose)) for part in parts]
    named = [(part.form, part.name, part.place) for part in parts if part.place != purpose]
    for form, name, place in [(source, source.text, purpose), *named]:
        if not any(file.has_rows for part, file in found if part.place == place):
            _refuse_row_options(form, f"{purpose} text {name}", place, spelling)
    return found


def list_text_files(source: TextSource, purpose: str) -> list[Path]:
    """List the files that a text names, none of which is read; the built-in ones are left out.

    Raises:
        InputError: the mix is wrong, or a file is missing.
    """
    parts = list_parts(source, purpose)
    own = [part for part in parts if find_builtin_file(part.text, purpose) is None]
    return [_find_file(part, purpose) for part in own]


def check_text_files(source: TextSource, purpose: str, spelling: Spelling = IN_RECIPE) -> None:
    """Check that the files of a text exist and are texts, reading their beginnings alone.

    Raises:
        InputError: as for `open_parts`.
    """
    open_parts(source, purpose, spelling)


def refuse_row_options(source: TextSource, purpose: str) -> None:
    """Refuse options for rows beside a text that has none, such as one that the model writes.

    Raises:
        InputError: there is one.
    """
    _refuse_row_options(source, f"{purpose} text {source.text}", purpose, IN_RECIPE)


def _refuse_row_options(form: NamedText, label: str, place: str, spelling: Spelling) -> None:
    for option in _ROW_OPTIONS:
        value = getattr(form, option)
        # Recipes that older versions wrote name the default field for every text.
        if value is not None and (option, value) != ("field", "text"):
            raise InputError(
                f"{spelling.name(place, option)} is for rows of JSON or parquet, and {label} has "
                "none that it applies to, so nothing would read it; leave it out"
            )


def _is_known(name: str, source: TextSource) -> bool:
    if name in (BUILTIN_TEXT, GENERAL_TEXT, DEFAULT_TEXT) or name in source.sources:
        return True
    try:
        return bool(name) and Path(name).expanduser().exists()
    except (OSError, RuntimeError, ValueError):  # raised again, with a message, at opening
        return False


def _parse_entry(entry: str, source: TextSource, purpose: str) -> tuple[str, float | None]:
    """Split one entry of a mix into name and weight; None for no weight."""
    if not entry:
        raise InputError(
            f"{purpose} text {source.text!r} has a part without a name; write NAME:WEIGHT, and "
            "commas between parts"
        )
    name, colon, number = entry.rpartition(":")
    if not colon or _is_known(entry, source):
        return entry, None
    try:
        weight = float(number)
    except ValueError:
        if not _is_known(name.strip(), source):
            return entry, None
        weight = math.nan
    if not 0 < weight < math.inf:
        raise InputError(
            f"{purpose} text: the weight of {name} is {number!r}, expected: a number above 0"
        )
    return name.strip(), weight


def _make_part(name: str, weight: float, source: TextSource, purpose: str) -> TextPart:
    if name in source.sources:
        named = source.sources[name]
        return TextPart(name, named.text, named, f"{purpose}.sources.{name}", weight)
    if source.sources and not _is_known(name, source):
        raise InputError(suggest(f"file or source of {purpose}", name, source.sources))
    return TextPart(name, name, source, purpose, weight)


def _find_file(part: TextPart, purpose: str) -> Path:
    try:
        path = find_builtin_file(part.text, purpose) or Path(part.text).expanduser()
        exists = bool(part.text) and path.exists()
    except OSError as error:
        raise InputError(f"{purpose} text cannot be read: {error.strerror}: {part.text}") from error
    except (RuntimeError, ValueError) as error:  # the home of nobody, or a NUL character
        raise InputError(f"{purpose} text {part.text} cannot be read: {error}") from error
    if not exists:
        raise InputError(
            f"{purpose} text {part.text} does not exist; give a text or JSONL file, 'builtin', "
            "'general', or a mix such as a.jsonl:0.5,b.txt:0.5"
        )
    return path


def share_out(total: int, weights: Sequence[float]) -> list[int]:
    """Divide ``total`` into whole numbers by weight.

    Shares are rounded down, and the largest remainders get one more each, until the sum is
    ``total``. Of equal remainders, the first is served first.

    >>> share_out(10, [0.5, 0.5]), share_out(10, [1, 1, 1]), share_out(4, [0.6, 0.9])
    ([5, 5], [4, 3, 3], [2, 2])
    """
    exact = [total * weight / sum(weights) for weight in weights]
    counts = [math.floor(share) for share in exact]
    order = sorted(range(len(exact)), key=lambda n: (counts[n] - exact[n], n))
    for n in order[: total - sum(counts)]:
        counts[n] += 1
    return counts
