"""Verbs about what there is: recipes and targets."""

from __future__ import annotations

import json

import click

from moe2edge.cli.common import JSON, emit


@click.group(name="recipe")
def recipe_group() -> None:
    """Recipes that come with moe2edge."""


@recipe_group.command(name="list")
@JSON
def list_recipes_command(as_json: bool) -> None:
    """List the bundled recipes."""
    from moe2edge.pipeline import recipe

    found = {}
    for name, path in recipe.list_bundled().items():
        found[name] = path.read_text("utf-8").partition("\n")[0].lstrip("# ")
    if as_json:
        emit({"recipes": found})
        return
    for name, summary in found.items():
        click.echo(f"{name:12} {summary}")


@recipe_group.command(name="show", epilog="\b\nExample:\n  moe2edge recipe show trim-w4")
@click.argument("name")
@click.option("--set", "settings", multiple=True, help="Override, as in gptq.group_size=64.")
def show_recipe_command(name: str, settings: tuple[str, ...]) -> None:
    """Print a recipe with every default spelt out."""
    from moe2edge.pipeline import recipe

    click.echo(recipe.parse(recipe.find(name), settings).render(), nl=False)


@recipe_group.command(name="schema")
def print_schema_command() -> None:
    """Print the JSON Schema of recipes, for completion in editors."""
    from moe2edge.pipeline.recipe import build_json_schema

    click.echo(json.dumps(build_json_schema(), indent=2))


@click.command()
@JSON
def targets_command(as_json: bool) -> None:
    """List the targets, what each of them writes, and its options."""
    from moe2edge.pipeline import registry

    found = {name: registry.find_target(name) for name in registry.list_targets()}
    options = {name: registry.list_options(target) for name, target in found.items()}
    if as_json:
        summaries = {name: target.summary for name, target in found.items()}
        emit({"targets": summaries, "options": options})
        return
    for name, target in found.items():
        click.echo(f"{name:6} {target.summary}")
        choices = registry.list_choices(target)
        for option, default in options[name].items():
            among = f" (of {', '.join(map(str, choices[option]))})" if option in choices else ""
            click.echo(f"       {name}:{option}={default} is the default{among}")
