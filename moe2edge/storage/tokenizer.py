"""Tokenizer, end tokens and context length of a model in a folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe2edge.errors import InputError
from moe2edge.storage.text_files import read_json

CONFIG = "tokenizer_config.json"
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer of a folder, from its own files only; no code of it is executed.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    # Without a vocabulary transformers may silently make an empty tokenizer.
    if not any((folder / name).is_file() for name in VOCABULARIES):
        raise InputError(
            f"{folder} has no tokenizer (none of {', '.join(VOCABULARIES)}); copy the "
            "tokenizer files of the source model"
        )
    for name in ("tokenizer.json", CONFIG, "vocab.json"):
        if (folder / name).is_file():
            read_json(folder / name)
    # Without tokenizer_config.json transformers uses the family's default class, which may build
    # another tokenizer than tokenizer.json describes (seen with transformers 5.23).
    bare = (folder / "tokenizer.json").is_file() and not (folder / CONFIG).is_file()
    kind: Any = PreTrainedTokenizerFast if bare else AutoTokenizer
    try:
        return kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"the tokenizer in {folder} cannot be read: {reason}") from error


def read_stop_ids(folder: Path, config: Mapping[str, Any] | None = None) -> frozenset[int]:
    """Read the end tokens from ``generation_config.json`` in a folder, else from its config.

    Args:
        folder: an output folder or a checkpoint.
        config: its ``config.json``; None: read it, if there is one.

    Raises:
        InputError: ``eos_token_id`` is neither a token nor a list of tokens.
    """
    path = folder / "generation_config.json"
    found = read_json(path).get("eos_token_id") if path.is_file() else None
    place = path.name
    if found is None:
        place = "config.json"
        if config is None:
            config = read_json(folder / place) if (folder / place).is_file() else {}
        found = config.get("eos_token_id")
    tokens = [] if found is None else found if isinstance(found, list) else [found]
    if not all(type(token) is int and token >= 0 for token in tokens):
        raise InputError(f"eos_token_id in {place} is {found!r}, not a token or a list of tokens")
    return frozenset(tokens)


def read_context_length(config: Mapping[str, Any]) -> int | None:
    """Read the number of tokens that a model can hold from its config; None if not given."""
    length = config.get("max_position_embeddings")
    return length if type(length) is int else None
