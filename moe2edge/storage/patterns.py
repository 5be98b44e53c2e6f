"""Regular expressions that a folder or a recipe brings, matched in linear time.

Python's own module takes exponential time for some patterns, so that a folder from elsewhere could
hold a command up for ever. RE2 never does. What it has no linear way for (lookaround, references
to groups) is refused.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

# Bytes of a compiled pattern; a pattern for every tensor of a large model takes far less.
LARGEST_COMPILED = 8 << 20
LONGEST_SOURCE = 100_000


@lru_cache(maxsize=4096)
def compile_pattern(source: str) -> Any:
    r"""Compile a regular expression; the result has ``match`` and ``search``.

    Raises:
        ValueError: it is not one, or cannot be matched in linear time.

    >>> compile_pattern(r"layers\.[02]\.").search("model.layers.2.mlp") is not None
    True
    """
    import re2

    if len(source) > LONGEST_SOURCE:
        raise ValueError(f"it has {len(source)} characters, at most {LONGEST_SOURCE} are read")
    options = re2.Options()
    options.log_errors = False
    options.max_mem = LARGEST_COMPILED
    try:
        return re2.compile(source, options)
    except re2.error as error:
        reason = error.args[0] if error.args else "unknown"
        text = reason.decode("utf-8", "replace") if isinstance(reason, bytes) else str(reason)
        raise ValueError(f"{text}; lookaround and references to groups are not matched") from error
    except UnicodeEncodeError as error:
        raise ValueError(f"it holds a character that is none: {error.reason}") from error
