"""Recipes: the passes for a model and their texts, parsed strictly and rendered in full."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from reprlib import Repr
from typing import Any

import yaml
from pydantic import ValidationError

from moe2edge.calibration.sources import NamedText, TextSource
from moe2edge.errors import InputError, suggest
from moe2edge.model.model import Model
from moe2edge.pipeline import registry
from moe2edge.pipeline.contract import Pass
from moe2edge.storage.text_files import read_bytes, read_yaml

BUNDLED = Path(__file__).parents[1] / "recipes"
# Shortens values in messages: a few lines of YAML with aliases can expand to gigabytes.
SHOWN = Repr()
SHOWN.maxlevel = 2
SHOWN.maxstring = SHOWN.maxother = SHOWN.maxlong = 100


@dataclass(frozen=True)
class Recipe:
    """A parsed recipe.

    Attributes:
        calibration: text that passes read for calibration.
        evaluation: held-out text that the report is about.
        passes: the steps, in order.
        training: text that passes train on; None if none does.
        calibrates_targets: whether a target reads the calibration text, too.
        narrows_head: whether all targets hold a head in 8 bits, so that this is the default.
    """

    calibration: TextSource
    evaluation: TextSource
    passes: tuple[Pass, ...]
    training: TextSource | None = None
    calibrates_targets: bool = False
    narrows_head: bool = False

    @property
    def needs_calibration(self) -> bool:
        """True if a pass or a target reads the calibration text."""
        return self.calibrates_targets or any(step.needs_tokens for step in self.passes)

    def resolve(self, model: Model) -> Recipe:
        """Return the recipe with every choice of its passes that depends on ``model`` made."""
        passes = list(self.passes)
        # A head is quantized once, and nothing may train it afterwards.
        last = max((n for n, step in enumerate(passes) if step.computes_numbers), default=None)
        if self.narrows_head and last is not None:
            passes[last] = passes[last].narrow_head(model)
        return replace(self, passes=tuple(step.resolve(model) for step in passes))

    def render(self) -> str:
        """Render the recipe as YAML with every default; parsing it gives the same recipe."""
        data = {
            "calibration": self.calibration.model_dump(),
            "evaluation": self.evaluation.model_dump(),
            **({"training": self.training.model_dump()} if self.training else {}),
            "passes": [{p.name: p.model_dump(by_alias=True)} for p in self.passes],
        }
        text: str = yaml.safe_dump(data, sort_keys=False)
        return text


# In bytes; the largest have a rule for each tensor.
LARGEST_RECIPE = 16 << 20
DEFAULT_EVALUATION = {"samples": 32}


def list_bundled() -> dict[str, Path]:
    """Return the recipes that come with moe2edge, by name."""
    return {path.stem: path for path in sorted(BUNDLED.glob("*.yaml"))}


def find(name_or_path: str) -> str:
    """Read the text of a bundled recipe or of a file.

    Raises:
        InputError: there is neither.
    """
    try:
        path = list_bundled().get(name_or_path) or Path(name_or_path).expanduser()
        if path.is_file():
            return read_bytes(path, LARGEST_RECIPE).decode()
    # The last: there is no such user's home.
    except (InputError, OSError, UnicodeDecodeError, RuntimeError) as error:
        reason = str(error)[:100]
        raise InputError(f"recipe {name_or_path[:100]} cannot be read: {reason}") from error
    raise InputError(suggest("recipe", name_or_path, list_bundled()) + ", or a file")


def parse(text: str, settings: Sequence[str] = ()) -> Recipe:
    """Parse a recipe.

    Args:
        text: YAML.
        settings: overrides such as ``gptq.group_size=64`` or ``calibration.samples=16``.

    Raises:
        InputError: with the place, what was found and what was expected.

    >>> parse("passes: [gptq]").passes[0].bits
    4
    """
    data = read_yaml(text, "the recipe")
    if not isinstance(data, dict):
        raise InputError("a recipe is a mapping: calibration, evaluation, training, passes")
    known = ("calibration", "evaluation", "training", "passes")
    for key in data:
        if key not in known:
            raise InputError(suggest("key in the recipe", str(key), known))
    steps = [_entry(entry) for entry in _list(data.get("passes"))]
    sections = {
        "calibration": dict(_mapping("calibration", data.get("calibration"))),
        "evaluation": DEFAULT_EVALUATION | dict(_mapping("evaluation", data.get("evaluation"))),
        "training": dict(_mapping("training", data.get("training"))),
    }
    for setting in settings:
        _override(setting, sections, steps)
    texts = {name: parse_section(name, options) for name, options in sections.items()}
    passes = tuple(_build(registry.find_pass(name), name, options) for name, options in steps)
    trains = any(step.needs_training_text for step in passes)
    if not trains and sections["training"]:
        raise InputError(
            "training is given, but no pass of the recipe trains; leave it out, or add a pass that "
            "does, such as recover"
        )
    return Recipe(
        texts["calibration"],
        texts["evaluation"],
        passes,
        texts["training"] if trains else None,
    )


def parse_section(name: str, options: Mapping[str, Any]) -> TextSource:
    """Parse a text section of a recipe, or options given elsewhere.

    Raises:
        InputError: an option is unknown or wrong.
    """
    named = {
        str(key): _build(NamedText, f"{name}.sources.{key}", _mapping(f"{name}.sources.{key}", own))
        for key, own in _mapping(f"{name}.sources", options.get("sources")).items()
    }
    found: TextSource = _build(TextSource, name, {**options, "sources": named})
    return found


def _list(value: object) -> list[Any]:
    if not isinstance(value, list):
        raise InputError(
            "the recipe needs 'passes', a list of passes ([] exports the model unchanged)"
        )
    return value


def _mapping(name: str, value: object) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InputError(
            f"{name}: expected options, such as {{seed: 1}}, found {SHOWN.repr(value)}"
        )
    return value


def _entry(entry: object) -> tuple[str, dict[str, Any]]:
    """Parse a pass: ``name`` or ``name: {option: value}``."""
    if isinstance(entry, str):
        return entry, {}
    if isinstance(entry, dict) and len(entry) == 1:
        ((name, options),) = entry.items()
        return str(name), dict(_mapping(str(name), options))
    raise InputError(f"a pass is a name, or a name with options; found {SHOWN.repr(entry)}")


def _override(
    setting: str, sections: dict[str, dict[str, Any]], steps: list[tuple[str, dict[str, Any]]]
) -> None:
    """Carry out one ``--set``."""
    path, equals, value = setting.partition("=")
    name, dot, option = path.strip().partition(".")
    shown = f"--set {' '.join(setting.split())[:100]}"
    if not equals or not dot or not option:
        raise InputError(f"{shown}: expected name.option=value, as in gptq.group_size=64")
    places = [options for step, options in steps if step == name]
    places += [sections[name]] if name in sections else []
    if not places:
        names = {*sections, *(step for step, _ in steps)}
        raise InputError(f"{shown}: {suggest('part of the recipe', name, names)}")
    if len(places) > 1:
        raise InputError(
            f"{shown} is ambiguous: the recipe has {name} {len(places)} times; edit the recipe file"
        )
    places[0][option] = read_yaml(value, f"{shown}: the value")


def _build(kind: type[Any], name: str, options: Mapping[str, Any]) -> Any:
    """Validate options; the first fault becomes one line."""
    known = _options(kind)
    for key in options:
        if key not in known:
            raise InputError(suggest(f"option of {name}", str(key), known))
    try:
        return kind.model_validate(options)
    except ValidationError as error:
        first = error.errors()[0]
        # In an entry of a list, name the whole path to the option; elsewhere types follow.
        inside = len(first["loc"]) > 2 and isinstance(first["loc"][1], int)
        place = ".".join([name, *(str(part) for part in first["loc"][: 3 if inside else 1])])
        if first["type"] == "extra_forbidden":
            raise InputError(f"{place} is not an option") from error
        if first["type"] == "missing":
            raise InputError(f"{place} is missing: {_describe(kind, first['loc'])}") from error
        message = first["msg"].removeprefix("Value error, ")
        message = message.removeprefix("Input should be ").replace("Input should", "it should")
        if not first["loc"]:  # the fault of several options together
            raise InputError(f"{name}: {message}") from error
        found = SHOWN.repr(first["input"])
        raise InputError(f"{place} is {found}, expected: {message}") from error


def _options(kind: type[Any]) -> dict[str, Any]:
    """Return the fields by their names in recipes."""
    return {field.alias or key: field for key, field in kind.model_fields.items()}


def _describe(kind: type[Any], place: tuple[int | str, ...]) -> str:
    described = _options(kind)[str(place[0])].description if len(place) == 1 else None
    return described or "it has no default"


def build_json_schema() -> dict[str, Any]:
    """Build the JSON Schema of recipes, for editors: options, types and defaults of every pass."""
    definitions: dict[str, Any] = {}
    choices: list[dict[str, Any]] = []
    for name in registry.list_passes():
        schema = registry.find_pass(name).model_json_schema()
        definitions |= schema.pop("$defs", {})
        definitions[name] = schema
        ref = {"$ref": f"#/$defs/{name}"}
        if not schema.get("required"):
            choices.append({"const": name})
        choices.append(
            {
                "type": "object",
                "properties": {name: ref},
                "required": [name],
                "additionalProperties": False,
            }
        )
    text = TextSource.model_json_schema()
    definitions |= text.pop("$defs", {})
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "moe2edge recipe",
        "type": "object",
        "properties": {
            "calibration": text,
            "evaluation": text,
            "training": text,
            "passes": {"type": "array", "items": {"anyOf": choices}},
        },
        "required": ["passes"],
        "additionalProperties": False,
        "$defs": definitions,
    }
