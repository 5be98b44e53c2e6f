"""Options of text in a recipe: its source, and how it is cut into samples."""

from __future__ import annotations

from string import Formatter
from typing import Annotated, Self

from pydantic import Field, field_validator, model_validator

from moe2edge.calibration.builtin_texts import BUILTIN_TEXT, DEFAULT_TEXT, GENERAL_TEXT
from moe2edge.options import Options


class NamedText(Options):
    """A text with a name, to be used as a part of mixes."""

    text: Annotated[str, Field(description="builtin, general, or a text or JSONL file")]
    field: Annotated[str, Field(description="field of a JSONL line that contains the text")] = (
        "text"
    )
    template: Annotated[
        str | None,
        Field(description="instead of field: a text with fields, such as '{question} {answer}'"),
    ] = None

    @field_validator("template")
    @classmethod
    def _template_is_plain(cls, value: str | None) -> str | None:
        if value is not None:
            split_template(value)
        return value

    @model_validator(mode="after")
    def _field_or_template(self) -> Self:
        if self.template is not None and self.field != "text":
            raise ValueError("give field or template, not both")
        return self


class TextSource(NamedText):
    """Source of a text, and how the text is cut into samples."""

    text: Annotated[
        str,
        Field(
            description="builtin (code), general (code, docs, problems, dialogues and articles), "
            "a text or JSONL file, a name defined in sources, or a mix of them with weights: "
            "NAME:WEIGHT,NAME:WEIGHT. For calibration also self: text that the model writes. For "
            "evaluation also none: measure no quality. default: builtin for builtin:tiny-moe, "
            "general for other models"
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
