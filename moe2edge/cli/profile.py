"""The command that profiles models and output folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import click

from moe2edge.cli.common import (
    FILE,
    JSON_OPTION,
    add_hub_options,
    add_row_options,
    emit,
    open_model,
    print_table,
    quiet_libraries,
    read_text_options,
    show,
)
from moe2edge.cli.progress_bar import make_reporter


def _print_schema(context: click.Context, _: click.Parameter, asked: bool) -> None:
    if asked:
        from moe2edge.evaluation.profile.document import build_profile_schema

        click.echo(json.dumps(build_profile_schema(), indent=2))
        context.exit()


PROFILE_EXAMPLES = """\b
Examples:
  moe2edge profile out-onnx
  moe2edge profile out/onnx out/gptq out/gguf
  moe2edge profile out-onnx --preset quick --report profile.html --markdown profile.md
  moe2edge profile builtin:tiny-moe --preset quick --json"""


@click.command(epilog=PROFILE_EXAMPLES)
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@click.option(
    "--preset",
    type=click.Choice(["quick", "ci", "full"]),
    default="ci",
    show_default=True,
    help="Amount of work. quick: 1 prompt of 64 tokens, 16 generated, 1 process; ci: 3 of 128, "
    "32 generated, 3 processes; full: 5 of 512, 128 generated, 5 processes.",
)
@click.option(
    "--text",
    default="builtin",
    show_default=True,
    help="File to cut prompts from: text, JSON lines, parquet.",
)
@add_row_options
@click.option("--prompt-tokens", type=int, help="Tokens per prompt [default: as in the preset].")
@click.option("--gen-tokens", type=int, help="New tokens per prompt [default: as in the preset].")
@click.option("--repeats", type=int, help="Number of fresh processes [default: as in the preset].")
@click.option("--threads", type=int, help="CPU threads [default: one per core].")
@click.option(
    "--explain/--no-explain",
    default=None,
    help="Also measure a cold load, memory over time, operators and the use of experts, in one "
    "more process [default: as in the preset; quick does not].",
)
@click.option(
    "--quality",
    help="Text to measure perplexity, KL and top-1 agreement of outputs on [default: take over "
    "what the export measured].",
)
@click.option("--samples", type=int, help="Samples of that text [default: 32].")
@click.option("--length", type=int, help="Tokens of each of them [default: 512].")
@click.option(
    "-o", "--output", type=FILE, help="Write the JSON document to a file, for later comparison."
)
@click.option(
    "--report", type=FILE, help="Write one HTML page with charts, which needs no network."
)
@click.option("--trace", type=FILE, help="Write a trace for Perfetto or chrome://tracing.")
@click.option("--markdown", type=FILE, help="Write Markdown, for a comment on a pull request.")
@click.option("--junit", type=FILE, help="Write JUnit XML, for CI.")
@click.option(
    "--schema",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_schema,
    help="Print the JSON Schema of the document, and exit.",
)
@JSON_OPTION
@add_hub_options
def profile_command(
    models: tuple[str, ...],
    preset: Literal["quick", "ci", "full"],
    text: str,
    field: str | None,
    template: str | None,
    chat: bool | None,
    chat_template: str | None,
    quality: str | None,
    samples: int | None,
    length: int | None,
    explain: bool | None,
    as_json: bool,
    revision: str | None,
    cache_dir: Path | None,
    output: Path | None,
    report: Path | None,
    trace: Path | None,
    markdown: Path | None,
    junit: Path | None,
    **sizes: int | bool | None,
) -> None:
    """Measure latency and memory of MODELs and output folders.

    Every measurement runs in a fresh process. Several are measured in turns (A B C, C B A), and
    compared with the first.
    """
    from moe2edge.commands.profile import (
        EXPLAINED_VIEWS,
        check_views,
        profile_models,
        write_views,
    )
    from moe2edge.evaluation.profile.table import build_profile_table, build_set_table

    judged = {"text": quality, "samples": samples, "length": length}
    if quality is None and (samples is not None or length is not None):
        raise click.UsageError("--samples and --length are those of --quality TEXT; give it too")
    asked = {"output": output, "report": report, "trace": trace, "markdown": markdown}
    views = {name: path for name, path in {**asked, "junit": junit}.items() if path is not None}
    check_views(views)
    if explain is None and any(name in views for name in EXPLAINED_VIEWS):
        explain = True
    sizes["explain"] = explain
    places = [m if Path(m).is_dir() else open_model(m, revision, cache_dir) for m in models]
    quiet_libraries()
    reporter = make_reporter(quiet=as_json)
    rows = {"field": field, "template": template, "chat": chat, "chat_template": chat_template}
    source = read_text_options("evaluation", {"text": text, **rows})
    held_out = read_text_options("evaluation", {**judged, **rows}) if quality else None
    found = profile_models(
        places, preset=preset, text=source, sizes=sizes, quality=held_out, reporter=reporter
    )
    several = len(places) > 1
    document = found.to_json() if several else found.profiles[0].to_json()
    write_views(document, views)
    if as_json:
        emit(document)
        return
    print_table(build_set_table(found) if several else build_profile_table(found.profiles[0]))
    for label, profile in zip(found.labels, found.profiles, strict=True):
        name = f"{label}: " if several else ""
        if note := profile.artifact["note"]:
            show(f"note: {name}{note}", err=True)
        for warning in profile.warnings:
            show(f"warning: {name}{warning}", err=True)
    for path in views.values():
        show(f"written: {path}", err=True)
