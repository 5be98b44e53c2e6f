"""Verbs on what was written: verify, generate, profile, evaluate."""

from __future__ import annotations

import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

import click

from moe2edge.cli import progress_bar
from moe2edge.cli.common import (
    FOLDER,
    JSON,
    THREADS,
    add_hub_options,
    add_text_options,
    emit,
    open_model,
    print_table,
    quiet_libraries,
    read_text_options,
)
from moe2edge.cli.progress_bar import make_reporter
from moe2edge.errors import DoesNotFit, VerificationFailed


@click.command(epilog="\b\nExample:\n  moe2edge verify out-onnx")
@FOLDER
@click.option("--reference", help="Also repeat the comparison with this source MODEL.")
@THREADS
@JSON
@add_hub_options
def verify_command(
    folder: Path,
    reference: str | None,
    as_json: bool,
    revision: str | None,
    cache_dir: Path | None,
) -> None:
    """Prove that a folder holds what was exported: files, every tensor, logits in its runtime."""
    from moe2edge.evaluation import verify
    from moe2edge.pipeline import registry
    from moe2edge.storage.manifest import check_manifest_files, open_artifact

    artifact = open_artifact(folder)
    target = registry.make_target(artifact.target, artifact.options)
    if differences := check_manifest_files(artifact):
        raise VerificationFailed(f"{folder}: {'; '.join(differences)}")
    quiet_libraries()
    recorded = verify.Reference.read(folder)
    count, parity, runtime = verify.check_folder(target, folder, recorded)
    result: dict[str, Any] = {"tensors": count, "parity": asdict(parity)}
    if reference:
        if runtime is None:
            raise DoesNotFit(f"{folder} is too large for the memory of this machine to be run")
        source = open_model(reference, revision, cache_dir).model
        result["kl_at_export"] = recorded.source_kl
        result["kl_to_source"] = verify.check_source(recorded, runtime, source)
    if as_json:
        emit(result)
        return
    click.echo(f"files: {len(artifact.manifest['files'])} as in the manifest")
    click.echo(f"tensors: {count} hold the numbers that were exported")
    click.echo(f"logits: largest error {parity.exact:.1e} with float32 activations")
    if parity.shipped is None:
        click.echo("runtime: not run, this machine has too little memory")
    else:
        click.echo(
            f"runtime: {parity.shipped:.2%} relative error as shipped, {parity.top1:.1%} same "
            f"top-1 ({parity.positions} positions, cached)"
        )
    if reference:
        than = "" if recorded.source_kl is not None else " (none was measured at export)"
        click.echo(f"KL to {reference}: {result['kl_to_source']:.5f} nats per token{than}")
    click.echo("verified")


@click.command(epilog='\b\nExample:\n  moe2edge generate out-onnx "def read_json(path):"')
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
def generate_command(
    folder: Path, prompt: str, max_tokens: int, chat: bool | None, as_json: bool, **how: Any
) -> None:
    """Continue PROMPT with the model in FOLDER, in the runtime it was made for."""
    from moe2edge.commands import generate
    from moe2edge.runtime import generation
    from moe2edge.storage.manifest import open_artifact
    from moe2edge.storage.tokenizer import load_tokenizer

    artifact = open_artifact(folder)
    generation.check_settings(max_tokens, **how)
    quiet_libraries()
    tokenizer = load_tokenizer(folder)
    ids = generation.encode_prompt(tokenizer, prompt, chat)
    tell = partial(click.echo, err=True)
    tokens = generate.continue_in(artifact, ids, tell, max_tokens=max_tokens, **how)
    if as_json:
        made = list(progress_bar.iterate_until_interrupted(tokens))
        emit({"prompt": prompt, "text": tokenizer.decode(made), "tokens": made})
        return
    click.echo(prompt, nl=False)
    for piece in generation.stream_text(tokenizer, progress_bar.iterate_until_interrupted(tokens)):
        click.echo(piece, nl=False)
        sys.stdout.flush()
    click.echo()


PROFILE_EXAMPLES = """\b
Examples:
  moe2edge profile out-onnx
  moe2edge profile builtin:tiny-moe --preset quick --json"""


@click.command(epilog=PROFILE_EXAMPLES)
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
@add_hub_options
def profile_command(
    model: str,
    preset: Literal["quick", "ci", "full"],
    text: Path | None,
    as_json: bool,
    revision: str | None,
    cache_dir: Path | None,
    **sizes: int | None,
) -> None:
    """Measure latency and memory of MODEL, or of an output folder, in fresh processes."""
    from moe2edge.commands.api import profile
    from moe2edge.evaluation.profile.table import build_profile_table

    place = model if Path(model).is_dir() else open_model(model, revision, cache_dir)
    quiet_libraries()
    reporter = make_reporter(quiet=as_json)
    result = profile(place, preset=preset, text=text, reporter=reporter, **sizes)
    if as_json:
        emit(result.to_json())
        return
    print_table(build_profile_table(result))
    if note := result.artifact["note"]:
        click.echo(f"note: {note}", err=True)
    for warning in result.warnings:
        click.echo(f"warning: {warning}", err=True)


EVALUATE_EXAMPLES = """\b
Examples:
  moe2edge evaluate out-onnx --reference builtin:tiny-moe
  moe2edge evaluate out-onnx --text gsm8k.jsonl --template '{question} {answer}'
  moe2edge evaluate out-onnx --text math.jsonl:0.5,code.txt:0.5 --field question"""


@click.command(epilog=EVALUATE_EXAMPLES)
@FOLDER
@click.option("--reference", help="Source MODEL, for KL and top-1 agreement.")
@add_text_options(samples=32)
@THREADS
@JSON
@add_hub_options
def evaluate_command(
    folder: Path,
    reference: str | None,
    as_json: bool,
    revision: str | None,
    cache_dir: Path | None,
    **text: Any,
) -> None:
    """Perplexity of an output FOLDER on a text, and how far it is from its source."""
    from moe2edge.evaluation.output_quality import evaluate_output as run

    source = read_text_options("evaluation", text)
    quiet_libraries()
    model = open_model(reference, revision, cache_dir).model if reference else None
    found = run(folder, source, model, make_reporter(quiet=as_json).advance)
    if as_json:
        emit(asdict(found))
        return
    click.echo(f"perplexity: {found.perplexity:.3f} ({found.tokens:,} tokens)")
    if found.kl is not None and found.top1 is not None:
        click.echo(f"KL to {reference}: {found.kl:.5f} nats per token")
        click.echo(f"same most likely token: {found.top1:.1%}")
