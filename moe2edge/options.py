"""Base class for all that users set: options of passes, rules and texts."""

from __future__ import annotations

from typing import get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

# Numbers that fit into 32 bits are all that seeds and counts need.
LIMIT = 1 << 32


class Options(BaseModel):
    """Typed options; an unknown option is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_booleans(cls, value: object, info: ValidationInfo) -> object:
        """Refuse YAML's true and false where pydantic would read them as 1 and 0."""
        annotation = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and bool not in (annotation, *get_args(annotation)):
            raise ValueError("a number or a word, not true or false")
        return value

    @field_validator("*", mode="after")
    @classmethod
    def _refuse_huge_numbers(cls, value: object) -> object:
        """Refuse counts that no library takes."""
        numbers = value if isinstance(value, list) else [value]
        if any(isinstance(one, int) and abs(one) >= LIMIT for one in numbers):
            raise ValueError(f"a number below {LIMIT}")
        return value
