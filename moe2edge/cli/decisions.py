"""Verbs on decisions: make them, show them, compare them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from moe2edge.cli.common import (
    CALIB,
    JSON,
    QUIET,
    SETTINGS,
    THREADS,
    add_hub_options,
    emit,
    open_model,
    parse_recipe,
    print_table,
    quiet_libraries,
)
from moe2edge.cli.progress_bar import make_reporter

if TYPE_CHECKING:
    from moe2edge.evaluation.decision_overlap import Overlap
    from moe2edge.pipeline.decisions import BlockDecision, Decisions

DECIDE_EXAMPLES = """\b
Examples:
  moe2edge decide builtin:tiny-moe -r trim -o sets.json
  moe2edge decide MODEL -r trim -o math.json --calib gsm8k.jsonl
      --set calibration.field=question
  moe2edge decide MODEL -r trim -o mix.json --calib gsm8k.jsonl:0.5,code.txt:0.5
The pass apply_decisions carries them out later: {apply_decisions: {file: sets.json}}"""


@click.command(epilog=DECIDE_EXAMPLES)
@click.argument("model")
@click.option("-r", "--recipe", required=True, help="Bundled recipe or file, of trimming passes.")
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="JSON file to write."
)
@SETTINGS
@CALIB
@click.option("--force", is_flag=True, help="Replace a file of decisions.")
@QUIET
@THREADS
@JSON
@add_hub_options
def decide_command(
    model: str,
    recipe: str,
    output: Path,
    settings: tuple[str, ...],
    calib: str | None,
    force: bool,
    quiet: bool,
    as_json: bool,
    revision: str | None,
    cache_dir: Path | None,
) -> None:
    """Choose what of MODEL stays, by a recipe that trims, and write down the choice alone."""
    from moe2edge.commands.decide import decide as run
    from moe2edge.pipeline import decisions

    parsed = parse_recipe(recipe, settings, calib)
    decisions.check_decisions_output(output, force=force)
    checkpoint = open_model(model, revision, cache_dir)
    quiet_libraries()
    found, steps = run(checkpoint, parsed, make_reporter(quiet=quiet))
    decisions.write_decisions(found, output)
    if as_json:
        emit({"output": str(output), "decisions": found.to_json()})
        return
    _show(found)
    for step in steps:
        for note in step.notes:
            click.echo(f"{step.name}: {note}")
    click.echo(f"written: {output}")


@click.group(name="decisions")
def decisions_group() -> None:
    """Files of decisions, as decide writes them."""


@decisions_group.command(name="show", epilog="\b\nExample:\n  moe2edge decisions show sets.json")
@click.argument("file", type=click.Path(path_type=Path))
@JSON
def show_decisions_command(file: Path, as_json: bool) -> None:
    """Show what FILE decides for each block."""
    from moe2edge.pipeline.decisions import read_decisions

    found = read_decisions(file)[0]
    if as_json:
        emit({"decisions": found.to_json()})
        return
    _show(found)


def _show(found: Decisions) -> None:
    from rich.table import Table

    source, calibration = found.source, found.calibration
    click.echo(f"source: {source.model} ({source.family}, sha256 {source.sha256[:12]}...)")
    if calibration is not None:
        click.echo(
            f"calibration: {calibration.text}, {calibration.samples} samples of "
            f"{calibration.length} tokens"
        )
    table = Table()
    for heading in ("block", "experts", "stays", "top-k", "skips below", "which"):
        table.add_column(heading, justify="left" if heading == "which" else "right")
    for own in found.blocks:
        table.add_row(
            str(own.origin),
            str(own.experts_before),
            "-" if own.dropped else str(len(own.experts)),
            str(own.top_k or "-"),
            ", ".join(f"{value:.4f}" for value in own.skip_below) or "-",
            _which(own),
        )
    print_table(table)


def _which(own: BlockDecision) -> str:
    """Experts that stay, and what the block is if it routes no more."""
    if own.dropped:
        return "block dropped"
    if own.mlp == "moe":
        whole = len(own.experts) == own.experts_before
        return "all" if whole else " ".join(map(str, own.experts))
    words = {"none": "nothing after attention", "norm": "the norm only"}
    experts = f" {own.experts[0]}" if own.experts else ""
    return words.get(str(own.mlp), f"{own.mlp}{experts}")


COMPARE_EXAMPLE = "\b\nExample:\n  moe2edge decisions compare math.json code.json text.json"


@decisions_group.command(name="compare", epilog=COMPARE_EXAMPLE)
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@JSON
def compare_decisions_command(files: tuple[Path, ...], as_json: bool) -> None:
    """Show which experts every two of FILES have in common, layer by layer."""
    from moe2edge.evaluation.decision_overlap import compare
    from moe2edge.pipeline.decisions import read_decisions

    found = {str(path): read_decisions(path)[0] for path in files}
    overlaps = compare(found)
    if as_json:
        emit({"overlaps": [own.to_json() for own in overlaps]})
        return
    if len({own.source.sha256 for own in found.values()}) > 1:
        click.echo("note: the decisions are about different models of one shape", err=True)
    for own in overlaps:
        _print_overlap(own)
    if len(overlaps) > 1:
        _print_overall(overlaps)
    click.echo("expected: mean overlap of random sets of the same sizes")


def _print_overlap(own: Overlap) -> None:
    from rich.table import Table

    table = Table(title=f"A: {own.a_name}, B: {own.b_name}", title_justify="left")
    for heading in ("block", "experts", "A", "B", "in both", "expected", "Jaccard", "same"):
        table.add_column(heading, justify="right")
    for layer in own.layers:
        table.add_row(
            str(layer.origin),
            str(layer.experts),
            str(layer.a),
            str(layer.b),
            str(layer.both),
            f"{layer.expected:.1f}",
            f"{layer.jaccard:.2f}",
            "yes" if layer.identical else "",
        )
    table.add_section()
    table.add_row("all", str(sum(layer.experts for layer in own.layers)), *_overall(own))
    print_table(table)


def _print_overall(overlaps: Sequence[Overlap]) -> None:
    from rich.table import Table

    table = Table(title="all layers", title_justify="left")
    for heading in ("A", "B", "A keeps", "B keeps", "in both", "expected", "Jaccard", "same"):
        table.add_column(heading, justify="right")
    for own in overlaps:
        table.add_row(own.a_name, own.b_name, *_overall(own))
    print_table(table)


def _overall(own: Overlap) -> tuple[str, ...]:
    return (
        str(own.a),
        str(own.b),
        str(own.both),
        f"{own.expected:.1f}",
        f"{own.jaccard:.2f}",
        f"{len(own.identical)} of {len(own.layers)}",
    )
