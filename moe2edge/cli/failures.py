"""Errors of the system and of libraries, as one line and an exit code.

A full disk or memory that cannot be had ends with the exit code of `DoesNotFit`, whichever library
found it out, and however it words it.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moe2edge.errors import DoesNotFit, InputError, Moe2EdgeError

DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
UNUSABLE_NAME = frozenset({errno.ENAMETOOLONG, errno.ELOOP})
DISK_WORDS = ("no space left on device", "disk quota exceeded", "file too large")
# Words of torch, oneDNN, ONNX Runtime, OpenBLAS, the dynamic linker and Python's threads.
MEMORY_WORDS = (
    "allocate memory", "out of memory", "bad_alloc", "bad allocation", "not enough memory",
    "could not create a primitive", "could not create a memory", "failed to map segment",
    "can't start new thread", "cannot allocate", "pthread_create failed", "mmap failed",
)  # fmt: skip
# Characters of a message that a terminal shows without hiding what came before.
LONGEST_MESSAGE = 1500


def list_causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and the errors that it was raised from."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        yield current
        seen.add(id(current))
        current = current.__cause__ or (
            None if current.__suppress_context__ else current.__context__
        )


def explain_shortage(error: BaseException, writing: Path | None = None) -> str | None:
    """Return a message if a full disk or too little memory is behind an error; else None.

    Args:
        error: the error.
        writing: folder whose disk is named where the error names no file.
    """
    if isinstance(error, DoesNotFit):
        return None
    for cause in list_causes(error):
        if message := _explain_disk(cause, writing) or _explain_memory(cause):
            return message
    return None


@contextmanager
def naming_disk(out: Path) -> Iterator[None]:
    """Let errors of a full disk name the folder of ``out``, where all that is written lies.

    Raises:
        DoesNotFit: in place of such an error, with its notes.
    """
    try:
        yield
    except Exception as error:
        shortage = explain_shortage(error, out.absolute().parent)
        if shortage is None:
            raise
        refused = DoesNotFit(shortage)
        for note in getattr(error, "__notes__", ()):
            refused.add_note(note)
        raise refused from error


def _read_error(error: BaseException) -> tuple[int | None, str]:
    """Return the number of an error of the system, or the words of a library's, in lower case."""
    if isinstance(error, OSError):
        return error.errno, ""  # its text holds the names of files
    return None, "" if isinstance(error, Moe2EdgeError) else str(error).lower()


def _explain_disk(error: BaseException, writing: Path | None) -> str | None:
    """Return a message if the disk, or the user's share of it, is full."""
    number, words = _read_error(error)
    if number not in DISK_FULL and not any(known in words for known in DISK_WORDS):
        return None
    # Writing into a file that is open names none, nor do libraries.
    filename = error.filename if isinstance(error, OSError) else None
    place = f" (in {writing})" if writing is not None else ""
    place = f" while {filename} was written" if filename else place
    reason = {
        errno.EDQUOT: "the disk quota is used up",
        errno.EFBIG: "the limit on the size of a file (ulimit -f) is reached",
    }.get(number or 0, "the disk is full")
    return f"{reason}{place}; free some space, or write to another disk"


def _explain_memory(error: BaseException) -> str | None:
    """Return a message if memory could not be had."""
    number, words = _read_error(error)
    known = isinstance(error, MemoryError) or number == errno.ENOMEM
    if not known and not any(known in words for known in MEMORY_WORDS):
        return None
    return (
        f"memory could not be had{_describe_limit()}; raise the limit, set --max-memory where the "
        "command has it, or use a larger machine"
    )


def _describe_limit() -> str:
    """Describe the smallest limit on the memory of this process."""
    from moe2edge.runtime.memory import find_limit

    try:
        return f" (machine, container or limit: {find_limit() / 1e9:.2f} GB)"
    except (MemoryError, OSError):
        return ""


def classify_os_error(error: OSError) -> tuple[str, int]:
    """Return the message and the exit code of an error of the system."""
    name = str(error.filename or "no file named")
    code = InputError.exit_code if error.errno in UNUSABLE_NAME else Moe2EdgeError.exit_code
    return f"{error.strerror or error}: {shorten(name, 200)}", code


def escape(text: str, kept: str = "") -> str:
    r"""Escape characters that a terminal does not print, but those in ``kept``.

    >>> escape("a\x1b[31m\n", "\n") == "a\\x1b[31m\n"
    True
    """
    return "".join(
        c if c.isprintable() or c in kept else c.encode("unicode_escape").decode() for c in text
    )


def shorten(text: str, longest: int = LONGEST_MESSAGE) -> str:
    r"""Cut a text in the middle, and escape characters that a terminal does not print.

    >>> shorten("abcdefghij", 8), shorten("a\x1b[31m")
    ('abc...ij', 'a\\x1b[31m')
    """
    plain = escape(text)
    if len(plain) <= longest:
        return plain
    kept = longest - 3
    return f"{plain[: kept - kept // 2]}...{plain[len(plain) - kept // 2 :]}"
