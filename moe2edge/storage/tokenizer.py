"""Tokenizer, end tokens and context length of a model in a folder."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from moe2edge.errors import InputError, get_first_line
from moe2edge.storage.generation_config import parse_stop_ids, read_generation_config
from moe2edge.storage.text_files import read_bytes, read_json

TOKENIZER, CONFIG, SENTENCEPIECE = "tokenizer.json", "tokenizer_config.json", "tokenizer.model"
VOCABULARIES = (TOKENIZER, SENTENCEPIECE, "vocab.json", "vocab.txt")
# What transformers may read of a tokenizer as JSON.
ADDED = "added_tokens.json"
JSON_FILES = (TOKENIZER, CONFIG, "vocab.json", "special_tokens_map.json", ADDED)
# Several times the largest vocabularies.
LARGEST_VOCABULARY = 128 << 20
# A line of a vocabulary in tiktoken's format.
_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+=* \d+\s")

# Texts that kinds of tokenizers cut differently: spaces, digits, scripts, case, line breaks.
RECORDED_TEXTS = (
    "Hello world, it's 2024!",
    " a leading space",
    "tabs\tand\n\n  two lines   and spaces  ",
    "def read(path: str) -> dict[str, int]:\n    return {'a': 12345678}\n",
    "na\u00efve caf\u00e9, \u4f60\u597d, \u041f\u0440\u0438\u0432\u0435\u0442, \U0001f600",
    "e\u0301 \ufb01 \u00a0x",
    "ALL CAPS and CamelCase_with_underscores",
)


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer of a folder, from its own files only; no code of it is executed.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    # Without a vocabulary transformers may silently make an empty tokenizer.
    if not has_tokenizer(folder):
        raise InputError(
            f"{folder} has no tokenizer (none of {', '.join(VOCABULARIES)}); copy the "
            "tokenizer files of the source model"
        )
    for name in JSON_FILES:
        if (folder / name).exists():
            _check_kinds(folder, name, read_json(folder / name))
    _check_sentencepiece(folder)
    # Without tokenizer_config.json transformers uses the family's default class, which may build
    # another tokenizer than tokenizer.json describes (seen with transformers 5.23).
    bare = (folder / TOKENIZER).is_file() and not (folder / CONFIG).is_file()
    kind: Any = PreTrainedTokenizerFast if bare else AutoTokenizer

    def load() -> Any:
        return kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False)

    loaded, reason = _run_foreign(load)
    if reason:
        raise InputError(f"the tokenizer in {folder} cannot be read: {_explain(folder, reason)}")
    return loaded


def _check_kinds(folder: Path, name: str, found: Mapping[str, Any]) -> None:
    """Refuse values of another kind than transformers expects, whose own errors do not name them.

    Raises:
        InputError: names file, key and value.
    """
    key, expected = "", ""
    if name == ADDED:
        key = next((key for key, value in found.items() if type(value) is not int), "")
        expected = "an id"
    elif name == CONFIG and not isinstance(found.get("tokenizer_class", ""), str | None):
        key, expected = "tokenizer_class", "the name of a class"
    elif name == CONFIG and not _are_templates(found.get("chat_template")):
        key, expected = "chat_template", "a text, or a list of objects with name and template"
    if expected and key:
        raise InputError(
            f"the tokenizer in {folder} cannot be read: {key[:60]!r} in {name} is "
            f"{repr(found[key])[:60]}, expected: {expected}; correct it, or take it out"
        )


def _are_templates(value: Any) -> bool:
    """Return whether a value is one chat template, several by name, or none."""
    if isinstance(value, dict):
        return all(isinstance(one, str) for one in value.values())
    if isinstance(value, list):
        keys = ("name", "template")
        return all(
            isinstance(one, dict) and all(isinstance(one.get(key), str) for key in keys)
            for one in value
        )
    return value is None or isinstance(value, str)


def has_tokenizer(folder: Path) -> bool:
    """Return whether a folder has a vocabulary of any kind."""
    return any((folder / name).is_file() for name in VOCABULARIES)


def _run_foreign(run: Callable[[], Any]) -> tuple[Any, str]:
    """Call a library that reads the files of a tokenizer; return its result, or why it failed.

    The libraries raise every kind of error for a file that they cannot read, the bare Exception
    among them, and a panic of compiled code, which is none.
    """
    try:
        return run(), ""
    except Exception as error:
        reason = get_first_line(error)
        # The text of these is a key, or about the code of the library alone.
        if isinstance(error, KeyError | AttributeError | TypeError | IndexError):
            reason = f"{type(error).__name__}: {reason}"
        return None, reason or type(error).__name__
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        return None, get_first_line(Exception(*error.args)) or "panic"


def _explain(folder: Path, reason: str) -> str:
    """Say why a tokenizer cannot be read, and what to do."""
    if (folder / TOKENIZER).is_file():
        wrong = _run_foreign(lambda: _read_tokenizer_file(folder))[1]
        if wrong:
            return (
                f"tokenizers {version('tokenizers')} refuses {TOKENIZER} ({wrong}); it is damaged: "
                "download it again; or made by a newer version: pip install --upgrade tokenizers "
                "transformers"
            )
    elif (folder / SENTENCEPIECE).is_file():
        # The reason would be that of the last of several readers, which is for another format.
        return (
            f"{SENTENCEPIECE} is no SentencePiece model that transformers can convert, or does not "
            f"fit {CONFIG}; download both again, or give {TOKENIZER} instead"
        )
    if "custom code" in reason or "trust_remote_code" in reason:
        return f"{CONFIG} asks for code of its own, which is never run; give {TOKENIZER} instead"
    return f"{reason}; download its files again"


def _read_tokenizer_file(folder: Path) -> Any:
    """Read ``tokenizer.json`` as runtimes without transformers do."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(folder / TOKENIZER))


def _check_sentencepiece(folder: Path) -> None:
    """Check that ``tokenizer.model``, where it is the only vocabulary, can be read.

    Without the package transformers tries other formats, and its message is about the last one.

    Raises:
        InputError: it is of another format, or the package that reads it is missing.
    """
    path = folder / SENTENCEPIECE
    if (folder / TOKENIZER).exists() or not path.exists():
        return
    begin = read_bytes(path, LARGEST_VOCABULARY)[:1000]
    if _TIKTOKEN_LINE.match(begin):
        raise InputError(
            f"the tokenizer in {folder} cannot be read: {SENTENCEPIECE} holds no SentencePiece "
            f"model but a list of ranks; give {TOKENIZER} instead, as the model's own folder on "
            "the hub may have it"
        )
    if find_spec("sentencepiece") is None:
        raise InputError(
            f"the tokenizer in {folder} cannot be read: {SENTENCEPIECE} needs the package "
            f"sentencepiece: pip install sentencepiece; or give {TOKENIZER} instead"
        )


def encode_text(tokenizer: Any, text: str, *, special: bool = True) -> list[int]:
    """Return the ids of a text, with the special tokens that the tokenizer adds or without.

    Raises:
        InputError: the tokenizer cannot encode it, such as for want of an unknown token.
    """
    ids: list[int] = call_tokenizer(tokenizer, text, add_special_tokens=special)["input_ids"]
    return ids


def call_tokenizer(tokenizer: Any, text: str, **options: Any) -> Any:
    """Call a tokenizer of transformers.

    Raises:
        InputError: as for `encode_text`.
    """
    found, reason = _run_foreign(lambda: tokenizer(text, verbose=False, **options))
    if reason:
        raise InputError(
            f"the tokenizer cannot encode {text[:50]!r}: {reason}; download its files again, or "
            "give another text"
        )
    return found


# ---- two readers ---------------------------------------------------------------------------------


def compare_readers(tokenizer: Any, folder: Path) -> list[str]:
    """Compare the ids that transformers gives with those of ``tokenizer.json`` alone.

    Runtimes without transformers read ``tokenizer.json`` and nothing else.

    Args:
        tokenizer: the tokenizer of the folder, of transformers.
        folder: the folder.

    Returns:
        The differences in words, none if both are the same.
    """
    if not (folder / TOKENIZER).is_file():
        return []
    other, reason = _run_foreign(lambda: _read_tokenizer_file(folder))
    if reason:
        return [f"{TOKENIZER} cannot be read by itself, as other runtimes do: {reason}"]
    said = []
    if other.truncation is not None:
        said.append(
            f"{TOKENIZER} cuts texts after {other.truncation['max_length']} tokens where a runtime "
            "reads it by itself; transformers does not"
        )
    if other.padding is not None:
        said.append(
            f"{TOKENIZER} pads texts where a runtime reads it by itself; transformers does not"
        )
    other.no_truncation()
    other.no_padding()
    added = sorted(tokenizer.get_added_vocab(), key=lambda token: (len(token), token))[:100]
    for text in (*RECORDED_TEXTS, *(f"a{token}b" for token in added)):
        try:
            mine, plain = (encode_text(tokenizer, text, special=yes) for yes in (True, False))
        except InputError:  # it knows only a few words
            continue
        theirs = _encode(other, text, special=True)
        if mine == theirs:
            continue
        same = plain == _encode(other, text, special=False)
        what = "adds other special tokens" if same else "gives other ids"
        said.append(
            f"{TOKENIZER} by itself, as runtimes without transformers read it, {what} than "
            f"transformers with {CONFIG}: {text[:60]!r} is {_shorten_ids(theirs)}, not "
            f"{_shorten_ids(mine)}; this export uses the latter"
        )
        break
    return said


def _encode(raw: Any, text: str, *, special: bool) -> list[int]:
    ids, _ = _run_foreign(lambda: raw.encode(text, add_special_tokens=special).ids)
    return list(ids or [])


def _shorten_ids(ids: Sequence[int]) -> str:
    return str(list(ids)) if len(ids) <= 8 else f"[{', '.join(map(str, ids[:8]))}, ...]"


def find_foreign_tokens(tokenizer: Any, vocabulary: int) -> list[str]:
    """Find tokens whose ids a model of ``vocabulary`` entries does not have, in order of ids."""
    ids = {index: token for token, index in tokenizer.get_vocab().items() if index >= vocabulary}
    return [ids[index] for index in sorted(ids)]


# ---- settings ------------------------------------------------------------------------------------


def read_stop_ids(folder: Path, config: Mapping[str, Any] | None = None) -> frozenset[int]:
    """Read the end tokens from ``generation_config.json`` in a folder, else from its config.

    Args:
        folder: an output folder or a checkpoint.
        config: its ``config.json``; None: read it, if there is one.

    Raises:
        InputError: ``eos_token_id`` is neither a token nor a list of tokens, or the generation
            config is wrong.
    """
    found = parse_stop_ids(read_generation_config(folder), "generation_config.json")
    if found is None:
        if config is None:
            place = folder / "config.json"
            config = read_json(place) if place.is_file() else {}
        found = parse_stop_ids(config, "config.json")
    return found or frozenset()


def read_context_length(config: Mapping[str, Any]) -> int | None:
    """Read the number of tokens that a model can hold from its config; None if not given."""
    length = config.get("max_position_embeddings")
    return length if type(length) is int else None
