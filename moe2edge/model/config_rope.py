"""Judging rotary embeddings: one kind, one spelling, and a table that is always the same."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

from moe2edge.errors import InputError, Unsupported

# Rotary embeddings whose tables do not depend on the length of the text, and their numbers.
STATIC_ROPE: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}
# Kinds that know how long the texts of pretraining were.
_WITH_LENGTH = ("llama3", "yarn")
_ORIGINAL = "original_max_position_embeddings"
_OBJECTS = ("rope_scaling", "rope_parameters")


def check_given_rope(given: Mapping[str, Any]) -> None:
    """Refuse rotary embeddings of a kind that is not supported, or spelled twice and not alike.

    Args:
        given: contents of ``config.json``.

    Raises:
        InputError: two spellings differ, a number is missing or of no use.
        Unsupported: the kind of the rotary embedding is not supported, or each kind of layer has
            its own.
    """
    for name in _OBJECTS:
        rope = given.get(name)
        if isinstance(rope, dict):
            _check_given(name, rope, given)
        elif rope is not None:
            raise InputError(f"config.json: {name} is {rope!r:.100}, expected: an object or null")


def _check_given(name: str, rope: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    kinds = [rope[key] for key in ("rope_type", "type") if key in rope]
    if len(kinds) == 2 and kinds[0] != kinds[1]:
        raise _differ(f"{name}.rope_type", kinds[0], f"{name}.type", kinds[1])
    kind = kinds[0] if kinds else "default"
    if not isinstance(kind, str) or kind not in STATIC_ROPE:
        raise Unsupported(
            f"rope type {kind!r:.100} is not supported; supported: {', '.join(STATIC_ROPE)}, "
            "whose tables do not depend on the length of the text"
        )
    if nested := [key for key, value in rope.items() if isinstance(value, dict)]:
        raise Unsupported(
            f"config.json: {name} has settings of their own for {nested[0]!r:.100}; different "
            "rotary embeddings in different layers are not supported"
        )
    for key in ("rope_theta", *((_ORIGINAL,) if kind in _WITH_LENGTH else ())):
        inner, outer = rope.get(key), given.get(key)
        if None not in (inner, outer) and inner != outer:
            raise _differ(f"{name}.{key}", inner, key, outer)
    for key in STATIC_ROPE[kind]:
        if kind != "yarn" or rope.get(key, 0) is not None:  # null: the ratio of two lengths
            _need(rope, kind, key)


def check_same_rope(config: Any, given: Mapping[str, Any]) -> None:
    """Refuse ``rope_scaling`` beside ``rope_parameters`` that mean different tables.

    Args:
        config: transformers' config of ``given``.
        given: contents of ``config.json``.

    Raises:
        InputError: they differ.
    """
    if not all(given.get(name) for name in _OBJECTS):
        return
    old, new = (_standardize(config, given[name]) for name in _OBJECTS)
    if old != new:
        raise _differ("rope_scaling", old, "rope_parameters", new)


def _standardize(config: Any, rope: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings of a rotary embedding with transformers' defaults for what they lack."""
    changed = copy.deepcopy(config)
    changed.rope_parameters = {"rope_theta": config.rope_parameters["rope_theta"], **rope}
    changed.standardize_rope_params()
    return {key: value for key, value in changed.rope_parameters.items() if key != "type"}


def _differ(first: str, value: Any, second: str, other: Any) -> InputError:
    """Make the error for two spellings of one setting."""
    return InputError(
        f"config.json: {first} is {value!r:.200} and {second} is {other!r:.200}; both name the "
        "same setting, and programs disagree which one counts: leave out the wrong one"
    )


def check_rope_table(config: Any, given: Mapping[str, Any]) -> None:
    """Compute the table of frequencies by transformers' own function, and judge it.

    Args:
        config: transformers' config, with the size of heads.
        given: contents of ``config.json``.

    Raises:
        InputError: the table cannot be computed, or is not finite.
        Unsupported: only a part of a head is rotated.
    """
    rope = config.rope_parameters
    kind = rope["rope_type"]
    _need(rope, kind, "rope_theta")
    parts = [place.get("partial_rotary_factor") for place in (rope, given)]
    if any(part is not None and part != 1 for part in parts):
        raise Unsupported("partial rotary embeddings are not supported")
    if kind != "default":
        _check_table(config, kind)


def _need(rope: Mapping[str, Any], kind: str, key: str) -> None:
    value: Any = rope.get(key)
    if type(value) not in (int, float) or not value > 0:
        raise InputError(f"config.json: {kind!r} rope needs {key} > 0, found {value!r:.100}")


def _check_table(config: Any, kind: str) -> None:
    """Refuse settings with which transformers' function fails, or returns what is no number."""
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    try:
        table, scale = ROPE_INIT_FUNCTIONS[kind](copy.deepcopy(config))
        sound = len(table) == config.head_dim // 2 and bool(torch.isfinite(table).all())
        reason = "it is not finite"
    except (ArithmeticError, KeyError, RuntimeError, TypeError, ValueError) as error:
        sound, scale, reason = False, 1.0, str(error)
    if not sound or type(scale) not in (int, float) or not math.isfinite(scale):
        raise InputError(
            f"config.json: the table of the rotary embedding {config.rope_parameters!r:.300} "
            f"cannot be computed ({reason:.200})"
        )
