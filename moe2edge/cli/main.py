"""The command line: one verb each. Results on stdout, everything else on stderr."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import click

from moe2edge.cli import decisions, inspect, outputs, progress_bar, recipes
from moe2edge.cli.common import (
    CALIB,
    JSON,
    QUIET,
    SETTINGS,
    THREADS,
    add_hub_options,
    emit,
    open_model,
    parse_bytes,
    parse_recipe,
    print_table,
    quiet_libraries,
)
from moe2edge.cli.progress_bar import make_reporter
from moe2edge.errors import InputError, Moe2EdgeError

if TYPE_CHECKING:
    from moe2edge.pipeline.target import Target

INTERRUPTED = 130
# For torch, which reads it when it is first used. Large pages are fewer page faults, a twelfth off
# the time of an export. Of code for each shape of a product oneDNN would keep 1024 pieces, of up to
# half a megabyte, and experts see other numbers of tokens in every block.
ENVIRONMENT = {"THP_MEM_ALLOC_ENABLE": "1", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64"}
EXIT_CODES = """\b
Exit codes: 0 done; 1 failed while running; 2 the command, recipe, model or
text is wrong; 5 does not fit on the disk or in memory; 6 not supported;
7 verification failed; 8 training diverged; 130 interrupted."""


class CommandGroup(click.Group):
    """Commands with the project's exit codes."""

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run; every error that is ours becomes one line and its exit code."""
        as_json = "--json" in sys.argv
        progress_bar.listen()
        try:
            super().main(*args, **{**extra, "standalone_mode": False})
        except click.exceptions.Exit as error:
            sys.exit(error.exit_code)
        except click.ClickException as error:
            _fail(error.format_message(), error.exit_code, as_json)
        except Moe2EdgeError as error:
            _debug()
            _fail(_told(str(error), error), error.exit_code, as_json)
        except (click.Abort, KeyboardInterrupt) as error:
            # Click raises an error of its own in place of an interrupt.
            first = error.__cause__ or error
            _leave(_told("interrupted", first, "nothing was left behind"), as_json)
        except BrokenPipeError:
            sys.stderr.close()
            sys.exit(1)
        except OSError as error:
            _debug()
            what = f"{error.strerror or error}: {error.filename or 'no file named'}"
            _fail(_told(what, error), 1, as_json)
        except Exception as error:  # the last resort: a fault of ours, told in one line as well
            _debug()
            what = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            hint = "run again with MOE2EDGE_DEBUG=1 and report what it prints"
            _fail(_told(f"{what} (a fault of moe2edge; {hint})", error), 1, as_json)


def _debug() -> None:
    """Where an error came from, for those who ask."""
    if os.environ.get("MOE2EDGE_DEBUG"):
        traceback.print_exc()


def _told(message: str, error: BaseException, otherwise: str = "") -> str:
    """A message with what the error has on it, such as what an export has kept."""
    notes = getattr(error, "__notes__", ()) or ([otherwise] if otherwise else [])
    return "; ".join([message, *notes])


def _leave(message: str, as_json: bool) -> NoReturn:
    """Exit after an interrupt.

    Python ends itself with the signal, whatever exit code it was given, if the interrupt passed
    through an ``exec`` of text, as dataclasses do while a library is imported.
    """
    try:
        _fail(message, INTERRUPTED, as_json)
    except SystemExit:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(INTERRUPTED)


def _fail(message: str, code: int, as_json: bool) -> NoReturn:
    if as_json:
        click.echo(json.dumps({"ok": False, "error": {"code": code, "message": message}}))
    click.echo(f"error: {message}", err=True)
    sys.exit(code)


@click.group(
    cls=CommandGroup, epilog=EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]}
)
@click.version_option(package_name="moe2edge")
def main() -> None:
    """Compress Mixture-of-Experts language models for one small machine.

    MODEL is a local folder, a hub id (org/name or org/name@revision), or builtin:tiny-moe.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


EXPORT_EXAMPLES = """\b
Examples:
  moe2edge export builtin:tiny-moe -t onnx -o out-onnx
  moe2edge export builtin:tiny-moe -t onnx,gptq -o out -r trim-w4
  moe2edge export builtin:tiny-moe -t hf -o out-hf -r trim --set expert_drop.keep=8
  moe2edge export builtin:tiny-moe -t gptq -o out-g64 --set gptq.group_size=64
  moe2edge export builtin:tiny-moe -t onnx:accuracy_level=0,gptq -o out-float32
  moe2edge export MODEL -t gptq -o out --calib math.jsonl:0.5,code.txt:0.5
      --set calibration.field=question"""


@main.command(epilog=EXPORT_EXAMPLES)
@click.argument("model")
@click.option(
    "-t",
    "--target",
    required=True,
    help="onnx, gptq, hf, or several with commas; options of a target follow it, as in "
    "onnx:accuracy_level=0 (see moe2edge targets).",
)
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder to write."
)
@click.option("-r", "--recipe", help="Bundled recipe or file [default: w4 for onnx and gptq].")
@SETTINGS
@CALIB
@click.option(
    "--eval",
    "evaluation",
    help="Held-out text for the report, likewise; none: no perplexity, for a quick export.",
)
@click.option("--force", is_flag=True, help="Replace an output folder of moe2edge.")
@click.option(
    "--resume",
    type=click.Choice(["auto", "never", "require"]),
    default="auto",
    show_default=True,
    help="Go on with an export to the same folder that was interrupted or killed: where there is "
    "one, not at all, or only if there is one.",
)
@click.option(
    "--max-memory",
    "most",
    callback=parse_bytes,
    help="For the whole process, as in 8GB: hidden states beyond a share go to the disk, and "
    "fewer experts are solved at once.",
)
@click.option(
    "--materialize",
    is_flag=True,
    help="Where one of the targets cannot hold experts that share matrices, write each with its "
    "own, for all of them.",
)
@QUIET
@THREADS
@JSON
@add_hub_options
def export_command(
    model: str,
    target: str,
    output: Path,
    recipe: str | None,
    settings: tuple[str, ...],
    calib: str | None,
    evaluation: str | None,
    force: bool,
    resume: Literal["auto", "never", "require"],
    most: int | None,
    materialize: bool,
    quiet: bool,
    as_json: bool,
    revision: str | None,
    cache_dir: Path | None,
) -> None:
    """Compress MODEL, write it for a runtime, verify it there, and report."""
    from moe2edge.commands.export import export as run
    from moe2edge.pipeline.registry import parse_targets

    targets = parse_targets(target)
    parsed = parse_recipe(recipe or _default_recipe(targets), settings, calib, evaluation)
    checkpoint = open_model(model, revision, cache_dir)
    quiet_libraries()
    report = run(
        checkpoint,
        parsed,
        targets,
        output.absolute(),
        make_reporter(quiet=quiet),
        force=force,
        resume=resume,
        most=most,
        materialize=materialize,
    )
    if as_json:
        emit({"output": str(output), **report.to_json()})
        return
    print_table(report.table())
    for line in report.lines():
        click.echo(line)
    click.echo(f"written: {output}")


def _default_recipe(targets: Sequence[Target]) -> str:
    if any(target.name == "hf" for target in targets):
        raise InputError(
            "target hf needs a recipe that trims, such as -r trim: it cannot hold quantized numbers"
        )
    return "w4"


for command in (
    decisions.decide_command,
    decisions.decisions_group,
    inspect.inspect_command,
    outputs.verify_command,
    outputs.generate_command,
    outputs.profile_command,
    outputs.evaluate_command,
    recipes.recipe_group,
    recipes.targets_command,
):
    main.add_command(command)
