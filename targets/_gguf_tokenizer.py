"""The tokenizer in a GGUF file: its tokens, how it cuts text, special tokens and chat templates."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe2edge.errors import Unsupported, VerificationFailed
from moe2edge.storage.text_files import read_json
from moe2edge.storage.tokenizer import (
    RECORDED_TEXTS,
    TOKENIZER,
    encode_text,
    has_tokenizer,
    load_tokenizer,
    read_stop_ids,
)
from moe2edge.targets._gguf_file import Metadata, PlannedGguf, write_outline

if TYPE_CHECKING:
    from moe2edge.targets._gguf_runtime import LlamaProcess

# Kinds of tokens as files number them.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

_CONTRACTIONS = (
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|",
    "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|",
)
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_BEHIND = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_MARKED = (
    r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%s?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%s?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# ``tokenizer.ggml.pre`` by the pattern that cuts words in ``tokenizer.json``; the second name is
# for vocabularies whose words are taken whole (``ignore_merges``).
PATTERNS: Mapping[str, tuple[str, str]] = {
    **{f"{c}{_WORDS}|\\p{{N}}{{1,3}}|{_BEHIND}": ("dbrx", "llama-bpe") for c in _CONTRACTIONS},
    **{f"{c}{_WORDS}|\\p{{N}}|{_BEHIND}": ("qwen2", "qwen2") for c in _CONTRACTIONS},
    **{f"{c}{_MARKED}": ("qwen35", "qwen35") for c in _CONTRACTIONS},
    **{_CASED % (c[:-1], c[:-1]): ("gpt-4o", "gpt-4o") for c in _CONTRACTIONS},
    f"{_WORDS}|\\p{{N}}|{_BEHIND}": ("ufakzeka", "ufakzeka"),
    # Its words begin with an apostrophe in a few more places than llama.cpp has any pattern for.
    f"{_WORDS}|\\p{{N}}{{1,3}}|{_BEHIND}": ("dbrx", "llama-bpe"),
}
APOSTROPHES = f"{_WORDS}|\\p{{N}}{{1,3}}|{_BEHIND}"
# The same for several steps, by how the patterns of the first two begin.
STEPS = {
    (r"\p{N}{1,3}", "[\u4e00-\u9fa5"): "deepseek-v3",
    ("[\r\n]", r"\s?[A-Za-z"): "deepseek-llm",
}
# Cut like the texts in transformers that are recorded with an output, and more of each kind.
CHECKED_TEXTS = (
    *(text for text in RECORDED_TEXTS if "e\u0301" not in text),
    "I'm sure they've said it'll work; we'd rather don't. That's JOHN'S \"quoted\" text.",
    "3.14159 + 1,000,000 = 0x7f; 12/31/1999 at 23:59:59 -- 42% off!!!",
    "for (int i = 0; i < n; ++i) {\n\tsum += a[i] * b[i];\r\n}\n\n\n// end\n",
    "  \n \n   three   spaces\t\ttabs   ",
    "\u3053\u3093\u306b\u3061\u306f\u4e16\u754c\u3002 \uc548\ub155\ud558\uc138\uc694 "
    "\u0645\u0631\u062d\u0628\u0627 \u0928\u092e\u0938\u094d\u0924\u0947 \u03b5\u03bb\u03bb\u03b7"
    "\u03bd\u03b9\u03ba\u03ac \U0001f468\u200d\U0001f469\u200d\U0001f467 \u2026 \u2014 \u20ac5",
    "https://example.org/path?query=1&x=%20#frag user@example.com snake_case camelCase",
)


def build_tokenizer(folder: Path, vocabulary: int, config: Mapping[str, Any]) -> dict[str, Any]:
    """Build the metadata of the tokenizer of a folder; without one, the file has token ids only.

    Args:
        folder: a checkpoint or an output.
        vocabulary: entries of the embedding.
        config: content of its ``config.json``.

    Raises:
        InputError: its files cannot be read.
        Unsupported: llama.cpp has no tokenizer of this kind.
    """
    if not has_tokenizer(folder):
        return {"tokenizer.ggml.model": "none"}
    if not (folder / TOKENIZER).is_file():
        raise Unsupported(
            f"target gguf reads tokenizers from {TOKENIZER}, which {folder} lacks; write it with "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        )
    loaded, data = load_tokenizer(folder), read_json(folder / TOKENIZER)
    model = data.get("model") or {}
    if model.get("type") != "BPE":
        raise Unsupported(
            f"target gguf holds tokenizers of byte pairs (BPE), not {model.get('type')}; export to "
            "hf, gptq or onnx"
        )
    tokens, kinds = _list_tokens(data, vocabulary)
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    if model.get("byte_fallback"):
        found = _describe_sentencepiece(data, tokens, kinds)
    else:
        found = {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": find_pre(data),
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": kinds,
            "tokenizer.ggml.merges": merges,
        }
    stop = read_stop_ids(folder, config)
    return found | _describe_special(loaded, stop, vocabulary) | _list_templates(loaded)


def _list_tokens(data: Mapping[str, Any], vocabulary: int) -> tuple[list[str], list[int]]:
    """Return text and kind of every entry of the embedding."""
    texts: list[str | None] = [None] * vocabulary
    kinds = [UNUSED] * vocabulary
    fallback = bool(data["model"].get("byte_fallback"))
    unknown = data["model"].get("unk_token")
    for text, number in data["model"]["vocab"].items():
        if number < vocabulary:
            texts[number] = text
            plain = BYTE if fallback and text.startswith("<0x") and len(text) == 6 else NORMAL
            kinds[number] = UNKNOWN if text == unknown else plain
    for added in data.get("added_tokens") or ():
        number, text = added["id"], added["content"]
        if number < vocabulary:
            texts[number] = text
            special = UNKNOWN if text == unknown and fallback else CONTROL
            kinds[number] = special if added.get("special") else USER_DEFINED
    return [f"[PAD{n}]" if text is None else text for n, text in enumerate(texts)], kinds


def _describe_sentencepiece(
    data: Mapping[str, Any], tokens: list[str], kinds: list[int]
) -> dict[str, Any]:
    """Describe a tokenizer of SentencePiece; files hold its merges as scores of what they make."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(data["model"]["merges"]):
        made = "".join(merge.split(" ") if isinstance(merge, str) else merge)
        ranks.setdefault(made, rank)
    least = float(len(ranks))
    scores = [-float(ranks.get(text, least)) for text in tokens]
    steps = json.dumps([data.get("normalizer"), data.get("pre_tokenizer")], ensure_ascii=False)
    begins = '"prepend"' in steps or '"prepend_scheme": "always"' in steps
    begins = begins or '"prepend_scheme": "first"' in steps
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.add_space_prefix": begins,
    }


def find_pre(data: Mapping[str, Any]) -> str:
    """Find the name by which llama.cpp knows how a tokenizer of bytes cuts text.

    Args:
        data: content of ``tokenizer.json``.

    Raises:
        Unsupported: it is none that is known here.
    """
    whole = bool(data["model"].get("ignore_merges"))
    steps = list(_list_steps(data.get("pre_tokenizer")))
    kinds = [step["type"] for step in steps]
    patterns = [str(step["pattern"].get("Regex")) for step in steps if step["type"] == "Split"]
    own = bool(steps) and kinds[-1] == "ByteLevel" and steps[-1].get("use_regex", True)
    found: str | None = None
    if kinds == ["ByteLevel"] and own:
        found = "gpt-2"
    elif kinds == ["Digits", "ByteLevel"] and own and steps[0].get("individual_digits"):
        found = "starcoder"
    elif kinds == ["Split", "ByteLevel"] and not own and patterns[0] in PATTERNS:
        found = PATTERNS[patterns[0]][whole]
    elif len(patterns) > 1:
        found = next(
            (
                name
                for (first, second), name in STEPS.items()
                if patterns[0] == first and patterns[1].startswith(second)
            ),
            None,
        )
    if found is None:
        shown = " and ".join(patterns) or ", ".join(kinds) or "nothing"
        raise Unsupported(
            f"the tokenizer cuts text by {shown[:200]}, for which target gguf knows no "
            "tokenizer.ggml.pre; export to hf, gptq or onnx"
        )
    return found


def has_loose_apostrophes(data: Mapping[str, Any]) -> bool:
    """Return whether words begin with an apostrophe where no pattern of llama.cpp has that."""
    steps = list(_list_steps(data.get("pre_tokenizer")))
    return any(step.get("pattern") == {"Regex": APOSTROPHES} for step in steps)


def _list_steps(step: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """Yield the steps of a pre-tokenizer, those of sequences one by one."""
    if step is None:
        return
    if step["type"] == "Sequence":
        for inner in step["pretokenizers"]:
            yield from _list_steps(inner)
    else:
        yield step


def _describe_special(loaded: Any, stop: Collection[int], vocabulary: int) -> dict[str, Any]:
    """Describe the special tokens, and which of them the tokenizer adds."""
    ends = sorted(token for token in stop if token < vocabulary)
    own = loaded.eos_token_id
    first = own if own in ends or not ends else ends[0]
    # Files have room for three tokens that end a text; llama.cpp knows more by their names.
    rest = [token for token in ends if token != first][:2]
    found = {
        "bos": loaded.bos_token_id,
        "eos": first,
        **dict(zip(("eot", "eom"), rest, strict=False)),
        "unknown": loaded.unk_token_id,
        "padding": loaded.pad_token_id,
    }
    plain, whole = (encode_text(loaded, "a", special=special) for special in (False, True))
    added = whole[: len(whole) - len(plain)] if whole[-len(plain) :] == plain else whole[:1]
    return {
        **{
            f"tokenizer.ggml.{name}_token_id": token
            for name, token in found.items()
            if token is not None and token < vocabulary
        },
        "tokenizer.ggml.add_bos_token": bool(added) and added == [loaded.bos_token_id],
        "tokenizer.ggml.add_eos_token": whole != plain and whole[-1:] == [own],
    }


def _list_templates(loaded: Any) -> dict[str, Any]:
    """Return the chat templates."""
    from moe2edge.runtime.chat_templates import list_chat_templates

    named = list_chat_templates(loaded)
    default = named.pop("default", None)
    found = {} if default is None else {"tokenizer.chat_template": default}
    found |= {f"tokenizer.chat_template.{name}": text for name, text in named.items()}
    return found | ({"tokenizer.chat_templates": sorted(named)} if named else {})


# ---- compared with transformers ------------------------------------------------------------------


def check_outline(
    folder: Path,
    metadata: Metadata,
    stop: Collection[int],
    *,
    tensors: Sequence[PlannedGguf] = (),
    texts: Sequence[str] = (),
) -> list[int]:
    """Open a file without numbers in llama.cpp, and compare how it and transformers encode texts.

    Args:
        folder: a checkpoint or an output.
        metadata: of the file, with its tokenizer.
        stop: tokens that end a text.
        tensors: of the file; none: only the tokenizer is looked at.
        texts: further texts.

    Returns:
        Those of ``stop`` with which llama.cpp would not stop.

    Raises:
        Unsupported: llama.cpp refuses the file, the ids differ, or xllamacpp is missing.
    """
    from moe2edge.targets._gguf_runtime import LlamaProcess

    with tempfile.TemporaryDirectory(prefix="moe2edge-") as name:
        path = Path(name) / "model.gguf"
        write_outline(path, metadata, tensors)
        part = "shapes" if tensors else "vocabulary"
        try:
            process = LlamaProcess(path, exact=False, threads=1, part=part)
        except VerificationFailed as error:
            raise Unsupported(
                f"{error}; nothing was computed yet: choose another target or recipe"
            ) from error
        try:
            if metadata["tokenizer.ggml.model"] == "none":
                return []
            _compare_ids(process, folder, metadata, texts)
            ends = sorted(stop)
            reply, _ = process.ask("ends", ids=ends)
            return [token for token, known in zip(ends, reply["ends"], strict=True) if not known]
        finally:
            process.close()


def _compare_ids(
    process: LlamaProcess, folder: Path, metadata: Metadata, texts: Sequence[str]
) -> None:
    """Compare the ids of texts.

    Raises:
        Unsupported: some differ.
    """
    loaded = load_tokenizer(folder)
    every = [*CHECKED_TEXTS, *_render_chat(loaded), *texts]
    for special in (False, True):
        reply, _ = process.ask("encode", texts=every, special=special)
        for text, found in zip(every, reply["ids"], strict=True):
            expected = encode_text(loaded, text, special=special)
            if found != expected:
                raise _refuse(metadata, text, found, expected)


def _render_chat(loaded: Any) -> list[str]:
    """Return a short chat in the model's template, if it has one that can be filled in."""
    from moe2edge.runtime.chat_templates import ChatRenderer, TemplateFailedError

    if not loaded.chat_template:
        return []
    chat = [{"role": "user", "content": "Hi, who are you?"}]
    try:
        with ChatRenderer(loaded) as renderer:
            return [renderer.render(chat, add_generation_prompt=True)]
    except TemplateFailedError:
        return []


def _refuse(metadata: Metadata, text: str, found: list[int], expected: list[int]) -> Unsupported:
    at = next(
        (n for n, pair in enumerate(zip(found, expected, strict=False)) if pair[0] != pair[1]),
        min(len(found), len(expected)),
    )
    return Unsupported(
        f"llama.cpp encodes {text[:60]!r} otherwise than transformers, with "
        f"{metadata['tokenizer.ggml.model']} and {metadata['tokenizer.ggml.pre']}: token {at + 1} "
        f"is {found[at : at + 1]}, expected {expected[at : at + 1]}; export to hf, gptq or onnx"
    )
