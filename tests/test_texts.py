"""Formats of texts, chats, and what is said about texts that are wrong: every remedy is run."""

from __future__ import annotations

import gzip
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from helpers import run
from moe2edge.calibration import text_formats, tokens
from moe2edge.calibration.sources import AS_FLAGS, IN_RECIPE, NamedText, TextSource
from moe2edge.calibration.tokens import encode_texts, load_tokens, read_texts
from moe2edge.errors import DoesNotFit, InputError
from moe2edge.pipeline import recipe
from moe2edge.pipeline.recipe import parse_section
from moe2edge.progress import QUIET, Reporter
from moe2edge.runtime.chat_templates import (
    ChatRenderer,
    TemplateFailedError,
    choose_chat_template,
    list_chat_templates,
)
from moe2edge.storage.tokenizer import load_tokenizer
from moe2edge.testing import Make, make_tokenizer

ROWS: list[dict[str, Any]] = [{"text": f"text number {n} " * 5, "n": n} for n in range(40)]
TEXTS: list[str] = [row["text"] for row in ROWS]
LINES = "\n".join(map(json.dumps, ROWS))
CHAT = (
    "{{ eos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% if m.tool_calls %}call {{ m.tool_calls[0].function.name }}{% endif %}{% endfor %}"
    "{% if tools %} with {{ tools[0].name }}{% endif %}"
)


def read(path: Path, **options: Any) -> list[str]:
    return read_texts(TextSource(text=str(path), **options), "calibration")


def refuse(path: Path, **options: Any) -> str:
    """Return the error of a text: one line."""
    with pytest.raises(InputError) as caught:
        read(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- formats -------------------------------------------------------------------------------------

PRETTY = json.dumps(ROWS, indent=1)
FORMATS = {
    "lines": LINES,
    "lines with blank ones": "\n\n" + LINES.replace("\n", "\n \n") + "\n\n",
    "lines of another system": LINES.replace("\n", "\r\n"),
    "lines of joined files": "\ufeff" + LINES.replace("\n", "\n\ufeff"),
    "an array": json.dumps(ROWS),
    "an array, indented": "\n " + PRETTY + "\n",
    "an object with a list": json.dumps({"version": 1, "names": ["a"], "data": ROWS}),
    "an object, indented": json.dumps({"data": ROWS}, indent=2),
}


@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["", "mark"])
@pytest.mark.parametrize("content", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("suffix", [".json", ".txt", "", ".json.gz"])
def test_json_is_recognized_by_its_content(
    tmp_path: Path, content: str, mark: str, suffix: str
) -> None:
    path, data = tmp_path / f"a{suffix}", (mark + content).encode()
    path.write_bytes(gzip.compress(data) if suffix.endswith("gz") else data)
    assert read(path) == TEXTS
    assert read(path, template="{n}: {text}")[3] == f"3: {TEXTS[3]}"
    assert "has no text in field 'no_such_field' (it has n, text)" in refuse(
        path, field="no_such_field"
    )


@pytest.mark.parametrize(
    "content",
    [
        "plain", "[1] Knuth, The Art", "[section]\nkey = 1", "[[a link]] in a wiki",
        '"Quoted," she said',
        "{ int a = 1; }", "{{ jinja }}", "{'python': 1}", "2024", "[x](https://x)", "null and void",
        "[2024-01-01] started", "{}", "a,b\n1,2", "a\u2028b\u0085c",
    ],
)  # fmt: skip
@pytest.mark.parametrize("packed", [False, True])
def test_plain_text_stays_plain_text(tmp_path: Path, content: str, packed: bool) -> None:
    path, data = tmp_path / "a.txt", content.encode()
    path.write_bytes(gzip.compress(data) if packed else data)
    assert read(path) == [content]
    path.write_bytes(b"\xef\xbb\xbf" + data.replace(b"\n", b"\r\n"))
    assert read(path) == [content]


WRONG: list[tuple[str, bytes, str]] = [
    ("a.jsonl", b"plain text\nof two lines", "a.jsonl, line 1 is not JSON"),
    ("a.NDJSON", b"plain", "line 1 is not JSON"),
    ("a.jsonl.gz", gzip.compress(b"plain"), "line 1 is not JSON"),
    ("a.json", b"plain text", "looks like JSON, but is not"),
    ("a.json", b'"one big string"', "is JSON, but a string instead of rows"),
    ("a.json", b"17", "is JSON, but a number instead of rows"),
    ("a.json", b"[]", "is an empty list"),
    ("a.json", b"[1, 2]", "line 1 is not an object but '1'; give rows such as"),
    ("a.txt", b'["one", "two"]', "line 1 is not an object but 'one'; give rows such as"),
    ("a.txt", b'["Hello", she said', "if it is plain text, begin it with a line of words"),
    ("a.txt", b'{"a": 1} is JSON', "if it is plain text, give it the suffix .txt, and begin"),
    ("a.jsonl", b'{\n"text": "a"\n}', "line 1 is not JSON: Expecting property name"),
    ("a.ndjson", b'{"text":\n"a"}', "or put each object on one line of its own (jq -c"),
    ("a.jsonl", b'[{"role": "user"}]\n[]', 'give rows such as {"messages": [...]}'),
    ("a.jsonl", b'["a"]\n["b"]', "line 1 is not an object but \"['a']\"; give rows"),
    ("a.txt", b'[{"text": "a"}, {"text": "b"}] and more', "something follows behind the end"),
    ("a.txt", b'[{"text": "a"},\n\n{"text": }]', "line 3: Expecting value"),
    ("a.txt", b'[{"text": "a"}', "expected ',', found 'the end'"),
    ("a.txt", b'{"text": "a"}\n{"text": "b"', "line 2 is not JSON"),
    ("a.txt", b'{"text": "a"', "looks like JSON, but is not"),
    ("a.txt", b'{\n"text": "a"\n}\n{\n"text": "b"\n}', "put each object on one line of its own"),
    ("a.json", b'{"data": {"text": "a"}}', "a JSON object with no list of rows (it has data)"),
    ("a.json", b'{"a": [{}], "b": [{}]}', "several lists of rows (it has a, b)"),
    ("a.json", b'{"added_tokens": [{"id": 1}], "model": {}}', "is a tokenizer (tokenizer.json)"),
    ("a.jsonl", b'{"text": "a"}\n{"text": null}', "(it is null; the line has text)"),
    ("a.jsonl", b'{"text": {"en": "a"}}', "(it is an object; the line has text)"),
    ("a.jsonl", b'{"body": {"text": "a"}}', 'give rows such as {"text": "..."}'),
    ("a.jsonl", b'{"text": " "}\n\n', "is empty"),
    ("a.txt", "Latin caf\xe9".encode("latin-1"), "is not UTF-8"),
    ("a.txt", "wide".encode("utf-16"), "is not UTF-8 but seems to be UTF-16"),
    ("a.txt", "wide".encode("utf-16-be"), "has NUL characters"),
    ("a.txt", "wide".encode("utf-32"), "is not UTF-8 but seems to be UTF-16 or UTF-32"),
    ("a.txt", b"text" * 70_000 + b"\0", "has NUL characters"),
    ("a.txt", b"x" * 70_000 + b"\xff", "is not UTF-8"),
    ("a.safetensors", (90).to_bytes(8, "little") + b'{"a": 1}', "has NUL characters"),
    ("a.gz", gzip.compress(b"text" * 999)[:-9], "gzip cannot unpack it"),
    ("a.gz", b"\x1f\x8b rubbish", "gzip cannot unpack it"),
    ("a.gz", gzip.compress(gzip.compress(b"text")), "is compressed with gzip twice"),
    ("a.txt", b"BZh91AY", "is compressed with bzip2; decompress it"),
    ("a.txt", b"\x28\xb5\x2f\xfdxx", "is compressed with zstd"),
    ("a.zip", b"PK\x03\x04", "is a zip archive"),
    ("a.pdf", b"%PDF-1.7", "is a PDF document"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "message"), WRONG, ids=[w[2] for w in WRONG])
def test_what_is_no_text_is_one_line(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    assert message in refuse(tmp_path / name)


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (pipe, tmp_path, Path("/dev/zero")):
        assert "is not a regular file (a folder, pipe or device)" in refuse(path)


def test_one_row_and_one_object_with_a_list_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"text": "a row", "parts": [{"text": "b"}]}, indent=1))
    assert read(path) == ["a row"]
    assert "has no text in field 'body'" in refuse(path, field="body")
    assert read(path, template="{text}!") == ["a row!"]


def test_long_elements_are_read_and_too_long_ones_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, rows = tmp_path / "a.json", [{"text": "x" * n} for n in (3, 150_000, 5, 70_000)]
    for content in (
        json.dumps(rows),
        "\n".join(map(json.dumps, rows)),
        json.dumps({"a": rows}, indent=1),
    ):
        path.write_text(content)
        assert read(path) == [row["text"] for row in rows]
    monkeypatch.setattr(text_formats, "MOST_CHARACTERS", 100_000)
    assert "its one JSON value is longer than 100,000 characters" in refuse(path)
    path.write_text("\n".join(map(json.dumps, rows)))
    assert "line 2 is longer than 100,000 characters" in refuse(path)
    path.write_text(json.dumps(rows))
    assert "the element at line 1 is longer than 100,000 characters" in refuse(path)


def test_parquet(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.data"
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    assert read(path) == TEXTS
    assert read(path, template="{n}")[7] == "7"
    assert "a.data, row 1 has no text in field 'x'" in refuse(path, field="x")
    path.write_bytes(path.read_bytes()[:-20])
    assert "is damaged parquet" in refuse(path)


def test_parquet_without_its_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and so on PAR1")
    assert "needs pyarrow: pip install 'pyarrow>=" in refuse(tmp_path / "a.parquet")


# ---- options that nothing reads ------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{"field": "x"}, {"template": "{x}"}, {"chat": True}, {"chat_template": "x"}]
)
def test_options_of_rows_need_rows(tmp_path: Path, options: dict[str, Any]) -> None:
    path = tmp_path / "a.txt"
    path.write_text("plain")
    name = next(iter(options))
    assert f"calibration.{name} is for rows of JSON or parquet" in refuse(path, **options)
    own = {"a": {"text": str(path), **options}}
    section = parse_section("calibration", {"text": "a", "sources": own})
    with pytest.raises(InputError, match=f"calibration.sources.a.{name} is for rows"):
        read_texts(section, "calibration")


def test_recipes_of_older_versions_still_run() -> None:
    old = {"text": "builtin", "field": "text", "template": None, "samples": 4, "length": 8}
    assert read_texts(parse_section("calibration", old), "calibration")
    parse_section("calibration", old | {"template": "{a}"})


def test_options_contradict_each_other() -> None:
    for options, message in (
        ({"field": "a", "template": "{b}"}, "give field or template, not both"),
        ({"chat": True, "template": "{b}"}, "give template, or chat with its chat_template"),
        ({"chat": False, "chat_template": "b"}, "chat_template needs chat"),
    ):
        with pytest.raises(InputError, match=message):
            parse_section("calibration", options)


def test_text_that_the_model_writes_has_no_rows(tiny: Make, tmp_path: Path) -> None:
    command = ["decide", tiny("mixtral"), "-r", "trim", "-o", tmp_path / "s.json", "-q"]
    result = run(*command, "--calib", "self", "--set", "calibration.field=x")
    assert result.exit_code == 2
    assert "calibration.field is for rows" in result.stderr


# ---- chats ---------------------------------------------------------------------------------------


@pytest.fixture
def chatty(tmp_path: Path) -> Any:
    """Return a tokenizer with a chat template."""
    make_tokenizer(tmp_path / "tokenizer")
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    tokenizer.chat_template = CHAT
    return tokenizer


def say(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def test_chats_become_text(tmp_path: Path, chatty: Any) -> None:
    parts = [{"type": "text", "text": "two "}, {"type": "text", "text": "parts"}]
    call = say("assistant", None, tool_calls=[{"function": {"name": "look_up"}}])
    rows: list[dict[str, Any]] = [
        {"messages": [say("system", "be kind"), say("user", "hi"), say("assistant", "hello")]},
        {"messages": [say("user", parts)]},
        {"messages": [say("user", "find"), call], "tools": [{"name": "look_up"}]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"text": "a text comes first", "messages": [say("user", "hi")]},
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    source = TextSource(text=str(path))
    found = read_texts(source, "calibration", chatty)
    assert found == [
        "<end><system>be kind<user>hi<assistant>hello",
        "<end><user>two parts",
        "<end><user>find<assistant>call look_up with look_up",
        "<end><user>a<assistant>b",
        "a text comes first",
    ]
    # The same as transformers gives.
    assert found[0] == chatty.apply_chat_template(rows[0]["messages"], tokenize=False)
    forced = TextSource(text=str(path), chat=True)
    assert read_texts(forced, "calibration", chatty)[4] == "<end><user>hi"
    ids = [i for text in found for i in (0, *chatty(text, add_special_tokens=False)["input_ids"])]
    windows = TextSource(text=str(path), samples=len(ids) // 8, length=8)
    samples = load_tokens(windows, chatty, "calibration", (64, 96)).ids
    # An end token before each document, another of the template.
    assert samples.flatten().tolist() == ids[: samples.numel()]
    assert ids[:2] == [0, 0]


def test_a_chat_alone_in_its_file_is_a_row(tmp_path: Path, chatty: Any) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"messages": [say("user", "hi")]}, indent=1))
    assert read_texts(TextSource(text=str(path)), "training", chatty) == ["<end><user>hi"]


BAD_CHATS: list[tuple[dict[str, Any], str]] = [
    ({"messages": [say("user", [{"type": "image", "url": "x"}])]},
     "line 1, message 1 has a part of type 'image', expected: text alone"),
    ({"messages": [say("user", 3)]}, "message 1 has content that is no text"),
    ({"messages": [say("user", "a"), say("assistant", None)]}, "message 2 has no content"),
    ({"messages": [say("", "a")]}, "message 1: role is '', not a word"),
    ({"conversations": [{"from": "alien", "value": "a"}]}, "is from 'alien', expected: human, gpt"),
    ({"messages": [say("user", "a")], "tools": "x"}, "tools is not a list"),
    ({"messages": []}, "messages is an empty list, expected: a list of messages with role and"),
    ({"messages": "a"}, "messages is a text, expected: a list of messages"),
    ({"conversations": [[say("user", "a")]]}, "conversations is a list of something else"),
    ({"conversations": {"id": 1}}, "conversations is an object, expected"),
]  # fmt: skip


def test_bad_chats_are_refused(tmp_path: Path, chatty: Any) -> None:
    path = tmp_path / "chats.jsonl"
    for row, message in BAD_CHATS:
        path.write_text(json.dumps(row))
        with pytest.raises(InputError) as caught:
            read_texts(TextSource(text=str(path)), "calibration", chatty)
        assert message in str(caught.value)
    path.write_text(json.dumps({"text": "a"}))
    with pytest.raises(InputError, match="has no chat in field 'messages' or 'conversations'"):
        read_texts(TextSource(text=str(path), chat=True), "calibration", chatty)


def test_a_template_that_refuses_a_chat_names_the_line(tmp_path: Path, chatty: Any) -> None:
    chatty.chat_template = (
        "{% if messages[0].role != 'user' %}{{ raise_exception('a user begins') }}{% endif %}x"
    )
    rows = [{"messages": [say(role, "a")]} for role in ("user", "assistant")]
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(InputError) as caught:
        read_texts(TextSource(text=str(path)), "calibration", chatty)
    assert str(caught.value) == (
        "chats.jsonl, line 2: the model's chat template cannot be filled in (a user begins); fix "
        "or remove the line"
    )


def test_a_model_without_a_template_says_so(tmp_path: Path, chatty: Any) -> None:
    chatty.chat_template = None
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": [say("user", "a")], "summary": "b"}))
    for tokenizer in (chatty, None):
        with pytest.raises(InputError, match=r"no chat template; put .* --field=summary"):
            read_texts(TextSource(text=str(path)), "evaluation", tokenizer, AS_FLAGS)


def test_named_templates(chatty: Any) -> None:
    assert list_chat_templates(chatty) == {"default": CHAT}
    chatty.chat_template = {"rag": "{# rag #}r", "tool_use": "{# tools #}t", "default": "d"}
    assert list(list_chat_templates(chatty)) == ["default", "rag", "tool_use"]
    assert choose_chat_template(chatty, None) == "d"
    assert choose_chat_template(chatty, None, tools=True) == "{# tools #}t"
    assert choose_chat_template(chatty, "rag", tools=True) == "{# rag #}r"
    with pytest.raises(InputError, match="unknown chat template 'ragg': did you mean 'rag'"):
        choose_chat_template(chatty, "ragg")
    chatty.chat_template = {"a": "1", "b": "2"}
    with pytest.raises(InputError, match="several chat templates and none is the default"):
        choose_chat_template(chatty, None)
    chatty.chat_template = {"a": "1"}
    assert choose_chat_template(chatty, None) == "1"


@pytest.mark.slow
def test_templates_have_limits_and_one_date(chatty: Any) -> None:
    # Each is harmless: it ends after seconds, or takes some megabytes.
    loop = "{% for a in range(9000) %}{% for b in range(9000) %}{% endfor %}{% endfor %}x"
    for template, message in (
        (loop, r"more than 0\.2 s or 1 GB of memory, and was stopped"),
        ("{{ 'x' * 9000000 }}", "it writes 9,000,000 characters, more than 8,388,608"),
        ("{{ messages.append(1) }}", "unsafe|not safe|immutable|sandbox|access"),
    ):
        chatty.chat_template = template
        with (
            ChatRenderer(chatty, seconds=0.2) as renderer,
            pytest.raises(TemplateFailedError, match=message),
        ):
            renderer.render([say("user", "hi")])
    chatty.chat_template = "{{ strftime_now('%Y-%m-%d') }}"
    with ChatRenderer(chatty) as renderer:
        assert renderer.render([say("user", "hi")]) == "2025-01-01"


# ---- remedies ------------------------------------------------------------------------------------


def list_remedies(message: str) -> list[list[str]]:
    """Return the options that a message proposes, as a shell would split them."""
    quoted = r"'[^']*'(?:\"'\"'[^']*')*"
    found = re.findall(rf"--set (?:{quoted}|\S+)|--[a-z-]+=(?:{quoted}|\S+)", message)
    return [shlex.split(one.rstrip(",;)")) for one in found]


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "add", "output": "the answer is long enough"},
        {"prompt": "a", "completion": "b"},
        {"the answer": "with a blank"},
        {"no": "a word that YAML reads otherwise", "n": 3},
        {"it's": "a quote"},
        {"chat": [say("user", "hi")], "id": 3},
    ],
)
@pytest.mark.parametrize("flags", [False, True])
def test_remedies_for_fields_work(
    tmp_path: Path, row: dict[str, Any], flags: bool, chatty: Any
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(InputError) as caught:
        read_texts(
            TextSource(text=str(path)), "evaluation", chatty, AS_FLAGS if flags else IN_RECIPE
        )
    remedies = list_remedies(str(caught.value))
    assert len(remedies) == (2 if {"output", "prompt"} & row.keys() else 1)
    for remedy in remedies:
        if flags:
            option, _, value = remedy[0].partition("=")
            source = parse_section("evaluation", {"text": str(path), option[2:]: value})
        else:
            assert remedy[0] == "--set"
            settings = [f"evaluation.text={path}", remedy[1]]
            source = recipe.parse("passes: []", settings).evaluation
        assert read_texts(source, "evaluation", chatty)


def test_remedies_for_named_sources_work(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"question": "a", "answer": "b"}))
    own: dict[str, Any] = {"qa": {"text": str(path)}}
    with pytest.raises(InputError) as caught:
        read_texts(parse_section("calibration", {"text": "qa", "sources": own}), "calibration")
    said = re.findall(r"give (.*?) under calibration.sources.qa in the recipe", str(caught.value))
    for option in said[0].split(" under ")[:1]:
        fixed = {"qa": own["qa"] | yaml.safe_load(option)}
        section = parse_section("calibration", {"text": "qa", "sources": fixed})
        assert read_texts(section, "calibration") == ["b"]


def test_a_recipe_renders_the_options_of_chats() -> None:
    parsed = recipe.parse("{passes: [], calibration: {text: a, chat: true, chat_template: rag}}")
    assert recipe.parse(parsed.render()) == parsed
    assert parsed.calibration.chat is True
    assert NamedText(text="a").chat is None


# ---- long texts ----------------------------------------------------------------------------------


def test_large_files_report_progress_and_tables_are_named(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "LARGE_FILE", 1000)
    path = tmp_path / "a.csv"
    seen: list[tuple[Any, ...]] = []
    said: list[str] = []
    path.write_text("a,b\n" * 50_000)
    tokenizer = load_tokenizer(tiny("mixtral"))
    reporter = Reporter(said.append, lambda *report: seen.append(report))
    source = TextSource(text=str(path), samples=2, length=8)
    found = load_tokens(source, tokenizer, "calibration", (64, 96), reporter=reporter)
    size = path.stat().st_size
    assert seen[-1] == (f"calibration: reading {path}", size, size, "bytes")
    assert 0 < seen[0][1] < size
    assert "is read as plain text, commas included" in said[0]
    path.with_suffix(".csv.gz").write_bytes(gzip.compress(path.read_bytes()))
    packed = TextSource(text=str(path.with_suffix(".csv.gz")), samples=2, length=8)
    again = load_tokens(packed, tokenizer, "calibration", (64, 96), reporter=reporter)
    assert torch.equal(found.ids, again.ids)


def test_more_tokens_than_memory_holds(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moe2edge.runtime import memory

    monkeypatch.setattr(tokens, "MANY_TOKENS", 100)
    monkeypatch.setattr(memory, "find_limit", lambda *_: 1)
    (tmp_path / "a.txt").write_text("text " * 100)
    with pytest.raises(DoesNotFit, match=r"has more than .* tokens, which needs .* give a part"):
        load_tokens(
            TextSource(text=str(tmp_path / "a.txt"), samples=1, length=8),
            load_tokenizer(tiny("mixtral")), "calibration", (64, 96),
        )  # fmt: skip


def test_prompts_are_cut_from_documents_joined(tmp_path: Path, chatty: Any) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(LINES)
    found = encode_texts(TextSource(text=str(path)), chatty, "evaluation", AS_FLAGS, QUIET)
    whole = chatty("\n".join(TEXTS), add_special_tokens=False)["input_ids"]
    assert found.tolist() == whole
    both = TextSource(text=f"{path}:1,builtin:1")
    with pytest.raises(InputError, match="prompts are cut from one text"):
        encode_texts(both, chatty, "evaluation", AS_FLAGS, QUIET)


# ---- commands ------------------------------------------------------------------------------------


def test_arguments_that_are_not_utf_8_are_one_line(tmp_path: Path) -> None:
    for arguments in (
        ["generate", str(tmp_path), "caf\udce9"],
        ["evaluate", str(tmp_path), "--text", "\udcff.txt"],
        ["export", "m\udcff", "-t", "onnx", "-o", "out"],
        ["decide", "m", "-r", "trim", "-o", "caf\udce9.json", "--json"],
    ):
        result = run(*arguments)
        assert result.exit_code == 2
        assert re.fullmatch(
            r"error: the argument '.*\\udc..*' is not UTF-8 \(from character \d on\); .*\n",
            result.stderr,
        )


def test_a_prompt_in_bytes_from_a_shell(tmp_path: Path) -> None:
    command: list[Any] = [sys.executable, "-m", "moe2edge", "generate", str(tmp_path), b"caf\xe9"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: the argument 'caf\\udce9' is not UTF-8")


@pytest.mark.slow
def test_evaluate_profile_and_export_take_chats_and_name_their_own_options(
    tmp_path: Path, tiny: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    chats = [{"messages": [say("user", "hello " * 20)], "id": n} for n in range(50)]
    Path("chats.jsonl").write_text("\n".join(map(json.dumps, chats)))
    rows = [{"question": "why", "answer": "because " * 20, "id": n} for n in range(50)]
    Path("rows.json").write_text(json.dumps(rows))
    Path("a.txt").write_text("a few words " * 25)
    few = ["--set", "calibration.samples=4", "--set", "calibration.length=32"]
    few += ["--set", "evaluation.samples=2", "--set", "evaluation.length=32", "-q"]
    result = run("export", tiny("mixtral"), "-t", "gptq", "-o", "out", "--set",
                 "gptq.group_size=32", "--eval", "none", *few)  # fmt: skip
    assert result.exit_code == 0, result.output
    folder = Path("out")
    checks: list[tuple[list[object], str]] = [
        (["evaluate", folder, "--samples", "2"], "give --length=128"),
        (["evaluate", folder, "--length", "64", "--samples", "99", "--text", "a.txt"],
         "fewer samples (--samples=4)"),
        (["evaluate", folder, "--length", "64", "--samples", "2", "--text", "rows.json"],
         "give --field=answer, or --template='{question} {answer}'"),
        (["profile", folder, "--preset", "quick", "--text", "rows.json"], "give --field=answer"),
    ]  # fmt: skip
    for command, expected in checks:
        result = run(*command)
        assert result.exit_code == 2, result.output
        assert "--set" not in result.stderr
        assert expected in result.stderr
        for remedy in list_remedies(result.stderr):
            done = run(*command, *remedy)
            assert done.exit_code == 0, (remedy, done.output)
    small = ["--length", "64", "--samples", "2"]
    for command in (["evaluate", folder, *small], ["profile", folder]):
        result = run(*command, "--text", "chats.jsonl")
        assert result.exit_code == 2
        assert "has a chat in field 'messages', but the model has no chat template" in result.stderr
    (folder / "chat_template.jinja").write_text(CHAT)
    result = run("evaluate", folder, "--length", "64", "--samples", "2", "--text", "chats.jsonl")
    assert result.exit_code == 0, result.output
