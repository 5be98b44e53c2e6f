"""``moe2edge plan``: what an export would give and take, before anything is downloaded or run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from moe2edge.cli.common import (
    JSON_OPTION,
    SETTINGS_OPTION,
    VERIFY_OPTION,
    add_hub_options,
    emit,
    parse_bytes,
    print_table,
    quiet_libraries,
    read_recipe_options,
    show,
    without_collection,
)
from moe2edge.progress import format_bytes, format_time

if TYPE_CHECKING:
    from moe2edge.commands.forecast import Forecast, ModelSize
    from moe2edge.commands.plan import Wish
    from moe2edge.commands.recipe_ladder import Choice
    from moe2edge.evaluation.machine_rates import MachineRates
    from moe2edge.pipeline.recipe import Recipe

PLAN_EXAMPLES = """\b
Examples:
  moe2edge plan builtin:tiny-moe
  moe2edge plan builtin:tiny-moe -t onnx,gptq -r trim-w4 --json
  moe2edge plan builtin:tiny-moe -t onnx --budget 700MB --disk 9MB > recipe.yaml
  moe2edge plan --measure"""
HEADINGS = (
    "target", "folder", "weights", "cache", "a token", "running", "read a token", "tok/s <",
)  # fmt: skip
BUDGET_OPTION = click.option(
    "--budget",
    callback=parse_bytes,
    help="Memory that an output may take while it runs, such as 16GiB: weights, cache of --context "
    "tokens and the runtime.",
)
DISK_OPTION = click.option(
    "--disk",
    callback=parse_bytes,
    help="Bytes that the folder of an output may have, such as 6GB.",
)
CONTEXT_OPTION = click.option(
    "--context",
    type=click.IntRange(min=1),
    default=4096,
    show_default=True,
    help="Tokens of a text that an output remembers.",
)


def _print_schema(context: click.Context, _: click.Parameter, asked: bool) -> None:
    if asked:
        from moe2edge.commands.plan_document import build_plan_schema

        click.echo(json.dumps(build_plan_schema(), indent=2))
        context.exit()


@click.command(epilog=PLAN_EXAMPLES)
@click.argument("model", required=False)
@click.option(
    "-r",
    "--recipe",
    help="Bundled recipe or recipe file [default: w4, and as-is for target hf].",
)
@click.option(
    "-t",
    "--target",
    help="Targets, as of export [default: every one that holds the family].",
)
@SETTINGS_OPTION
@BUDGET_OPTION
@DISK_OPTION
@CONTEXT_OPTION
@click.option(
    "--max-memory", "most", callback=parse_bytes, help="Memory limit of the export, as of export."
)
@click.option("--materialize", is_flag=True, help="As of export.")
@VERIFY_OPTION
@click.option(
    "--measure",
    is_flag=True,
    help="Measure the rates of this machine first, in under 30 s, and keep them.",
)
@JSON_OPTION
@click.option(
    "--schema",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_schema,
    help="Print the JSON Schema of what --json prints, and exit.",
)
@add_hub_options
def plan_command(
    model: str | None,
    recipe: str | None,
    target: str | None,
    settings: tuple[str, ...],
    budget: int | None,
    disk: int | None,
    context: int,
    most: int | None,
    materialize: bool,
    verify: Literal["full", "quick"],
    measure: bool,
    as_json: bool,
    revision: str | None,
    cache_dir: Path | None,
) -> None:
    """Say what an export of MODEL would give and take, without reading its weights.

    MODEL may also be a config.json, or a folder with nothing else. For each target: bytes on the
    disk, memory while running, the speed that the memory allows at most, and the programs that load
    it; memory, disk and time of the export; and all that would refuse it. With --budget or --disk,
    recipes that fit, best first; standard output is then the best as YAML, for export -r.
    """
    from moe2edge.errors import InputError

    with without_collection():
        from moe2edge.commands.plan import (
            NEEDS_MODEL,
            Wish,
            choose_for_limits,
            forecast_wish,
            get_rates,
        )

        quiet_libraries()
    rates = get_rates(measure=measure)
    if model is None:
        if not measure:
            raise InputError(NEEDS_MODEL)
        _show_rates(rates, as_json)
        return
    wish = Wish(
        model,
        revision,
        cache_dir,
        None if recipe is None else read_recipe_options(recipe, settings, None),
        settings,
        target,
        context,
        most,
        materialize,
        verify,
    )
    if budget is not None or disk is not None:
        _show_choices(choose_for_limits(wish, rates, budget, disk), as_json)
        return
    with without_collection():
        found = forecast_wish(wish, rates)
    # An export needs targets; without a choice of them, some may refuse.
    refusing = [one for one in found if target is not None or (recipe and not one.targets)]
    _tell(found, refusing, as_json)


def _tell(found: Sequence[Forecast], refusing: Sequence[Forecast], as_json: bool) -> None:
    """Print forecasts, and raise what refuses the first of some of them, with all in its document.

    Raises:
        InputError, Unsupported: so, with the line of the export.
    """
    from moe2edge.commands.forecast import refuse_like_export
    from moe2edge.commands.plan_document import describe_plans
    from moe2edge.errors import Moe2EdgeError

    document = describe_plans(found)
    if not as_json:
        for one in found:
            _show(one)
    try:
        for one in refusing:
            refuse_like_export(one)
    except Moe2EdgeError as error:
        error.details = document
        raise
    if as_json:
        emit(document)


def _show_rates(rates: MachineRates, as_json: bool) -> None:
    from moe2edge.commands.plan_document import describe_kept_rates
    from moe2edge.evaluation.machine_rates import locate_rates

    if as_json:
        emit(describe_kept_rates(rates, str(locate_rates())))
        return
    show(f"{_describe_rates(rates)}; kept in {locate_rates()}")


def _describe_rates(rates: MachineRates) -> str:
    how = "measured" if rates.source == "measured" else "assumed; measure them: plan --measure"
    return (
        f"rates ({how}): products {rates.products / 1e9:.0f} GFLOP/s ({rates.narrow / 1e9:.0f} in "
        "bfloat16), solving "
        f"{rates.solve / 1e9:.1f} GFLOP/s, disk {rates.disk / 1e6:.0f} MB/s, memory "
        f"{rates.bandwidth / 1e9:.1f} GB/s"
    )


def _show(one: Forecast) -> None:
    """Print a forecast."""
    from rich.table import Table

    show(f"{one.source} ({one.family}): {_format_size(one.before)}")
    if one.after != one.before:
        show(f"after the passes: {_format_size(one.after)}")
    if one.targets:
        table = Table(title=f"context of {one.context:,} tokens", title_justify="left")
        for n, heading in enumerate(HEADINGS):
            table.add_column(heading, justify="right" if n else "left")
        for t in one.targets:
            sizes = (t.disk, t.weights, t.cache, t.cache_per_token, t.resident, t.read)
            table.add_row(t.target, *map(format_bytes, sizes), f"{t.ceiling:.1f}")
        print_table(table)
    for line in list_lines(one):
        show(line)


def list_lines(one: Forecast) -> Iterator[str]:
    """Yield what is to be said of a forecast beside its table."""
    if one.export is not None:
        yield (
            f"export: {format_bytes(one.export.memory)} of memory, "
            f"{format_bytes(one.export.disk)} on the disk, about {format_time(one.export.seconds)}"
        )
        largest = max(one.export.stages, key=lambda stage: stage.memory)
        slowest = max(one.export.stages, key=lambda stage: stage.seconds)
        yield f"  most memory: {largest.name}; most time: {slowest.name}"
    yield _describe_rates(one.rates)
    for target in one.targets:
        if target.droppable:
            yield (
                f"{target.target}: {format_bytes(target.droppable)} of its memory are pages of a "
                "file of which the runtime holds copies; the system takes them back, and --budget "
                "leaves them out"
            )
        for loader in target.loaders:
            yield f"{target.target} in {loader.program}: {loader.text}"
    yield from (f"note: {note}" for note in one.notes)
    yield from (f"too little here: {line}" for line in one.lacking)
    yield from (f"refused (exit code {r.code}): {r.message}" for r in one.refusals)


def _show_choices(found: Sequence[Choice], as_json: bool) -> None:
    """Print recipes that fit: the best as YAML, all in comments."""
    if as_json:
        from moe2edge.commands.plan_document import describe_choices

        emit(describe_choices(found))
        return
    names = ",".join(one.target for one in found[0].forecast.targets)
    show(f"# Recipes that fit in {names}, best first:")
    for one in found:
        sizes = "; ".join(
            f"{t.target} {format_bytes(t.resident)} running, {format_bytes(t.disk)} on the disk"
            for t in one.forecast.targets
        )
        show(f"#   {one.passes}: {sizes}")
    show(found[0].text.rstrip())


def choose_and_tell(wish: Wish, budget: int | None, disk: int | None) -> Recipe:
    """Return the best recipe by which outputs fit, and say which it is.

    Raises:
        InputError, Unsupported, DoesNotFit: there is none.
    """
    from moe2edge.commands.plan import choose_for_limits
    from moe2edge.evaluation.machine_rates import find_rates

    quiet_libraries()
    best = choose_for_limits(wish, find_rates(), budget, disk)[0]
    show(f"recipe for the budget: passes: {best.passes}", err=True)
    return best.recipe


def _format_size(size: ModelSize) -> str:
    """Format the size of a model."""
    return (
        f"{size.parameters:,} parameters, {size.active_parameters:,} active, "
        f"{format_bytes(size.bytes)}"
    )
