"""Every error that a user can meet, and the exit code of each.

::

    Moe2EdgeError                 1   something went wrong while running
    ├── InputError                2   the command, the recipe, the model or a text is wrong
    │   ├── Unreadable            2   a file is there and cannot be read, perhaps for a moment
    │   └── WorkDamaged           2   the saved work of an unfinished run cannot be used
    ├── DiskFailed                1   a file does not hold what was written to it
    ├── Regressed                 3   a comparison found a regression
    ├── Inconclusive              4   a comparison can say nothing of a metric
    ├── DoesNotFit                5   not enough disk or memory
    ├── Unsupported               6   a model, a setting or a target that is not supported
    ├── VerificationFailed        7   an output does not hold what it should hold
    └── Diverged                  8   the training loss is NaN or infinite

Each message is one line: what was found, what was expected, what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any


class Moe2EdgeError(Exception):
    """Base of all errors raised on purpose; the command line prints them without a traceback."""

    exit_code = 1
    # Further keys of the document of a failed command with --json.
    details: Mapping[str, Any] = {}


class InputError(Moe2EdgeError):
    """The command, the recipe, the model or a text is wrong."""

    exit_code = 2


class Unreadable(InputError):
    """A file is there and cannot be read, perhaps for a moment; what it holds may be right."""


class WorkDamaged(InputError):
    """The saved work of an unfinished run cannot be used."""


class DiskFailed(Moe2EdgeError):
    """A file does not hold what was written to it."""


class Regressed(Moe2EdgeError):
    """A comparison found that a metric got worse by more than its tolerance."""

    exit_code = 3


class Inconclusive(Moe2EdgeError):
    """A comparison can say nothing of a metric that the gate watches."""

    exit_code = 4


class DoesNotFit(Moe2EdgeError):
    """There is not enough disk or memory for what was asked."""

    exit_code = 5


class Unsupported(Moe2EdgeError):
    """The input is sound, but this model, setting or target is not supported."""

    exit_code = 6


class VerificationFailed(Moe2EdgeError):
    """An output does not hold what it should hold."""

    exit_code = 7


class Diverged(Moe2EdgeError):
    """The training loss is NaN or infinite."""

    exit_code = 8


def join_lines(error: BaseException, longest: int = 300) -> str:
    r"""Return the text of an error in one line, cut to a length.

    >>> join_lines(ValueError("one\n  two"), longest=6)
    'one tw'
    """
    return " ".join(str(error).split())[:longest]


def get_first_line(error: BaseException, longest: int = 300) -> str:
    r"""Return the first line of the text of an error, cut to a length.

    >>> get_first_line(ValueError("one\n  two"))
    'one'
    """
    return str(error).strip().partition("\n")[0][:longest]


def suggest(kind: str, name: str, known: Iterable[str]) -> str:
    """Return a message for an unknown name, with the closest known one.

    >>> suggest("pass", "expert-drop", ["expert_drop", "gptq"])
    "unknown pass 'expert-drop': did you mean 'expert_drop'? Known: expert_drop, gptq"
    """
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    hint = f": did you mean {close[0]!r}?" if close else "."
    return f"unknown {kind} {name!r}{hint} Known: {', '.join(known)}"
