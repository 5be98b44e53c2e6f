"""Continue a prompt, token by token, in any runtime; and turn tokens into text as they come."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from moe2edge.errors import InputError, Moe2EdgeError

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
    """Continue ``prompt_ids``; yields each token as soon as it is chosen.

    Args:
        runtime: where the model runs.
        prompt_ids: at least one token.
        max_tokens: how many to yield at most.
        stop: end tokens; the first one chosen ends the text and is not yielded.
        temperature: 0 takes the likeliest token (greedy); else logits are divided by it.
        top_p: sample from the likeliest tokens that together have this probability.
        top_k: sample from this many of the likeliest tokens; 0 for all.
        seed: of the sampling; the same seed gives the same tokens.

    Raises:
        InputError: a setting is out of its range, or the prompt has no tokens.
        Moe2EdgeError: the runtime's logits are not numbers (raised while iterating).
    """
    check_settings(max_tokens, temperature, top_p, top_k, seed)
    count_remaining(len(prompt_ids), max_tokens, None)
    return _continue(runtime, prompt_ids, max_tokens, stop, (temperature, top_p, top_k, seed))


def describe_runtime(runtime: Runtime) -> str:
    """How quantized matrices run, in one line; empty where the runtime has nothing to tell."""
    return str(getattr(runtime, "note", ""))


def check_settings(
    max_tokens: int, temperature: float, top_p: float, top_k: int, seed: int
) -> None:
    """Refuse what `generate` cannot do; it takes no model to know.

    Raises:
        InputError: a setting is out of its range.
    """
    # Written so that NaN, too, is out of range.
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
    """How many tokens can follow a prompt: ``max_tokens``, or fewer where the context ends.

    Args:
        prompt_tokens: length of the prompt.
        max_tokens: how many are wanted.
        context: tokens that the model holds, prompt included; None if it is not known.

    Raises:
        InputError: the prompt has no tokens, or leaves no room for one more.

    >>> count_remaining(100, 64, 128), count_remaining(100, 20, 128), count_remaining(100, 64, None)
    (28, 20, 64)
    """
    if not prompt_tokens:
        raise InputError("the prompt has no tokens; give some text")
    if context is not None and prompt_tokens >= context:
        raise InputError(
            f"the prompt has {prompt_tokens} tokens, but the model holds {context}, its answer "
            "included; shorten the prompt"
        )
    return max_tokens if context is None else min(max_tokens, context - prompt_tokens)


def _continue(
    runtime: Runtime,
    prompt_ids: Sequence[int],
    max_tokens: int,
    stop: frozenset[int],
    how: tuple[float, float, int, int],
) -> Iterator[int]:
    import torch

    temperature, top_p, top_k, seed = how
    generator = torch.Generator().manual_seed(seed)
    logits = runtime.start(prompt_ids)
    for done in range(1, max_tokens + 1):
        if bool(logits.isnan().any()):
            raise Moe2EdgeError(
                f"the logits after {len(prompt_ids) + done - 1} tokens are not numbers; "
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
    """One token from ``logits`` float32 [vocabulary]; greedy at temperature 0.

    Temperature, then top-k, then top-p (Holtzman et al., 2020, https://arxiv.org/abs/1904.09751):
    the smallest set of likeliest tokens whose probabilities reach ``top_p``.
    """
    import torch

    if temperature == 0:
        return int(logits.argmax())
    ordered, tokens = torch.sort(logits / temperature, descending=True, stable=True)
    if top_k:
        ordered, tokens = ordered[:top_k], tokens[:top_k]
    chances = torch.softmax(ordered, dim=-1)
    # A token stays while those before it have not reached top_p; so the first always stays.
    stays = chances.cumsum(-1) - chances < top_p
    drawn = torch.multinomial(chances * stays, 1, generator=generator)
    return int(tokens[drawn])


def encode_prompt(tokenizer: Any, prompt: str, chat: bool | None = None) -> list[int]:
    """Tokens of a prompt, as the model was trained to see them.

    Args:
        tokenizer: of transformers.
        prompt: text; with a chat template, what the user says.
        chat: whether to use the chat template; None uses it where there is one.

    Raises:
        InputError: ``chat`` is True and the tokenizer has no template, or it cannot be filled in.
    """
    has_template = bool(tokenizer.chat_template)
    if chat and not has_template:
        raise InputError("the model has no chat template; leave the chat option out")
    ids: list[int]
    if has_template and chat is not False:
        # The template writes the special tokens itself.
        ids = tokenizer(_fill_template(tokenizer, prompt), add_special_tokens=False)["input_ids"]
    else:
        ids = tokenizer(prompt)["input_ids"]
    # Some templates, and some users, write the first token where the tokenizer adds it anyway.
    if tokenizer.bos_token_id is not None and ids[:2] == [tokenizer.bos_token_id] * 2:
        ids = ids[1:]
    return ids


def _fill_template(tokenizer: Any, prompt: str) -> str:
    from jinja2 import TemplateError

    try:
        text: str = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
        )
    except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(
            f"the model's chat template cannot be filled in ({reason}); "
            "give the prompt without the chat template"
        ) from error
    return text


def stream_text(tokenizer: Any, ids: Iterable[int]) -> Iterator[str]:
    """Text of tokens as they come; never a piece of a character.

    Joined, the pieces are ``tokenizer.decode(ids, clean_up_tokenization_spaces=False)``. A token
    can change how the one before it reads only while a character is incomplete, so text goes out
    when it ends in a whole one; decoding restarts at the tokens that went out last, because the
    first token of a decoded sequence may lose its space.
    """
    seen: list[int] = []
    first, last = 0, 0  # seen[first:last] is text that went out last
    for token in ids:
        seen.append(token)
        if _may_change(tokenizer, token):
            continue
        whole, sent = _decode(tokenizer, seen[first:]), _decode(tokenizer, seen[first:last])
        if len(whole) > len(sent) and not whole.endswith(_BROKEN):
            yield whole[len(sent) :]
            first, last = last, len(seen)
    rest = _decode(tokenizer, seen[first:])[len(_decode(tokenizer, seen[first:last])) :]
    if rest:
        yield rest


def _may_change(tokenizer: Any, token: int) -> bool:
    """Whether a token is one byte of a run that decodes as a whole (SentencePiece's fall-back).

    If one byte of such a run is wrong, every byte of the run reads as broken, also earlier ones.
    """
    text = tokenizer.convert_ids_to_tokens(token)
    return isinstance(text, str) and _BYTE_TOKEN.fullmatch(text) is not None


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    text: str = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    return text
