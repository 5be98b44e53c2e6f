"""Commands for decisions: make them, show them, compare them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from moe2edge.cli.common import (
    CALIB_OPTION,
    JSON_OPTION,
    PATHS_OPTION,
    QUIET_OPTION,
    RESUME_OPTION,
    SETTINGS_OPTION,
    SOURCE_CHECK_OPTION,
    THREADS_OPTION,
    add_hub_options,
    emit,
    open_model,
    print_table,
    quiet_libraries,
    read_recipe_options,
    show,
)
from moe2edge.cli.failures import naming_disk
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
To carry out the decisions later, use the pass apply_decisions in a recipe:
  {apply_decisions: {file: sets.json}}"""


@click.command(epilog=DECIDE_EXAMPLES)
@click.argument("model")
@click.option(
    "-r",
    "--recipe",
    required=True,
    help="Bundled recipe or recipe file. It may have pruning passes only.",
)
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="JSON file to write."
)
@SETTINGS_OPTION
@CALIB_OPTION
@click.option("--force", is_flag=True, help="Replace an existing file of decisions.")
@PATHS_OPTION
@SOURCE_CHECK_OPTION
@RESUME_OPTION
@QUIET_OPTION
@THREADS_OPTION
@JSON_OPTION
@add_hub_options
def decide_command(
    model: str,
    recipe: str,
    output: Path,
    settings: tuple[str, ...],
    calib: str | None,
    force: bool,
    keep_paths: bool,
    source_check: bool,
    resume: Literal["auto", "never", "require"],
    quiet: bool,
    as_json: bool,
    revision: str | None,
    cache_dir: Path | None,
) -> None:
    """Decide which parts of MODEL a pruning recipe keeps.

    Writes only the decisions, not the model.
    """
    from moe2edge.commands.decide import decide_to_file
    from moe2edge.commands.texts import check_texts
    from moe2edge.pipeline.decisions import DECISIONS
    from moe2edge.storage.output_checks import check_output_early

    parsed = read_recipe_options(recipe, settings, calib)
    # Before the model is downloaded.
    check_output_early(Path(os.path.abspath(output)), force=force, form=DECISIONS)
    check_texts(parsed)
    checkpoint = open_model(model, revision, cache_dir)
    quiet_libraries()
    reporter = make_reporter(quiet=quiet)
    with naming_disk(output):
        decided, steps = decide_to_file(
            checkpoint,
            parsed,
            output,
            reporter,
            force=force,
            resume=resume,
            keep_paths=keep_paths,
            source_check=source_check,
        )
    if as_json:
        emit({"output": str(output), "decisions": decided.to_json()})
        return
    _print_decisions(decided)
    for step in steps:
        for note in step.notes:
            show(f"{step.name}: {note}")
    show(f"written: {output}")


@click.group(name="decisions", epilog="\b\nExample:\n  moe2edge decisions show sets.json")
def decisions_group() -> None:
    """Show and compare files of decisions, as decide writes them."""


@decisions_group.command(name="show", epilog="\b\nExample:\n  moe2edge decisions show sets.json")
@click.argument("file", type=click.Path(path_type=Path))
@JSON_OPTION
def show_decisions_command(file: Path, as_json: bool) -> None:
    """Show the decisions in FILE, block by block."""
    from moe2edge.pipeline.decisions import read_decisions

    decisions = read_decisions(file)[0]
    if as_json:
        emit({"decisions": decisions.to_json()})
        return
    _print_decisions(decisions)


def _print_decisions(decisions: Decisions) -> None:
    from rich.table import Table

    source, calibration = decisions.source, decisions.calibration
    show(f"source: {source.model} ({source.family}, sha256 {source.sha256[:12]}...)")
    if calibration is not None:
        show(
            f"calibration: {calibration.text}, {calibration.samples} samples of "
            f"{calibration.length} tokens"
        )
    if (check := decisions.source_check) is not None and check.status != "passed":
        show(f"source check {check.status}: {check.reason}")
    table = Table()
    for heading in ("block", "experts", "kept", "top-k", "skips below", "kept experts"):
        table.add_column(heading, justify="left" if heading == "kept experts" else "right")
    for block in decisions.blocks:
        table.add_row(
            str(block.origin),
            str(block.experts_before),
            "-" if block.dropped else str(len(block.experts)),
            str(block.top_k or "-"),
            ", ".join(f"{value:.4f}" for value in block.skip_below) or "-",
            _describe_kept(block),
        )
    print_table(table)


def _describe_kept(block: BlockDecision) -> str:
    """Describe the experts that stay, or what remains of a block without a router."""
    if block.dropped:
        return "block dropped"
    if block.mlp == "moe":
        all_kept = len(block.experts) == block.experts_before
        return "all" if all_kept else " ".join(map(str, block.experts))
    words = {"none": "nothing (attention only)", "norm": "only the norm"}
    experts = f" {block.experts[0]}" if block.experts else ""
    return words.get(str(block.mlp), f"{block.mlp}{experts}")


COMPARE_EXAMPLE = "\b\nExample:\n  moe2edge decisions compare math.json code.json"


@decisions_group.command(name="compare", epilog=COMPARE_EXAMPLE)
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@JSON_OPTION
def compare_decisions_command(files: tuple[Path, ...], as_json: bool) -> None:
    """Compare the experts that every pair of FILES keeps.

    Shows the overlap for each layer and over all layers.
    """
    from moe2edge.evaluation.decision_overlap import compare
    from moe2edge.pipeline.decisions import read_decisions

    decisions = {str(path): read_decisions(path)[0] for path in files}
    overlaps = compare(decisions)
    if as_json:
        emit({"overlaps": [overlap.to_json() for overlap in overlaps]})
        return
    if len({each.source.sha256 for each in decisions.values()}) > 1:
        show("note: the files were made for different models of the same shape", err=True)
    for overlap in overlaps:
        _print_overlap(overlap)
    if len(overlaps) > 1:
        _print_overall(overlaps)
    show("expected: mean number kept by both if sets of the same sizes were drawn at random")


def _print_overlap(overlap: Overlap) -> None:
    from rich.table import Table

    table = Table(title=f"A: {overlap.a_name}, B: {overlap.b_name}", title_justify="left")
    for heading in ("block", "experts", "A", "B", "in both", "expected", "Jaccard", "same"):
        table.add_column(heading, justify="right")
    for layer in overlap.layers:
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
    experts = sum(layer.experts for layer in overlap.layers)
    table.add_row("all", str(experts), *_format_totals(overlap))
    print_table(table)


def _print_overall(overlaps: Sequence[Overlap]) -> None:
    from rich.table import Table

    table = Table(title="all layers", title_justify="left")
    for heading in ("A", "B", "A keeps", "B keeps", "in both", "expected", "Jaccard", "same"):
        table.add_column(heading, justify="right")
    for overlap in overlaps:
        table.add_row(overlap.a_name, overlap.b_name, *_format_totals(overlap))
    print_table(table)


def _format_totals(overlap: Overlap) -> tuple[str, ...]:
    return (
        str(overlap.a),
        str(overlap.b),
        str(overlap.both),
        f"{overlap.expected:.1f}",
        f"{overlap.jaccard:.2f}",
        f"{len(overlap.identical)} of {len(overlap.layers)}",
    )
