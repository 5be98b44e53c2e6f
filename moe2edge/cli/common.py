"""Options that several commands share, and functions that print results."""

from __future__ import annotations

import gc
import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moe2edge.cli.failures import escape

if TYPE_CHECKING:
    from moe2edge.calibration.sources import TextSource
    from moe2edge.pipeline.recipe import Recipe

Command = Callable[..., Any]
FILE = click.Path(path_type=Path)


def emit(data: dict[str, Any]) -> None:
    """Print the one JSON document of a successful command on stdout."""
    click.echo(json.dumps({"ok": True, **data}, indent=2, ensure_ascii=False))


def print_table(table: Any) -> None:
    """Print a table of rich; outside a terminal it is 150 columns wide."""
    from rich.console import Console
    from rich.segment import Segment, Segments

    width = None if sys.stdout.isatty() else 150
    # Names of files and models may hold what rich, or the terminal, would take for markup.
    console = Console(width=width, markup=False, emoji=False, highlight=False)
    parts = (Segment(escape(text, "\n"), style) for text, style, _ in console.render(table))
    console.print(Segments(parts), end="")


def show(line: str, *, err: bool = False) -> None:
    """Print text that may hold names of files and models, on stdout or stderr."""
    click.echo(escape(line, "\n"), err=err)


def quiet_libraries() -> None:
    """Turn off progress bars and notices of transformers, which would mix with our output."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


@contextmanager
def without_collection() -> Iterator[None]:
    """Let Python not look for garbage, of which imports and handles on tensors are none.

    It takes a sixth of the time of importing torch and transformers.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def open_model(model: str, revision: str | None, cache_dir: Path | None) -> Any:
    """Open the checkpoint that the argument MODEL names."""
    from moe2edge.storage.checkpoint import open_checkpoint

    return open_checkpoint(model, revision=revision, cache_dir=cache_dir)


SOURCE_CHECK_OPTION = click.option(
    "--no-source-check",
    "source_check",
    is_flag=True,
    flag_value=False,
    default=True,
    help="Do not compare MODEL with stock transformers first, which runs a short text through it "
    "twice.",
)


def add_hub_options(command: Command) -> Command:
    """Add the options that select files of a model on the Hugging Face Hub."""
    command = click.option("--revision", help="Branch, tag or commit of a model on the Hub.")(
        command
    )
    return click.option(
        "--cache-dir", type=click.Path(path_type=Path), help="Cache folder for files from the Hub."
    )(command)


MIX_HELP = "A file (text, JSON lines, parquet), or a weighted mix: a.jsonl:0.5,b.txt:0.5."

SETTINGS_OPTION = click.option(
    "--set",
    "settings",
    multiple=True,
    help="Override a recipe option, such as gptq.group_size=64. Can be given several times.",
)
CALIB_OPTION = click.option(
    "--calib",
    help=f"Calibration text [default: that of the recipe]. {MIX_HELP} self: text that the model "
    "generates.",
)


def read_recipe_options(
    name: str, settings: tuple[str, ...], calib: str | None, evaluation: str | None = None
) -> Recipe:
    """Parse a recipe, with the texts and settings of the command line.

    Args:
        name: a bundled recipe or a file.
        settings: values of ``--set``.
        calib: value of ``--calib``.
        evaluation: value of ``--eval``.
    """
    from moe2edge.pipeline import recipe

    return recipe.parse(recipe.find(name), list_settings(settings, calib, evaluation))


def list_settings(
    settings: tuple[str, ...], calib: str | None, evaluation: str | None
) -> list[str]:
    """List the settings of a recipe that the command line gives, its texts among them."""
    texts = [f"calibration.text={json.dumps(calib)}"] if calib is not None else []
    texts += [f"evaluation.text={json.dumps(evaluation)}"] if evaluation is not None else []
    return [*texts, *settings]


CHAT_TEMPLATE_OPTION = click.option(
    "--chat-template",
    help="Name of the chat template, if the model has several.",
)
_ROW_OPTIONS = (
    click.option("--field", help="Field of each row [default: text, messages or conversations]."),
    click.option(
        "--template",
        help=r"Text with several fields of a row, instead of --field, such as "
        r"'{question}\n{answer}'; \n stands for a line break.",
    ),
    click.option(
        "--chat/--no-chat",
        default=None,
        help="Rows are chats, in the form of the model's chat template [default: if they have "
        "messages].",
    ),
    CHAT_TEMPLATE_OPTION,
)


def add_text_options(samples: int) -> Callable[[Command], Command]:
    """Add options of a text and its samples, whose values `read_text_options` takes."""
    options = (
        click.option(
            "--text",
            help=f"{MIX_HELP} [default: builtin for builtin:tiny-moe, general for other models].",
        ),
        *_ROW_OPTIONS,
        click.option("--samples", default=samples, show_default=True, help="Number of samples."),
        click.option("--length", default=512, show_default=True, help="Tokens per sample."),
        click.option(
            "--seed", default=0, show_default=True, help="Seed of the random choice of samples."
        ),
    )

    return lambda command: _decorate(command, options)


def add_row_options(command: Command) -> Command:
    """Add options that say how a row of a text becomes a document."""
    return _decorate(command, _ROW_OPTIONS)


def _decorate(command: Command, options: Sequence[Callable[[Command], Command]]) -> Command:
    for option in reversed(options):
        command = option(command)
    return command


def read_text_options(purpose: str, options: Mapping[str, Any]) -> TextSource:
    """Make the section of a recipe from the values of `add_text_options`, with the same checks."""
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
    """Parse a size such as 8GB, 512MiB or 2e9 into bytes."""
    if value is None:
        return None
    match = re.fullmatch(r"\s*([\d.]+(?:e\d+)?)\s*([KMGT]?)(i?)B?\s*", value, re.IGNORECASE)
    try:
        number = float(match[1]) if match else math.nan
    except ValueError:
        number = math.nan
    if match is None or not 0 < number < math.inf:
        raise click.BadParameter(f"{value!r} is not a size; expected one such as 8GB or 512MiB")
    base = 1024 if match[3] else 1000
    return int(number * base ** " KMGT".index(match[2].upper() or " "))


# ONNX sessions use the number of threads of torch, so that one option sets both.
THREADS_OPTION = click.option(
    "--threads",
    type=click.IntRange(min=1),
    expose_value=False,
    callback=_set_threads,
    help="CPU threads [default: one per core]. Use fewer while other programs run.",
)
JSON_OPTION = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON document on stdout instead of text."
)
PATHS_OPTION = click.option(
    "--keep-paths",
    is_flag=True,
    help="Write the paths of MODEL and texts into what is written, not only their names.",
)
RESUME_OPTION = click.option(
    "--resume",
    type=click.Choice(["auto", "never", "require"]),
    default="auto",
    show_default=True,
    help="Resume an interrupted or killed run to the same output. auto: resume if there is one; "
    "never: start over; require: fail if there is none.",
)
VERIFY_OPTION = click.option(
    "--verify",
    type=click.Choice(["full", "quick"]),
    default="full",
    show_default=True,
    help="full: every file, every tensor, and logits and perplexity in the runtime; quick: every "
    "file, and the logits of one prompt in the runtime.",
)
QUIET_OPTION = click.option("-q", "--quiet", is_flag=True, help="Do not show progress.")
FOLDER_ARGUMENT = click.argument("folder", type=click.Path(path_type=Path))
