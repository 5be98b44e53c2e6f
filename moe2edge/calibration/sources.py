"""Options of text in a recipe: its source, and how it is cut into samples."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from string import Formatter
from typing import Annotated, Self

from pydantic import Field, field_validator, model_validator

from moe2edge.calibration.builtin_texts import BUILTIN_TEXT, DEFAULT_TEXT, GENERAL_TEXT
from moe2edge.options import Options


class NamedText(Options):
    """A text with a name, to be used as a part of mixes."""

    text: Annotated[
        str,
        Field(description="builtin, general, or a file: text, JSON lines, JSON array, parquet"),
    ]
    field: Annotated[
        str | None,
        Field(
            description="field of a JSON row that contains the text or the chat; by default text, "
            "messages or conversations"
        ),
    ] = None
    template: Annotated[
        str | None,
        Field(description="instead of field: a text with fields, such as '{question} {answer}'"),
    ] = None
    chat: Annotated[
        bool | None,
        Field(
            description="true: rows are chats (messages with role and content), and the model's "
            "chat template makes them text; false: they are not; by default each row decides"
        ),
    ] = None
    chat_template: Annotated[
        str | None,
        Field(description="name of the chat template, where the model has several"),
    ] = None

    @field_validator("template")
    @classmethod
    def _template_is_plain(cls, value: str | None) -> str | None:
        if value is not None:
            split_template(value)
        return value

    @model_validator(mode="after")
    def _options_agree(self) -> Self:
        # Recipes that older versions wrote name the default field beside a template.
        if self.template is not None and self.field not in (None, "text"):
            raise ValueError("give field or template, not both")
        if self.template is not None and (self.chat or self.chat_template):
            raise ValueError("give template, or chat with its chat_template, not both")
        if self.chat is False and self.chat_template:
            raise ValueError("chat_template needs chat; leave chat: false out")
        return self


class TextSource(NamedText):
    """Source of a text, and how the text is cut into samples."""

    text: Annotated[
        str,
        Field(
            description="builtin (code), general (code, docs, problems, dialogues and articles), "
            "a file (text, JSON lines, JSON array, parquet), a name defined in sources, or a mix "
            "of them with weights: NAME:WEIGHT,NAME:WEIGHT. For calibration also self: text that "
            "the model writes. For evaluation also none: measure no quality. default: builtin for "
            "builtin:tiny-moe, general for other models"
        ),
    ] = DEFAULT_TEXT
    samples: Annotated[int, Field(ge=1, description="number of samples")] = 128
    length: Annotated[int, Field(ge=2, description="tokens in a sample")] = 512
    seed: Annotated[
        int, Field(ge=0, le=2**32 - 1, description="seed of the random choice of samples")
    ] = 0
    sources: Annotated[
        dict[str, NamedText],
        Field(
            description="texts by name, to be used in text, such as {math: {text: math.jsonl, "
            "field: question}}"
        ),
    ] = {}  # noqa: RUF012  (pydantic copies it)

    @field_validator("sources")
    @classmethod
    def _names_are_plain(cls, value: dict[str, NamedText]) -> dict[str, NamedText]:
        for name in value:
            reserved = name in (BUILTIN_TEXT, GENERAL_TEXT, DEFAULT_TEXT)
            if reserved or not name.strip() or set(name) & set(",:"):
                raise ValueError(
                    "names other than builtin, general and default, without comma and colon"
                )
        return value


# ---- options in messages -----------------------------------------------------------------------


@dataclass(frozen=True)
class Spelling:
    """Options of a text as the command at hand spells them, for messages.

    Attributes:
        flags: they are options of the command itself, not settings of a recipe.
    """

    flags: bool = False

    def name(self, place: str, option: str) -> str:
        """Return the name of an option of a text.

        >>> Spelling().name("calibration", "chat_template")
        'calibration.chat_template'
        >>> Spelling(flags=True).name("evaluation", "chat_template")
        '--chat-template'
        """
        return f"--{option.replace('_', '-')}" if self.flags else f"{place}.{option}"

    def give(self, place: str, option: str, value: object) -> str:
        r"""Return the words that give an option a value.

        >>> Spelling().give("calibration", "length", 64)
        '--set calibration.length=64'
        >>> Spelling().give("calibration", "template", "{a} {b}")
        '--set \'calibration.template="{a} {b}"\''
        >>> Spelling().give("calibration.sources.math", "field", "a")
        'field: a under calibration.sources.math in the recipe'
        >>> Spelling(flags=True).give("evaluation", "field", "an answer")
        "--field='an answer'"
        """
        if self.flags:
            if option == "chat":
                return "--chat" if value else "--no-chat"
            return f"{self.name(place, option)}={shlex.quote(str(value))}"
        # As YAML reads it: a word that could be something else is quoted.
        plain = not isinstance(value, str) or re.fullmatch(
            r"(?!(?i:yes|no|on|off|true|false|null|"
            r"[yn])$)[A-Za-z_][\w-]*",
            value,
        )
        shown = (
            json.dumps(value, ensure_ascii=False)
            if not plain
            else (str(value).lower() if isinstance(value, bool) else str(value))
        )
        if "." in place:
            return f"{option}: {shown} under {place} in the recipe"
        return f"--set {shlex.quote(f'{place}.{option}={shown}')}"


IN_RECIPE, AS_FLAGS = Spelling(), Spelling(flags=True)


# ---- reading -----------------------------------------------------------------------------------


def split_template(template: str) -> list[tuple[str, str | None]]:
    """Split a template into literal texts, each with the field that follows it.

    After the last literal text the field is None.

    Raises:
        ValueError: the template has no field, or braces that contain anything but the plain name
            of a field.

    >>> split_template("Q: {question}{{}}")
    [('Q: ', 'question'), ('{', None), ('}', None)]
    """
    hint = "a text with plain fields, such as '{question} {answer}', and {{ }} for braces"
    try:
        pieces = list(Formatter().parse(template))
    except ValueError as error:
        raise ValueError(hint) from error
    fields = [(field, spec, conv) for _, field, spec, conv in pieces if field is not None]
    plain = all(field and not set(field) & set(".[]{}") for field, _, _ in fields)
    if not fields or not plain or any(spec or conv for _, spec, conv in fields):
        raise ValueError(hint)
    return [(literal, field) for literal, field, _, _ in pieces]
