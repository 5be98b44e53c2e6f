"""Files beside config and weights: read and judged before any work, and written as judged."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoTokenizer

from moe2edge.errors import InputError
from moe2edge.storage import companions, text_files
from moe2edge.storage.checkpoint import open_checkpoint
from moe2edge.storage.companions import Companions, read_companions
from moe2edge.storage.tokenizer import compare_readers
from moe2edge.testing import Make

TEMPLATE = "{{ messages[0]['content'] }}"


@pytest.fixture
def folder(tiny: Make, tmp_path: Path) -> Path:
    """Return a checkpoint of its own."""
    return Path(shutil.copytree(tiny("mixtral"), tmp_path / "model"))


def judge(folder: Path) -> Companions:
    return read_companions(open_checkpoint(folder))


def edit(path: Path, **changes: Any) -> None:
    data = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**data, **changes}))


def write_out(folder: Path, out: Path) -> Path:
    """Write what an output of a checkpoint gets, and the config that its tokenizer asks for."""
    out.mkdir()
    judge(folder).write(out)
    shutil.copyfile(folder / "config.json", out / "config.json")
    return out


def load_templates(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder).chat_template


def name_class(content: bytes) -> bytes:
    """Name the class of tokenizers as transformers 4 knows it."""
    names = b'"model_input_names": ["input_ids", "attention_mask"]'
    known = b'"PreTrainedTokenizerFast",\n  %s' % names
    return content.replace(b'"TokenizersBackend"', known)


def test_usual_files_are_copied_without_a_word(folder: Path, tmp_path: Path) -> None:
    found = judge(folder)
    assert found.notes == ()
    out = write_out(folder, tmp_path / "out")
    for file in found.files:
        assert (out / file.name).read_bytes() == name_class((folder / file.name).read_bytes())
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= {
        file.name for file in found.files
    }


Change = Callable[[Path], object]
DAMAGE: list[tuple[str, str, str]] = [
    ("tokenizer.json", "{", r"tokenizer\.json is damaged"),
    ("tokenizer.json", "[]", "does not hold a JSON object"),
    ("tokenizer.json", "{}", r"the tokenizer in .* cannot be read: tokenizers .* refuses"),
    ("tokenizer_config.json", "nonsense", r"tokenizer_config\.json is damaged"),
    ("tokenizer_config.json", '{"tokenizer_class": 5}', "'tokenizer_class' .* is 5, expected: the"),
    (
        "tokenizer_config.json",
        '{"chat_template": 5}',
        "'chat_template' in .* is 5, expected: a text",
    ),
    ("tokenizer_config.json", '{"chat_template": [{"name": "a"}]}', "expected: a text, or a list"),
    ("tokenizer_config.json", '{"chat_template": {"a": 5}}', "expected: a text, or a list"),
    ("added_tokens.json", '{"<a>": "x"}', "'<a>' in added_tokens.json is 'x', expected: an id"),
    ("tokenizer_config.json", '{"added_tokens_decoder": 5}', "the tokenizer in .* cannot be read"),
    ("special_tokens_map.json", "{", r"special_tokens_map\.json is damaged"),
    ("added_tokens.json", "[1]", r"added_tokens\.json is damaged"),
    ("vocab.json", "{", r"vocab\.json is damaged"),
    ("chat_template.json", "{", r"chat_template\.json is damaged"),
    ("generation_config.json", "{", r"generation_config\.json is damaged"),
    ("generation_config.json", '{"eos_token_id": -1}', "eos_token_id in .* is -1, not a token"),
    ("generation_config.json", '{"eos_token_id": [1, "x"]}', r"is \[1, 'x'\], not a token"),
    ("generation_config.json", '{"pad_token_id": "x"}', "pad_token_id in .* is 'x', not a token"),
    ("generation_config.json", '{"bos_token_id": true}', "bos_token_id in .* is True, not a token"),
    ("generation_config.json", '{"decoder_start_token_id": [0]}', "decoder_start_token_id in"),
    (
        "generation_config.json",
        '{"max_new_tokens": "a"}',
        "max_new_tokens in .* is 'a', expected: a whole number; correct it, or take it out",
    ),
    ("generation_config.json", '{"temperature": "hot"}', "temperature in .* is 'hot', expected: a"),
    ("generation_config.json", '{"top_p": NaN}', "top_p in .* is nan, expected: a number"),
    ("generation_config.json", '{"repetition_penalty": true}', "is True, expected: a number"),
    ("generation_config.json", '{"do_sample": "no"}', "is 'no', expected: true or false"),
    ("generation_config.json", '{"num_return_sequences": 2}', "refuses num_return_sequences 2"),
    ("generation_config.json", '{"streamer": 1, "top_k": 5}', "refuses streamer 1 in"),
    ("generation_config.json", '{"validate": 1}', "refuses validate 1 in"),
]


@pytest.mark.parametrize(("name", "content", "message"), DAMAGE)
def test_damage_is_one_line_before_any_work(
    folder: Path, name: str, content: str, message: str
) -> None:
    (folder / name).write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        judge(folder)
    assert "\n" not in str(caught.value)


def test_a_template_has_to_be_utf8(folder: Path) -> None:
    (folder / "chat_template.jinja").write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match=r"chat_template\.jinja is damaged .* UTF-8"):
        judge(folder)


@pytest.mark.parametrize(
    "content",
    [
        '{"foo": 1}', '{"eos_token_id": []}', '{"pad_token_id": -1}',
        '{"top_k": 5, "do_sample": 1, "temperature": 0.7, "max_time": 3, "use_cache": null}',
    ],
)  # fmt: skip
def test_what_transformers_takes_passes_byte_for_byte(
    folder: Path, tmp_path: Path, content: str
) -> None:
    (folder / "generation_config.json").write_text(f" {content}\n")
    out = write_out(folder, tmp_path / "out")
    assert (out / "generation_config.json").read_text() == f" {content}\n"


# ---- what is no file, or lies elsewhere --------------------------------------------------------


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def link_outside(path: Path) -> None:
    secret = path.parents[1] / "secret.json"
    secret.write_text("{}")
    path.symlink_to(secret)


IN_PLACE: list[tuple[str, Change, str]] = [
    ("a folder", Path.mkdir, "is not a regular file"),
    ("a pipe", make_pipe, "is not a regular file"),
    ("a link to nowhere", lambda path: path.symlink_to("nowhere"), "a link that leads nowhere"),
    ("a link outside", link_outside, "is a link that leads out of the folder"),
]


@pytest.mark.skipif(os.name != "posix", reason="pipes and links")
@pytest.mark.parametrize(
    ("put", "message"), [c[1:] for c in IN_PLACE], ids=[c[0] for c in IN_PLACE]
)
def test_what_is_no_file_is_not_read(folder: Path, put: Change, message: str) -> None:
    for name in ("README.md", "LICENSE"):
        put(folder / name)
    found = judge(folder)
    assert [note.partition(" ")[0] for note in found.notes] == ["LICENSE", "README.md"]
    assert all(message in note for note in found.notes)
    assert "LICENSE" not in [file.name for file in found.files]
    for name in ("special_tokens_map.json", "chat_template.jinja", "additional_chat_templates"):
        if name == "additional_chat_templates" and message == "is not a regular file":
            continue
        put(folder / name)
        with pytest.raises(InputError, match=f"{name} in .* {message}"):
            judge(folder)
        folder.joinpath(name).rmdir() if folder.joinpath(name).is_dir() and not folder.joinpath(
            name
        ).is_symlink() else folder.joinpath(name).unlink()


@pytest.mark.skipif(os.name != "posix", reason="links")
def test_links_inside_the_folder_are_followed(folder: Path, tmp_path: Path) -> None:
    (folder / "files").mkdir()
    shutil.move(folder / "tokenizer.json", folder / "files" / "t")
    (folder / "tokenizer.json").symlink_to("files/t")
    out = write_out(folder, tmp_path / "out")
    assert not (out / "tokenizer.json").is_symlink()
    assert (out / "tokenizer.json").read_bytes() == (folder / "files" / "t").read_bytes()


def test_sizes_have_limits(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "LICENSE").write_text("x" * 200)
    monkeypatch.setattr(companions, "LARGEST_TEXT", 199)
    (folder / "generation_config.json").unlink()
    monkeypatch.setattr(text_files, "LARGEST_JSON", 100)
    with pytest.raises(InputError, match=r"has [\d,]+ bytes, expected: at most 1"):
        judge(folder)
    monkeypatch.undo()
    monkeypatch.setattr(companions, "LARGEST_TEXT", 199)
    (folder / "tokenizer_config.json").unlink()
    (folder / "tokenizer_config.json").write_text("{}")
    found = judge(folder)
    assert "has 200 bytes, expected: at most 199; outputs do without" in found.notes[0]
    listed = {path.name for path in companions.list_companions(folder)}
    assert "tokenizer_config.json" in listed
    assert "LICENSE" not in listed  # so that nobody computes its digest


def test_a_file_that_may_not_be_read_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbidden, open_ = {"LICENSE"}, os.open

    def refuse(name: Any, *args: Any, **kwargs: Any) -> int:
        if Path(os.fsdecode(name)).name in forbidden:
            raise PermissionError(13, "Permission denied", name)
        return open_(name, *args, **kwargs)

    (folder / "LICENSE").write_text("x")
    monkeypatch.setattr(os, "open", refuse)
    assert "LICENSE cannot be read: Permission denied" in judge(folder).notes[0]
    forbidden.add("tokenizer.json")
    with pytest.raises(InputError, match=r"tokenizer\.json cannot be read: Permission denied"):
        judge(folder)


def test_a_file_that_changes_on_the_way_is_an_error(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(companions, "KEPT", 0)
    found = judge(folder)
    edit(folder / "tokenizer.json", more=1)
    with pytest.raises(InputError, match=r"tokenizer\.json changed while the export ran"):
        found.write(tmp_path)


# ---- cards -------------------------------------------------------------------------------------

MIT = {"license": "mit"}
OTHER = {"license": "other", "license_name": "x", "license_link": "LICENSE"}
# Content, license keys, and whether a note says that the card cannot be read.
CARDS: dict[str, tuple[bytes, dict[str, Any], bool]] = {
    "usual": (b"---\nlicense: mit\ntags: 5\n---\n# Model\n", MIT, False),
    "no front matter": (b"# Model\n", {}, False),
    "a rule": (b"---\nTiny model\n---\n", {}, True),
    "empty": (b"", {}, False),
    "empty front matter": (b"---\n---\n", {}, False),
    "CRLF and BOM": (b"\xef\xbb\xbf---\r\nlicense: mit\r\n---\r\n", MIT, False),
    "not UTF-8": (b"---\nlicense: mit\n---\nMod\xe8le", MIT, False),
    "no YAML": (b"---\nlicense: apache-2.0: see LICENSE\n---\n", {}, True),
    "a list": (b"---\n- text-generation\n---\n", {}, True),
    "several": (b"---\nlicense: [mit, bsd]\n---\n", {"license": ["mit", "bsd"]}, False),
    "a number": (b"---\nlicense: 2.0\n---\n", {}, True),
    "lines": (b'---\nlicense: "a\\nb"\n---\n', {}, True),
    "no license": (b"---\nlicense:\nlicense_name: x\n---\n", {}, False),
    "other": (f"---\n{yaml.safe_dump(OTHER)}\n---\n".encode(), OTHER, False),
    "no end": (b"---\nlicense: mit\n" + b"tags: a\n" * 10_000, {}, True),
    "UTF-16": ("---\nlicense: mit\n---\n".encode("utf-16"), {}, True),
    "large body": (b"---\nlicense: mit\n---\n" + b"x" * 200_000, MIT, False),
}


@pytest.mark.parametrize("name", CARDS)
def test_a_card_costs_its_contents_at_most(folder: Path, name: str) -> None:
    content, license_keys, unreadable = CARDS[name]
    (folder / "README.md").write_bytes(content)
    found = judge(folder)
    assert found.license == license_keys
    said = ["README.md is no card that can be read (" in note for note in found.notes]
    assert said == [True] * unreadable


# ---- chat templates ----------------------------------------------------------------------------


def test_every_template_is_in_the_output(folder: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = {"default": TEMPLATE, "tool_use": "{{ tools }}" + TEMPLATE}
    tokenizer.save_pretrained(folder)
    out = write_out(folder, tmp_path / "out")
    assert (out / "additional_chat_templates" / "tool_use.jinja").is_file()
    assert load_templates(out) == load_templates(folder) == tokenizer.chat_template
    assert judge(folder).notes == ()


@pytest.mark.parametrize(
    "other", ["old", [{"name": "default", "template": "old"}, {"name": "rag", "template": "r"}]]
)
def test_of_two_templates_the_one_that_transformers_uses_stays(
    folder: Path, tmp_path: Path, other: Any
) -> None:
    edit(folder / "tokenizer_config.json", chat_template=other)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "older"}))
    out = write_out(folder, tmp_path / "out")
    assert load_templates(out) == load_templates(folder) == TEMPLATE
    assert "chat_template" not in json.loads((out / "tokenizer_config.json").read_text())
    assert not (out / "chat_template.json").exists()
    notes = " ".join(judge(folder).notes)
    assert "tokenizer_config.json is another than the one of chat_template.jinja" in notes
    assert "chat_template.json holds another chat template" in notes


def test_the_further_templates_hide_the_one_of_the_config(folder: Path, tmp_path: Path) -> None:
    edit(folder / "tokenizer_config.json", chat_template=TEMPLATE)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("rag")
    out = write_out(folder, tmp_path / "out")
    assert load_templates(out) == load_templates(folder) == {"rag": "rag"}
    assert "of additional_chat_templates, which transformers uses" in judge(folder).notes[0]


@pytest.mark.parametrize("end", ["", "\n"])
def test_equal_templates_stay_as_they_are(folder: Path, tmp_path: Path, end: str) -> None:
    edit(folder / "tokenizer_config.json", chat_template=TEMPLATE)
    (folder / "chat_template.jinja").write_text(TEMPLATE + end)
    out = write_out(folder, tmp_path / "out")
    written = (out / "tokenizer_config.json").read_bytes()
    assert written == name_class((folder / "tokenizer_config.json").read_bytes())
    assert judge(folder).notes == ()


def test_a_template_with_a_fault_is_said(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m")
    assert "the chat template has a fault: " in judge(folder).notes[0]
    (folder / "chat_template.jinja").write_text("{{ messages|nothing }}")
    assert "there is no filter or test 'nothing'" in judge(folder).notes[0]
    (folder / "chat_template.jinja").write_text("{{ 2 ** 4 ** 5 }}{{ 'x' | center(40) }}")
    assert judge(folder).notes == ()
    good = (
        "{% for m in messages %}{% generation %}{{ m }}{% endgeneration %}{% break %}{% endfor %}"
    )
    (folder / "chat_template.jinja").write_text(good)
    assert judge(folder).notes == ()


# ---- the tokenizer -----------------------------------------------------------------------------


def test_tokens_that_the_model_has_not_are_named(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<t{n}>" for n in range(7)]})
    tokenizer.save_pretrained(folder)
    (note,) = judge(folder).notes
    assert "the tokenizer has 7 tokens that the model has not (96 entries): '<t0>'" in note
    assert "'<t4>' and 2 more" in note


def test_two_readers_of_the_tokenizer_are_compared(folder: Path) -> None:
    token = {"content": "lo", "special": True, "normalized": False, "lstrip": False,
             "rstrip": False, "single_word": False}  # fmt: skip
    edit(folder / "tokenizer_config.json", added_tokens_decoder={"96": token})
    notes = " ".join(judge(folder).notes)
    assert (
        "tokenizer.json by itself, as runtimes without transformers read it, gives other" in notes
    )


def test_special_tokens_of_both_readers_are_the_same(folder: Path) -> None:
    end = {"id": "<end>", "ids": [0], "tokens": ["<end>"]}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    single = [{"SpecialToken": {"id": "<end>", "type_id": 0}}, text]
    processor = {"single": single, "pair": [text], "special_tokens": {"<end>": end}}
    edit(folder / "tokenizer.json", post_processor={"type": "TemplateProcessing", **processor})
    assert judge(folder).notes == ()


def test_other_special_tokens_are_told_from_other_ids(folder: Path) -> None:
    class Adding:
        """Puts a token in front, which tokenizer.json does not say."""

        def __init__(self) -> None:
            self.plain = AutoTokenizer.from_pretrained(folder)

        def get_added_vocab(self) -> dict[str, int]:
            return {}

        def __call__(self, text: str, add_special_tokens: bool, **_: Any) -> dict[str, list[int]]:
            ids: list[int] = self.plain(text, add_special_tokens=False)["input_ids"]
            return {"input_ids": [0] * add_special_tokens + ids}

    (said,) = compare_readers(Adding(), folder)
    assert "adds other special tokens" in said
    assert "not [0, " in said


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        (
            "truncation",
            {"direction": "Right", "max_length": 12, "strategy": "LongestFirst", "stride": 0},
            "cuts texts after 12 tokens",
        ),
        (
            "padding",
            {"strategy": {"Fixed": 99}, "direction": "Right", "pad_to_multiple_of": None,
             "pad_id": 0, "pad_type_id": 0, "pad_token": "<end>"},
            "pads texts",
        ),
    ],
)  # fmt: skip
def test_what_other_readers_do_with_length_is_said(
    folder: Path, key: str, value: Any, said: str
) -> None:
    edit(folder / "tokenizer.json", **{key: value})
    (note,) = judge(folder).notes
    assert said in note


@pytest.mark.parametrize("code", [{"AutoTokenizer": ["own.Own", None]}, ["own.Own", None]])
def test_code_of_a_tokenizer_is_never_run(folder: Path, tmp_path: Path, code: Any) -> None:
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
    edit(folder / "tokenizer_config.json", auto_map=code, tokenizer_class="Own")
    notes = judge(folder).notes
    assert "names code of its own ('own.Own'), which is never executed" in notes[0]
    assert not (tmp_path / "ran").exists()


def test_only_sentencepiece_without_its_package(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moe2edge.storage.tokenizer.find_spec", lambda _: None)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    with pytest.raises(InputError, match="pip install sentencepiece; or give tokenizer"):
        judge(folder)


def test_a_vocabulary_of_another_format_is_named(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    with pytest.raises(InputError, match=r"holds no SentencePiece model but a list of ranks"):
        judge(folder)


def test_a_damaged_sentencepiece_model_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moe2edge.storage.tokenizer.find_spec", lambda _: object())
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"nonsense")
    with pytest.raises(InputError, match=r"tokenizer\.model is no SentencePiece model") as caught:
        judge(folder)
    assert "tiktoken" not in str(caught.value)


# ---- special tokens of configs -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("pad_token_id", 96, "padding changes no logits"),
        ("eos_token_id", [0, 200], "eos_token_id in {} is 200, but"),
        ("bos_token_id", 96, "bos_token_id in {} is 96, but"),
        ("decoder_start_token_id", 500, "decoder_start_token_id in {} is 500"),
    ],
)
@pytest.mark.parametrize("place", ["config.json", "generation_config.json"])
def test_special_tokens_beyond_the_model_are_named(
    folder: Path, place: str, key: str, value: Any, said: str
) -> None:
    edit(folder / place, **{key: value})
    (note,) = judge(folder).notes
    assert said.format(place) in note
    assert "the vocabulary of the model has 96 entries" in note
