"""Read text for calibration, evaluation and training, and cut it into samples of tokens.

A text is plain text, JSONL, or a mix of several with weights.
"""

from __future__ import annotations

import hashlib
import json
import math
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe2edge.calibration.builtin_texts import (
    BUILTIN_TEXT,
    DEFAULT_TEXT,
    GENERAL_TEXT,
    find_builtin_file,
    name_general_parts,
)
from moe2edge.calibration.sources import split_template
from moe2edge.errors import InputError, suggest

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.calibration.sources import TextSource


@dataclass(frozen=True)
class TextPart:
    """One text of a mix.

    Attributes:
        name: name of the part in the mix.
        text: ``builtin``, a part of ``general``, or a file.
        field: field of a JSONL line that contains the text.
        template: template that is filled in instead of the field, or None.
        weight: weight above 0, relative to the weights of the other parts.
    """

    name: str
    text: str
    field: str
    template: str | None
    weight: float


@dataclass(frozen=True)
class PartTokens:
    """Samples from one part of a mix.

    Attributes:
        name: name of the part in the mix.
        text: ``builtin``, a part of ``general``, or the file of the part.
        samples: number of samples.
        sha256: digest of the ids of these samples.
    """

    name: str
    text: str
    samples: int
    sha256: str


@dataclass(frozen=True)
class Tokens:
    """Samples of equal length, cut from a text or from a mix of texts.

    Attributes:
        ids: int64 [samples, length]. The parts of a mix are interleaved, so that any run of
            samples has about the same shares of each as the whole.
        name: the text as the recipe names it.
        sha256: digest of the ids.
        parts: the samples from each part of the text.
    """

    ids: Tensor
    name: str
    sha256: str
    parts: tuple[PartTokens, ...] = ()

    @property
    def provenance(self) -> dict[str, Any]:
        """Origin of the tokens, as plain data for reports."""
        samples, length = self.ids.shape
        return {
            "text": self.name,
            "samples": samples,
            "length": length,
            "sha256": self.sha256,
            "parts": [asdict(part) for part in self.parts],
        }


# ---- mixes -------------------------------------------------------------------------------------


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
    parts = tuple(_make_part(name, weight or 1.0, source, purpose) for name, weight in entries)
    unnamed = [part for part in parts if part.name not in source.sources]
    if source.template is not None and not any(part.template for part in unnamed):
        raise InputError(
            f"{purpose}.template is for JSONL files that are not under sources, and {purpose} "
            f"text {source.text} has none; leave the template out"
        )
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


def _is_known(name: str, source: TextSource) -> bool:
    if name in (BUILTIN_TEXT, GENERAL_TEXT, DEFAULT_TEXT) or name in source.sources:
        return True
    try:
        return Path(name).expanduser().is_file()
    except (OSError, RuntimeError):  # raised again, with a message, where the file is opened
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
        return TextPart(name, named.text, named.field, named.template, weight)
    if source.sources and not _is_known(name, source):
        raise InputError(suggest(f"file or source of {purpose}", name, source.sources))
    # In a mix of JSONL and plain text, the template applies to JSONL only.
    template = source.template if Path(name).suffix == ".jsonl" else None
    return TextPart(name, name, source.field, template, weight)


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


def read_texts(source: TextSource, purpose: str) -> list[str]:
    """Read the documents of a source, part after part, regardless of the weights.

    A text file is one document; each line of a JSONL file is one.

    Raises:
        InputError: a file is missing, empty or not UTF-8, or a line has no text in the field.
    """
    return [text for part in list_parts(source, purpose) for text in read_part(part, purpose)]


def read_part(part: TextPart, purpose: str) -> list[str]:
    """Read the documents of one part.

    Raises:
        InputError: as for `read_texts`.
    """
    path = _find_file(part, purpose)
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{purpose} text {path} is not UTF-8: {error.reason}; convert it to UTF-8"
        ) from error
    except OSError as error:
        raise InputError(f"{purpose} text cannot be read: {error.strerror}: {path}") from error
    if path.suffix == ".jsonl":
        texts = _parse_jsonl(path, text, part)
    elif part.template is None:
        texts = [text]
    else:
        raise InputError(
            f"{purpose} text {part.name}: a template is for JSONL, not for {path}; leave the "
            "template out"
        )
    if not any(t.strip() for t in texts):
        raise InputError(f"{purpose} text {path} is empty; give another file")
    return texts


def check_text_files(source: TextSource, purpose: str) -> None:
    """Check that the files of a text exist, without reading them.

    Raises:
        InputError: a file is missing, or the text is not a valid mix.
    """
    for part in list_parts(source, purpose):
        _find_file(part, purpose)


def _find_file(part: TextPart, purpose: str) -> Path:
    try:
        path = find_builtin_file(part.text, purpose) or Path(part.text).expanduser()
        exists = path.is_file()
    except OSError as error:
        raise InputError(f"{purpose} text cannot be read: {error.strerror}: {part.text}") from error
    except RuntimeError as error:  # the home of a user that does not exist
        raise InputError(f"{purpose} text {part.text} cannot be read: {error}") from error
    if not exists:
        raise InputError(
            f"{purpose} text {part.text} does not exist; give a text or JSONL file, 'builtin', "
            "'general', or a mix such as a.jsonl:0.5,b.txt:0.5"
        )
    return path


def _parse_jsonl(path: Path, text: str, part: TextPart) -> list[str]:
    texts = []
    # Not splitlines(), because a JSON string may contain U+2028 and other Unicode line breaks.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row: Any = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"{path.name}, line {number} is not JSON: {error}; fix or remove the line"
            ) from error
        value = _build_document(row, part, f"{path.name}, line {number}")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"{path.name}, line {number} holds {value[error.start]!a}, an unpaired surrogate, "
                "which is no character; fix or remove the line"
            ) from error
        texts.append(value)
    return texts


def _build_document(row: Any, part: TextPart, where: str) -> str:
    """Return the text of one JSONL line: its field, or the filled-in template."""
    pieces = split_template(part.template) if part.template else [("", part.field)]
    # A template may insert a number, but a number alone is not a text.
    kinds: tuple[type, ...] = (str, int, float) if part.template else (str,)
    document = ""
    for literal, field in pieces:
        document += literal
        if field is None:
            continue
        value = row.get(field) if isinstance(row, dict) else None
        if isinstance(value, bool) or not isinstance(value, kinds):
            has = f"it has {', '.join(sorted(row))}" if isinstance(row, dict) else "not an object"
            remedy = (
                "fix the template or the line"
                if part.template
                else "name the field with 'field' in the recipe, such as --set "
                "calibration.field=answer"
            )
            raise InputError(f"{where} has no text in field {field!r} ({has}); {remedy}")
        document += str(value)
    return document


# ---- tokens ------------------------------------------------------------------------------------


def check_length(source: TextSource, purpose: str, longest: int) -> None:
    """Check that samples are not longer than the ``longest`` sequence of the model.

    Raises:
        InputError: they are longer.
    """
    if source.length > longest:
        raise InputError(
            f"{purpose}.length {source.length} is longer than the {longest} positions of the "
            f"model; give --set {purpose}.length={longest}"
        )


def load_tokens(
    source: TextSource, tokenizer: Any, purpose: str, limits: tuple[int, int]
) -> Tokens:
    """Cut the text of ``source`` into samples. Its seed alone decides which ones are chosen.

    The samples of a mix are divided among the parts by weight. Each part is cut separately: it
    contributes the same samples as if it were the only text, with the same seed and its number of
    samples.

    Args:
        source: section of the recipe.
        tokenizer: tokenizer of the model.
        purpose: ``calibration``, ``evaluation`` or ``training``.
        limits: longest sequence and size of the vocabulary of the model.

    Raises:
        InputError: the text is missing, empty or too short, samples are too long for the model, a
            part of a mix gets no sample, or the tokenizer is that of another model.
    """
    import torch

    longest, vocabulary = limits
    check_length(source, purpose, longest)
    parts = list_parts(source, purpose)
    counts = share_out(source.samples, [part.weight for part in parts])
    for part, count in zip(parts, counts, strict=True):
        # A few samples of the general text do not have every kind.
        if not count and part.text not in name_general_parts():
            raise InputError(
                f"{purpose} text: part {part.name} gets none of the {source.samples} samples; give "
                f"it more weight, or more samples: --set {purpose}.samples=N"
            )
    parts = tuple(part for part, count in zip(parts, counts, strict=True) if count)
    counts = [count for count in counts if count]
    samples = []
    for part, count in zip(parts, counts, strict=True):
        tokens = _encode_part(part, tokenizer, purpose)
        windows = len(tokens) // source.length
        if windows < count:
            name = part.name if len(parts) > 1 else None
            raise _make_length_error(source, purpose, name, count, tokens)
        samples.append(_choose_windows(tokens, source, count))
    ids = torch.cat(samples)[_interleave(counts)]
    if int(ids.max()) >= vocabulary:
        raise InputError(
            f"the tokenizer gives token id {int(ids.max())}, but the vocabulary of the model has "
            f"{vocabulary} entries; put this model's tokenizer files into its folder"
        )
    by_part = tuple(
        PartTokens(part.name, part.text, len(part_ids), _hash_ids(part_ids))
        for part, part_ids in zip(parts, samples, strict=True)
    )
    return Tokens(ids, source.text, _hash_ids(ids), by_part)


def wrap_tokens(ids: Tensor, name: str) -> Tokens:
    """Wrap samples int64 [samples, length] that do not come from a text, under ``name``."""
    digest = _hash_ids(ids)
    return Tokens(ids, name, digest, (PartTokens(name, name, len(ids), digest),))


def _encode_part(part: TextPart, tokenizer: Any, purpose: str) -> array[int]:
    """Return the token ids of all documents, each after an end token."""
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    tokens = array("q")
    for text in read_part(part, purpose):
        tokens.extend(end)
        tokens.extend(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    return tokens


def _make_length_error(
    source: TextSource, purpose: str, part: str | None, count: int, tokens: array[int]
) -> InputError:
    windows, needed = len(tokens) // source.length, count * source.length
    if part is not None:
        return InputError(
            f"{purpose} text: part {part} is too short: {len(tokens):,} tokens, but its {count} "
            f"of the {source.samples} samples of {source.length} need {needed:,}; give it more "
            "text or less weight"
        )
    remedy = f", fewer samples (--set {purpose}.samples={windows})" if windows else ""
    return InputError(
        f"{purpose} text {source.text} is too short: {len(tokens):,} tokens, but {source.samples} "
        f"samples of {source.length} need {needed:,}; give more text{remedy}, or a smaller length"
    )


def _choose_windows(tokens: array[int], source: TextSource, count: int) -> Tensor:
    """Choose ``count`` windows without overlap, int64 [count, length], in the order of the text."""
    import numpy as np
    import torch

    windows = len(tokens) // source.length
    chosen = np.random.default_rng(source.seed).permutation(windows)[:count]
    rows = np.frombuffer(tokens, np.int64)[: windows * source.length].reshape(windows, -1)
    return torch.from_numpy(rows[np.sort(chosen)])


def _interleave(counts: Sequence[int]) -> list[int]:
    """Return the order that interleaves parts of these sizes, stored one after another, evenly."""
    places = [((n + 0.5) / count, part) for part, count in enumerate(counts) for n in range(count)]
    return sorted(range(len(places)), key=places.__getitem__)


def _hash_ids(ids: Tensor) -> str:
    return hashlib.sha256(ids.numpy().tobytes()).hexdigest()
