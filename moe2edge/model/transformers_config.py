"""Configs and classes of transformers, as it finds them for a ``config.json``."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from moe2edge.errors import InputError, Unsupported, join_lines
from moe2edge.model.config_keys import FIXED, INERT, RUN, RUN_KEPT

# Transformers makes lists of these lengths while it parses; no model comes near them.
LENGTHS: Mapping[str, int] = {
    "num_hidden_layers": 2_000, "num_labels": 1_000_000, "num_local_experts": 100_000,
    "n_routed_experts": 100_000, "num_experts": 100_000, "moe_num_experts": 100_000,
}  # fmt: skip
LARGEST = 2**63
# Not attributes of transformers' class, but of its objects.
PRIVATE = frozenset({"_heterogeneity_spec", "_rope_type_labels"})
# Model types that transformers does not know, of models that are ones of another that it knows.
ALIASES: Mapping[str, str] = {"kimi_k2": "deepseek_v3"}


def find_class(config: Any) -> Any:
    """Find transformers' class of causal language models for a text config.

    Raises:
        Unsupported: there is none.
    """
    import transformers
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    # Some text models are mapped only as parts of others; their class is named after the config.
    stem = type(config).__name__.removesuffix("Config").removesuffix("Text")
    if found := getattr(transformers, f"{stem}ForCausalLM", None):
        return found
    raise Unsupported(
        f"transformers {transformers.__version__} has no causal language model for "
        f"{config.model_type}"
    )


def read_text_config(given: Mapping[str, Any]) -> Any:
    """Return transformers' config of the text model that ``config.json`` describes.

    Raises:
        InputError: transformers refuses the config.
        Unsupported: transformers does not know the model type.
    """
    import transformers
    from transformers import CONFIG_MAPPING

    kind = str(given.get("model_type"))
    kind = ALIASES.get(kind, kind)
    if kind not in CONFIG_MAPPING:
        code = "; the code that comes with it (auto_map) is never run"
        raise Unsupported(
            f"model type {kind!r:.100} is not known to transformers {transformers.__version__}"
            + (code if given.get("auto_map") else "")
        )
    config = make_transformers_config(kind, given)
    _check_own_parts(config, given)
    try:
        text = config.get_text_config(decoder=True)
    except Exception as error:  # a foreign class
        raise explain_refusal(error) from error
    part = given.get("text_config")
    if not isinstance(text, transformers.PreTrainedConfig):
        raise InputError(f"config.json: text_config is {part!r:.100}, which {kind} does not have")
    if isinstance(part, Mapping):
        _check_own_parts(text, part)
    if text is not config and getattr(config, "is_encoder_decoder", False):
        raise Unsupported(
            f"{kind} is an encoder-decoder model; moe2edge works on decoder-only models"
        )
    if text is not config and given.get("tie_word_embeddings") is not None:
        text.tie_word_embeddings = given["tie_word_embeddings"]
    return text


def make_transformers_config(kind: str, settings: Mapping[str, Any]) -> Any:
    """Return transformers' config of a model type, to run a model.

    Settings of how to run it, such as whether router logits are returned, are transformers' own:
    the loss that it computes from router logits needs layers of one size.

    Raises:
        InputError: transformers refuses a value, such as one of a key that no row reads.
    """
    from transformers import AutoConfig

    check_lengths(settings)
    left_out = ("model_type", *RUN_KEPT)
    # Transformers writes into what it is given.
    kept = {key: _decode(copy.deepcopy(v)) for key, v in settings.items() if key not in left_out}
    try:
        with silence_transformers():
            return AutoConfig.for_model(kind, **kept)
    except MemoryError:
        raise
    except Exception as error:  # a foreign class: any error of its own is one of the config
        raise explain_refusal(error) from error


def _check_own_parts(config: Any, given: Mapping[str, Any]) -> None:
    """Refuse names of methods, and of what all of the classes of transformers consist of.

    A property is an older or another name of a setting, and other attributes are settings.
    """
    from transformers import PreTrainedConfig

    kind = type(config)
    found = {key: getattr(kind, key, None) for key in given}
    settings = {
        key
        for key, value in found.items()
        if isinstance(value, property) or not (callable(value) or hasattr(PreTrainedConfig, key))
    }
    known = {field.name for field in fields(kind)} | set(kind.attribute_map) | settings
    check_no_part(kind, given, known | INERT | RUN | set(FIXED))


def check_no_part(kind: Any, given: Mapping[str, Any], known: Set[str]) -> None:
    """Refuse names of methods and other parts of transformers' class, which they would replace.

    Raises:
        Unsupported: names the key.
    """
    for key in given:
        if key not in known and (hasattr(kind, key) or key in PRIVATE):
            raise Unsupported(
                f"config.json: {key} is the name of a part of transformers' {kind.__name__}, "
                "which a setting of that name would replace; leave it out"
            )


def check_lengths(settings: Mapping[str, Any]) -> None:
    """Refuse numbers of more than 64 bits, and lengths that no model has, wherever they are.

    Raises:
        InputError: names the key.
    """
    left: list[tuple[str, Any]] = [(str(key), value) for key, value in settings.items()]
    while left:
        key, value = left.pop()
        if isinstance(value, Mapping):
            left += [(f"{key}.{name}", one) for name, one in value.items()]
        elif isinstance(value, list):
            left += [(key, one) for one in value]
        elif isinstance(value, int):
            limit = LENGTHS.get(key.rpartition(".")[2], LARGEST - 1)
            if abs(value) > limit:
                most = f"at most {limit}" if limit < LARGEST - 1 else "a number of at most 64 bits"
                raise InputError(f"config.json: {key} is {value!r:.100}, expected: {most}")


def explain_refusal(error: Exception) -> InputError:
    """Make the error for a config that transformers refuses."""
    return InputError(f"config.json: transformers refuses it: {join_lines(error)}")


@contextmanager
def silence_transformers() -> Iterator[None]:
    """Keep transformers from printing notices about single values."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)


def _decode(value: Any) -> Any:
    """Return a value with the infinities and NaN that transformers writes as objects."""
    if isinstance(value, dict):
        if set(value) == {"__float__"}:
            return float(value["__float__"])
        return {key: _decode(one) for key, one in value.items()}
    return [_decode(one) for one in value] if isinstance(value, list) else value


def is_pad_token(token: Any, vocabulary: int) -> bool:
    """Return whether an embedding table can have this padding row, None or counted from the end.

    Tokenizers that got a pad token of their own have one behind the table. Padding rows only matter
    in training.
    """
    return token is None or -vocabulary <= token < vocabulary
