"""Configs and classes of transformers, as it finds them for a ``config.json``."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from moe2edge.errors import InputError, Unsupported, join_lines
from moe2edge.model.config_keys import RUN_KEPT

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
    try:
        text = config.get_text_config(decoder=True)
    except Exception as error:  # a foreign class
        raise explain_refusal(error) from error
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
