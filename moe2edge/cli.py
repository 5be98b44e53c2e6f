"""The command line: one verb each. Results on stdout, everything else on stderr."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import click

from moe2edge import progress
from moe2edge.errors import InputError, Moe2EdgeError, VerificationFailed
from moe2edge.progress import watcher

INTERRUPTED = 130
EXIT_CODES = """\b
Exit codes: 0 done; 1 failed while running; 2 the command, recipe, model or
text is wrong; 5 does not fit on the disk or in memory; 6 not supported;
7 verification failed; 130 interrupted."""


class Group(click.Group):
    """Commands with the project's exit codes."""

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run; every error that is ours becomes one line and its exit code."""
        as_json = "--json" in sys.argv
        progress.listen()
        try:
            super().main(*args, **{**extra, "standalone_mode": False})
        except click.exceptions.Exit as error:
            sys.exit(error.exit_code)
        except click.ClickException as error:
            _fail(error.format_message(), error.exit_code, as_json)
        except Moe2EdgeError as error:
            _debug()
            _fail(str(error), error.exit_code, as_json)
        except (click.Abort, KeyboardInterrupt):
            _leave("interrupted; nothing was left behind", as_json)
        except BrokenPipeError:
            sys.stderr.close()
            sys.exit(1)
        except OSError as error:
            _debug()
            _fail(f"{error.strerror or error}: {error.filename or 'no file named'}", 1, as_json)
        except Exception as error:  # the last resort: a fault of ours, told in one line as well
            _debug()
            what = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            hint = "run again with MOE2EDGE_DEBUG=1 and report what it prints"
            _fail(f"{what} (a fault of moe2edge; {hint})", 1, as_json)


def _debug() -> None:
    """Where an error came from, for those who ask."""
    if os.environ.get("MOE2EDGE_DEBUG"):
        traceback.print_exc()


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


def _emit(data: dict[str, Any]) -> None:
    click.echo(json.dumps({"ok": True, **data}, indent=2, ensure_ascii=False))


def _print_table(table: Any) -> None:
    from rich.console import Console

    width = None if sys.stdout.isatty() else 150
    Console(width=width).print(table)


def _quiet_libraries() -> None:
    """No bars and notices of libraries between our own lines."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _checkpoint(model: str, revision: str | None, cache_dir: Path | None) -> Any:
    from moe2edge.checkpoint import open_checkpoint

    return open_checkpoint(model, revision=revision, cache_dir=cache_dir)


Command = Callable[..., Any]


def _from_hub(command: Command) -> Command:
    """Options that say which files of the hub MODEL means."""
    command = click.option("--revision", help="Branch, tag or commit of a hub model.")(command)
    return click.option("--cache-dir", type=click.Path(path_type=Path), help="Cache of hub files.")(
        command
    )


def _set_threads(_: click.Context, __: click.Parameter, count: int | None) -> None:
    if count is not None:
        import torch

        torch.set_num_threads(count)


# ONNX sessions take torch's number, so that one option rules both.
THREADS = click.option(
    "--threads",
    type=click.IntRange(min=1),
    expose_value=False,
    callback=_set_threads,
    help="Processor threads [default: one per core]. Lower it beside other work.",
)
JSON = click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
FOLDER = click.argument("folder", type=click.Path(path_type=Path))


@click.group(cls=Group, epilog=EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="moe2edge")
def main() -> None:
    """Compress Mixture-of-Experts language models for one small machine.

    MODEL is a local folder, a hub id (org/name or org/name@revision), or builtin:tiny-moe.
    """


EXPORT_EXAMPLES = """\b
Examples:
  moe2edge export builtin:tiny-moe -t onnx -o out-onnx
  moe2edge export builtin:tiny-moe -t onnx,gptq -o out -r trim-w4
  moe2edge export builtin:tiny-moe -t hf -o out-hf -r trim --set expert_drop.keep=8
  moe2edge export builtin:tiny-moe -t gptq -o out-g64 --set gptq.group_size=64"""


@main.command(epilog=EXPORT_EXAMPLES)
@click.argument("model")
@click.option("-t", "--target", required=True, help="onnx, gptq, hf, or several with commas.")
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder to write."
)
@click.option("-r", "--recipe", help="Bundled recipe or file [default: w4 for onnx and gptq].")
@click.option("--set", "settings", multiple=True, help="Override, as in gptq.group_size=64.")
@click.option("--calib", help="Calibration text: a text or JSONL file.")
@click.option("--eval", "evaluation", help="Held-out text for the report: a text or JSONL file.")
@click.option("--force", is_flag=True, help="Replace an output folder of moe2edge.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
@THREADS
@JSON
@_from_hub
def export(
    model: str,
    target: str,
    output: Path,
    recipe: str | None,
    settings: tuple[str, ...],
    calib: str | None,
    evaluation: str | None,
    force: bool,
    quiet: bool,
    as_json: bool,
    revision: str | None,
    cache_dir: Path | None,
) -> None:
    """Compress MODEL, write it for a runtime, verify it there, and report."""
    from moe2edge import recipe as recipes
    from moe2edge.export import check_targets
    from moe2edge.export import export as run

    targets = check_targets(target)
    name = recipe or _default_recipe(target)
    texts = [f"calibration.text={json.dumps(calib)}"] if calib else []
    texts += [f"evaluation.text={json.dumps(evaluation)}"] if evaluation else []
    parsed = recipes.parse(recipes.find(name), [*texts, *settings])
    checkpoint = _checkpoint(model, revision, cache_dir)
    _quiet_libraries()
    report = run(checkpoint, parsed, targets, output.absolute(), watcher(quiet=quiet), force=force)
    if as_json:
        _emit({"output": str(output), **report.to_json()})
        return
    _print_table(report.table())
    for line in report.lines():
        click.echo(line)
    click.echo(f"written: {output}")


def _default_recipe(target: str) -> str:
    names = {name.strip() for name in target.split(",")}
    if "hf" in names:
        raise InputError(
            "target hf needs a recipe that trims, such as -r trim: it cannot hold quantized numbers"
        )
    return "w4"


@main.command(epilog="\b\nExample:\n  moe2edge inspect builtin:tiny-moe")
@click.argument("model")
@JSON
@_from_hub
def inspect(model: str, as_json: bool, revision: str | None, cache_dir: Path | None) -> None:
    """Show what MODEL, or a folder that moe2edge wrote, is made of; reads headers only."""
    from moe2edge.artifact import is_artifact

    if is_artifact(Path(model)):
        _inspect_output(Path(model), as_json)
        return
    found = _checkpoint(model, revision, cache_dir).model
    if as_json:
        _emit(
            {
                "family": found.family.model_type,
                "architecture": found.family.architecture,
                "blocks": len(found.blocks),
                "expert_counts": list(found.expert_counts),
                "top_k": [layer.router.top_k for _, layer in found.moe_blocks],
                "parameters": found.parameters,
                "active_parameters": found.active_parameters,
                "bytes": found.nbytes,
            }
        )
        return
    click.echo(str(found))


def _inspect_output(folder: Path, as_json: bool) -> None:
    from moe2edge.artifact import open_artifact

    artifact = open_artifact(folder)
    if as_json:
        _emit({"manifest": dict(artifact.manifest)})
        return
    model, source = artifact.manifest["model"], artifact.manifest["source"]
    click.echo(f"{folder}: target {artifact.target}, made from {source['model']}")
    click.echo(f"parameters: {model['parameters']:,} ({model['active_parameters']:,} active)")
    click.echo(f"experts per MoE layer: {model['expert_counts']}; blocks: {model['origins']}")
    for name, entry in artifact.manifest["files"].items():
        click.echo(f"{entry['bytes']:>12,}  {entry['sha256'][:12]}  {name}")
    total = sum(entry["bytes"] for entry in artifact.manifest["files"].values())
    click.echo(f"{total:>12,}  bytes in all")


@main.command(epilog="\b\nExample:\n  moe2edge verify out-onnx")
@FOLDER
@click.option("--reference", help="Also repeat the comparison with this source MODEL.")
@THREADS
@JSON
@_from_hub
def verify(
    folder: Path,
    reference: str | None,
    as_json: bool,
    revision: str | None,
    cache_dir: Path | None,
) -> None:
    """Prove that a folder holds what was exported: files, every tensor, logits in its runtime."""
    from moe2edge import registry
    from moe2edge import verify as checks
    from moe2edge.artifact import check_files, open_artifact

    artifact = open_artifact(folder)
    target = registry.target(artifact.target)
    if differences := check_files(artifact):
        raise VerificationFailed(f"{folder}: {'; '.join(differences)}")
    _quiet_libraries()
    recorded = checks.Reference.read(folder)
    count, parity, runtime = checks.check_folder(target, folder, recorded)
    result: dict[str, Any] = {"tensors": count, "parity": asdict(parity)}
    if reference:
        source = _checkpoint(reference, revision, cache_dir).model
        result["kl_to_source"] = checks.check_source(recorded, runtime, source)
    if as_json:
        _emit(result)
        return
    click.echo(f"files: {len(artifact.manifest['files'])} as in the manifest")
    click.echo(f"tensors: {count} hold the numbers that were exported")
    click.echo(
        f"logits in the runtime: largest error {parity.exact:.1e} with float32 activations, "
        f"{parity.shipped:.2%} relative as shipped, {parity.top1:.1%} same top-1 "
        f"({parity.positions} positions, cached)"
    )
    if reference:
        click.echo(f"KL to {reference}: {result['kl_to_source']:.5f} nats per token")
    click.echo("verified")


@main.command(epilog='\b\nExample:\n  moe2edge generate out-onnx "def read_json(path):"')
@FOLDER
@click.argument("prompt")
@click.option("-n", "--max-tokens", default=64, show_default=True, help="At most so many tokens.")
@click.option("--temperature", default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-p", default=1.0, show_default=True, help="Sample from this much probability.")
@click.option("--top-k", default=0, show_default=True, help="Sample from so many tokens; 0: all.")
@click.option("--seed", default=0, show_default=True, help="For sampling.")
@click.option("--chat/--no-chat", default=None, help="Use the chat template [default: if any].")
@THREADS
@JSON
def generate(
    folder: Path, prompt: str, max_tokens: int, chat: bool | None, as_json: bool, **how: Any
) -> None:
    """Continue PROMPT with the model in FOLDER, in the runtime it was made for."""
    from moe2edge import generate as text
    from moe2edge.artifact import open_artifact, tokenizer_of

    artifact = open_artifact(folder)
    text.check_settings(max_tokens, **how)
    _quiet_libraries()
    tokenizer = tokenizer_of(folder)
    ids = text.encode_prompt(tokenizer, prompt, chat)
    tell = partial(click.echo, err=True)
    tokens = text.continue_in(artifact, ids, tell, max_tokens=max_tokens, **how)
    if as_json:
        made = list(progress.watched(tokens))
        _emit({"prompt": prompt, "text": tokenizer.decode(made), "tokens": made})
        return
    click.echo(prompt, nl=False)
    for piece in text.stream_text(tokenizer, progress.watched(tokens)):
        click.echo(piece, nl=False)
        sys.stdout.flush()
    click.echo()


PROFILE_EXAMPLES = """\b
Examples:
  moe2edge profile out-onnx
  moe2edge profile builtin:tiny-moe --preset quick --json"""


@main.command(epilog=PROFILE_EXAMPLES)
@click.argument("model")
@click.option(
    "--preset",
    type=click.Choice(["quick", "ci", "full"]),
    default="ci",
    show_default=True,
    help="How much is measured.",
)
@click.option("--text", type=click.Path(path_type=Path), help="Natural text for the prompts.")
@click.option("--prompt-tokens", type=int, help="Tokens of a prompt.")
@click.option("--gen-tokens", type=int, help="Tokens generated after it.")
@click.option("--repeats", type=int, help="Fresh processes.")
@click.option("--threads", type=int, help="Processor threads.")
@JSON
@_from_hub
def profile(
    model: str,
    preset: str,
    text: Path | None,
    as_json: bool,
    revision: str | None,
    cache_dir: Path | None,
    **sizes: int | None,
) -> None:
    """Measure latency and memory of MODEL, or of an output folder, in fresh processes."""
    from moe2edge.calibration import read_texts
    from moe2edge.profile.measure import PRESETS
    from moe2edge.profile.measure import profile as measure
    from moe2edge.profile.table import table
    from moe2edge.recipe import TextSource

    place = Path(model) if Path(model).is_dir() else _checkpoint(model, revision, cache_dir).folder
    given = {name: value for name, value in sizes.items() if value is not None}
    settings = replace(PRESETS[preset], **given)
    source = TextSource(text=str(text)) if text else TextSource()
    _quiet_libraries()
    prompts = "\n".join(read_texts(source, "evaluation"))
    advance = watcher(quiet=as_json).advance
    result = measure(place, text=prompts, settings=settings, fixed=given.keys(), advance=advance)
    if as_json:
        _emit(result.to_json())
        return
    _print_table(table(result))
    for warning in result.warnings:
        click.echo(f"warning: {warning}", err=True)


EVALUATE_EXAMPLES = """\b
Example:
  moe2edge evaluate out-onnx --reference builtin:tiny-moe"""


@main.command(epilog=EVALUATE_EXAMPLES)
@FOLDER
@click.option("--reference", help="Source MODEL, for KL and top-1 agreement.")
@click.option("--text", default="builtin", show_default=True, help="A text or JSONL file.")
@click.option("--field", default="text", show_default=True, help="Field of a JSONL line.")
@click.option("--samples", default=32, show_default=True, help="Samples of the text.")
@click.option("--length", default=512, show_default=True, help="Tokens in a sample.")
@THREADS
@JSON
@_from_hub
def evaluate(
    folder: Path,
    reference: str | None,
    text: str,
    field: str,
    samples: int,
    length: int,
    as_json: bool,
    revision: str | None,
    cache_dir: Path | None,
) -> None:
    """Perplexity of an output FOLDER on a text, and how far it is from its source."""
    from moe2edge.evaluate import evaluate as run
    from moe2edge.recipe import section

    options = {"text": text, "field": field, "samples": samples, "length": length}
    source = section("evaluation", options)
    _quiet_libraries()
    model = _checkpoint(reference, revision, cache_dir).model if reference else None
    found = run(folder, source, model, watcher(quiet=as_json).advance)
    if as_json:
        _emit(asdict(found))
        return
    click.echo(f"perplexity: {found.perplexity:.3f} ({found.tokens:,} tokens)")
    if found.kl is not None and found.top1 is not None:
        click.echo(f"KL to {reference}: {found.kl:.5f} nats per token")
        click.echo(f"same most likely token: {found.top1:.1%}")


@main.group(name="recipe")
def recipe_group() -> None:
    """Recipes that come with moe2edge."""


@recipe_group.command(name="list")
@JSON
def recipe_list(as_json: bool) -> None:
    """List the bundled recipes."""
    from moe2edge import recipe as recipes

    found = {}
    for name, path in recipes.bundled().items():
        found[name] = path.read_text("utf-8").partition("\n")[0].lstrip("# ")
    if as_json:
        _emit({"recipes": found})
        return
    for name, summary in found.items():
        click.echo(f"{name:12} {summary}")


@recipe_group.command(name="show", epilog="\b\nExample:\n  moe2edge recipe show trim-w4")
@click.argument("name")
@click.option("--set", "settings", multiple=True, help="Override, as in gptq.group_size=64.")
def recipe_show(name: str, settings: tuple[str, ...]) -> None:
    """Print a recipe with every default spelt out."""
    from moe2edge import recipe as recipes

    click.echo(recipes.parse(recipes.find(name), settings).render(), nl=False)


@recipe_group.command(name="schema")
def recipe_schema() -> None:
    """Print the JSON Schema of recipes, for completion in editors."""
    from moe2edge.recipe import json_schema

    click.echo(json.dumps(json_schema(), indent=2))


@main.command()
@JSON
def targets(as_json: bool) -> None:
    """List the targets and what each of them writes."""
    from moe2edge import registry

    found = {name: registry.target(name).summary for name in registry.target_names()}
    if as_json:
        _emit({"targets": found})
        return
    for name, summary in found.items():
        click.echo(f"{name:6} {summary}")
