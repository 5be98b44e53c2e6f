"""``generation_config.json``: settings of generation, and the tokens that end a text."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe2edge.errors import InputError, get_first_line
from moe2edge.storage.text_files import read_json

GENERATION_CONFIG = "generation_config.json"
# Keys of single tokens, in both configs. That a number is negative, as -1 for none, is common.
TOKEN_KEYS = ("bos_token_id", "pad_token_id", "decoder_start_token_id")
# Keys whose values transformers takes as they are, and fails on when it generates.
WHOLE_KEYS = frozenset(
    {
        "max_length", "max_new_tokens", "min_length", "min_new_tokens", "no_repeat_ngram_size",
        "num_beams", "num_return_sequences", "top_k",
    }
)  # fmt: skip
NUMBER_KEYS = frozenset(
    {
        "encoder_repetition_penalty", "epsilon_cutoff", "eta_cutoff", "guidance_scale",
        "length_penalty", "max_time", "min_p", "repetition_penalty", "temperature", "top_p",
        "typical_p",
    }
)  # fmt: skip
FLAG_KEYS = frozenset({"do_sample", "renormalize_logits", "use_cache"})
# Keys among which the one at fault is looked for; transformers knows about eighty.
MOST_KEYS = 200


def read_generation_config(folder: Path) -> Mapping[str, Any]:
    """Read ``generation_config.json`` of a folder; empty if there is none.

    Keys that transformers does not know are no fault.

    Raises:
        InputError: it is damaged, a token is none, or transformers refuses it; the key is named.
    """
    path = folder / GENERATION_CONFIG
    if not path.exists():
        return {}
    found = read_json(path)
    for key in TOKEN_KEYS:
        if found.get(key) is not None and type(found[key]) is not int:
            raise InputError(
                f"{key} in {path.name} is {_shorten(found[key])}, not a token; correct it, or take "
                "it out"
            )
    parse_stop_ids(found, path.name)
    for key, value in found.items():
        if value is not None and (expected := _find_expected(key, value)):
            raise InputError(
                f"{key} in {path.name} is {_shorten(value)}, expected: {expected}; correct it, or "
                "take it out"
            )
    if reason := _find_refusal(found):
        wrong = _find_refused_key(found)
        what = "" if wrong is None else f"{wrong[:60]} {_shorten(found[wrong])} in "
        raise InputError(f"transformers refuses {what}{path.name} ({reason}); correct it")
    return found


def _find_expected(key: str, value: object) -> str:
    """Return what a value should be; empty if it may be what it is."""
    if key in FLAG_KEYS and not isinstance(value, bool | int):
        return "true or false"
    if key in WHOLE_KEYS and type(value) is not int:
        return "a whole number"
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if key in NUMBER_KEYS and not (number and math.isfinite(value)):  # type: ignore[arg-type]
        return "a number"
    return ""


def parse_stop_ids(settings: Mapping[str, Any], place: str) -> frozenset[int] | None:
    """Return the end tokens of a generation config or of a config; None if it has no such key.

    Raises:
        InputError: ``eos_token_id`` is neither a token nor a list of tokens.
    """
    found = settings.get("eos_token_id")
    if found is None:
        return None
    tokens = found if isinstance(found, list) else [found]
    if not all(type(token) is int and token >= 0 for token in tokens):
        raise InputError(
            f"eos_token_id in {place} is {_shorten(found)}, not a token or a list of tokens"
        )
    return frozenset(tokens)


def list_foreign_ids(settings: Mapping[str, Any], vocabulary: int) -> dict[str, list[int]]:
    """List the special tokens of a config that a model of ``vocabulary`` entries does not have.

    Negative numbers, which stand for none, are not listed.
    """
    found = {}
    for key in (*TOKEN_KEYS, "eos_token_id"):
        value = settings.get(key)
        ids = value if isinstance(value, list) else [value]
        if beyond := [one for one in ids if type(one) is int and one >= vocabulary]:
            found[key] = beyond
    return found


def _find_refusal(settings: Mapping[str, Any]) -> str:
    """Return why transformers cannot load or save a generation config; empty if it can."""
    from transformers import GenerationConfig

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            hash(GenerationConfig.from_dict(dict(settings)))  # a digest of what it would save
    # Values of the wrong kind raise whatever the first use of them raises.
    except Exception as error:
        return get_first_line(error, 200) or type(error).__name__
    return ""


def _find_refused_key(settings: Mapping[str, Any]) -> str | None:
    """Return the key at fault: refused alone, or the first of several that do not fit together."""
    keys = list(settings)[:MOST_KEYS]
    for key in keys:
        if _find_refusal({key: settings[key]}):
            return key
    for key in keys:
        if not _find_refusal({other: settings[other] for other in settings if other != key}):
            return key
    return None


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."
