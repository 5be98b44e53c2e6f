"""Records of what is kept in a work folder: lines of JSON, each with a digest of its own.

A record holds the digests of the files that it speaks of: of the bytes that were to be written, not
of those that were read back. So whatever a disk or a person changes later is found before it is
used.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from moe2edge.storage.text_files import hash_file, sync_folder

# File in the folder of a pass with one record: of all that counts there.
STATE = "state.json"
# A sealed line ends with this entry, the digest of the same JSON without the entry.
_SEAL = ', "digest": "{}"}}\n'
_SEAL_LENGTH = len(_SEAL.format("0" * 64))


def seal(data: Mapping[str, Any]) -> bytes:
    """Return a line of JSON with a digest of its own; ``data`` is not empty."""
    body = json.dumps(data).encode()
    return body[:-1] + _SEAL.format(hashlib.sha256(body).hexdigest()).encode()


def unseal(line: bytes) -> dict[str, Any] | None:
    """Return what was sealed; None: the line is not what was written."""
    body = line[:-_SEAL_LENGTH] + b"}"
    if line != body[:-1] + _SEAL.format(hashlib.sha256(body).hexdigest()).encode():
        return None
    data: dict[str, Any] = json.loads(body)
    return data


def read_records(path: Path) -> tuple[list[dict[str, Any]], bool]:
    """Read the sound records at the beginning of a file, of which there may be none.

    Returns:
        The records, and whether something behind them is damaged. A last line that was cut short,
        as a kill leaves it, is not.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return [], False
    *lines, last = data.split(b"\n")
    records: list[dict[str, Any]] = []
    for line in lines:
        record = unseal(line + b"\n")
        if record is None:
            return records, True
        records.append(record)
    return records, b'"digest"' in last


def recover_records(path: Path) -> tuple[list[dict[str, Any]], bool]:
    """Read the sound records at the beginning of a file, as `read_records`; remove the rest."""
    records, damaged = read_records(path)
    sound = sum(len(seal(record)) for record in records)
    if path.exists() and path.stat().st_size > sound:
        os.truncate(path, sound)
    return records, damaged


def append_record(path: Path, record: Mapping[str, Any], *, durable: bool = True) -> None:
    """Append a record, and make it durable unless a power loss may cost it."""
    new = not path.exists()
    with path.open("ab") as file:
        file.write(seal(record))
        if durable:
            file.flush()
            os.fsync(file.fileno())
    if new and durable:
        sync_folder(path.parent)


def write_records(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Replace a file of records at once, and make it durable."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        for record in records:
            file.write(seal(record))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def is_sound(path: Path, sha256: str | None) -> bool:
    """Return whether a file is there and holds what was written; None: nothing was."""
    try:
        return sha256 is not None and hash_file(path) == sha256
    except OSError:
        return False


def find_damaged(folder: Path, files: Mapping[str, str]) -> str | None:
    """Find the first of some files, with their digests, that is damaged or missing."""
    return next((name for name in files if not is_sound(folder / name, files[name])), None)
