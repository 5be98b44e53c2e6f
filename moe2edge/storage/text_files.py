"""JSON and YAML files, file digests, and atomic writes."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from moe2edge.errors import InputError, Unreadable, get_first_line, join_lines

# Several times the largest tokenizers and indices; a larger file is something else.
LARGEST_JSON = 128 << 20
# What to do about a file that is there and cannot be read; its content may be right.
_RIGHTS = "get the right to read it, and run the same command again"
_OPEN_FILES = "raise the limit on open files (ulimit -n), and run the same command again"
_READ_REMEDIES = {
    errno.EACCES: _RIGHTS,
    errno.EPERM: _RIGHTS,
    errno.EMFILE: _OPEN_FILES,
    errno.ENFILE: _OPEN_FILES,
    errno.ELOOP: "put the file itself in its place",
}
_NOT_THERE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG}
GET_AGAIN = "put it there, or download it again"


class _Loader(yaml.SafeLoader):
    """Loader of plain YAML that refuses duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping; YAML itself would let the last of equal keys win."""
        counts = Counter(str(key.value) for key, _ in node.value)
        if duplicates := [key for key, count in counts.items() if count > 1]:
            raise yaml.constructor.ConstructorError(
                None, None, f"{min(duplicates)!r} is given twice", node.start_mark
            )
        return super().construct_mapping(node, deep)


def read_yaml(text: str, what: str) -> Any:
    """Parse plain YAML, such as the value of a setting.

    Raises:
        InputError: it is not plain YAML.
    """
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    # A tag that does not fit its value, such as !!bool x, raises any of these inside PyYAML.
    except (
        yaml.YAMLError,
        ArithmeticError,
        AttributeError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        raise InputError(f"{what} is not valid YAML: {join_lines(error)}") from error


def find_read_remedy(error: Exception, missing: str = GET_AGAIN) -> str:
    """Say what to do about a file that cannot be read.

    Args:
        error: what reading it failed with.
        missing: what to do where it is not there.
    """
    number = error.errno if isinstance(error, OSError) else None
    if number is None or number in _NOT_THERE:
        return missing
    # It may be there again in a moment: another disk, another host.
    usual = "check the disk or the connection to it, and run the same command again"
    return _READ_REMEDIES.get(number, usual)


def make_read_error(path: Path, error: OSError) -> InputError:
    """Make the error for a file that cannot be read, with what to do about it."""
    kind = InputError if error.errno in _NOT_THERE else Unreadable
    return kind(f"{path} cannot be read: {error.strerror or error}; {find_read_remedy(error)}")


def read_bytes(path: Path, most: int) -> bytes:
    """Read a regular file.

    Raises:
        InputError: it cannot be read, is no regular file, or has more than ``most`` bytes.
    """
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise InputError(f"{path} is not a regular file; put a file in its place")
            # Counted as it is read, because some files of the system say that they are empty.
            data = file.read(most + 1)
    except OSError as error:
        raise make_read_error(path, error) from error
    except ValueError as error:  # a name with a zero byte
        raise InputError(f"{path} cannot be read: {error}; give another name") from error
    if len(data) > most:
        raise InputError(
            f"{path} has {max(found.st_size, len(data)):,} bytes, expected: at most {most:,}; "
            "export or download it again"
        )
    return data


def _open_at_once(name: str, flags: int) -> int:
    """Open a file without waiting, as for the other end of a pipe."""
    return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of at most `LARGEST_JSON` bytes.

    Raises:
        InputError: the file cannot be read or does not hold a JSON object.
    """
    try:
        data = json.loads(read_bytes(path, LARGEST_JSON).decode())
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path} is damaged ({get_first_line(error)}); export or download it again"
        ) from error
    if not isinstance(data, dict):
        raise InputError(
            f"{path} is damaged (it does not hold a JSON object); export or download it again"
        )
    return data


def hash_file(path: Path) -> str:
    """Compute the SHA-256 digest of a regular file.

    Raises:
        InputError: it is none.
    """
    with open(path, "rb", opener=_open_at_once) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise InputError(f"{path} is not a regular file; put a file in its place")
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, data: object) -> str:
    """Write ``data`` as indented JSON; return the SHA-256 of what was to be written."""
    return write_bytes(path, (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode())


def write_bytes(path: Path, data: bytes) -> str:
    """Write a file of an output; return the SHA-256 of what was to be written."""
    path.write_bytes(data)
    return hashlib.sha256(data).hexdigest()


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable, where the system can."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that it is never incomplete; its name is durable after `sync_folder`."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
