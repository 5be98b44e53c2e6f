"""Continue a prompt with the model of an output folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from moe2edge.errors import Unsupported
from moe2edge.runtime.generation import count_remaining, describe_runtime, generate
from moe2edge.runtime.protocol import check_id_range
from moe2edge.storage.text_files import read_json
from moe2edge.storage.tokenizer import read_context_length, read_stop_ids

if TYPE_CHECKING:
    from pathlib import Path

    from moe2edge.pipeline.target import Target
    from moe2edge.runtime.protocol import Runtime
    from moe2edge.storage.manifest import Artifact


def continue_in(
    artifact: Artifact,
    prompt_ids: Sequence[int],
    tell: Callable[[str], object],
    *,
    max_tokens: int,
    **how: Any,
) -> Iterator[int]:
    """Generate tokens with an output folder, up to its end tokens or the last position.

    Args:
        artifact: the folder; its model is loaded when everything else is known to be right.
        prompt_ids: at least one token.
        tell: receives a line if the model holds fewer tokens than asked for, and another on how
            quantized matrices run, if the runtime says so.
        max_tokens: the largest number of tokens to yield.
        how: temperature and other settings.

    Raises:
        InputError: a setting is out of its range, or the prompt leaves no room for a token.
    """
    from moe2edge.pipeline import registry

    config = read_json(artifact.folder / "config.json")
    vocabulary, context = config.get("vocab_size"), read_context_length(config)
    if prompt_ids and type(vocabulary) is int:
        check_id_range(min(prompt_ids), max(prompt_ids), vocabulary)
    left = count_remaining(len(prompt_ids), max_tokens, context)
    stop = read_stop_ids(artifact.folder)
    if left < max_tokens:
        tell(
            f"note: generating at most {left} tokens instead of {max_tokens}: the prompt takes "
            f"{len(prompt_ids)} of the {context} positions of the model"
        )
    target = registry.make_target(artifact.target, artifact.options)
    runtime = _open_runtime(target, artifact.folder, tell)
    if note := describe_runtime(runtime):
        tell(f"note: {note}")
    return generate(runtime, prompt_ids, max_tokens=left, stop=stop, **how)


def _open_runtime(target: Target, folder: Path, tell: Callable[[str], object]) -> Runtime:
    """Open a folder in the program that it is for, or say why another one runs it."""
    try:
        elsewhere = target.reopen_elsewhere(folder)
    except Unsupported as error:
        tell(f"note: target {target.name} runs it in Python: {error}")
        elsewhere = None
    return elsewhere or target.reopen(folder)
