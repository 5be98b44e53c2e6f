"""The command that compares profiles and output folders."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from moe2edge.cli.common import (
    FILE,
    JSON_OPTION,
    emit,
    print_table,
    quiet_libraries,
    read_text_options,
    show,
)
from moe2edge.cli.progress_bar import make_reporter
from moe2edge.errors import Inconclusive, Regressed

COMPARE_EXAMPLES = """\b
Examples:
  moe2edge profile out-onnx -o base.json
  moe2edge compare base.json head.json --markdown comment.md
  moe2edge compare out-before out-after --pairs 10

\b
Exit codes: 0 no metric of the gate got worse; 3 one did; 4 nothing can be said
of one; 2 the files are of another version or of other work; 6 a runtime is not
installed."""


@click.command(epilog=COMPARE_EXAMPLES)
@click.argument("base", type=FILE)
@click.argument("head", type=FILE)
@click.option("--gate", type=FILE, help="File of tolerances [default: that of moe2edge].")
@click.option(
    "--pairs",
    type=click.IntRange(5, 1000),
    help="Pairs of runs in a round, of two folders [default: as in the gate].",
)
@click.option("--text", default="builtin", show_default=True, help="File to cut prompts from.")
@click.option("--prompt-tokens", type=click.IntRange(1), help="Tokens per prompt [default: 64].")
@click.option("--gen-tokens", type=click.IntRange(1), help="New tokens per prompt [default: 16].")
@click.option("--threads", type=click.IntRange(1), help="CPU threads [default: one per core].")
@click.option("-o", "--output", type=FILE, help="Write the JSON document to a file.")
@click.option("--markdown", type=FILE, help="Write Markdown, for a comment on a pull request.")
@click.option("--junit", type=FILE, help="Write JUnit XML, for CI.")
@JSON_OPTION
def compare_command(
    base: Path,
    head: Path,
    gate: Path | None,
    pairs: int | None,
    text: str,
    prompt_tokens: int | None,
    gen_tokens: int | None,
    threads: int | None,
    output: Path | None,
    markdown: Path | None,
    junit: Path | None,
    as_json: bool,
) -> None:
    """Judge HEAD against BASE: two files of `moe2edge profile`, or two output folders.

    Sizes, memory and quality have tolerances. Folders run in turns in fresh processes, and a
    change of a timing has to be found twice; timings of two files are advice alone.
    """
    from dataclasses import replace

    from moe2edge.commands.compare import compare_outputs, write_comparison
    from moe2edge.commands.profile import check_views
    from moe2edge.evaluation.gate.views import build_comparison_table
    from moe2edge.evaluation.profile.settings import PRESETS

    asked = {"output": output, "markdown": markdown, "junit": junit}
    views = {name: path for name, path in asked.items() if path is not None}
    check_views(views)
    sizes = {"prompt_tokens": prompt_tokens, "gen_tokens": gen_tokens, "threads": threads}
    given: dict[str, Any] = {name: value for name, value in sizes.items() if value is not None}
    if base.is_dir():  # files need no library that says anything
        quiet_libraries()
    found = compare_outputs(
        base,
        head,
        gate=gate,
        pairs=pairs,
        settings=replace(PRESETS["quick"], **given),
        text=read_text_options("evaluation", {"text": text}),
        reporter=make_reporter(quiet=as_json),
    )
    write_comparison(found, views)
    if as_json:
        emit(found.to_json())
    else:
        print_table(build_comparison_table(found))
        for path in views.values():
            show(f"written: {path}", err=True)
    try:
        found.check()
    except (Regressed, Inconclusive) as error:
        if not as_json:
            raise
        # The document says it already, and it is the only one on the standard output.
        show(f"error: {error}", err=True)
        sys.exit(error.exit_code)
