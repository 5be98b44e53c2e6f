"""Cut text for calibration, evaluation and training into samples of tokens."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from moe2edge.calibration.builtin_texts import name_general_parts
from moe2edge.calibration.documents import read_documents
from moe2edge.calibration.mixes import TextPart, open_parts, share_out
from moe2edge.calibration.pieces import Seams, encode_document, pack_ids
from moe2edge.calibration.sources import IN_RECIPE, Spelling
from moe2edge.calibration.text_formats import TextFile
from moe2edge.errors import InputError
from moe2edge.progress import QUIET, Reporter

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.calibration.sources import TextSource

# Reading smaller files is not worth a line of progress, in bytes.
LARGE_FILE = 2 << 20
# Number of tokens that are held before memory is looked at.
MANY_TOKENS = 1 << 26
TABLES = (".csv", ".tsv")


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


# ---- reading -----------------------------------------------------------------------------------


def read_texts(
    source: TextSource, purpose: str, tokenizer: Any = None, spelling: Spelling = IN_RECIPE
) -> list[str]:
    """Read the documents of a source, part after part, regardless of the weights.

    A plain text is one document; each row of JSON or parquet is one.

    Args:
        source: section of the recipe.
        purpose: ``calibration``, ``evaluation`` or ``training``.
        tokenizer: tokenizer of the model; None: chats are refused.
        spelling: how the command at hand spells options.

    Raises:
        InputError: a file is missing, empty or not UTF-8, or a row has no text in the field.
    """
    return [
        "".join(pieces)
        for part, file in open_parts(source, purpose, spelling)
        for pieces in read_documents(part, file, tokenizer, spelling)
    ]


# ---- tokens ------------------------------------------------------------------------------------


def check_length(
    source: TextSource, purpose: str, longest: int, spelling: Spelling = IN_RECIPE
) -> None:
    """Check that samples are not longer than the ``longest`` sequence of the model.

    Raises:
        InputError: they are longer.
    """
    if source.length > longest:
        raise InputError(
            f"{spelling.name(purpose, 'length')} {source.length} is longer than the {longest} "
            f"positions of the model; give {spelling.give(purpose, 'length', longest)}"
        )


def load_tokens(
    source: TextSource,
    tokenizer: Any,
    purpose: str,
    limits: tuple[int, int],
    *,
    spelling: Spelling = IN_RECIPE,
    reporter: Reporter = QUIET,
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
        spelling: how the command at hand spells options.
        reporter: receives progress.

    Raises:
        InputError: the text is missing, empty or too short, samples are too long for the model, a
            part of a mix gets no sample, or the tokenizer is that of another model.
        DoesNotFit: the tokens of the text do not fit in memory.
    """
    import torch

    longest, vocabulary = limits
    check_length(source, purpose, longest, spelling)
    opened = open_parts(source, purpose, spelling)
    counts = share_out(source.samples, [part.weight for part, _ in opened])
    for (part, _), count in zip(opened, counts, strict=True):
        # A few samples of the general text do not have every kind.
        if not count and part.text not in name_general_parts():
            raise InputError(
                f"{purpose} text: part {part.name} gets none of the {source.samples} samples; give "
                f"it more weight, or more samples: {spelling.give(purpose, 'samples', 'N')}"
            )
    opened = [each for each, count in zip(opened, counts, strict=True) if count]
    parts, counts = [part for part, _ in opened], [count for count in counts if count]
    samples = []
    for (part, file), count in zip(opened, counts, strict=True):
        tokens = _encode_part(part, file, tokenizer, spelling, reporter)
        if len(tokens) // source.length < count:
            # With fewer samples, every part has to be long enough.
            lengths = [len(_encode_part(*each, tokenizer, spelling, reporter)) for each in opened]
            most = _count_possible([n // source.length for n in lengths], parts)
            fewer = spelling.give(purpose, "samples", most) if most else None
            name = part.name if len(parts) > 1 else None
            raise _make_length_error(source, purpose, name, count, len(tokens), fewer)
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


def encode_texts(
    source: TextSource, tokenizer: Any, purpose: str, spelling: Spelling, reporter: Reporter
) -> array[int]:
    """Return the token ids of a single text, int32, its documents joined by line breaks.

    Raises:
        InputError: the text is missing, unsuitable, or a mix.
    """
    (part, file), *others = open_parts(source, purpose, spelling)
    if others:
        raise InputError(f"text {source.text}: prompts are cut from one text; name one file")
    file, seams = _watch(file, part, reporter), Seams()
    pieces = (
        piece
        for n, document in enumerate(read_documents(part, file, tokenizer, spelling))
        for piece in (*(["\n"] if n else []), *document)
    )
    tokens = array("i")
    for found in encode_document(pieces, tokenizer, seams):
        tokens.extend(found)
    _report_seams(file, seams, reporter)
    return tokens


def _encode_part(
    part: TextPart, file: TextFile, tokenizer: Any, spelling: Spelling, reporter: Reporter
) -> array[int]:
    """Return the token ids of all documents, int32, each after an end token."""
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    tokens, seams, looked_at = array("i"), Seams(), MANY_TOKENS
    file = _watch(file, part, reporter)
    for document in read_documents(part, file, tokenizer, spelling):
        tokens.extend(pack_ids(end))
        for found in encode_document(document, tokenizer, seams):
            tokens.extend(found)
            if len(tokens) > looked_at:
                looked_at = 2 * len(tokens)
                _check_memory(file, looked_at)
    _report_seams(file, seams, reporter)
    return tokens


def _watch(file: TextFile, part: TextPart, reporter: Reporter) -> TextFile:
    """Return the file so that reading it reports progress, and say what is unusual about it."""
    if not file.has_rows and file.path.suffix.lower() in TABLES:
        reporter.log(
            f"note: {file.label} is read as plain text, commas included; for single columns, "
            "convert it to JSON lines or parquet"
        )
    if file.path.stat().st_size < LARGE_FILE:
        return file

    def advance(done: int, total: int) -> None:
        reporter.advance(f"{file.purpose}: reading {part.name}", done, total, "bytes")

    return replace(file, advance=advance)


def _check_memory(file: TextFile, tokens: int) -> None:
    from moe2edge.runtime.memory import check_memory

    what = f"{file.label} has more than {tokens // 2:,} tokens"
    check_memory(4 * tokens, what, "give a part of it, such as its first gigabyte")


def _report_seams(file: TextFile, seams: Seams, reporter: Reporter) -> None:
    if seams.cuts:
        reporter.log(
            f"note: {file.label} was tokenized in pieces, and at {seams.cuts} cuts no place was "
            f"found where they join exactly (a long run without a break): {seams.ids} ids there "
            "may differ from those of the text as a whole"
        )


def _count_possible(windows: Sequence[int], parts: Sequence[TextPart]) -> int:
    """Return a number of samples for which each part has windows enough, and gets one; else 0."""
    weights = [part.weight for part in parts]
    most = min(int(n * sum(weights) / w) for n, w in zip(windows, weights, strict=True))
    return most if most and 0 not in share_out(most, weights) else 0


def _make_length_error(
    source: TextSource, purpose: str, part: str | None, count: int, tokens: int, fewer: str | None
) -> InputError:
    """Say that a text, or a part of a mix, is too short, and what would do."""
    needed = count * source.length
    if part is not None:
        remedy = f", or fewer samples ({fewer})" if fewer else ""
        return InputError(
            f"{purpose} text: part {part} is too short: {tokens:,} tokens, but its {count} of the "
            f"{source.samples} samples of {source.length} need {needed:,}; give it more text or "
            f"less weight{remedy}"
        )
    remedy = f", fewer samples ({fewer})" if fewer else ""
    return InputError(
        f"{purpose} text {source.text} is too short: {tokens:,} tokens, but {source.samples} "
        f"samples of {source.length} need {needed:,}; give more text{remedy}, or a smaller length"
    )


def _choose_windows(tokens: array[int], source: TextSource, count: int) -> Tensor:
    """Choose ``count`` windows without overlap, int64 [count, length], in the order of the text."""
    import numpy as np
    import torch

    windows = len(tokens) // source.length
    chosen = np.random.default_rng(source.seed).permutation(windows)[:count]
    rows = np.frombuffer(tokens, np.int32)[: windows * source.length].reshape(windows, -1)
    return torch.from_numpy(rows[np.sort(chosen)].astype(np.int64))


def _interleave(counts: Sequence[int]) -> list[int]:
    """Return the order that interleaves parts of these sizes, stored one after another, evenly."""
    places = [((n + 0.5) / count, part) for part, count in enumerate(counts) for n in range(count)]
    return sorted(range(len(places)), key=places.__getitem__)


def _hash_ids(ids: Tensor) -> str:
    return hashlib.sha256(ids.numpy().tobytes()).hexdigest()
