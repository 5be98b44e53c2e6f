"""JSON and YAML files, digests, and files that are never half there."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from moe2edge.errors import InputError

if TYPE_CHECKING:
    pass


class _Loader(yaml.SafeLoader):
    """Plain YAML in which a key stands once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping; YAML itself would let the last of equal keys win."""
        keys = [str(key.value) for key, _ in node.value]
        if twice := {key for key in keys if keys.count(key) > 1}:
            raise yaml.constructor.ConstructorError(
                None, None, f"{min(twice)!r} stands there twice", node.start_mark
            )
        return super().construct_mapping(node, deep)


def read_yaml(text: str, what: str) -> Any:
    """Plain YAML, such as the value of a setting.

    Raises:
        InputError: it is not.
    """
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    # A tag that does not fit its value, such as !!bool x, raises whatever PyYAML stumbles over.
    except (
        yaml.YAMLError,
        ArithmeticError,
        AttributeError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{what} is not YAML as expected: {reason[:300]}") from error


def get_first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        InputError: the file cannot be read or holds something else.
    """
    try:
        data = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{path} is damaged ({get_first_line(error)}); export or download it again"
        ) from error
    if not isinstance(data, dict):
        raise InputError(
            f"{path} is damaged (it holds no JSON object); export or download it again"
        )
    return data


def hash_file(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, data: object) -> None:
    """Write ``data`` as indented JSON."""
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", "utf-8")


def sync_folder(folder: Path) -> None:
    """Make names in a folder durable, where the system can."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_atomically(path: Path, text: str) -> None:
    """Write a file that is never half there; its name is durable after `sync_folder`."""
    beside = path.with_name(path.name + ".tmp")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
