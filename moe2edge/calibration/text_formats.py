"""Read files of text: the format is recognized by the content, and read piece by piece.

A file is plain text, or has rows: JSON lines, a JSON array of objects, an object that holds one
such array, or parquet. Each but parquet may be compressed with gzip.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import stat
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from moe2edge.errors import InputError, get_first_line
from moe2edge.storage.text_files import find_read_remedy

Format = Literal["text", "lines", "array", "object", "parquet"]

GZIP = b"\x1f\x8b"
# What a file begins with that is no text, and what to do about it.
_UNPACK = "decompress it, or compress it with gzip instead"
_CONVERT = "give text, JSON lines or parquet"
FOREIGN: Mapping[bytes, tuple[str, str]] = {
    GZIP: ("compressed with gzip twice", "decompress it once"),
    b"BZh": ("compressed with bzip2", _UNPACK),
    b"\xfd7zXZ\0": ("compressed with xz", _UNPACK),
    b"\x28\xb5\x2f\xfd": ("compressed with zstd", _UNPACK),
    b"PK\x03\x04": ("a zip archive", _UNPACK),
    b"7z\xbc\xaf": ("a 7z archive", _UNPACK),
    b"%PDF-": ("a PDF document", _CONVERT),
    b"ARROW1": ("an Arrow file", _CONVERT),
    b"SQLite format 3\0": ("a database", _CONVERT),
    b"GGUF": ("a GGUF model", _CONVERT),
}
PARQUET = b"PAR1"
UTF_16_AND_32 = (b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")
# A line, an object, or an element of an array, in characters.
MOST_CHARACTERS = 64 << 20
READ_SIZE = 1 << 16
# What some systems write before a text in UTF-8. Files that were joined have it in the middle.
MARK = "\ufeff"
LINE_SUFFIXES, JSON_SUFFIXES = (".jsonl", ".ndjson"), (".jsonl", ".ndjson", ".json")
# An object with a name at its beginning, or an array of such or of strings: hardly anything else
# than JSON.
_LIKE_JSON = re.compile(
    r"""\s*(\[\s*)*(\{\s*"([^"\\\n]|\\.)*"\s*:|(?<=[\[\s])"([^"\\\n]|\\.)*"\s*[,\]])"""
)
_BLANK = re.compile(r"[ \t\n\r]*")


@dataclass(frozen=True)
class TextFile:
    """A file and its format.

    Attributes:
        path: the file.
        purpose: what the text is for, in messages.
        format: plain text, or how it holds rows.
        advance: receives the bytes read and the size of the file.
    """

    path: Path
    purpose: str
    format: Format = "text"
    advance: Callable[[int, int], None] | None = None

    @property
    def has_rows(self) -> bool:
        """True for a file of rows."""
        return self.format != "text"

    @property
    def label(self) -> str:
        """The file, for messages."""
        return f"{self.purpose} text {self.path}"


def recognize_text(path: Path, purpose: str) -> TextFile:
    """Recognize the format of a file from its content.

    Raises:
        InputError: it cannot be read, is not a regular file, empty, or in no known format.
    """
    file = TextFile(path, purpose)
    if not stat.S_ISREG(_read_mode(file)):
        raise InputError(
            f"{file.label} is not a regular file (a folder, pipe or device); write the text to a "
            "file, and give that"
        )
    with _naming_faults(file):
        with path.open("rb") as raw:
            head = raw.read(16)
        if head.startswith(PARQUET):
            return TextFile(path, purpose, "parquet")
        _refuse_foreign(file, head, packed=False)
        with _open_bytes(path) as unpacked:
            _refuse_foreign(file, unpacked.read(16), packed=head.startswith(GZIP))
        return TextFile(path, purpose, _recognize_json(file))


def read_pieces(file: TextFile) -> Iterator[str]:
    """Read a plain text piece by piece.

    Raises:
        InputError: it is not UTF-8, empty, or has characters that no text has.
    """
    empty = True
    with _naming_faults(file), _open_text(file) as content:
        while piece := content.read(READ_SIZE):
            _refuse_nul(file, piece)
            empty = empty and not piece.strip()
            yield piece
    if empty:
        raise InputError(f"{file.label} is empty; give another file")


def read_rows(file: TextFile, is_row: Callable[[Any], bool]) -> Iterator[tuple[str, Any]]:
    """Read the rows of a file, each with the words that say where it is.

    Args:
        file: a file that has rows.
        is_row: takes the only object of a file; False: its list of objects has the rows.

    Raises:
        InputError: the file is damaged, or a row is too long.
    """
    with _naming_faults(file):
        if file.format == "parquet":
            yield from _read_parquet(file)
        elif file.format == "lines":
            with _open_text(file) as content:
                for number, line in _read_lines(file, content):
                    yield f"{file.path.name}, line {number}", _parse_line(file, number, line)
        elif file.format == "array":
            with _open_text(file) as content:
                for number, row in _JsonArray(file, content).read():
                    yield f"{file.path.name}, line {number}", row
        else:
            yield from _unwrap(file, _read_object(file), is_row)


# ---- recognizing -------------------------------------------------------------------------------


def _read_mode(file: TextFile) -> int:
    try:
        return file.path.stat().st_mode
    except OSError as error:
        raise InputError(
            f"{file.purpose} text cannot be read: {error.strerror}: {file.path}; "
            f"{find_read_remedy(error, 'give one that is there')}"
        ) from error


def _refuse_foreign(file: TextFile, head: bytes, *, packed: bool) -> None:
    for begin, (what, remedy) in FOREIGN.items():
        if head.startswith(begin) and (packed or begin != GZIP):
            raise InputError(f"{file.label} is {what}; {remedy}")
    if packed and head.startswith(PARQUET):
        raise InputError(f"{file.label} is parquet compressed with gzip; decompress it")
    if head.startswith(UTF_16_AND_32):
        raise InputError(
            f"{file.label} is not UTF-8 but seems to be UTF-16 or UTF-32 (from its first bytes); "
            "convert it: iconv -f UTF-16 -t UTF-8 FILE > NEW"
        )


def _recognize_json(file: TextFile) -> Format:
    suffixes = [s for s in file.path.name.lower().split(".")[1:] if s != "gz"]
    suffix = f".{suffixes[-1]}" if suffixes else ""
    with _open_text(file) as content:
        head = content.read(READ_SIZE)
    _refuse_nul(file, head)
    head = head.lstrip(MARK)
    begin = head.lstrip()[:1]
    like = begin in ("[", "{") and _LIKE_JSON.match(head) is not None
    if not begin:
        return "lines" if suffix in LINE_SUFFIXES else "text"  # says that it is empty
    rows = suffix in LINE_SUFFIXES
    if begin == "[" and (like or suffix == ".json"):
        # Lines of arrays are no array.
        return "lines" if rows and _has_first_line(file, list) else "array"
    if rows:
        return "lines"
    if begin == "{" and (like or suffix == ".json"):
        return "lines" if _has_first_line(file, dict) else "object"
    return "object" if suffix in JSON_SUFFIXES else "text"


def _has_first_line(file: TextFile, kind: type) -> bool:
    """Return whether the first line is an object, or an array, and more follows."""
    with _open_text(file) as content:
        lines = _read_lines(file, content)
        _, first = next(lines)
        return _is_json(first, kind) and next(lines, None) is not None


def _is_json(text: str, kind: type) -> bool:
    try:
        return isinstance(json.loads(text), kind)
    except (ValueError, RecursionError):
        return False


# ---- opening -----------------------------------------------------------------------------------


@contextmanager
def _naming_faults(file: TextFile) -> Iterator[None]:
    """Turn errors of reading into one line."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise InputError(
            f"{file.label} is not UTF-8: {error.reason}; convert it to UTF-8"
        ) from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(
            f"{file.label} is damaged, gzip cannot unpack it: {error}; compress it again"
        ) from error
    except OSError as error:
        raise InputError(
            f"{file.purpose} text cannot be read: {error.strerror or error}: {file.path}; "
            f"{find_read_remedy(error, 'give one that is there')}"
        ) from error


@contextmanager
def _open_bytes(path: Path, watch: Callable[[int], None] | None = None) -> Iterator[BinaryIO]:
    with path.open("rb") as raw:
        packed = raw.read(2) == GZIP
        raw.seek(0)
        source: Any = raw if watch is None else _Watched(raw, watch)
        if packed:
            with gzip.GzipFile(fileobj=source) as unpacked:
                yield unpacked  # type: ignore[misc]
        else:
            yield source


class _Watched(io.RawIOBase):
    """A file that says how far it was read."""

    def __init__(self, file: BinaryIO, watch: Callable[[int], None]) -> None:
        self._file, self._watch = file, watch

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._watch(self._file.tell())
        return data

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


@contextmanager
def _open_text(file: TextFile) -> Iterator[io.TextIOWrapper]:
    """Open a text, whatever its compression, its mark at the beginning and its line ends."""
    advance = file.advance
    size = file.path.stat().st_size
    watch = None if advance is None else (lambda done: advance(done, size))
    with _open_bytes(file.path, watch) as content:
        buffered = content if watch is None else io.BufferedReader(content, READ_SIZE)  # type: ignore[type-var]
        yield io.TextIOWrapper(buffered, encoding="utf-8-sig")


def _refuse_nul(file: TextFile, text: str) -> None:
    if "\0" in text:
        raise InputError(
            f"{file.label} has NUL characters, so it is no text in UTF-8 (but binary, or UTF-16); "
            "give text in UTF-8"
        )


# ---- rows --------------------------------------------------------------------------------------


def _read_lines(file: TextFile, content: io.TextIOWrapper) -> Iterator[tuple[int, str]]:
    """Read lines that are not blank, with their numbers."""
    number = 0
    # Not splitlines(), because a JSON string may contain U+2028 and other Unicode line breaks.
    while line := content.readline(MOST_CHARACTERS + 1):
        number += 1
        line = line.removeprefix(MARK)
        if len(line) > MOST_CHARACTERS:
            raise _make_size_error(file, f"line {number}")
        if line.strip():
            yield number, line


def _make_size_error(file: TextFile, what: str) -> InputError:
    return InputError(
        f"{file.path.name}, {what} is longer than {MOST_CHARACTERS:,} characters; give JSON lines, "
        "with a shorter document on each line"
    )


def _parse_line(file: TextFile, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        # An object of several lines ends too early.
        early = getattr(error, "pos", 0) >= len(line.rstrip())
        more = ", or put each object on one line of its own (jq -c . FILE > NEW)" if early else ""
        raise InputError(
            f"{file.path.name}, line {number} is not JSON: {error}; fix or remove the line{more}"
        ) from error


def _read_object(file: TextFile) -> Any:
    """Read a file that is one JSON value."""
    with _open_text(file) as content:
        text = content.read(MOST_CHARACTERS + 1)
    if len(text) > MOST_CHARACTERS:
        raise _make_size_error(file, "its one JSON value")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _make_json_error(file, error) from error


def _make_json_error(file: TextFile, error: Exception) -> InputError:
    found = getattr(error, "doc", "")[getattr(error, "pos", 0) :][:1]
    extra = getattr(error, "msg", "") == "Extra data" and found in ("{", "[")
    remedy = (
        "put each object on one line of its own (jq -c . FILE > NEW)"
        if extra
        else "fix it; if it is plain text, give it the suffix .txt, and begin it with a line of "
        "words"
    )
    return InputError(f"{file.label} looks like JSON, but is not: {error}; {remedy}")


def _unwrap(file: TextFile, value: Any, is_row: Callable[[Any], bool]) -> Iterator[tuple[str, Any]]:
    """Yield the rows of a file that is one JSON value."""
    if not isinstance(value, dict):
        kinds = {str: "a string", list: "a list", bool: "true or false", type(None): "null"}
        raise InputError(
            f"{file.label} is JSON, but {kinds.get(type(value), 'a number')} instead of rows; give "
            'JSON lines such as {"text": "..."}'
        )
    if is_row(value):
        yield file.path.name, value
        return
    if {"added_tokens", "model"} <= value.keys():
        raise InputError(f"{file.label} is a tokenizer (tokenizer.json), not a text; give a text")
    lists = [
        key
        for key, each in value.items()
        if isinstance(each, list) and each and all(isinstance(row, dict) for row in each)
    ]
    if len(lists) != 1:
        has = ", ".join(lists or list(map(str, value))[:20]) or "nothing"
        what = "several lists of rows" if lists else "no list of rows"
        raise InputError(
            f"{file.label} is a JSON object with {what} (it has {has}); give JSON lines, or an "
            "object with one list of objects"
        )
    for n, row in enumerate(value[lists[0]], start=1):
        yield f"{file.path.name}, {lists[0]} {n}", row


class _JsonArray:
    """Reads a JSON array element by element."""

    def __init__(self, file: TextFile, content: io.TextIOWrapper) -> None:
        self._file, self._content = file, content
        self._decoder = json.JSONDecoder()
        self._text, self._at, self._line = "", 0, 1

    def read(self) -> Iterator[tuple[int, Any]]:
        """Yield each element with the number of the line on which it begins."""
        self._take("[")
        if self._peek() == "]":
            raise InputError(f"{self._file.label} is an empty list; give another file")
        while True:
            self._peek()
            yield self._line, self._decode()
            if self._peek() == "]":
                break
            self._take(",")
        self._take("]")
        if self._peek():
            raise self._fault("something follows behind the end of the list")

    def _peek(self) -> str:
        """Skip white space; return the character behind it, which is empty at the end."""
        while True:
            blank = _BLANK.match(self._text, self._at)
            assert blank is not None
            self._skip(blank.end())
            if self._at < len(self._text) or not self._fill():
                return self._text[self._at : self._at + 1]

    def _take(self, character: str) -> None:
        if (found := self._peek()) != character:
            raise self._fault(f"expected {character!r}, found {found or 'the end'!r}")
        self._skip(self._at + 1)

    def _decode(self) -> Any:
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
                fault: Exception | None = None
            except RecursionError as error:
                raise self._fault(str(error)) from error
            except ValueError as error:
                fault, value, end = error, None, len(self._text)
            # At the end of what was read, a number or a word may go on.
            if end < len(self._text) or not self._fill():
                if fault is not None:
                    raise self._fault(getattr(fault, "msg", str(fault))) from fault
                self._skip(end)
                return value

    def _fill(self) -> bool:
        """Read on, as much as is waiting, so that long elements take few attempts."""
        self._text, self._at = self._text[self._at :], 0
        if len(self._text) > MOST_CHARACTERS:
            raise _make_size_error(self._file, f"the element at line {self._line}")
        more = self._content.read(max(READ_SIZE, len(self._text)))
        self._text += more
        return bool(more)

    def _skip(self, to: int) -> None:
        self._line += self._text.count("\n", self._at, to)
        self._at = to

    def _fault(self, reason: str) -> InputError:
        return _make_json_error(self._file, ValueError(f"line {self._line}: {reason}"))


def _read_parquet(file: TextFile) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise InputError(
            f"{file.label} is parquet, which needs pyarrow: pip install 'pyarrow>=18.0', or give "
            "JSON lines"
        ) from error
    number, size = 0, file.path.stat().st_size
    try:
        with parquet.ParquetFile(file.path) as content:
            total = max(content.metadata.num_rows, 1)
            for batch in content.iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{file.path.name}, row {number}", row
                if file.advance is not None:
                    file.advance(size * number // total, size)
    except pyarrow.ArrowException as error:
        reason = get_first_line(error)
        raise InputError(f"{file.label} is damaged parquet: {reason}; write it again") from error
    if not number:
        raise InputError(f"{file.label} has no rows; give another file")
