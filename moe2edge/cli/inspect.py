"""``moe2edge inspect``: show the structure of a model, and how its routers use the experts."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from moe2edge.cli.common import (
    JSON_OPTION,
    QUIET_OPTION,
    THREADS_OPTION,
    add_hub_options,
    add_text_options,
    emit,
    open_model,
    print_table,
    quiet_libraries,
    read_text_options,
    show,
)
from moe2edge.cli.progress_bar import make_reporter
from moe2edge.errors import InputError, Unsupported, suggest

if TYPE_CHECKING:
    from moe2edge.calibration.sources import TextSource
    from moe2edge.commands.private_paths import PrivatePaths
    from moe2edge.evaluation.routing_report import RoutingReport
    from moe2edge.storage.checkpoint import Checkpoint

EXAMPLES = """\b
Examples:
  moe2edge inspect builtin:tiny-moe
  moe2edge inspect builtin:tiny-moe --routing -o routing.png
  moe2edge inspect out-hf --routing --text math.jsonl --field question --json"""
NEEDS_ROUTING = (
    "text", "field", "template", "chat", "chat_template", "samples", "length", "seed", "criterion",
    "output",
)  # fmt: skip


@click.command(epilog=EXAMPLES)
@click.argument("model")
@click.option(
    "--routing", is_flag=True, help="Run a text through MODEL, and show how its experts are used."
)
@add_text_options(samples=128)
@click.option(
    "--criterion",
    default="mone",
    show_default=True,
    help="Criterion of expert_drop whose scores are shown; --json has all criteria.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Write heat maps to this file: .png, .svg or .pdf. An existing file is replaced.",
)
@QUIET_OPTION
@THREADS_OPTION
@JSON_OPTION
@add_hub_options
def inspect_command(
    model: str,
    routing: bool,
    criterion: str,
    output: Path | None,
    quiet: bool,
    as_json: bool,
    revision: str | None,
    cache_dir: Path | None,
    **text: Any,
) -> None:
    """Show the structure of MODEL or of an output folder.

    Reads config.json and file headers only, of any model that transformers knows, and says which
    passes and targets work on it, or why none does. With --routing, runs a text through the model,
    and shows for each MoE layer and expert: tokens, gate weights and the scores of every criterion
    of expert_drop; and for caches of experts, by size, the part of uses that they serve and the
    bytes that a token has to read, which says whether a model larger than memory is usable.
    """
    from moe2edge.commands.private_paths import PrivatePaths
    from moe2edge.storage.manifest import is_artifact

    if not routing:
        _refuse_routing_options()
        if is_artifact(Path(model)):
            _inspect_output(Path(model), as_json)
        else:
            _inspect_source(open_model(model, revision, cache_dir), as_json)
        return
    _check_criterion(criterion)
    if output is not None:
        from moe2edge.evaluation.routing_view import check_picture

        check_picture(output)
    # An unsupported target is refused before anything is downloaded.
    target = _read_target(Path(model)) if is_artifact(Path(model)) else None
    checkpoint = open_model(model, revision, cache_dir)
    source = read_text_options("calibration", text)
    report = _measure_routing(checkpoint, target, source, quiet=quiet)
    if output is not None:
        _write_picture(report, criterion, output, PrivatePaths.collect_from(checkpoint, [source]))
    _show_routing(report, criterion, output, as_json)


def _inspect_source(checkpoint: Checkpoint, as_json: bool) -> None:
    from moe2edge.commands.overview import make_overview

    quiet_libraries()
    overview = make_overview(checkpoint)
    if as_json:
        emit(overview.to_json())
        return
    for line in overview.lines():
        show(line)


def _inspect_output(folder: Path, as_json: bool) -> None:
    from moe2edge.storage.manifest import open_artifact

    artifact = open_artifact(folder)
    if as_json:
        emit({"manifest": dict(artifact.manifest)})
        return
    model, source = artifact.manifest["model"], artifact.manifest["source"]
    show(f"{folder}: target {artifact.target}, made from {source['model']}")
    show(f"parameters: {model['parameters']:,} ({model['active_parameters']:,} active)")
    show(f"experts per MoE layer: {model['expert_counts']}")
    show(f"blocks, by their index in the source: {model['origins']}")
    # Manifests of older versions lack these keys.
    for words, key in (("tied experts", "members"), ("replacements", "substitutes")):
        if any(model.get(key, ())):
            show(f"{words} per MoE layer: {model[key]}")
    for name, entry in artifact.manifest["files"].items():
        show(f"{entry['bytes']:>12,}  {entry['sha256'][:12]}  {name}")
    total = sum(entry["bytes"] for entry in artifact.manifest["files"].values())
    show(f"{total:>12,}  bytes in total")


# ---- routing -----------------------------------------------------------------------------------


def _refuse_routing_options() -> None:
    context = click.get_current_context()
    for name in NEEDS_ROUTING:
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            option = name.replace("_", "-")
            raise InputError(f"--{option} needs --routing: add --routing, or leave it out")


def _check_criterion(name: str) -> None:
    from moe2edge.evaluation.routing_report import REPORTED_CRITERIA

    if name not in REPORTED_CRITERIA:
        raise InputError(suggest("criterion", name, REPORTED_CRITERIA))


def _read_target(folder: Path) -> str:
    """Return the target of an output folder, if its numbers can be read back into a model.

    Raises:
        Unsupported: the folder has no safetensors.
    """
    from moe2edge.storage.manifest import open_artifact

    target = open_artifact(folder).target
    if not any(folder.glob("*.safetensors")):
        raise Unsupported(
            f"the routing of an output of target {target} ({folder}) cannot be inspected; export "
            "the same recipe with -t hf or -t gptq and inspect that, or inspect the source"
        )
    return target


def _measure_routing(
    checkpoint: Checkpoint, target: str | None, source: TextSource, *, quiet: bool
) -> RoutingReport:
    from moe2edge.calibration.sources import AS_FLAGS
    from moe2edge.calibration.tokens import load_tokens
    from moe2edge.commands.texts import choose_text
    from moe2edge.evaluation import routing_report
    from moe2edge.storage.manifest import open_artifact
    from moe2edge.storage.output import open_stored_model
    from moe2edge.storage.tokenizer import load_tokenizer

    changed = target or "per_layer_config" in checkpoint.config
    model = open_stored_model(checkpoint) if changed else checkpoint.model
    routing_report.check_routable(model, checkpoint.source)
    routing_report.estimate_routing(model, source.samples, source.length).check()
    quiet_libraries()
    geometry = model.family.geometry(model.config)
    limits = (geometry.max_positions, geometry.vocab)
    # An output is of the model that its manifest names.
    name = open_artifact(checkpoint.folder).source if target else checkpoint.source
    source = choose_text(source, name)
    reporter, tokenizer = make_reporter(quiet=quiet), load_tokenizer(checkpoint.folder)
    tokens = load_tokens(
        source, tokenizer, "calibration", limits, spelling=AS_FLAGS, reporter=reporter
    )
    text = tokens.provenance | {"seed": source.seed}
    origins = None if target is None else _read_origins(checkpoint.folder, len(model.blocks))
    found = routing_report.measure_routing(model, tokens.ids, reporter.advance, origins)
    family = model.family.architecture
    return routing_report.RoutingReport(checkpoint.source, family, target, text, *found)


def _read_origins(folder: Path, blocks: int) -> list[int]:
    """Read the index in the source of each block of an output folder."""
    from moe2edge.storage.manifest import open_artifact

    model = open_artifact(folder).manifest.get("model")
    origins = model.get("origins") if isinstance(model, dict) else None
    if isinstance(origins, list) and [type(origin) for origin in origins] == [int] * blocks:
        return origins
    raise InputError(
        f"the manifest of {folder} does not list the indices in the source of its {blocks} "
        "blocks; export it again"
    )


def _write_picture(
    report: RoutingReport, criterion: str, output: Path, paths: PrivatePaths
) -> None:
    """Write the picture, which may be published: names stand in it, and no paths."""
    from moe2edge.evaluation.routing_view import draw_picture
    from moe2edge.storage.durable import write_file

    shown = replace(report, model=paths.source, text=paths.hide(report.text))
    write_file(output, draw_picture(shown, criterion, output.suffix))


def _show_routing(
    report: RoutingReport, criterion: str, output: Path | None, as_json: bool
) -> None:
    from moe2edge.evaluation import routing_view

    if as_json:
        emit(report.to_json() | ({"picture": str(output)} if output else {}))
    else:
        print_table(routing_view.build_layer_table(report, criterion))
        width = shutil.get_terminal_size((150, 24)).columns if sys.stdout.isatty() else 150
        for line in routing_view.draw_heat_map(report, width, sys.stdout.encoding or "ascii"):
            show(line)
        print_table(routing_view.build_cache_table(report.expert_cache))
        if output is not None:
            show(f"written: {output}")
    for warning in report.warnings:
        show(f"warning: {warning}", err=True)
