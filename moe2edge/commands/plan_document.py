"""Form of the JSON documents of `moe2edge plan`, which is published as a JSON Schema."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, TypeAdapter

from moe2edge.commands.forecast import Forecast
from moe2edge.commands.recipe_ladder import Choice
from moe2edge.evaluation.machine_rates import MachineRates

PLAN_VERSION: Final = 2


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid")


class FailurePart(_Document):
    """Exit code and line of an export that would refuse."""

    code: int
    message: str


class PlanDocument(_Document):
    """Forecasts; with ``ok`` false, those of an export that would refuse, with its error."""

    ok: bool = True
    error: FailurePart | None = None
    schema_version: Literal[2] = PLAN_VERSION
    kind: Literal["moe2edge.plan"] = "moe2edge.plan"
    plans: list[Forecast]


class ChoicePart(_Document):
    """A recipe that fits, as YAML, and the forecast of its export."""

    recipe: str
    forecast: Forecast


class RecipesDocument(_Document):
    """Recipes that fit a budget, best first."""

    ok: Literal[True] = True
    schema_version: Literal[2] = PLAN_VERSION
    kind: Literal["moe2edge.recipes"] = "moe2edge.recipes"
    recipes: list[ChoicePart]


class RatesDocument(_Document):
    """Rates of the machine, and the file that keeps them."""

    ok: Literal[True] = True
    schema_version: Literal[2] = PLAN_VERSION
    kind: Literal["moe2edge.rates"] = "moe2edge.rates"
    rates: MachineRates
    file: str


_DOCUMENT: TypeAdapter[PlanDocument | RecipesDocument | RatesDocument] = TypeAdapter(
    PlanDocument | RecipesDocument | RatesDocument
)


def describe_plans(plans: Sequence[Forecast]) -> dict[str, Any]:
    """Return the document of forecasts, but for its ``ok`` and its error."""
    return _describe("moe2edge.plan", {"plans": [asdict(plan) for plan in plans]})


def describe_choices(choices: Sequence[Choice]) -> dict[str, Any]:
    """Return the document of recipes, but for its ``ok``."""
    found = [{"recipe": one.text, "forecast": asdict(one.forecast)} for one in choices]
    return _describe("moe2edge.recipes", {"recipes": found})


def describe_kept_rates(rates: MachineRates, file: str) -> dict[str, Any]:
    """Return the document of rates, but for its ``ok``."""
    return _describe("moe2edge.rates", {"rates": asdict(rates), "file": file})


def _describe(kind: str, data: Mapping[str, Any]) -> dict[str, Any]:
    return {"schema_version": PLAN_VERSION, "kind": kind, **data}


def build_plan_schema() -> dict[str, Any]:
    """Build the JSON Schema of all three documents."""
    schema = _DOCUMENT.json_schema()
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "moe2edge plan",
        **schema,
    }


def parse_plan(text: str) -> PlanDocument | RecipesDocument | RatesDocument:
    """Read a document.

    Raises:
        ValidationError: it does not fit the schema.
    """
    return _DOCUMENT.validate_json(text)
