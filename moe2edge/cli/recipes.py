"""Commands that list and print recipes and targets."""

from __future__ import annotations

import json
from dataclasses import asdict

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


TARGETS_EXAMPLES = "\b\nExamples:\n  moe2edge targets\n  moe2edge targets gguf"


@click.command(epilog=TARGETS_EXAMPLES)
@click.argument("name", required=False)
@JSON_OPTION
def targets_command(name: str | None, as_json: bool) -> None:
    """List the targets, their output formats, their options, and the programs that run them.

    With NAME, only that target, with the verdict on each program and its conditions; of several
    that apply to an output, the first holds.
    """
    from moe2edge.pipeline import registry

    names = registry.list_targets() if name is None else [name]
    targets = {each: registry.find_target(each) for each in names}
    options = {each: registry.list_options(target) for each, target in targets.items()}
    if as_json:
        summaries = {each: target.summary for each, target in targets.items()}
        rules = {
            each: [{**asdict(rule.loader), "when": rule.when} for rule in target.rules()]
            for each, target in targets.items()
        }
        emit({"targets": summaries, "options": options, "programs": rules})
        return
    width = max(map(len, targets))
    for each, target in targets.items():
        click.echo(f"{each:{width}} {target.summary}")
        choices = registry.list_choices(target)
        for option, default in options[each].items():
            values = f" (of {', '.join(map(str, choices[option]))})" if option in choices else ""
            click.echo(f"{'':{width}} {each}:{option}={default} is the default{values}")
        found: dict[str, list[str]] = {}
        for rule in target.rules():
            verdicts = found.setdefault(rule.loader.program, [])
            if rule.loader.verdict not in verdicts:
                verdicts.append(rule.loader.verdict)
            if name is not None:
                when = f", with {rule.when}" if rule.when else ""
                click.echo(f"{'':{width}} {rule.loader.program}{when}: {rule.loader.text}")
        if name is None and found:
            said = "; ".join(f"{program}: {' or '.join(v)}" for program, v in found.items())
            click.echo(f"{'':{width}} {said}")
