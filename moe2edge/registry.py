"""Find a pass or a target by name: the file name is the name, so there is nothing to register."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable
from typing import TypeVar

import moe2edge.passes
import moe2edge.targets
from moe2edge.errors import InputError, did_you_mean
from moe2edge.pipeline import Pass
from moe2edge.target import Target

Base = TypeVar("Base")


def pass_names() -> list[str]:
    """Names of all passes.

    >>> "gptq" in pass_names()
    True
    """
    return _public(moe2edge.passes.__path__)


def target_names() -> list[str]:
    """Names of all targets.

    >>> target_names()
    ['gptq', 'hf', 'onnx']
    """
    return _public(moe2edge.targets.__path__)


def pass_type(name: str) -> type[Pass]:
    """The pass in the file ``name``.

    Raises:
        InputError: there is none; names the nearest.
    """
    if name not in pass_names():
        raise InputError(did_you_mean("pass", name, pass_names()))
    return _only(f"moe2edge.passes.{name}", Pass)


def target(name: str) -> Target:
    """The target in the file ``name``, with its default settings.

    Raises:
        InputError: there is none; names the nearest.
    """
    if name not in target_names():
        raise InputError(did_you_mean("target", name, target_names()))
    return _only(f"moe2edge.targets.{name}", Target)()


def name_of(thing: object) -> str:
    """Name of a pass or target (instance or class): that of its file."""
    kind = thing if isinstance(thing, type) else type(thing)
    return kind.__module__.rpartition(".")[2]


def _public(path: Iterable[str]) -> list[str]:
    return sorted(m.name for m in pkgutil.iter_modules(path) if not m.name.startswith("_"))


def _only(module_name: str, base: type[Base]) -> type[Base]:
    module = importlib.import_module(module_name)
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, base)
        and value.__module__ == module_name
        and not value.__name__.startswith("_")
    ]
    if len(found) != 1:
        raise AssertionError(f"{module_name} must define one {base.__name__}, found {found}")
    return found[0]
