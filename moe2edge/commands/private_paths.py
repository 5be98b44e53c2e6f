"""Paths of the user, which reports, cards and decisions do not tell."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from moe2edge.calibration.sources import TextSource
from moe2edge.options import Options
from moe2edge.pipeline.recipe import Recipe
from moe2edge.storage.checkpoint import Checkpoint

_Options = TypeVar("_Options", bound=Options)


@dataclass(frozen=True)
class PrivatePaths:
    """Paths as a user gave them, each with the name that stands for it in what is written.

    Attributes:
        names: the name for each path.
        source: name for the source.
        are_kept: whether paths are written as they were given.
    """

    names: Mapping[str, str]
    source: str
    are_kept: bool = False

    @classmethod
    def collect(cls, checkpoint: Checkpoint, recipe: Recipe, *, keep: bool) -> PrivatePaths:
        """Collect the paths of a run; with ``keep`` they are written as they were given."""
        if keep:
            return cls({}, checkpoint.source, True)
        sections = (recipe.calibration, recipe.evaluation, recipe.training)
        options = [
            value for step in recipe.passes for value in dict(step).values()
            if isinstance(value, str)
        ]  # fmt: skip
        return cls.collect_from(checkpoint, [one for one in sections if one is not None], options)

    @classmethod
    def collect_from(
        cls, checkpoint: Checkpoint, sections: Iterable[TextSource], options: Iterable[str] = ()
    ) -> PrivatePaths:
        """Collect the paths of a source, of texts, and of whatever options name files."""
        names = {checkpoint.source: checkpoint.name, str(checkpoint.folder): checkpoint.name}
        for section in sections:
            given = (section.text, *(named.text for named in section.sources.values()))
            names |= _name_files(given)
        names |= _name_files(options)
        # A bare name tells no place.
        named = {path: name for path, name in names.items() if Path(path).parts[1:]}
        return cls(named, checkpoint.name)

    @cached_property
    def _pattern(self) -> re.Pattern[str] | None:
        """Pattern of the paths, none of them in the middle of another; None if there are none."""
        longest_first = sorted(self.names, key=len, reverse=True)
        paths = "|".join(re.escape(path) for path in longest_first)
        return re.compile(rf"(?<![\w./\\-])(?:{paths})") if paths else None

    def hide(self, data: Any) -> Any:
        """Return plain data with the name in place of each path, in all its texts."""
        if isinstance(data, str):
            pattern = self._pattern
            return pattern.sub(lambda found: self.names[found[0]], data) if pattern else data
        if isinstance(data, Mapping):
            return {self.hide(key): self.hide(value) for key, value in data.items()}
        if isinstance(data, (list, tuple)):
            return type(data)(self.hide(value) for value in data)
        return data

    def hide_in(self, recipe: Recipe) -> Recipe:
        """Return a recipe with the name in place of each path, to be rendered and not to be run."""
        training = recipe.training
        return replace(
            recipe,
            calibration=self._hide_in_section(recipe.calibration),
            evaluation=self._hide_in_section(recipe.evaluation),
            training=None if training is None else self._hide_in_section(training),
            passes=tuple(self._hide_in_options(step) for step in recipe.passes),
        )

    def _hide_in_section(self, section: TextSource) -> TextSource:
        sources = {name: self._hide_in_options(own) for name, own in section.sources.items()}
        return self._hide_in_options(section).model_copy(update={"sources": sources})

    def _hide_in_options(self, options: _Options) -> _Options:
        texts = {key: value for key, value in dict(options).items() if isinstance(value, str)}
        return options.model_copy(update={key: self.hide(value) for key, value in texts.items()})


def _name_files(texts: Iterable[str]) -> dict[str, str]:
    """Return the names of the files in texts, each a path or a mix of paths with weights."""
    found = {}
    for text in texts:
        for entry in (text, *(part.strip() for part in text.split(","))):
            # A mix is split, unless there is a file with this name as a whole.
            for path in (entry, entry.rpartition(":")[0]):
                if path and Path(path).name != path and _is_file(path):
                    found[path] = Path(path).name
    return found


def _is_file(path: str) -> bool:
    try:
        return Path(path).expanduser().exists()
    except (OSError, RuntimeError, ValueError):
        return False
