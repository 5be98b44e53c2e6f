"""Text to tokens: plain text or JSONL, for calibration and for evaluation."""

from __future__ import annotations

import hashlib
import json
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe2edge.checkpoint import BUILTIN_FOLDER
from moe2edge.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.recipe import TextSource


@dataclass(frozen=True)
class Tokens:
    """Samples of equal length, cut from a text.

    Attributes:
        ids: int64 [samples, length].
        name: where the text is from.
        sha256: digest of the ids.
    """

    ids: Tensor
    name: str
    sha256: str


def read_texts(source: TextSource, purpose: str) -> list[str]:
    """Documents of a source: a file of text is one, each line of a JSONL file is one.

    Raises:
        InputError: the file is missing, empty, not Unicode, or a line is not as announced.
    """
    try:
        if source.text == "builtin":
            path = BUILTIN_FOLDER / f"{purpose}.txt"
        else:
            path = Path(source.text).expanduser()
        if not path.is_file():
            raise InputError(
                f"{purpose} text {source.text} does not exist; give a text or JSONL file, or "
                "'builtin'"
            )
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{purpose} text {path} is not UTF-8: {error.reason}") from error
    except OSError as error:
        raise InputError(f"{purpose} text cannot be read: {error.strerror}: {path}") from error
    except RuntimeError as error:  # no such user's home
        raise InputError(f"{purpose} text {source.text} cannot be read: {error}") from error
    texts = _jsonl(path, text, source.field) if path.suffix == ".jsonl" else [text]
    if not any(t.strip() for t in texts):
        raise InputError(f"{purpose} text {path} is empty")
    return texts


def _jsonl(path: Path, text: str, field: str) -> list[str]:
    found = []
    # Not splitlines(): a JSON string may hold U+2028 and other line breaks of Unicode.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row: Any = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path.name}, line {number} is not JSON: {error}") from error
        value = row.get(field) if isinstance(row, dict) else None
        if not isinstance(value, str):
            has = f"it has {', '.join(sorted(row))}" if isinstance(row, dict) else "no object"
            raise InputError(
                f"{path.name}, line {number} has no text in field {field!r} ({has}); "
                "name the field with 'field' in the recipe, such as --set calibration.field=answer"
            )
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"{path.name}, line {number} holds half a character, "
                f"{value[error.start]!a}; mend or remove the line"
            ) from error
        found.append(value)
    return found


def load_tokens(
    source: TextSource, tokenizer: Any, purpose: str, limits: tuple[int, int]
) -> Tokens:
    """Cut the text of ``source`` into samples; which ones is decided by its seed alone.

    Args:
        source: section of the recipe.
        tokenizer: of the model.
        purpose: ``calibration`` or ``evaluation``.
        limits: longest sequence and size of the vocabulary of the model.

    Raises:
        InputError: the text is missing, empty or too short, or samples are too long for the model.
    """
    import numpy as np
    import torch

    longest, vocabulary = limits
    if source.length > longest:
        raise InputError(
            f"{purpose}.length {source.length} is longer than the {longest} positions of the "
            f"model; --set {purpose}.length={longest}"
        )
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    stream = array("q")
    for text in read_texts(source, purpose):
        stream.extend(end)
        stream.extend(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    windows = len(stream) // source.length
    if windows < source.samples:
        remedy = f", or --set {purpose}.samples={windows}" if windows else ""
        raise InputError(
            f"{purpose} text {source.text} is too short: {len(stream):,} tokens, but "
            f"{source.samples} samples of {source.length} need "
            f"{source.samples * source.length:,}; give more text{remedy}"
        )
    chosen = np.random.default_rng(source.seed).permutation(windows)[: source.samples]
    rows = np.frombuffer(stream, np.int64)[: windows * source.length].reshape(windows, -1)
    ids = torch.from_numpy(rows[np.sort(chosen)])
    if int(ids.max()) >= vocabulary:
        raise InputError(
            f"the tokenizer makes id {int(ids.max())}, but the model has {vocabulary} entries; "
            "it is not this model's tokenizer"
        )
    digest = hashlib.sha256(ids.numpy().tobytes()).hexdigest()
    return Tokens(ids, source.text, digest)
