"""Find a pass or a target by name: the file name is the name, so there is nothing to register.

Names of targets have hyphens where those of their files have underscores.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import pkgutil
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

import moe2edge.passes
import moe2edge.targets
from moe2edge.errors import InputError, suggest
from moe2edge.pipeline.contract import Pass
from moe2edge.pipeline.target import Target, get_target_name
from moe2edge.storage.text_files import read_yaml

Base = TypeVar("Base")


def list_passes() -> list[str]:
    """Return the names of all passes.

    >>> "gptq" in list_passes()
    True
    """
    return _public(moe2edge.passes.__path__)


def list_targets() -> list[str]:
    """Return the names of all targets.

    >>> "compressed-tensors" in list_targets()
    True
    """
    return [get_target_name(file) for file in _public(moe2edge.targets.__path__)]


def find_pass(name: str) -> type[Pass]:
    """Return the pass in the file ``name``.

    Raises:
        InputError: there is none; names the nearest.
    """
    if name not in list_passes():
        raise InputError(suggest("pass", name, list_passes()))
    return _only(f"moe2edge.passes.{name}", Pass)


def find_target(name: str) -> Target:
    """Return the target in the file ``name``, with its default options.

    Raises:
        InputError: there is none; names the nearest.
    """
    return make_target(name, {})


def make_target(name: str, options: Mapping[str, object]) -> Target:
    """Make the target in the file ``name`` with some of its options: the fields of its class.

    Raises:
        InputError: there is no such target or option, or a value is not one of the option's.

    >>> make_target("onnx", {"accuracy_level": 0})
    Onnx(accuracy_level=0, kv_cache='float32', layout='plain')
    """
    if name not in list_targets():
        raise InputError(suggest("target", name, list_targets()))
    kind = _only(f"moe2edge.targets.{name.replace('-', '_')}", Target)
    known = {field.name for field in dataclasses.fields(kind)}
    hints = get_type_hints(kind) if options else {}
    for option, value in options.items():
        if option not in known:
            if not known:
                raise InputError(f"target {name} has no options, but {option} is given")
            raise InputError(suggest(f"option of target {name}", option, known))
        try:
            TypeAdapter(hints[option]).validate_python(value, strict=True)
        except ValidationError as error:
            expected = error.errors()[0]["msg"].removeprefix("Input should be ")
            raise InputError(f"{name}:{option} is {value!r}, expected: {expected}") from error
    return kind(**options)


def list_options(target: Target) -> dict[str, Any]:
    """Return all options of a target with their values, as `make_target` takes them."""
    return dataclasses.asdict(target)


def list_choices(target: Target) -> dict[str, tuple[object, ...]]:
    """Return the possible values of those options of a target that are one of a few."""
    hints = get_type_hints(type(target))
    names = (field.name for field in dataclasses.fields(target))
    return {name: get_args(hints[name]) for name in names if get_origin(hints[name]) is Literal}


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


def parse_targets(names: str) -> list[Target]:
    """Parse the targets of ``-t``: names separated by commas, each with ``:option=value`` after it.

    Raises:
        InputError: a name or an option is unknown or given twice, or a value is not one of its.
    """
    entries = [entry.strip() for entry in names.split(",") if entry.strip()]
    wanted = [entry.partition(":")[0].strip() for entry in entries]
    if not wanted or len(set(wanted)) != len(wanted):
        raise InputError(f"-t {names!r}: expected one or more of {list_targets()}")
    return [
        make_target(name, _target_options(entry))
        for name, entry in zip(wanted, entries, strict=True)
    ]


def _target_options(entry: str) -> dict[str, Any]:
    """Parse the options of one target, as in ``onnx:accuracy_level=0``."""
    found: dict[str, Any] = {}
    for setting in entry.split(":")[1:]:
        option, equals, value = (part.strip() for part in setting.partition("="))
        if not option or not equals or not value or option in found:
            raise InputError(
                f"-t {entry!r}: expected NAME:option=value, each option once, as in "
                "onnx:accuracy_level=0"
            )
        found[option] = read_yaml(value, f"-t {entry!r}: the value of {option}")
    return found
