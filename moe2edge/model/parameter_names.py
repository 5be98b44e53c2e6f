"""Names of tensors in files, and the parameters of transformers' model that they become.

Which tensor becomes which parameter is transformers' own knowledge (its conversion mapping); it is
asked here, not written again. Tensors of single experts are put together in one parameter of all.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from moe2edge.errors import Unsupported

NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
# Beginnings of names in files of models of several parts, and of the text model alone, whose table
# of transformers rarely knows the others.
TEXT_PLACES = (("model.language_model.", "model."), ("language_model.", ""))


@dataclass(frozen=True)
class Stored:
    """Form in which a parameter is stored.

    Attributes:
        names: of its tensors in files: for each source of the conversion, in its order, those of
            all experts or the only one.
        steps: names of transformers' operations that make the parameter of them, none if the one
            tensor is the parameter.
    """

    names: tuple[tuple[str, ...], ...]
    steps: tuple[str, ...] = ()

    def names_in_order(self) -> tuple[str, ...]:
        """Return the names of all tensors, in the order in which they are put together."""
        return tuple(name for part in self.names for name in part)

    @property
    def name(self) -> str:
        """Name of the only tensor.

        Raises:
            ValueError: there are several.
        """
        ((name,),) = self.names
        return name


def map_names(model: Any, names: Iterable[str]) -> dict[str, Stored]:
    """Return the stored form of parameters and buffers of a model, by their names in it.

    Args:
        model: transformers' model, on any device.
        names: of the tensors in files. Those that become nothing that the model has are left out.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key

    mapping = get_model_conversion_mapping(model)
    renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
    converters = [one for one in mapping if isinstance(one, WeightConverter)]
    sources = {
        pattern: (n, one) for one in converters for n, pattern in enumerate(one.source_patterns)
    }
    known = model.state_dict()
    found: dict[str, dict[int, list[str]]] = {}
    steps: dict[str, Any] = {}
    rename = _Renamer(renamings, converters, model.base_model_prefix, known)
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename(name)
        if target not in known:
            continue
        number, converter = sources[pattern] if pattern is not None else (0, None)
        found.setdefault(target, {}).setdefault(number, []).append(name)
        steps[target] = converter
    return {
        target: Stored(tuple(tuple(parts[n]) for n in sorted(parts)), _list_steps(steps[target]))
        for target, parts in found.items()
    }


def _list_steps(converter: Any) -> tuple[str, ...]:
    """Return the names of the operations of a conversion."""
    return () if converter is None else tuple(type(step).__name__ for step in converter.operations)


class _Renamer:
    """Transformers' names of the parameters that tensors become.

    Names that differ in numbers only are renamed alike, so each form is asked for once.
    """

    def __init__(
        self, renamings: list[Any], converters: list[Any], prefix: str, known: Mapping[str, Any]
    ) -> None:
        self._asked = (renamings, converters, prefix)
        self._known = known
        self._forms: dict[str, tuple[str, str | None] | None] = {}

    def __call__(self, name: str) -> tuple[str, str | None]:
        """Return the parameter, and the pattern of a conversion that matched."""
        numbers = NUMBER.findall(name)
        form = NUMBER.sub("#", name)
        if form not in self._forms:
            self._forms[form] = self._learn(name, numbers)
        learned = self._forms[form]
        if learned is None:
            return self._ask(name)
        target, pattern = learned
        return target.format(*numbers), pattern

    def _learn(self, name: str, numbers: list[str]) -> tuple[str, str | None] | None:
        """Return a template of the parameter for names of one form; None if there is none."""
        target, pattern = self._ask(name)
        kept = NUMBER.findall(target)
        # Numbers are kept in their order, or those of experts are gone.
        if kept != numbers[: len(kept)] or "{" in target or "}" in target:
            return None
        places = iter(range(len(kept)))
        template = NUMBER.sub(lambda _: f"{{{next(places)}}}", target)
        return template, pattern

    def _ask(self, name: str) -> tuple[str, str | None]:
        from transformers.core_model_loading import rename_source_key

        target, pattern = rename_source_key(name, *self._asked, self._known)
        if target in self._known:
            return target, pattern
        # A rule for older names may also match one that is right already.
        if name in self._known:
            return name, None
        for place, alone in TEXT_PLACES:
            if name.startswith(place):
                return self._ask(alone + name.removeprefix(place))
        return target, pattern


def list_usual_names(model: Any) -> dict[str, Stored]:
    """Return the form in which transformers stores each parameter and buffer of a model.

    Of experts in tensors of their own, only the first is named.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        rename_source_key,
    )

    mapping = get_model_conversion_mapping(model)
    converters = [one for one in mapping if isinstance(one, WeightConverter)]
    back = [one.reverse_transform() for one in mapping[::-1]]
    renamings = [one for one in back if isinstance(one, WeightRenaming)]
    found = {}
    for parameter in model.state_dict():
        names: list[str] = [parameter]
        steps: tuple[str, ...] = ()
        for one in converters:
            # The last rule for a parameter is that of today's files.
            target = one.target_patterns[0].lstrip("^").replace("\\", "")
            if parameter.endswith(target):
                stem = parameter.removesuffix(target)
                sources = (p.replace("\\", "").replace("*", "0") for p in one.source_patterns)
                names, steps = [stem + source for source in sources], _list_steps(one)
        parts = (rename_source_key(name, renamings, [], reverse=True)[0] for name in names)
        found[parameter] = Stored(tuple((name,) for name in parts), steps)
    return found


def check_steps(parameter: str, stored: Stored) -> None:
    """Refuse a parameter that is put together in a way that is not known.

    Raises:
        Unsupported: names the operation.
    """
    known = {(), ("MergeModulelist",), ("MergeModulelist", "Concatenate")}
    if stored.steps not in known:
        raise Unsupported(f"{parameter} is made by {' and '.join(stored.steps)} of its tensors")
