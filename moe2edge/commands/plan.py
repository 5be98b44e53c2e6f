"""`moe2edge plan`: forecasts of exports, and recipes for a budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moe2edge.commands.export_stages import Extent
from moe2edge.commands.forecast import Forecast, forecast_export
from moe2edge.commands.recipe_ladder import Choice, Limits, choose_recipes
from moe2edge.errors import InputError, Unsupported
from moe2edge.evaluation.machine_rates import (
    MachineRates,
    find_rates,
    keep_rates,
    measure_rates,
)
from moe2edge.pipeline.recipe import Recipe, find, parse
from moe2edge.pipeline.registry import find_target, list_targets, parse_targets
from moe2edge.pipeline.target import Target
from moe2edge.runtime.memory import Memory, find_limit
from moe2edge.storage.checkpoint import Checkpoint
from moe2edge.storage.durable import make_place_error
from moe2edge.storage.hollow import open_without_numbers

NEEDS_MODEL = "plan needs MODEL, or --measure to measure this machine alone"
NEEDS_TRIMMING = (
    "target hf needs a recipe that prunes, such as -r trim, because it cannot hold "
    "quantized numbers"
)
# Recipe of each target where none is given, and of those that hold no quantized numbers.
USUAL_RECIPE, PLAIN_RECIPE = "w4", "as-is"
# Targets for which a recipe is looked for, the first that holds the family.
PREFERRED = ("onnx", "gguf", "gptq")


@dataclass(frozen=True)
class Wish:
    """Wish of a user of `plan`.

    Attributes:
        model, revision, cache_dir: the source.
        recipe: the recipe; None: the usual one of each target.
        settings: values of ``--set``, for recipes that are chosen.
        targets: value of ``-t``; None: every target that holds the family.
        context: tokens of a text.
        most: bytes of memory for the export; None: what the machine has.
        materialize: give tied experts matrices of their own.
        verify: how much of each output the export compares with the model in memory.
    """

    model: str
    revision: str | None
    cache_dir: Path | None
    recipe: Recipe | None
    settings: tuple[str, ...]
    targets: str | None
    context: int
    most: int | None
    materialize: bool
    verify: Extent = "full"


def get_rates(*, measure: bool) -> MachineRates:
    """Return the rates of this machine; with ``measure``, measured now, and kept.

    Raises:
        InputError, DoesNotFit: they cannot be kept, or the working folder takes no file.
    """
    if not measure:
        return find_rates()
    try:
        rates = measure_rates()
    except OSError as error:
        raise make_place_error(Path.cwd(), error) from error
    try:
        keep_rates(rates)
    except OSError as error:
        raise make_place_error(Path(error.filename or "the cache folder"), error) from error
    return rates


def forecast_wish(wish: Wish, rates: MachineRates) -> list[Forecast]:
    """Forecast an export; without recipe and targets, one for each recipe that is usual.

    Raises:
        InputError, Unsupported: MODEL cannot be read, or there is no such target.
    """
    asked = None if wish.targets is None else parse_targets(wish.targets)
    recipe = wish.recipe
    if recipe is None and asked is not None:
        recipe = parse(find(choose_default_recipe(asked)), wish.settings)
    with open_without_numbers(wish.model, revision=wish.revision, cache_dir=wish.cache_dir) as (
        checkpoint,
        notes,
    ):
        targets = asked if asked is not None else _list_usable(checkpoint)

        def forecast(by: Recipe, own: Sequence[Target]) -> Forecast:
            return _forecast(checkpoint, notes, wish, rates, by, own)

        if recipe is None:
            plain = [one for one in targets if one.name == "hf"]
            others = [one for one in targets if one.name != "hf"]
            # Exports of their own: what a head becomes depends on all targets of one.
            narrow = [one for one in others if one.narrow_head]
            wide = [one for one in others if not one.narrow_head]
            groups = ((USUAL_RECIPE, narrow), (USUAL_RECIPE, wide), (PLAIN_RECIPE, plain))
            return [forecast(parse(find(name), wish.settings), own) for name, own in groups if own]
        return [forecast(recipe, targets)]


def choose_for_limits(
    wish: Wish, rates: MachineRates, budget: int | None, disk: int | None
) -> list[Choice]:
    """Choose recipes by which every output fits, best first.

    Args:
        wish: what is asked for; a recipe that is given is the only one that is tried.
        rates: those of the machine.
        budget: bytes of memory of a running output; None: any.
        disk: bytes of the folder of an output; None: any.

    Raises:
        InputError, Unsupported: no recipe can be exported.
        DoesNotFit: none fits; names the smallest.
    """
    limits = Limits(budget, disk)
    asked = None if wish.targets is None else parse_targets(wish.targets)
    with open_without_numbers(wish.model, revision=wish.revision, cache_dir=wish.cache_dir) as (
        checkpoint,
        notes,
    ):
        targets = asked if asked is not None else _choose_one(_list_usable(checkpoint))

        def forecast(by: Recipe) -> Forecast:
            return _forecast(checkpoint, notes, wish, rates, by, targets)

        return choose_recipes(limits, wish.settings, forecast, wish.recipe)


def _forecast(
    checkpoint: Checkpoint,
    notes: Sequence[str],
    wish: Wish,
    rates: MachineRates,
    recipe: Recipe,
    targets: Sequence[Target],
) -> Forecast:
    return forecast_export(
        checkpoint,
        recipe,
        targets,
        rates,
        Memory.from_limit(find_limit(wish.most)),
        context=wish.context,
        notes=notes,
        materialize=wish.materialize,
        verify=wish.verify,
    )


def _list_usable(checkpoint: Checkpoint) -> list[Target]:
    """List the targets that hold the family of a source.

    Raises:
        Unsupported: its layers have no experts.
    """
    if not checkpoint.model.expert_counts:
        raise Unsupported(
            f"no layer of {checkpoint.source} has experts; it is dense: take a Mixture of Experts"
        )
    every = (find_target(name) for name in list_targets())
    return [one for one in every if one.supports(checkpoint.model.family)]


def _choose_one(usable: Sequence[Target]) -> list[Target]:
    """Choose the target for which recipes are looked for where none is given."""
    first = [one for name in PREFERRED for one in usable if one.name == name]
    return [*first, *usable][:1]


def choose_default_recipe(targets: Sequence[Target]) -> str:
    """Return the recipe of an export that names none.

    Raises:
        InputError: a target holds no quantized numbers.
    """
    if any(target.name == "hf" for target in targets):
        raise InputError(NEEDS_TRIMMING)
    return USUAL_RECIPE
