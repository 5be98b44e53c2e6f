"""Commands for outputs: verify, generate, evaluate."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moe2edge.cli import progress_bar
from moe2edge.cli.common import (
    CHAT_TEMPLATE_OPTION,
    FOLDER_ARGUMENT,
    JSON_OPTION,
    THREADS_OPTION,
    add_hub_options,
    add_text_options,
    emit,
    open_model,
    quiet_libraries,
    read_text_options,
    show,
)
from moe2edge.cli.progress_bar import make_reporter
from moe2edge.errors import DoesNotFit

if TYPE_CHECKING:
    from moe2edge.evaluation.verify import Verification
    from moe2edge.evaluation.verify_elsewhere import Elsewhere


@click.command(epilog="\b\nExample:\n  moe2edge verify out-onnx")
@FOLDER_ARGUMENT
@click.option(
    "--reference",
    help="Source MODEL, to measure the KL to it again and compare it with that of the export.",
)
@THREADS_OPTION
@JSON_OPTION
@add_hub_options
def verify_command(
    folder: Path,
    reference: str | None,
    as_json: bool,
    revision: str | None,
    cache_dir: Path | None,
) -> None:
    """Verify that FOLDER holds what was exported.

    Checks every file and tensor, tables and configs against what they derive from, the tokenizer,
    and the logits in the runtime of the target.
    """
    from moe2edge.evaluation import verify
    from moe2edge.evaluation.verify_elsewhere import verify_elsewhere

    quiet_libraries()
    done = verify.verify_output(folder)
    elsewhere = verify_elsewhere(done)
    recorded, parity = done.reference, done.parity
    result: dict[str, Any] = {
        "tensors": done.tensors,
        "parity": asdict(parity),
        "notes": list(done.notes),
        "not_checked": list(done.unchecked),
    }
    if elsewhere is not None:
        result["elsewhere"] = asdict(elsewhere)
        result["not_checked"] += [elsewhere.unchecked] if elsewhere.unchecked else []
    if reference:
        if done.runtime is None:
            raise DoesNotFit(
                f"{folder} needs more memory than this machine has, so it cannot be run and "
                f"compared with {reference}; leave out --reference, or verify on a larger machine"
            )
        source = open_model(reference, revision, cache_dir).model
        result["kl_at_export"] = recorded.source_kl
        result["kl_to_source"] = verify.check_source(recorded, done.runtime, source)
    if as_json:
        emit(result)
        return
    for line in (*_describe_verification(done), *_describe_elsewhere(elsewhere)):
        show(line)
    if reference:
        note = (
            ""
            if recorded.source_kl is not None
            else " (not compared: the export did not measure it)"
        )
        show(f"KL to {reference}: {result['kl_to_source']:.5f} nats per token{note}")
    for note in done.notes:
        show(f"note: {note}")
    for missing in result["not_checked"]:
        show(f"not checked: {missing}")
    show("verified")


def _describe_verification(done: Verification) -> Iterator[str]:
    """Yield the lines about what was compared."""
    record, parity = done.reference.record, done.parity
    extent = "the manifest" if record is None else "the manifest, and to what was exported"
    yield f"files: {len(done.artifact.files)} equal to {extent}"
    yield f"tensors: {done.tensors} equal to what was exported"
    far = "" if parity.far is None else f", {parity.far:.1e} at the far end of the context"
    yield f"logits: largest error {parity.exact:.1e} with float32 activations{far}"
    if parity.shipped is None:
        yield "runtime: not run, because this machine has too little memory"
    else:
        yield (
            f"runtime: {parity.shipped:.2%} relative error of logits as shipped, {parity.top1:.1%} "
            f"top-1 agreement ({parity.positions} positions, with KV cache)"
        )
    if parity.whole_cache is not None:
        yield f"cache: {parity.whole_cache:.2%} relative error without rounding keys and values"


def _describe_elsewhere(elsewhere: Elsewhere | None) -> Iterator[str]:
    """Yield a line about the program that the folder is for, if that was run as well."""
    if elsewhere is not None and (parity := elsewhere.parity) is not None:
        yield (
            f"elsewhere: {parity.shipped:.2%} relative error of logits, {parity.top1:.1%} top-1 "
            f"agreement; {elsewhere.program}"
        )


@click.command(epilog='\b\nExample:\n  moe2edge generate out-onnx "def read_json(path):"')
@FOLDER_ARGUMENT
@click.argument("prompt")
@click.option(
    "-n", "--max-tokens", default=64, show_default=True, help="Maximum number of new tokens."
)
@click.option(
    "--temperature", default=0.0, show_default=True, help="Sampling temperature; 0 is greedy."
)
@click.option(
    "--top-p",
    default=1.0,
    show_default=True,
    help="Sample from the most likely tokens that together have this probability.",
)
@click.option(
    "--top-k",
    default=0,
    show_default=True,
    help="Sample from this many of the most likely tokens; 0: all.",
)
@click.option("--seed", default=0, show_default=True, help="Seed of the sampling.")
@click.option(
    "--chat/--no-chat",
    default=None,
    help="Apply the chat template to PROMPT [default: if the model has one].",
)
@CHAT_TEMPLATE_OPTION
@THREADS_OPTION
@JSON_OPTION
def generate_command(
    folder: Path,
    prompt: str,
    max_tokens: int,
    chat: bool | None,
    chat_template: str | None,
    as_json: bool,
    **sampling: Any,
) -> None:
    """Continue PROMPT with the model in FOLDER.

    The model runs in the runtime of the target that wrote the folder.
    """
    from moe2edge.commands import generate
    from moe2edge.runtime import generation
    from moe2edge.storage.manifest import check_sizes, open_artifact
    from moe2edge.storage.tokenizer import load_tokenizer

    artifact = open_artifact(folder)
    check_sizes(artifact)
    generation.check_settings(max_tokens, **sampling)
    quiet_libraries()
    tokenizer = load_tokenizer(folder)
    ids = generation.encode_prompt(tokenizer, prompt, chat, chat_template)
    log = partial(show, err=True)
    tokens = generate.continue_in(artifact, ids, log, max_tokens=max_tokens, **sampling)
    if as_json:
        generated = list(progress_bar.iterate_until_interrupted(tokens))
        emit({"prompt": prompt, "text": tokenizer.decode(generated), "tokens": generated})
        return
    click.echo(prompt, nl=False)
    for piece in generation.stream_text(tokenizer, progress_bar.iterate_until_interrupted(tokens)):
        click.echo(piece, nl=False)
        sys.stdout.flush()
    click.echo()


EVALUATE_EXAMPLES = """\b
Examples:
  moe2edge evaluate out-onnx --reference builtin:tiny-moe
  moe2edge evaluate out-onnx --text gsm8k.jsonl --template '{question} {answer}'
  moe2edge evaluate out-onnx --text math.jsonl:0.5,code.txt:0.5 --field question"""


@click.command(epilog=EVALUATE_EXAMPLES)
@FOLDER_ARGUMENT
@click.option("--reference", help="Source MODEL, to measure KL and top-1 agreement with it.")
@add_text_options(samples=32)
@THREADS_OPTION
@JSON_OPTION
@add_hub_options
def evaluate_command(
    folder: Path,
    reference: str | None,
    as_json: bool,
    revision: str | None,
    cache_dir: Path | None,
    **text: Any,
) -> None:
    """Measure the perplexity of an output FOLDER on a text.

    With --reference, also measures KL and top-1 agreement with the source.
    """
    from moe2edge.commands.texts import choose_text
    from moe2edge.evaluation.output_quality import evaluate_output as run
    from moe2edge.storage.manifest import check_sizes, open_artifact

    artifact = open_artifact(folder)
    check_sizes(artifact)  # before anything is downloaded
    # An output is of the model that its manifest names, and is measured on that one's text.
    source = choose_text(read_text_options("evaluation", text), artifact.source)
    quiet_libraries()
    checkpoint = open_model(reference, revision, cache_dir) if reference else None
    quality = run(folder, source, checkpoint, make_reporter(quiet=as_json))
    if as_json:
        emit(asdict(quality))
        return
    show(f"perplexity: {quality.perplexity:.3f} ({quality.tokens:,} tokens)")
    if quality.kl is not None and quality.top1 is not None:
        show(f"KL to {reference}: {quality.kl:.5f} nats per token")
        show(f"top-1 agreement: {quality.top1:.1%}")
