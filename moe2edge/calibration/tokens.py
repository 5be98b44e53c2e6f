"""Text to tokens, for calibration and for evaluation: plain text, JSONL, and mixes of them."""

from __future__ import annotations

import hashlib
import json
import math
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe2edge.calibration.sources import split_template
from moe2edge.errors import InputError, suggest
from moe2edge.storage.checkpoint import BUILTIN_FOLDER

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.calibration.sources import TextSource

BUILTIN_TEXT = "builtin"
# The built-in texts by purpose; what is trained on is no part of what the report is about.
BUILTIN_FILES = {
    "calibration": "calibration.txt",
    "evaluation": "evaluation.txt",
    "training": "calibration.txt",
}


@dataclass(frozen=True)
class TextPart:
    """One text of a mix.

    Attributes:
        name: as the mix names it.
        text: ``builtin`` or a file.
        field: of a JSONL line.
        template: in place of the field, None for none.
        weight: above 0, relative to the weights of the other parts.
    """

    name: str
    text: str
    field: str
    template: str | None
    weight: float


@dataclass(frozen=True)
class PartTokens:
    """What one part of a mix gave.

    Attributes:
        name: as the mix names it.
        text: where it is from.
        samples: number of samples.
        sha256: digest of their ids.
    """

    name: str
    text: str
    samples: int
    sha256: str


@dataclass(frozen=True)
class Tokens:
    """Samples of equal length, cut from a text or from a mix of texts.

    Attributes:
        ids: int64 [samples, length]; the parts of a mix take turns, so that any run of samples
            holds about as much of each as the whole.
        name: where the text is from.
        sha256: digest of the ids.
        parts: what each part of the text gave.
    """

    ids: Tensor
    name: str
    sha256: str
    parts: tuple[PartTokens, ...] = ()

    @property
    def provenance(self) -> dict[str, Any]:
        """Where the tokens are from, as plain data for reports."""
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
    """The parts of a text: one, or as many as ``NAME:WEIGHT,NAME:WEIGHT`` names.

    What is a source or a file under its whole name is not taken apart.

    Raises:
        InputError: a part is unknown or stands there twice, or a weight is no number above 0.
    """
    if _is_known(source.text, source):
        entries: list[tuple[str, float | None]] = [(source.text, None)]
    else:
        entries = [_weighed(entry.strip(), source, purpose) for entry in source.text.split(",")]
    names = [name for name, _ in entries]
    if twice := {name for name in names if names.count(name) > 1}:
        raise InputError(f"{purpose} text {source.text} has {min(twice)} twice; add the weights up")
    bare = [name for name, weight in entries if weight is None]
    if 0 < len(bare) < len(entries):
        raise InputError(
            f"{purpose} text {source.text}: {bare[0]} has no weight and others have; give each "
            "part a weight, or none"
        )
    parts = tuple(_part(name, weight or 1.0, source, purpose) for name, weight in entries)
    own = [part for part in parts if part.name not in source.sources]
    if source.template is not None and not any(part.template for part in own):
        raise InputError(
            f"{purpose}.template is for JSONL files that are not under sources, and {purpose} "
            f"text {source.text} has none; leave the template out"
        )
    return parts


def _is_known(name: str, source: TextSource) -> bool:
    if name == BUILTIN_TEXT or name in source.sources:
        return True
    try:
        return Path(name).expanduser().is_file()
    except (OSError, RuntimeError):  # told where it is opened
        return False


def _weighed(entry: str, source: TextSource, purpose: str) -> tuple[str, float | None]:
    """Name and weight of one entry of a mix."""
    if not entry:
        raise InputError(
            f"{purpose} text {source.text!r} has a part without a name; write NAME:WEIGHT, with "
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


def _part(name: str, weight: float, source: TextSource, purpose: str) -> TextPart:
    if name in source.sources:
        named = source.sources[name]
        return TextPart(name, named.text, named.field, named.template, weight)
    if source.sources and not _is_known(name, source):
        raise InputError(suggest(f"file or source of {purpose}", name, source.sources))
    # In a mix of JSONL and plain text the template is for the former.
    template = source.template if Path(name).suffix == ".jsonl" else None
    return TextPart(name, name, source.field, template, weight)


def share_out(total: int, weights: Sequence[float]) -> list[int]:
    """``total`` in whole parts by weight: the largest remainders get what rounding down leaves.

    Of equal remainders the earlier part's comes first.

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
    """Documents of a source, part after part, whatever the weights.

    A file of text is one document, each line of a JSONL file is one.

    Raises:
        InputError: a file is missing, empty, not Unicode, or a line is not as announced.
    """
    return [text for part in list_parts(source, purpose) for text in read_part(part, purpose)]


def read_part(part: TextPart, purpose: str) -> list[str]:
    """Documents of one part.

    Raises:
        InputError: as `read_texts`.
    """
    path = _file_of(part, purpose)
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{purpose} text {path} is not UTF-8: {error.reason}") from error
    except OSError as error:
        raise InputError(f"{purpose} text cannot be read: {error.strerror}: {path}") from error
    if path.suffix == ".jsonl":
        texts = _jsonl(path, text, part)
    elif part.template is None:
        texts = [text]
    else:
        raise InputError(f"{purpose} text {part.name}: a template is for JSONL, not for {path}")
    if not any(t.strip() for t in texts):
        raise InputError(f"{purpose} text {path} is empty")
    return texts


def check_text_files(source: TextSource, purpose: str) -> None:
    """Refuse a text whose files are not there, without reading them.

    Raises:
        InputError: one is missing, or the mix is none.
    """
    for part in list_parts(source, purpose):
        _file_of(part, purpose)


def _file_of(part: TextPart, purpose: str) -> Path:
    try:
        builtin = part.text == BUILTIN_TEXT
        path = BUILTIN_FOLDER / BUILTIN_FILES[purpose] if builtin else Path(part.text).expanduser()
        there = path.is_file()
    except OSError as error:
        raise InputError(f"{purpose} text cannot be read: {error.strerror}: {part.text}") from error
    except RuntimeError as error:  # no such user's home
        raise InputError(f"{purpose} text {part.text} cannot be read: {error}") from error
    if not there:
        raise InputError(
            f"{purpose} text {part.text} does not exist; give a text or JSONL file, 'builtin', or "
            "a mix such as a.jsonl:0.5,b.txt:0.5"
        )
    return path


def _jsonl(path: Path, text: str, part: TextPart) -> list[str]:
    found = []
    # Not splitlines(): a JSON string may hold U+2028 and other line breaks of Unicode.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row: Any = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path.name}, line {number} is not JSON: {error}") from error
        value = _document(row, part, f"{path.name}, line {number}")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"{path.name}, line {number} holds half a character, "
                f"{value[error.start]!a}; mend or remove the line"
            ) from error
        found.append(value)
    return found


def _document(row: Any, part: TextPart, where: str) -> str:
    """Text of one line: its field, or its template filled in."""
    pieces = split_template(part.template) if part.template else [("", part.field)]
    # A number may stand inside of a text, but is no text.
    kinds: tuple[type, ...] = (str, int, float) if part.template else (str,)
    document = ""
    for literal, field in pieces:
        document += literal
        if field is None:
            continue
        value = row.get(field) if isinstance(row, dict) else None
        if isinstance(value, bool) or not isinstance(value, kinds):
            has = f"it has {', '.join(sorted(row))}" if isinstance(row, dict) else "no object"
            remedy = (
                "mend the template or the line"
                if part.template
                else "name the field with 'field' in the recipe, such as --set "
                "calibration.field=answer"
            )
            raise InputError(f"{where} has no text in field {field!r} ({has}); {remedy}")
        document += str(value)
    return document


# ---- tokens ------------------------------------------------------------------------------------


def check_length(source: TextSource, purpose: str, longest: int) -> None:
    """Refuse samples that are longer than the model takes.

    Raises:
        InputError: they are.
    """
    if source.length > longest:
        raise InputError(
            f"{purpose}.length {source.length} is longer than the {longest} positions of the "
            f"model; --set {purpose}.length={longest}"
        )


def load_tokens(
    source: TextSource, tokenizer: Any, purpose: str, limits: tuple[int, int]
) -> Tokens:
    """Cut the text of ``source`` into samples; which ones is decided by its seed alone.

    The samples of a mix are shared out by weight, and each part is cut on its own: it gives the
    samples that it would give alone with the same seed and its number of samples.

    Args:
        source: section of the recipe.
        tokenizer: of the model.
        purpose: ``calibration``, ``evaluation`` or ``training``.
        limits: longest sequence and size of the vocabulary of the model.

    Raises:
        InputError: the text is missing, empty or too short, or samples are too long for the model.
    """
    import torch

    longest, vocabulary = limits
    check_length(source, purpose, longest)
    parts = list_parts(source, purpose)
    counts = share_out(source.samples, [part.weight for part in parts])
    if 0 in counts:
        raise InputError(
            f"{purpose} text: part {parts[counts.index(0)].name} gets none of the "
            f"{source.samples} samples; give it more weight, or --set {purpose}.samples=N"
        )
    found = []
    for part, count in zip(parts, counts, strict=True):
        stream = _stream(part, tokenizer, purpose)
        windows = len(stream) // source.length
        if windows < count:
            raise _too_short(source, purpose, part.name if len(parts) > 1 else None, count, stream)
        found.append(_cut(stream, source, count))
    ids = torch.cat(found)[_turns(counts)]
    if int(ids.max()) >= vocabulary:
        raise InputError(
            f"the tokenizer makes id {int(ids.max())}, but the model has {vocabulary} entries; "
            "it is not this model's tokenizer"
        )
    gave = tuple(
        PartTokens(part.name, part.text, len(own), _digest(own))
        for part, own in zip(parts, found, strict=True)
    )
    return Tokens(ids, source.text, _digest(ids), gave)


def wrap_tokens(ids: Tensor, name: str) -> Tokens:
    """Samples int64 [samples, length] that come from no text, under a name of their own."""
    digest = _digest(ids)
    return Tokens(ids, name, digest, (PartTokens(name, name, len(ids), digest),))


def _stream(part: TextPart, tokenizer: Any, purpose: str) -> array[int]:
    """Token ids of all documents, each after an end token."""
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    stream = array("q")
    for text in read_part(part, purpose):
        stream.extend(end)
        stream.extend(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    return stream


def _too_short(
    source: TextSource, purpose: str, part: str | None, count: int, stream: array[int]
) -> InputError:
    windows, needed = len(stream) // source.length, count * source.length
    if part is not None:
        return InputError(
            f"{purpose} text: part {part} is too short: {len(stream):,} tokens, but its {count} "
            f"of the {source.samples} samples of {source.length} need {needed:,}; give it more "
            "text or less weight"
        )
    remedy = f", fewer samples (--set {purpose}.samples={windows})" if windows else ""
    return InputError(
        f"{purpose} text {source.text} is too short: {len(stream):,} tokens, but {source.samples} "
        f"samples of {source.length} need {needed:,}; give more text{remedy}, or a smaller length"
    )


def _cut(stream: array[int], source: TextSource, count: int) -> Tensor:
    """``count`` windows without overlap, int64 [count, length], in the order of the text."""
    import numpy as np
    import torch

    windows = len(stream) // source.length
    chosen = np.random.default_rng(source.seed).permutation(windows)[:count]
    rows = np.frombuffer(stream, np.int64)[: windows * source.length].reshape(windows, -1)
    return torch.from_numpy(rows[np.sort(chosen)])


def _turns(counts: Sequence[int]) -> list[int]:
    """Order in which parts that lie one after the other take turns, evenly."""
    places = [((n + 0.5) / count, part) for part, count in enumerate(counts) for n in range(count)]
    return sorted(range(len(places)), key=places.__getitem__)


def _digest(ids: Tensor) -> str:
    return hashlib.sha256(ids.numpy().tobytes()).hexdigest()
