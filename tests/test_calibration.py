"""Text to tokens, and every way in which text can be wrong."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import run
from moe2edge.calibration.mixes import list_parts, share_out
from moe2edge.calibration.sources import TextSource
from moe2edge.calibration.tokens import load_tokens, read_texts
from moe2edge.errors import InputError
from moe2edge.pipeline.recipe import parse_section
from moe2edge.storage.tokenizer import load_tokenizer
from moe2edge.testing import Make

LIMITS = (128, 96)


@pytest.fixture
def tokenizer(tiny: Make) -> Any:
    return load_tokenizer(tiny("mixtral"))


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
        (
            "a.txt",
            b"short",
            {},
            "too short: 6 tokens, but 4 samples of 8 need 32; give more text, or a smaller length$",
        ),
        ("a.txt", b"x" * 999, {"length": 129}, "longer than the 128 positions"),
        ("a.jsonl", b"", {}, "is empty"),
        ("a.jsonl", b"{", {}, "line 1 is not JSON"),
        ("a.jsonl", b'{"body": "x"}', {}, "no text in field 'text' .it has body."),
        ("a.jsonl", b'{"text": 3}', {}, "no text in field 'text'"),
        ("a.jsonl", b'["text"]', {}, "not an object"),
        ("a.jsonl", b"[" * 100_000, {}, "line 1 is not JSON"),
        ("a.jsonl", b'{"text": "x\\ud800"}', {}, r"line 1 holds '.ud800', an unpaired surrogate"),
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
    with pytest.raises(InputError, match="put this model's tokenizer files into its folder"):
        load_tokens(source(path), tokenizer, "calibration", (128, 50))


def test_jsonl_keeps_line_breaks_of_unicode_and_takes_a_mark(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    texts = ["one\u2028two", "three\u0085four"]
    rows = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    path.write_text("\ufeff" + "\r\n".join(rows), "utf-8")
    assert read_texts(source(path), "calibration") == texts


def test_an_impossible_file_name_gives_one_line() -> None:
    with pytest.raises(InputError, match="File name too long"):
        read_texts(source(Path("x" * 5000)), "calibration")
    with pytest.raises(InputError, match=r"~no-such-user/a\.txt cannot be read"):
        read_texts(source(Path("~no-such-user/a.txt")), "calibration")


# ---- mixes -----------------------------------------------------------------------------------


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with texts, which is the current one."""
    (tmp_path / "a.txt").write_text("".join(chr(33 + n * 7 % 90) for n in range(900)))
    (tmp_path / "b.txt").write_text("".join(chr(33 + n * n % 83) for n in range(700)))
    rows = [{"question": f"is {n}?", "answer": f"yes {n * n}", "n": n / 2} for n in range(60)]
    (tmp_path / "qa.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def mix(text: str, **options: Any) -> TextSource:
    return parse_section("calibration", {"text": text, "samples": 10, "length": 8, **options})


def test_a_mix_gives_of_each_part_what_it_gives_alone(texts: Path, tokenizer: Any) -> None:
    found = load_tokens(
        mix("a.txt:0.5,b.txt:0.3,qa.jsonl:0.2", field="answer", seed=3),
        tokenizer,
        "calibration",
        LIMITS,
    )
    counts = {"a.txt": 5, "b.txt": 3, "qa.jsonl": 2}
    alone = {
        name: load_tokens(
            mix(name, samples=count, seed=3, **({"field": "answer"} if "qa" in name else {})),
            tokenizer,
            "calibration",
            LIMITS,
        )
        for name, count in counts.items()
    }
    # The parts take turns: each next sample is that of the part which is furthest behind.
    expected, given = [], dict.fromkeys(counts, 0)
    for _ in range(10):
        name = min(
            (name for name in counts if given[name] < counts[name]),
            key=lambda name: ((given[name] + 0.5) / counts[name], list(counts).index(name)),
        )
        expected.append(alone[name].ids[given[name]])
        given[name] += 1
    assert torch.equal(found.ids, torch.stack(expected))
    assert [part.name for part in found.parts] == list(counts)
    assert found.provenance == {
        "text": "a.txt:0.5,b.txt:0.3,qa.jsonl:0.2",
        "samples": 10,
        "length": 8,
        "sha256": hashlib.sha256(found.ids.numpy().tobytes()).hexdigest(),
        "parts": [
            {"name": name, "text": name, "samples": count, "sha256": alone[name].sha256}
            for name, count in counts.items()
        ],
    }


def test_samples_are_shared_out_by_largest_remainder() -> None:
    rng = random.Random(0)
    for _ in range(300):
        weights = [rng.choice([rng.random() + 0.01, rng.randint(1, 5)]) for _ in range(4)]
        total = rng.randint(1, 40)
        exact = [total * weight / sum(weights) for weight in weights]
        expected = [int(share) for share in exact]
        while sum(expected) < total:
            behind = [share - count for share, count in zip(exact, expected, strict=True)]
            expected[behind.index(max(behind))] += 1
        assert share_out(total, weights) == expected
        assert share_out(total, [3 * weight for weight in weights]) == expected


def test_weights_need_not_sum_to_one_nor_be_there(texts: Path, tokenizer: Any) -> None:
    ids = [
        load_tokens(mix(text), tokenizer, "calibration", LIMITS).ids
        for text in ("a.txt:0.5,b.txt:0.5", "a.txt:70,b.txt:70", " a.txt , b.txt ")
    ]
    assert torch.equal(ids[0], ids[1])
    assert torch.equal(ids[0], ids[2])
    one = [load_tokens(mix(t), tokenizer, "calibration", LIMITS).ids for t in ("a.txt", "a.txt:3")]
    assert torch.equal(*one)


def test_sources_have_names_and_forms_of_their_own(texts: Path, tokenizer: Any) -> None:
    sources = {
        "math": {"text": "qa.jsonl", "template": "{question}\n{answer} ({n}){{}}"},
        "answers": {"text": "qa.jsonl", "field": "answer"},
        "code": {"text": "a.txt"},
    }
    source = mix("math:0.5,answers:0.25,b.txt:0.25", sources=sources, samples=8)
    found = load_tokens(source, tokenizer, "calibration", LIMITS)
    assert [(part.name, part.text, part.samples) for part in found.parts] == [
        ("math", "qa.jsonl", 4), ("answers", "qa.jsonl", 2), ("b.txt", "b.txt", 2),
    ]  # fmt: skip
    documents = read_texts(source, "calibration")
    assert documents[3] == "is 3?\nyes 9 (1.5){}"
    assert documents[60 + 3] == "yes 9"
    assert documents[-1] == (texts / "b.txt").read_text()
    alone = load_tokens(mix("math", sources=sources), tokenizer, "calibration", LIMITS)
    assert [part.name for part in alone.parts] == ["math"]


def test_builtin_is_a_part_like_others(texts: Path) -> None:
    parts = list_parts(mix("builtin:2,a.txt:1"), "evaluation")
    assert [(part.name, part.weight) for part in parts] == [("builtin", 2), ("a.txt", 1)]
    assert len(read_texts(mix("builtin:2,a.txt:1"), "evaluation")) == 2


@pytest.mark.parametrize("name", ["a:0.5", "a.txt,b.txt", "a.txt:1,b.txt:1", "x:0.5,y:0.5"])
def test_a_file_under_its_whole_name_is_no_mix(texts: Path, name: str) -> None:
    (texts / name).write_text("whole")
    assert read_texts(mix(name), "calibration") == ["whole"]


def test_a_file_with_a_colon_is_a_part(texts: Path) -> None:
    (texts / "a:0.5").write_text("colon")
    assert read_texts(mix("a:0.5,b.txt"), "calibration")[0] == "colon"
    assert read_texts(mix("a:0.5:3,b.txt:1"), "calibration")[0] == "colon"


SOURCES = {"math": {"text": "qa.jsonl", "field": "answer"}, "code": {"text": "a.txt"}}
BAD_MIXES: list[tuple[str, dict[str, Any], str]] = [
    ("a.txt:0,b.txt:1", {}, "the weight of a.txt is '0', expected: a number above 0"),
    ("a.txt:1,b.txt:-1", {}, "the weight of b.txt is '-1'"),
    ("a.txt:nan,b.txt:1", {}, "the weight of a.txt is 'nan'"),
    ("a.txt:inf,b.txt:1", {}, "the weight of a.txt is 'inf'"),
    ("a.txt:half,b.txt:1", {}, "the weight of a.txt is 'half'"),
    ("a.txt:0.5,b.txt", {}, "b.txt has no weight, but other parts have"),
    ("a.txt:0.5,,b.txt:0.5", {}, "a part without a name"),
    ("a.txt,", {}, "a part without a name"),
    ("", {}, "a part without a name"),
    (":0.5,a.txt:0.5", {}, "does not exist"),
    ("a.txt:0.5,a.txt:0.5", {}, "has a.txt twice"),
    ("a.txt:0.5,c.txt:0.5", {}, "calibration text c.txt does not exist"),
    ("math:0.5,cod:0.5", {"sources": SOURCES}, "'cod': did you mean 'code'?"),
    ("maths", {"sources": SOURCES}, "unknown file or source of calibration 'maths': did you"),
    ("a.txt:1,b.txt:1", {"samples": 200}, "part b.txt is too short: 701 tokens, but its 100 of"),
    ("code:1,math:9", {"sources": SOURCES, "samples": 90}, "part math is too short"),
    ("a.txt:1,b.txt:99", {}, "part a.txt gets none of the 10 samples"),
    ("qa.jsonl", {"template": "{question} {reply}"}, "qa.jsonl, line 1 has no text in field 're"),
    ("qa.jsonl:1,a.txt:1", {"field": "reply"}, "qa.jsonl, line 1 has no text in field 'reply'"),
    (
        "a.txt",
        {"template": "{question}"},
        "calibration.template is for rows of JSON",
    ),
    (
        "math",
        {"template": "{answer}", "sources": SOURCES},
        "calibration.template is for rows of JSON",
    ),
    (
        "x",
        {"sources": {"x": {"text": "a.txt", "template": "{q}"}}},
        "calibration.sources.x.template is for rows of JSON",
    ),
    ("x", {"sources": {"x": {"text": "none.txt"}}}, "calibration text none.txt does not exist"),
]


@pytest.mark.parametrize(("text", "options", "message"), BAD_MIXES, ids=[b[2] for b in BAD_MIXES])
def test_bad_mixes_are_refused(
    texts: Path, tokenizer: Any, text: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError) as caught:
        load_tokens(mix(text, **options), tokenizer, "calibration", LIMITS)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_samples_that_a_mix_has_are_proposed(texts: Path, tokenizer: Any) -> None:
    with pytest.raises(
        InputError, match=r"or fewer samples \(--set calibration.samples=\d+"
    ) as said:
        load_tokens(mix("a.txt:1,b.txt:5", samples=500), tokenizer, "calibration", LIMITS)
    most = int(str(said.value).rpartition("=")[2].rstrip(")"))
    load_tokens(mix("a.txt:1,b.txt:5", samples=most), tokenizer, "calibration", LIMITS)


@pytest.mark.parametrize("value", [[1], {"a": 1}, True, None])
def test_only_text_is_filled_into_a_template(texts: Path, value: object) -> None:
    rows = [{"q": "x", "a": "y"}, {"q": "x", "a": value}]
    (texts / "b.jsonl").write_text("\n" + "\n".join(map(json.dumps, rows)))
    with pytest.raises(InputError, match="line 3 has no text in field 'a'") as caught:
        read_texts(mix("b.jsonl", template="{q} {a}"), "calibration")
    assert "fix the template or the line" in str(caught.value)


def test_a_mix_on_the_command_line_is_reported_in_full(
    tiny: Make, texts: Path, tokenizer: Any
) -> None:
    arguments = [
        "decide", str(tiny("mixtral")), "-r", "trim", "-o", "s.json", "-q",
        "--calib", "a.txt:3,qa.jsonl:1", "--set", "calibration.template='{question} {answer}'",
        "--set", "calibration.samples=8", "--set", "calibration.length=16",
    ]  # fmt: skip
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    source = mix("a.txt:3,qa.jsonl:1", template="{question} {answer}", samples=8, length=16)
    found = json.loads(Path("s.json").read_text())["calibration"]
    assert found == load_tokens(source, tokenizer, "calibration", LIMITS).provenance
    assert [part["samples"] for part in found["parts"]] == [6, 2]
