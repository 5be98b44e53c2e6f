"""The command line. Results go to stdout, everything else to stderr."""

from __future__ import annotations

import atexit
import contextlib
import gc
import io
import json
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

import click

from moe2edge.cli import compare, decisions, inspect, outputs, plan, profile, progress_bar, recipes
from moe2edge.cli.common import (
    CALIB_OPTION,
    JSON_OPTION,
    PATHS_OPTION,
    QUIET_OPTION,
    RESUME_OPTION,
    SETTINGS_OPTION,
    SOURCE_CHECK_OPTION,
    THREADS_OPTION,
    VERIFY_OPTION,
    add_hub_options,
    emit,
    list_settings,
    open_model,
    parse_bytes,
    print_table,
    quiet_libraries,
    show,
)
from moe2edge.cli.failures import classify_os_error, explain_shortage, naming_disk, shorten
from moe2edge.cli.plan import choose_and_tell
from moe2edge.cli.progress_bar import make_reporter
from moe2edge.errors import DoesNotFit, InputError, Moe2EdgeError, join_lines
from moe2edge.runtime.waiting import choose_waiting

INTERRUPTED = 130
# Read by torch when it is first used. With large pages there are fewer page faults, which takes a
# twelfth off the time of an export. oneDNN compiles code for each shape of a matrix product and
# would keep 1024 such pieces of up to half a megabyte, although the number of tokens of an expert
# is different in every block.
ENVIRONMENT = {"THP_MEM_ALLOC_ENABLE": "1", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64"}
# Commands in which threads wait for each other hundreds of times a token.
DECODING = ("generate", "profile", "compare")
# Commands that need no more memory than Python.
WITHOUT_TORCH = ("recipe", "targets", "decisions")
EPILOG = """\b
Example:
  moe2edge export builtin:tiny-moe -t onnx -o out-onnx

\b
Exit codes: 0 success; 1 failed while running; 2 the command, recipe, model or
text is wrong; 3 a comparison found a regression; 4 it can say nothing; 5 not
enough disk or memory; 6 not supported; 7 verification failed; 8 training
diverged; 130 interrupted."""


# When Python ends, it looks for garbage among all objects of torch and transformers, which takes a
# sixth of the time of importing them. The system gets the memory back in any case.
atexit.register(gc.freeze)


class CommandGroup(click.Group):
    """Group of commands that exits with the exit codes of the project."""

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run a command, and turn every error into one line and an exit code."""
        as_json = "--json" in sys.argv
        progress_bar.listen()
        _take_any_character(sys.stdout)
        try:
            _refuse_bytes(args[0] if args else extra.get("args"))
            super().main(*args, **{**extra, "standalone_mode": False})
        except click.exceptions.Exit as error:
            sys.exit(error.exit_code)
        except click.ClickException as error:
            _fail(error.format_message(), error.exit_code, as_json)
        except Moe2EdgeError as error:
            _print_debug_traceback()
            shortage = explain_shortage(error)
            code = DoesNotFit.exit_code if shortage else error.exit_code
            message = _append_notes(shortage or str(error), error)
            _fail(message, code, as_json, error.details)
        except (click.Abort, KeyboardInterrupt) as error:
            # Click replaces an interrupt by its own error; the notes are on the cause.
            first = error.__cause__ or error
            _exit_interrupted(_append_notes("interrupted", first), as_json)
        except BrokenPipeError:
            sys.stderr.close()
            sys.exit(1)
        except Exception as error:
            _print_debug_traceback()
            message, code = _explain(error)
            _fail(_append_notes(message, error), code, as_json)


def _explain(error: Exception) -> tuple[str, int]:
    """Return the message and the exit code of an error that is not one of the project."""
    if shortage := explain_shortage(error):
        return shortage, DoesNotFit.exit_code
    if isinstance(error, OSError):
        return classify_os_error(error)
    # The last resort: a bug is reported in one line as well.
    message = f"{type(error).__name__}: {join_lines(error)}"
    hint = "run again with MOE2EDGE_DEBUG=1 and report what it prints"
    return f"{message} (a bug in moe2edge; {hint})", Moe2EdgeError.exit_code


def _refuse_bytes(arguments: Sequence[str] | None) -> None:
    """Refuse arguments that are not in UTF-8, which could be neither tokenized nor written.

    Raises:
        InputError: there is one.
    """
    for argument in sys.argv[1:] if arguments is None else arguments:
        try:
            argument.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"the argument {argument[:60]!a} is not UTF-8 (from character {error.start + 1} "
                "on); give it in UTF-8, and rename a file whose name is not"
            ) from error


def _take_any_character(stream: object) -> None:
    """Let a stream escape what its encoding lacks, where it would fail otherwise."""
    if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
        stream.reconfigure(errors="backslashreplace")


def _print_debug_traceback() -> None:
    """Print the traceback of the current error if MOE2EDGE_DEBUG is set."""
    if os.environ.get("MOE2EDGE_DEBUG"):
        traceback.print_exc()


def _append_notes(message: str, error: BaseException) -> str:
    """Append the notes of an error, such as which finished work an export kept."""
    return "; ".join([message, *getattr(error, "__notes__", ())])


def _exit_interrupted(message: str, as_json: bool) -> NoReturn:
    """Exit after an interrupt.

    If the interrupt passed through an ``exec`` of text, as in dataclasses while a library is
    imported, Python ends itself with the signal and ignores the exit code. Hence ``os._exit``.
    """
    try:
        _fail(message, INTERRUPTED, as_json)
    except SystemExit:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(INTERRUPTED)


def _fail(
    message: str, code: int, as_json: bool, details: Mapping[str, Any] | None = None
) -> NoReturn:
    message = shorten(message)
    with contextlib.suppress(OSError):  # the terminal may be closed
        if as_json:
            failure = {"ok": False, "error": {"code": code, "message": message}}
            click.echo(json.dumps({**failure, **(details or {})}))
        click.echo(f"error: {message}", err=True)
    sys.exit(code)


@click.group(
    cls=CommandGroup, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]}
)
@click.version_option(package_name="moe2edge")
@click.pass_context
def main(context: click.Context) -> None:
    """Compress Mixture-of-Experts language models for one small machine.

    MODEL is a local folder, a model on the Hugging Face Hub (org/name or org/name@revision), or
    builtin:tiny-moe.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ.update(choose_waiting(os.environ, spin=context.invoked_subcommand in DECODING))
    if context.invoked_subcommand not in WITHOUT_TORCH and not {"-h", "--help"} & set(sys.argv):
        from moe2edge.runtime.memory import check_imports_fit

        check_imports_fit()


EXPORT_EXAMPLES = """\b
Examples:
  moe2edge export builtin:tiny-moe -t onnx -o out-onnx
  moe2edge export builtin:tiny-moe -t onnx,gptq -o out -r trim-w4
  moe2edge export builtin:tiny-moe -t hf -o out-hf -r trim --set expert_drop.keep=8
  moe2edge export builtin:tiny-moe -t gptq -o out-g64 --set gptq.group_size=64
  moe2edge export builtin:tiny-moe -t onnx:accuracy_level=0,gptq -o out-float32
  moe2edge export builtin:tiny-moe -t onnx -o out-8mb --disk 8.7MB
  moe2edge export MODEL -t gptq -o out --calib math.jsonl:0.5,code.txt:0.5
      --set calibration.field=question"""


@main.command(epilog=EXPORT_EXAMPLES)
@click.argument("model")
@click.option(
    "-t",
    "--target",
    required=True,
    help="onnx, gguf, gptq, compressed-tensors, mlx or hf; separate several by commas. Options "
    "follow a target, as in onnx:accuracy_level=0, float32 activations (see: moe2edge targets).",
)
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    help="Folder to write. With several targets, it gets a subfolder for each.",
)
@click.option(
    "-r",
    "--recipe",
    help="Bundled recipe (see: moe2edge recipe list) or recipe file [default: w4 for onnx and "
    "gptq; required for hf].",
)
@SETTINGS_OPTION
@CALIB_OPTION
@click.option(
    "--eval",
    "evaluation",
    help="Held-out text for the report, in the same forms as --calib, except self. none: do not "
    "measure perplexity and KL, for a quick export.",
)
@plan.BUDGET_OPTION
@plan.DISK_OPTION
@plan.CONTEXT_OPTION
@click.option("--force", is_flag=True, help="Replace an existing output folder of moe2edge.")
@RESUME_OPTION
@click.option(
    "--max-memory",
    "most",
    callback=parse_bytes,
    help="Memory limit of the whole process, such as 8GB. To stay below it, hidden states are "
    "kept on disk and fewer experts are quantized at a time.",
)
@click.option(
    "--materialize",
    is_flag=True,
    help="If one of the targets cannot hold tied experts (experts that share matrices), write "
    "each of them with its own copy, in all targets. The output becomes larger.",
)
@PATHS_OPTION
@SOURCE_CHECK_OPTION
@VERIFY_OPTION
@QUIET_OPTION
@THREADS_OPTION
@JSON_OPTION
@add_hub_options
def export_command(
    model: str,
    target: str,
    output: Path,
    recipe: str | None,
    settings: tuple[str, ...],
    calib: str | None,
    evaluation: str | None,
    budget: int | None,
    disk: int | None,
    context: int,
    force: bool,
    resume: Literal["auto", "never", "require"],
    most: int | None,
    materialize: bool,
    keep_paths: bool,
    source_check: bool,
    verify: Literal["full", "quick"],
    quiet: bool,
    as_json: bool,
    revision: str | None,
    cache_dir: Path | None,
) -> None:
    """Compress MODEL, write it for a runtime, and verify it there."""
    from moe2edge.commands.export import export_targets as run
    from moe2edge.commands.plan import Wish, choose_default_recipe
    from moe2edge.commands.texts import check_texts
    from moe2edge.pipeline.recipe import find, parse
    from moe2edge.pipeline.registry import parse_targets
    from moe2edge.storage.output_checks import check_output_early

    targets = parse_targets(target)
    given = list_settings(settings, calib, evaluation)
    if budget is not None or disk is not None:
        own = parse(find(recipe), given) if recipe else None
        wish = Wish(
            model, revision, cache_dir, own, tuple(given), target, context, most, materialize,
            verify,
        )  # fmt: skip
        parsed = choose_and_tell(wish, budget, disk)
    else:
        parsed = parse(find(recipe or choose_default_recipe(targets)), given)
    output_folder = output.absolute()
    # Before the model is downloaded.
    check_output_early(output_folder, force=force)
    check_texts(parsed)
    checkpoint = open_model(model, revision, cache_dir)
    quiet_libraries()
    with naming_disk(output):
        report = run(
            checkpoint,
            parsed,
            targets,
            output_folder,
            make_reporter(quiet=quiet),
            force=force,
            resume=resume,
            most=most,
            materialize=materialize,
            keep_paths=keep_paths,
            source_check=source_check,
            verify=verify,
        )
    if as_json:
        emit({"output": str(output), **report.to_json()})
        return
    print_table(report.table())
    for line in report.lines():
        show(line)
    show(f"written: {output}")


for command in (
    decisions.decide_command,
    decisions.decisions_group,
    inspect.inspect_command,
    plan.plan_command,
    outputs.verify_command,
    outputs.generate_command,
    profile.profile_command,
    compare.compare_command,
    outputs.evaluate_command,
    recipes.recipe_group,
    recipes.targets_command,
):
    main.add_command(command)
