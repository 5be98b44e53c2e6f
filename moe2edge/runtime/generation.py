"""Continue a prompt token by token in any runtime, and turn the tokens into text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from moe2edge.errors import InputError, Moe2EdgeError
from moe2edge.storage.tokenizer import encode_text

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from moe2edge.runtime.protocol import Runtime

_BROKEN = "\N{REPLACEMENT CHARACTER}"
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def generate(
    runtime: Runtime,
    prompt_ids: Sequence[int],
    *,
    max_tokens: int,
    stop: frozenset[int] = frozenset(),
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
) -> Iterator[int]:
    """Continue ``prompt_ids``, and yield each token as soon as it is chosen.

    Args:
        runtime: the runtime of the model.
        prompt_ids: the prompt, at least one token.
        max_tokens: largest number of tokens to yield.
        stop: end tokens; the first one chosen ends the text and is not yielded.
        temperature: 0 takes the most likely token (greedy); otherwise logits are divided by it.
        top_p: sample from the most likely tokens that together have this probability.
        top_k: sample from this many of the most likely tokens; 0 for all.
        seed: seed of the sampling; the same seed gives the same tokens.

    Raises:
        InputError: a setting is out of range, or the prompt has no tokens.
        Moe2EdgeError: a logit is NaN (raised while iterating).
    """
    check_settings(max_tokens, temperature, top_p, top_k, seed)
    count_remaining(len(prompt_ids), max_tokens, None)
    return _generate_tokens(
        runtime, prompt_ids, max_tokens, stop, (temperature, top_p, top_k, seed)
    )


def describe_runtime(runtime: Runtime) -> str:
    """Describe how quantized matrices run, in one line; empty if the runtime does not say."""
    return str(getattr(runtime, "note", ""))


def count_cache_bytes(runtime: Runtime) -> int | None:
    """Count the bytes that a runtime holds of the sequence so far; None if it does not say."""
    count: int | None = getattr(runtime, "cache_nbytes", None)
    return count


def check_settings(
    max_tokens: int, temperature: float, top_p: float, top_k: int, seed: int
) -> None:
    """Check the settings of `generate`, before a model is loaded.

    Raises:
        InputError: a setting is out of range.
    """
    # Written so that NaN is out of range, too.
    if max_tokens < 1:
        raise InputError(f"max_tokens is {max_tokens}; give 1 or more")
    if not 0 <= temperature < float("inf"):
        raise InputError(f"temperature is {temperature}; give 0 (greedy) or more")
    if not 0 < top_p <= 1:
        raise InputError(f"top_p is {top_p}; give more than 0, up to 1")
    if top_k < 0:
        raise InputError(f"top_k is {top_k}; give 0 (all tokens) or more")
    if not 0 <= seed < 1 << 64:
        raise InputError(f"seed is {seed}; give 0 or more, below 2^64")


def count_remaining(prompt_tokens: int, max_tokens: int, context: int | None) -> int:
    """Return how many tokens can follow a prompt: ``max_tokens``, or fewer if the context ends.

    Args:
        prompt_tokens: length of the prompt.
        max_tokens: requested number of tokens.
        context: context length of the model, prompt included; None if it is not known.

    Raises:
        InputError: the prompt has no tokens, or leaves no room for one more.

    >>> count_remaining(100, 64, 128), count_remaining(100, 20, 128), count_remaining(100, 64, None)
    (28, 20, 64)
    """
    if not prompt_tokens:
        raise InputError("the prompt has no tokens; give some text")
    if context is not None and prompt_tokens >= context:
        raise InputError(
            f"the prompt has {prompt_tokens} tokens, but the context of the model is {context} "
            "tokens, the generated ones included; shorten the prompt"
        )
    return max_tokens if context is None else min(max_tokens, context - prompt_tokens)


def _generate_tokens(
    runtime: Runtime,
    prompt_ids: Sequence[int],
    max_tokens: int,
    stop: frozenset[int],
    sampling: tuple[float, float, int, int],
) -> Iterator[int]:
    import torch

    temperature, top_p, top_k, seed = sampling
    generator = torch.Generator().manual_seed(seed)
    logits = runtime.start(prompt_ids)
    for done in range(1, max_tokens + 1):
        if bool(logits.isnan().any()):
            raise Moe2EdgeError(
                f"the logits after {len(prompt_ids) + done - 1} tokens are not numbers (NaN); "
                "the model is damaged: run moe2edge verify on its folder"
            )
        token = choose_token(logits, temperature, top_p, top_k, generator)
        if token in stop:
            return
        yield token
        if done < max_tokens:
            logits = runtime.step(token)


def choose_token(
    logits: Tensor, temperature: float, top_p: float, top_k: int, generator: torch.Generator
) -> int:
    """Choose one token from ``logits`` float32 [vocabulary]; greedy at temperature 0.

    Temperature applies first, then top-k, then top-p (Holtzman et al., 2020,
    https://arxiv.org/abs/1904.09751): the smallest set of most likely tokens whose probabilities
    reach ``top_p``.
    """
    import torch

    if temperature == 0:
        return int(logits.argmax())
    ordered, tokens = torch.sort(logits / temperature, descending=True, stable=True)
    if top_k:
        ordered, tokens = ordered[:top_k], tokens[:top_k]
    probabilities = torch.softmax(ordered, dim=-1)
    # A token stays if the tokens before it do not reach top_p, so the first always stays.
    stays = probabilities.cumsum(-1) - probabilities < top_p
    drawn = torch.multinomial(probabilities * stays, 1, generator=generator)
    return int(tokens[drawn])


def encode_prompt(
    tokenizer: Any, prompt: str, chat: bool | None = None, chat_template: str | None = None
) -> list[int]:
    """Encode a prompt as token ids, in the form that the model was trained on.

    Args:
        tokenizer: the tokenizer of transformers.
        prompt: the text; with a chat template, the message of the user.
        chat: use the chat template; None uses it if there is one.
        chat_template: name of the chat template, where there are several; None: the default one.

    Raises:
        InputError: the prompt is not Unicode, ``chat`` is True and the tokenizer has no template,
            or the template cannot be filled in.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"the prompt is not Unicode: character {error.start + 1} is "
            f"{prompt[error.start]!a}; give text in UTF-8"
        ) from error
    has_template = bool(tokenizer.chat_template)
    if (chat or chat_template) and not has_template:
        raise InputError("the model has no chat template; leave --chat and --chat-template out")
    if chat_template and chat is False:
        raise InputError("--chat-template needs the chat template; leave --no-chat out")
    ids: list[int]
    if has_template and chat is not False:
        # The template adds the special tokens.
        text = _fill_template(tokenizer, prompt, chat_template)
        ids = encode_text(tokenizer, text, special=False)
    else:
        ids = encode_text(tokenizer, prompt)
    # Some templates, and some users, write a first token that the tokenizer adds as well.
    if tokenizer.bos_token_id is not None and ids[:2] == [tokenizer.bos_token_id] * 2:
        ids = ids[1:]
    return ids


def _fill_template(tokenizer: Any, prompt: str, name: str | None) -> str:
    from moe2edge.runtime.chat_templates import ChatRenderer, TemplateFailedError

    message = {"role": "user", "content": prompt}
    try:
        with ChatRenderer(tokenizer, name, today=True) as renderer:
            return renderer.render([message], add_generation_prompt=True)
    except TemplateFailedError as error:
        raise InputError(
            f"the model's chat template cannot be filled in ({error}); "
            "give the prompt without it (--no-chat)"
        ) from error


def stream_text(tokenizer: Any, ids: Iterable[int]) -> Iterator[str]:
    """Yield the text of tokens as they arrive, in pieces of whole characters.

    Joined, the pieces are ``tokenizer.decode(ids, clean_up_tokenization_spaces=False)``. A token
    changes the text of the token before it only while a character is incomplete, so text is
    yielded when it ends in a whole character. Decoding restarts at the tokens that were yielded
    last, because the first token of a decoded sequence may lose its space.
    """
    tokens: list[int] = []
    first, last = 0, 0  # tokens[first:last] is the text that was yielded last
    for token in ids:
        tokens.append(token)
        if _may_change(tokenizer, token):
            continue
        text, sent = _decode(tokenizer, tokens[first:]), _decode(tokenizer, tokens[first:last])
        if len(text) > len(sent) and not text.endswith(_BROKEN):
            yield text[len(sent) :]
            first, last = last, len(tokens)
    rest = _decode(tokenizer, tokens[first:])[len(_decode(tokenizer, tokens[first:last])) :]
    if rest:
        yield rest


def _may_change(tokenizer: Any, token: int) -> bool:
    """Return whether a token is one byte of a run that decodes as a whole.

    SentencePiece falls back to such bytes. If one byte of a run is invalid, every byte of the run
    decodes as broken, also earlier ones.
    """
    text = tokenizer.convert_ids_to_tokens(token)
    return isinstance(text, str) and _BYTE_TOKEN.fullmatch(text) is not None


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    text: str = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    return text
