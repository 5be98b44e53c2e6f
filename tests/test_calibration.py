"""Text to tokens, and every way in which text can be wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moe2edge.artifact import tokenizer_of
from moe2edge.calibration import load_tokens, read_texts
from moe2edge.errors import InputError
from moe2edge.recipe import TextSource
from moe2edge.testing import Make

LIMITS = (128, 96)


@pytest.fixture
def tokenizer(tiny: Make) -> Any:
    return tokenizer_of(tiny("mixtral"))


def source(path: Path, **changes: Any) -> TextSource:
    return TextSource(**{"text": str(path), "samples": 4, "length": 8, **changes})


def test_text_is_cut_into_samples(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "a.txt"
    path.write_text("abcdefg" * 20)
    found = load_tokens(source(path, samples=17), tokenizer, "calibration", LIMITS)
    assert found.ids.shape == (17, 8)
    assert found.ids.dtype == torch.int64
    # All 17 windows, in order: the end token, then the text.
    assert found.ids.flatten().tolist()[:9] == [0, *(ord(c) - 31 for c in "abcdefga")]


def test_the_seed_alone_decides_which_samples(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "a.txt"
    path.write_text("".join(chr(33 + n * 7 % 90) for n in range(900)))
    first, same = (load_tokens(source(path), tokenizer, "calibration", LIMITS) for _ in range(2))
    other = load_tokens(source(path, seed=1), tokenizer, "calibration", LIMITS)
    assert torch.equal(first.ids, same.ids)
    assert first.sha256 == same.sha256 != other.sha256


def test_each_line_of_jsonl_is_a_document(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"question": "abc", "answer": "xyz"}, {"question": "def", "answer": "uvw"}]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert read_texts(source(path, field="answer"), "calibration") == ["xyz", "uvw"]
    found = load_tokens(source(path, field="answer", samples=1), tokenizer, "calibration", LIMITS)
    assert found.ids[0].tolist() == [
        0,
        *(ord(c) - 31 for c in "xyz"),
        0,
        *(ord(c) - 31 for c in "uvw"),
    ]


@pytest.mark.parametrize(
    ("name", "content", "changes", "message"),
    [
        ("a.txt", b"", {}, "is empty"),
        ("a.txt", b" \n ", {}, "is empty"),
        ("a.txt", b"\xff\xfe", {}, "is not UTF-8"),
        ("a.txt", b"short", {}, "too short: 6 tokens, but 4 samples of 8 need 32; give more text$"),
        ("a.txt", b"x" * 999, {"length": 129}, "longer than the 128 positions"),
        ("a.jsonl", b"", {}, "is empty"),
        ("a.jsonl", b"{", {}, "line 1 is not JSON"),
        ("a.jsonl", b'{"body": "x"}', {}, "no text in field 'text' .it has body."),
        ("a.jsonl", b'{"text": 3}', {}, "no text in field 'text'"),
        ("a.jsonl", b'["text"]', {}, "no object"),
        ("a.jsonl", b"[" * 100_000, {}, "line 1 is not JSON"),
        ("a.jsonl", b'{"text": "x\\ud800"}', {}, r"line 1 holds half a character, '.ud800'"),
    ],
)
def test_bad_text_is_refused(
    tmp_path: Path, tokenizer: Any, name: str, content: bytes, changes: Any, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        load_tokens(source(path, **changes), tokenizer, "calibration", LIMITS)
    assert "\n" not in str(caught.value)


def test_missing_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        read_texts(source(tmp_path / "none.txt"), "evaluation")


def test_a_foreign_tokenizer_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "a.txt"
    path.write_text("z" * 99)
    with pytest.raises(InputError, match="not this model's tokenizer"):
        load_tokens(source(path), tokenizer, "calibration", (128, 50))


def test_jsonl_keeps_line_breaks_of_unicode_and_takes_a_mark(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    texts = ["one\u2028two", "three\u0085four"]
    rows = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    path.write_text("\ufeff" + "\r\n".join(rows), "utf-8")
    assert read_texts(source(path), "calibration") == texts


def test_a_name_that_no_system_has_is_one_line() -> None:
    with pytest.raises(InputError, match="File name too long"):
        read_texts(source(Path("x" * 5000)), "calibration")
    with pytest.raises(InputError, match=r"~no-such-user/a\.txt cannot be read"):
        read_texts(source(Path("~no-such-user/a.txt")), "calibration")
