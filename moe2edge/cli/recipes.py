"""Commands that list and print recipes and targets."""

from __future__ import annotations

import json

import click

from moe2edge.cli.common import JSON_OPTION, SETTINGS_OPTION, emit


@click.group(name="recipe", epilog="\b\nExample:\n  moe2edge recipe show trim-w4")
def recipe_group() -> None:
    """Show the bundled recipes and the schema of recipes."""


@recipe_group.command(name="list", epilog="\b\nExample:\n  moe2edge recipe list")
@JSON_OPTION
def list_recipes_command(as_json: bool) -> None:
    """List the bundled recipes."""
    from moe2edge.pipeline import recipe

    summaries = {}
    for name, path in recipe.list_bundled().items():
        summaries[name] = path.read_text("utf-8").partition("\n")[0].lstrip("# ")
    if as_json:
        emit({"recipes": summaries})
        return
    for name, summary in summaries.items():
        click.echo(f"{name:12} {summary}")


@recipe_group.command(name="show", epilog="\b\nExample:\n  moe2edge recipe show trim-w4")
@click.argument("name")
@SETTINGS_OPTION
def show_recipe_command(name: str, settings: tuple[str, ...]) -> None:
    """Print the recipe NAME with all default values.

    NAME is a bundled recipe or a recipe file.
    """
    from moe2edge.pipeline import recipe

    click.echo(recipe.parse(recipe.find(name), settings).render(), nl=False)


SCHEMA_EXAMPLE = "\b\nExample:\n  moe2edge recipe schema > recipe.schema.json"


@recipe_group.command(name="schema", epilog=SCHEMA_EXAMPLE)
def print_schema_command() -> None:
    """Print the JSON Schema of recipes, for completion in editors."""
    from moe2edge.pipeline.recipe import build_json_schema

    click.echo(json.dumps(build_json_schema(), indent=2))


@click.command(epilog="\b\nExample:\n  moe2edge targets")
@JSON_OPTION
def targets_command(as_json: bool) -> None:
    """List the targets, their output formats and their options."""
    from moe2edge.pipeline import registry

    targets = {name: registry.find_target(name) for name in registry.list_targets()}
    options = {name: registry.list_options(target) for name, target in targets.items()}
    if as_json:
        summaries = {name: target.summary for name, target in targets.items()}
        emit({"targets": summaries, "options": options})
        return
    width = max(map(len, targets))
    for name, target in targets.items():
        click.echo(f"{name:{width}} {target.summary}")
        choices = registry.list_choices(target)
        for option, default in options[name].items():
            values = f" (of {', '.join(map(str, choices[option]))})" if option in choices else ""
            click.echo(f"{'':{width}} {name}:{option}={default} is the default{values}")
