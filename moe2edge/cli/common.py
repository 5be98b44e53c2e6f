"""What the verbs of the command line share: options, and how results are printed."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from moe2edge.calibration.sources import TextSource
    from moe2edge.pipeline.recipe import Recipe

Command = Callable[..., Any]


def emit(data: dict[str, Any]) -> None:
    """The one JSON document on stdout."""
    click.echo(json.dumps({"ok": True, **data}, indent=2, ensure_ascii=False))


def print_table(table: Any) -> None:
    """A table of rich, wide enough where nobody looks at it on a terminal."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else 150
    Console(width=width).print(table)


def quiet_libraries() -> None:
    """No bars and notices of libraries between our own lines."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def open_model(model: str, revision: str | None, cache_dir: Path | None) -> Any:
    """The checkpoint that MODEL means."""
    from moe2edge.storage.checkpoint import open_checkpoint

    return open_checkpoint(model, revision=revision, cache_dir=cache_dir)


def add_hub_options(command: Command) -> Command:
    """Options that say which files of the hub MODEL means."""
    command = click.option("--revision", help="Branch, tag or commit of a hub model.")(command)
    return click.option("--cache-dir", type=click.Path(path_type=Path), help="Cache of hub files.")(
        command
    )


MIX = "A text or JSONL file, or a mix: a.jsonl:0.5,b.txt:0.5."

SETTINGS = click.option(
    "--set", "settings", multiple=True, help="Override, as in gptq.group_size=64."
)
CALIB = click.option("--calib", help=f"Calibration text. {MIX}")


def parse_recipe(
    name: str, settings: tuple[str, ...], calib: str | None, evaluation: str | None = None
) -> Recipe:
    """A bundled recipe or a file, with texts and settings given on the command line."""
    from moe2edge.pipeline import recipe

    texts = [f"calibration.text={json.dumps(calib)}"] if calib is not None else []
    texts += [f"evaluation.text={json.dumps(evaluation)}"] if evaluation is not None else []
    return recipe.parse(recipe.find(name), [*texts, *settings])


def add_text_options(samples: int) -> Callable[[Command], Command]:
    """Options of a text and how it is cut into samples; `read_text_options` takes their values."""
    options = (
        click.option("--text", default="builtin", show_default=True, help=MIX),
        click.option("--field", help="Field of a JSONL line [default: text]."),
        click.option("--template", help=r"Instead: '{question}\n{answer}'; \n is a line break."),
        click.option("--samples", default=samples, show_default=True, help="Samples of the text."),
        click.option("--length", default=512, show_default=True, help="Tokens in a sample."),
        click.option("--seed", default=0, show_default=True, help="Decides which samples."),
    )

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def read_text_options(purpose: str, options: Mapping[str, Any]) -> TextSource:
    """Section of a recipe from the values of `add_text_options`, with the same refusals."""
    from moe2edge.pipeline.recipe import parse_section

    given = {name: value for name, value in options.items() if value is not None}
    if "template" in given:
        given["template"] = given["template"].replace("\\n", "\n").replace("\\t", "\t")
    return parse_section(purpose, given)


def _set_threads(_: click.Context, __: click.Parameter, count: int | None) -> None:
    if count is not None:
        import torch

        torch.set_num_threads(count)


def parse_bytes(_: click.Context, __: click.Parameter, value: str | None) -> int | None:
    """Bytes of a size such as 8GB, 512MiB or 2e9."""
    if value is None:
        return None
    found = re.fullmatch(r"\s*([\d.]+(?:e\d+)?)\s*([KMGT]?)(i?)B?\s*", value, re.IGNORECASE)
    try:
        number = float(found[1]) if found else math.nan
    except ValueError:
        number = math.nan
    if found is None or not 0 < number < math.inf:
        raise click.BadParameter(f"{value!r} is no size; expected one such as 8GB or 512MiB")
    base = 1024 if found[3] else 1000
    return int(number * base ** " KMGT".index(found[2].upper() or " "))


# ONNX sessions take torch's number, so that one option rules both.
THREADS = click.option(
    "--threads",
    type=click.IntRange(min=1),
    expose_value=False,
    callback=_set_threads,
    help="Processor threads [default: one per core]. Lower it beside other work.",
)
JSON = click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
QUIET = click.option("-q", "--quiet", is_flag=True, help="No progress.")
FOLDER = click.argument("folder", type=click.Path(path_type=Path))
