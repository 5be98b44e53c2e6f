"""Long texts tokenized in pieces: the same ids as whole, for every kind of tokenizer."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

from moe2edge.calibration import pieces
from moe2edge.calibration.pieces import Seams, encode_document
from moe2edge.errors import InputError
from moe2edge.storage.checkpoint import BUILTIN_FOLDER
from moe2edge.storage.tokenizer import load_tokenizer

SPECIAL = ["<unk>", "<s>", "<|end|>", "<mask>"]


@cache
def read_source() -> str:
    """Read text that people wrote."""
    return (BUILTIN_FOLDER / "calibration.txt").read_text("utf-8")[:150_000]


@cache
def make_mixture() -> str:
    """Make a text of all that tokenizers treat in a way of its own."""
    draw, source = random.Random(0), read_source()
    accents = "naïve café e\u0301e\u0302 日本語の文章です。 한국어 العربية 😀👩\u200d👧 ﬁ ½ ＡＢＣ "

    def pick() -> str:
        at = draw.randrange(len(source) - 80)
        return draw.choice(
            [
                source[at : at + draw.randrange(80)], source[at : at + draw.randrange(80)],
                accents[draw.randrange(20) :], *SPECIAL[1:], " " * draw.randrange(40), "\n\n\n",
                "=" * draw.randrange(300), "a" * draw.randrange(200), "日本" * draw.randrange(50),
            ]
        )  # fmt: skip

    return "".join(pick() for _ in range(1500))


def list_texts() -> dict[str, str]:
    """Return texts by what is in them."""
    source, mixture = read_source(), make_mixture()
    runs = source[:9000] + "=" * 30000 + source[:5000] + " " * 30000 + "日" * 9000 + source[:3000]
    return {
        "source": source, "mixture": mixture, "runs": runs, "lines": "\n" * 20000 + mixture[:9000],
        "period": "abcde" * 9000 + source[:4000],
    }  # fmt: skip


# ---- tokenizers ----------------------------------------------------------------------------------


def _train(tokenizer: Any, kind: str, alphabet: tuple[str, ...] = (), more: int = 0) -> Any:
    from tokenizers import trainers

    special = SPECIAL + [f"<0x{n:02X}>" for n in range(more)]
    given: dict[str, Any] = {"vocab_size": 1500, "special_tokens": special, "show_progress": False}
    given |= {"initial_alphabet": list(alphabet)} if alphabet else {}
    given |= {"unk_token": "<unk>"} if kind == "UnigramTrainer" else {}
    texts = [read_source()[:50_000], make_mixture()[:40_000]]
    tokenizer.train_from_iterator(texts, getattr(trainers, kind)(**given))
    return tokenizer


def _edit(tokenizer: Any, **parts: Any) -> Any:
    from tokenizers import Tokenizer

    data = json.loads(tokenizer.to_str())
    for name, value in parts.items():
        place = data["model"] if name in data["model"] else data
        place[name] = value
    return Tokenizer.from_str(json.dumps(data))


def make_byte_level() -> Any:
    """Make one as GPT-2 has it: a pattern, then bytes."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return _train(tokenizer, "BpeTrainer", tuple(pre_tokenizers.ByteLevel.alphabet()))


def make_byte_level_with_normalizer() -> Any:
    """Make one as Qwen has it: composed characters, another pattern, then bytes."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    pattern = (
        r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
        r"\s+(?!\S)|\s+"
    )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return _train(tokenizer, "BpeTrainer", tuple(pre_tokenizers.ByteLevel.alphabet()))


@cache
def make_metaspace() -> Any:
    """Make one as Mixtral's older files: no words at all, the whole text is merged."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    blank = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    first = {"type": "Prepend", "prepend": "▁"}
    return _edit(
        _train(tokenizer, "BpeTrainer", more=256),
        pre_tokenizer=None,
        normalizer={"type": "Sequence", "normalizers": [first, blank]},
        byte_fallback=True,
        fuse_unk=True,
    )


def make_metaspace_first() -> Any:
    """Make one as Mixtral's newer files."""
    scheme = {"replacement": "▁", "prepend_scheme": "first", "split": False}
    return _edit(make_metaspace(), normalizer=None, pre_tokenizer={"type": "Metaspace", **scheme})


@cache
def make_unigram() -> Any:
    """Make one as T5 has it: the most likely pieces of each word, runs of spaces are one."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return _train(tokenizer, "UnigramTrainer")


def make_unigram_without_words() -> Any:
    """Make one as T5 has it, but for the most likely pieces of the whole text."""
    scheme = {"replacement": "▁", "prepend_scheme": "always", "split": False}
    return _edit(make_unigram(), pre_tokenizer={"type": "Metaspace", **scheme})


def make_word_piece() -> Any:
    """Make one as BERT has it: lower case, no accents, the longest known beginnings of words."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return _train(tokenizer, "WordPieceTrainer")


def make_word_level() -> Any:
    """Make one of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return _train(tokenizer, "WordLevelTrainer")


def wrap(tokenizer: Any, *, greedy: bool = False) -> Any:
    """Return the tokenizer as transformers has it.

    Args:
        tokenizer: of the library tokenizers.
        greedy: let one of the special tokens take all space beside it.
    """
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "<|end|>"}
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    mask = AddedToken("<mask>", lstrip=greedy, rstrip=greedy, special=True)
    wrapped.add_tokens([mask, AddedToken("café e", normalized=True)])
    return wrapped


KINDS: list[Callable[[], Any]] = [
    make_byte_level, make_byte_level_with_normalizer, make_metaspace, make_metaspace_first,
    make_unigram, make_unigram_without_words, make_word_piece, make_word_level,
]  # fmt: skip


def encode(text: str, tokenizer: Any) -> tuple[list[int], Seams]:
    """Tokenize a text in pieces."""
    seams = Seams()
    parts = encode_document([text], tokenizer, seams)
    return [i for part in parts for i in part], seams


def encode_whole(text: str, tokenizer: Any) -> list[int]:
    """Tokenize a text as transformers does."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__.removeprefix("make_"))
def test_pieces_give_the_ids_of_the_whole(
    make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("PIECE_LENGTH", 3000), ("SHARED", 600), ("MOST_JOINED", 48_000)):
        monkeypatch.setattr(pieces, name, value)
    tokenizer = wrap(make(), greedy=make is make_byte_level)
    for name, text in list_texts().items():
        found, seams = encode(text, tokenizer)
        assert found == encode_whole(text, tokenizer) or seams.cuts, name
        assert not seams.cuts, name


def test_the_built_in_text_and_tokenizer() -> None:
    tokenizer = load_tokenizer(BUILTIN_FOLDER)
    text = (BUILTIN_FOLDER / "calibration.txt").read_text("utf-8")
    assert len(text) > 4 * pieces.PIECE_LENGTH
    assert encode(text, tokenizer) == (encode_whole(text, tokenizer), Seams())


def test_pieces_of_any_length_are_one_text() -> None:
    tokenizer, text = wrap(make_byte_level()), make_mixture()
    cut = [text[:5], "", text[5:9], text[9:100_000], text[100_000:]]
    parts = list(encode_document(cut, tokenizer, Seams()))
    assert [i for part in parts for i in part] == encode_whole(text, tokenizer)
    assert next(encode_document([], tokenizer, Seams())).tolist() == []


def test_ids_that_may_differ_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("PIECE_LENGTH", 1000), ("SHARED", 200), ("MOST_JOINED", 4000)):
        monkeypatch.setattr(pieces, name, value)
    found, seams = encode("ab" * 10_000, tokenizer := wrap(make_word_level()))
    # One unknown word, which no piece can know the end of.
    assert encode_whole("ab" * 10_000, tokenizer) == [tokenizer.unk_token_id]
    assert len(found) == 1 + seams.cuts
    assert seams.ids >= seams.cuts > 0


class _Slow:
    """A tokenizer that does not give the places of its tokens."""

    is_fast = False

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in text]}


def test_a_tokenizer_without_places_gets_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "0123456789" * 20_000
    assert encode(text, _Slow()) == ([ord(c) for c in text], Seams())
    monkeypatch.setattr(pieces, "MOST_WITHOUT_PLACES", 100_000)
    with pytest.raises(InputError, match="longer than 100,000 characters"):
        encode(text, _Slow())


def test_ids_beyond_32_bits_are_a_fault_of_the_tokenizer() -> None:
    assert list(pieces.pack_ids([0, 2**31 - 1])) == [0, 2**31 - 1]
    with pytest.raises(InputError, match="gives token id 2147483648, which no model has"):
        pieces.pack_ids([0, 2**31])
