"""Tokenize a long text in pieces, to the ids that the whole text has.

Tokens of a text depend on what stands around them, but not on what stands far away. Neighbouring
pieces share some text. Where both give the same tokens at the same places there, the ids of the
first are used up to the middle of it, and those of the second from there on. Where they differ,
the first piece is made longer, and the next cut falls somewhere else.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from moe2edge.errors import InputError
from moe2edge.storage.tokenizer import call_tokenizer, encode_text

# In characters. Tokenizing takes up to 300 bytes of memory for each.
PIECE_LENGTH, SHARED, MOST_JOINED = 1 << 16, 1 << 12, 1 << 20
# Tokens that two pieces must have in common, and characters around a cut that must not be a run.
LEAST, AROUND = 8, 64
# Tokenizers without the places of their tokens get the text as a whole.
MOST_WITHOUT_PLACES = 16 << 20


@dataclass
class Seams:
    """Cuts at which the ids may differ from those of the whole text.

    Attributes:
        cuts: number of cuts where neighbouring pieces do not agree.
        ids: number of ids around them that differ between the two pieces.
    """

    cuts: int = 0
    ids: int = 0


@dataclass(frozen=True)
class _Encoded:
    """Tokens of a text: ids, and the character at which each begins."""

    text: str
    ids: list[int]
    begins: list[int]

    def list_between(self, begin: int, end: int) -> list[tuple[int, int]]:
        """List id and place, from ``begin`` on, of the tokens that begin before ``end``."""
        found = slice(bisect_left(self.begins, begin), bisect_left(self.begins, end))
        places = [place - begin for place in self.begins[found]]
        return list(zip(self.ids[found], places, strict=True))


def encode_document(pieces: Iterable[str], tokenizer: Any, seams: Seams) -> Iterator[array[int]]:
    """Yield the ids of a text, int32, in parts.

    Args:
        pieces: the text, in pieces of any length.
        tokenizer: the tokenizer of transformers.
        seams: gets the cuts that cannot be joined exactly.

    Raises:
        InputError: the text is long, and the tokenizer does not give the places of its tokens.
    """
    parts = _regroup(pieces, PIECE_LENGTH)
    text, more = next(parts, ""), next(parts, "")
    if not getattr(tokenizer, "is_fast", False):
        text = _join(text, more, parts)
        more = ""
    if not more:
        yield pack_ids(encode_text(tokenizer, text, special=False))
        return
    left, first = _encode(text, tokenizer), 0
    while more:
        start = _find_start(left)
        right = _encode(left.text[start:] + more, tokenizer)
        seam = _find_seam(left, right, start)
        if seam is None and len(left.text) < MOST_JOINED:
            left = _encode(left.text + more, tokenizer)
        elif seam is None:
            seams.cuts += 1
            seams.ids += _count_differing(left, right, start)
            yield pack_ids(left.ids[first:])
            left, first = _encode(more, tokenizer), 0
        else:
            yield pack_ids(left.ids[first : seam[0]])
            left, first = right, seam[1]
        more = next(parts, "")
    yield pack_ids(left.ids[first:])


def pack_ids(ids: Sequence[int]) -> array[int]:
    """Return token ids as int32.

    Raises:
        InputError: an id does not fit, which a damaged tokenizer can give.
    """
    try:
        return array("i", ids)
    except OverflowError:
        raise InputError(
            f"the tokenizer gives token id {max(ids)}, which no model has; put this model's "
            "tokenizer files into its folder"
        ) from None


def _join(text: str, more: str, rest: Iterator[str]) -> str:
    texts, length = [text, more], len(text) + len(more)
    for part in rest:
        texts.append(part)
        length += len(part)
        if length > MOST_WITHOUT_PLACES:
            raise InputError(
                f"a text is longer than {MOST_WITHOUT_PLACES:,} characters, and the tokenizer of "
                "the model cannot take one in pieces, because it has no tokenizer.json; give it as "
                "JSON lines, with one document a line"
            )
    return "".join(texts)


def _regroup(pieces: Iterable[str], size: int) -> Iterator[str]:
    """Yield the same text in pieces of ``size`` characters; only the last may be shorter."""
    waiting, length = [], 0
    for piece in pieces:
        waiting.append(piece)
        length += len(piece)
        if length >= size:
            text, end = "".join(waiting), length - length % size
            yield from (text[at : at + size] for at in range(0, end, size))
            waiting, length = [text[end:]], length - end
    if length:
        yield "".join(waiting)


def _encode(text: str, tokenizer: Any) -> _Encoded:
    found = call_tokenizer(tokenizer, text, add_special_tokens=False, return_offsets_mapping=True)
    return _Encoded(text, found["input_ids"], [begin for begin, _ in found["offset_mapping"]])


def _find_start(left: _Encoded) -> int:
    """Return where the text that the next piece shares begins: at a token of this one."""
    n = bisect_right(left.begins, len(left.text) - SHARED)
    return left.begins[n - 1] if n else len(left.text)


def _find_seam(left: _Encoded, right: _Encoded, start: int) -> tuple[int, int] | None:
    """Return the index of the same token in both, in the middle of the text that they share.

    Args:
        left: tokens of a piece.
        right: tokens of the next one.
        start: where in the first piece the second begins.

    Returns:
        None where the two give different tokens.
    """
    shared = len(left.text) - start
    margin = shared // 4
    both = left.list_between(start + margin, len(left.text) - margin)
    if len(both) < LEAST or both != right.list_between(margin, shared - margin):
        return None
    middle = len(both) // 2
    first, other = bisect_left(left.begins, start + margin), bisect_left(right.begins, margin)
    # The one nearest to the middle that is no part of a run.
    for n in sorted(range(1, len(both)), key=lambda n: abs(n - middle)):
        if not _is_in_run(left.text, left.begins[first + n]):
            return first + n, other + n
    return None


def _is_in_run(text: str, at: int) -> bool:
    """Return whether the text around a place repeats itself, or is empty on one side.

    There, an effect reaches as far as the run: a tokenizer may begin to divide a long line of
    equal characters at its end, and a special token may take all space beside it.
    """
    before, behind = text[max(at - AROUND, 0) : at], text[at : at + AROUND]
    if not before.strip() or not behind.strip():
        return True
    around = before + behind
    return any(around[n:] == around[:-n] for n in range(1, AROUND))


def _count_differing(left: _Encoded, right: _Encoded, start: int) -> int:
    """Count the tokens of the shared text that only one of two pieces has; at least one."""
    shared = len(left.text) - start
    a, b = left.list_between(start, len(left.text)), right.list_between(0, shared)
    return max(1, len(a) - len(set(a) & set(b)))
