"""How much to drop: a count, a fraction of what there is, or whatever reaches a threshold."""

from __future__ import annotations

from moe2edge.errors import InputError


def number(value: float, of: int) -> int:
    """A count, or a fraction of ``of`` rounded down.

    >>> number(2, 32), number(0.25, 32), number(0.4, 6)
    (2, 8, 2)
    """
    return value if isinstance(value, int) else int(value * of + 1e-9)


def check_amount(value: object) -> object:
    """Refuse what is neither a count nor a fraction; for validators of options.

    Raises:
        ValueError: it is not.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("a count (2) or a fraction (0.25)")
    if not value > 0:
        raise ValueError("a count of at least 1, or a fraction between 0 and 1")
    if isinstance(value, float) and value >= 1:
        raise ValueError("a fraction lies between 0 and 1; write a count without a point")
    return value


def check_choice(
    name: str, drop: float | None, threshold: float | None, most: float | None
) -> None:
    """Refuse both or neither of a number and a threshold, and a limit without a threshold.

    Raises:
        InputError: with the options of the pass ``name``.
    """
    if (drop is None) == (threshold is None):
        raise InputError(f"{name}: give drop (a count or a fraction) or threshold (a cosine)")
    if threshold is None and most is not None:
        raise InputError(f"{name}: most goes with threshold")
