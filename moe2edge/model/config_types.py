"""Types of the keys of ``config.json`` that families read; they are checked first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moe2edge.errors import InputError, Unsupported

# Rotary embeddings whose tables do not depend on the length of the text, and their required keys.
STATIC_ROPE: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Natural = Annotated[int, Field(ge=0)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class _Rope(_Strict):
    rope_type: str | None = None
    type: str | None = None
    rope_theta: Positive | None = None
    factor: Positive | None = None
    partial_rotary_factor: Positive | None = None


class _Settings(_Strict):
    """The keys with fixed spellings; families read sizes, whose spellings differ."""

    hidden_act: str = "silu"
    rms_norm_eps: Positive = 1e-5
    rope_theta: Positive | None = None
    rope_scaling: _Rope | None = None
    rope_parameters: _Rope | None = None
    partial_rotary_factor: Positive | None = None
    clip_qkv: Positive | None = None
    sliding_window: Natural | None = None
    max_window_layers: Natural | None = None
    use_sliding_window: bool | None = None
    layer_types: list[str] | None = None
    mlp_only_layers: list[int] | None = None
    decoder_sparse_step: Count | None = None
    attention_bias: bool | None = None
    qkv_bias: bool | None = None
    norm_topk_prob: bool | None = None
    tie_word_embeddings: bool | None = None
    bos_token_id: Natural | None = None
    eos_token_id: Natural | list[Natural] | None = None
    pad_token_id: int | None = None


def check_types(config: Mapping[str, Any]) -> None:
    """Check types and ranges of the values of a config.

    Raises:
        InputError: names the key, its value and the expected type or range.
    """
    try:
        _Settings.model_validate(config)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"] if part in config or part in _KEYS)
        expected = first["msg"].removeprefix("Input should be ").partition(" or instance of")[0]
        raise InputError(
            f"config.json: {key} is {repr(first['input'])[:100]}, expected: {expected}"
        ) from error


_KEYS = frozenset(_Rope.model_fields)


def parse_whole_number(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """Return a positive whole number of the config, or ``default`` if it is missing.

    Raises:
        InputError: it is missing without a default, or not a positive whole number.
    """
    value = config.get(key)
    if value is None:
        value = default
    if type(value) is not int or value <= 0:
        raise InputError(f"config.json: {key} must be a positive whole number, found {value!r}")
    return value


def check_rope(config: Mapping[str, Any]) -> None:
    """Refuse rotary embeddings without a fixed table, or with a missing number.

    Raises:
        InputError: a required number is missing or not positive.
        Unsupported: the table depends on the length of the text, or only a part of the head is
            rotated.
    """
    rope: Mapping[str, Any] = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in STATIC_ROPE:
        raise Unsupported(
            f"rope type {kind!r} is not supported, because it depends on the length of the text; "
            f"supported: {', '.join(STATIC_ROPE)}"
        )
    if rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1)) != 1:
        raise Unsupported("partial rotary embeddings are not supported")
    for key in STATIC_ROPE[kind]:
        value: Any = rope.get(key)
        if type(value) not in (int, float) or not value > 0:
            raise InputError(f"config.json: {kind!r} rope needs {key} > 0, found {value!r}")
