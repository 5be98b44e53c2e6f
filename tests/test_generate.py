"""Generation in any runtime, prompts, and text that streams without broken characters."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

from helpers import run
from moe2edge.errors import InputError, Moe2EdgeError
from moe2edge.pipeline import registry
from moe2edge.runtime.generation import (
    choose_token,
    count_remaining,
    encode_prompt,
    generate,
    stream_text,
)
from moe2edge.runtime.torch_runtime import TorchRuntime, open_source
from moe2edge.storage.manifest import write_manifest
from moe2edge.storage.tokenizer import read_context_length, read_stop_ids
from moe2edge.testing import make_checkpoint, make_tokenizer


class Counting:
    """After token n comes n + 1, most likely; ``calls`` tells what was asked of it."""

    dtype = "float32"
    threads = 1

    def __init__(self, vocabulary: int = 10) -> None:
        self.vocabulary = vocabulary
        self.calls: list[object] = []

    def _after(self, token: int) -> Tensor:
        return torch.eye(self.vocabulary)[(token + 1) % self.vocabulary] * 4

    def logits(self, ids: Tensor) -> Tensor:
        return torch.stack([torch.stack([self._after(int(t)) for t in row]) for row in ids])

    def start(self, ids: Sequence[int]) -> Tensor:
        self.calls.append(list(ids))
        return self._after(ids[-1])

    def step(self, token: int) -> Tensor:
        self.calls.append(token)
        return self._after(token)


class Broken(Counting):
    """Its second step gives logits that are not numbers."""

    def step(self, token: int) -> Tensor:
        return super().step(token) * float("nan" if len(self.calls) > 2 else 1)


def test_greedy_decoding_continues_from_the_last_token() -> None:
    runtime = Counting()
    assert list(generate(runtime, [1, 5], max_tokens=3)) == [6, 7, 8]
    assert runtime.calls == [[1, 5], 6, 7]  # no step for a token that nobody asks for


def test_an_end_token_ends_the_text_and_is_not_part_of_it() -> None:
    assert list(generate(Counting(), [1], max_tokens=9, stop=frozenset({4, 6}))) == [2, 3]


def test_tokens_come_one_by_one() -> None:
    runtime = Counting()
    tokens = generate(runtime, [1], max_tokens=5)
    assert next(tokens) == 2
    assert runtime.calls == [[1]]


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_greedy_equals_transformers_own_generate(tmp_path: Path, family: str) -> None:
    changes: dict[str, Any] = {"sliding_window": 12} if family == "mixtral" else {}
    make_checkpoint(tmp_path / "m", family, eos_token_id=None, pad_token_id=None, **changes)
    runtime = open_source(tmp_path / "m", dtype="float32")
    prompt = list(range(5, 25))
    theirs = runtime.model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=30,
        do_sample=False,
    )[0, len(prompt) :]
    ours = list(generate(runtime, prompt, max_tokens=30))
    assert ours == theirs.tolist()
    assert len(set(ours)) > 5  # not one token over and over, which any mistake could give


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "qwen2_moe", "qwen3_moe"])
def test_cached_steps_equal_a_whole_run(tmp_path: Path, family: str) -> None:
    changes: dict[str, Any] = {"sliding_window": 8} if family == "mixtral" else {}
    make_checkpoint(tmp_path / "m", family, **changes)
    runtime = open_source(tmp_path / "m", dtype="float32")
    ids = list(range(3, 23))
    whole = runtime.logits(torch.tensor([ids, ids[::-1]]))[0]
    steps = [runtime.start(ids[:12]), *(runtime.step(token) for token in ids[12:])]
    assert whole.dtype == steps[-1].dtype == torch.float32
    torch.testing.assert_close(torch.stack(steps), whole[11:], atol=1e-4, rtol=0)
    again = runtime.start(ids)  # a new sequence forgets the old one
    torch.testing.assert_close(again, whole[-1], atol=1e-4, rtol=0)


def test_a_source_runs_in_the_dtype_asked_for(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "m", "olmoe")
    runtime = open_source(tmp_path / "m")
    assert runtime.model.dtype == torch.bfloat16
    assert runtime.start([1, 2]).dtype == torch.float32


def test_a_folder_that_transformers_cannot_load_gives_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "olmoe"}', "utf-8")
    with pytest.raises(InputError, match="transformers cannot load") as caught:
        open_source(tmp_path)
    assert "\n" not in str(caught.value)


def test_step_before_start() -> None:
    with pytest.raises(Moe2EdgeError, match=r"step\(\) came before start\(\)"):
        TorchRuntime(torch.nn.Identity()).step(1)


def sample(seed: int, **settings: Any) -> list[int]:
    return list(generate(Counting(), [1], max_tokens=40, temperature=2.0, seed=seed, **settings))


def test_sampling_is_the_same_for_a_seed_and_leaves_torch_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    first = sample(1)
    torch.testing.assert_close(torch.rand(1), expected, atol=0, rtol=0)
    assert sample(1) == first
    assert sample(2) != first
    assert sample(1, top_p=0.5) != first


def draw(logits: Tensor, n: int = 10_000, **how: Any) -> Counter[int]:
    generator = torch.Generator().manual_seed(0)
    settings = {"temperature": 1.0, "top_p": 1.0, "top_k": 0} | how
    return Counter(choose_token(logits, **settings, generator=generator) for _ in range(n))


def test_samples_follow_the_probabilities() -> None:
    chances = torch.tensor([0.1, 0.5, 0.15, 0.25])
    found = draw(chances.log())
    assert [found[i] / 10_000 for i in range(4)] == pytest.approx(chances.tolist(), abs=0.02)
    squared = chances.square() / chances.square().sum()
    found = draw(chances.log(), temperature=0.5)
    assert [found[i] / 10_000 for i in range(4)] == pytest.approx(squared.tolist(), abs=0.02)


@pytest.mark.parametrize(
    ("how", "kept"),
    [
        ({"top_k": 2}, {1, 3}),
        ({"top_k": 99}, {0, 1, 2, 3}),
        ({"top_p": 0.4}, {1}),  # the likeliest always stays
        ({"top_p": 0.6}, {1, 3}),  # the smallest set that reaches 0.6
        ({"top_p": 0.8}, {1, 2, 3}),
        ({"top_p": 0.6, "top_k": 1}, {1}),
        ({"top_p": 0.9, "top_k": 2}, {1, 3}),
    ],
)
def test_only_the_likeliest_are_drawn(how: dict[str, Any], kept: set[int]) -> None:
    assert set(draw(torch.tensor([0.1, 0.5, 0.15, 0.25]).log(), n=500, **how)) == kept


def test_tokens_ruled_out_by_the_model_are_never_drawn() -> None:
    assert set(draw(torch.tensor([0.0, -torch.inf, 1.0]), n=500)) == {0, 2}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_k": -1}, "top_k is -1"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 1 << 64}, "seed is 18446744073709551616"),
    ],
)
def test_settings_are_checked_before_anything_runs(settings: dict[str, Any], message: str) -> None:
    runtime = Counting()
    with pytest.raises(InputError, match=message):
        generate(runtime, [1, 2], **{"max_tokens": 4, **settings})
    assert not runtime.calls


def test_a_prompt_without_tokens() -> None:
    with pytest.raises(InputError, match="the prompt has no tokens"):
        generate(Counting(), [], max_tokens=1)


def test_a_prompt_computes_no_more_logits_than_those_after_it(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "m", "olmoe")
    runtime = open_source(tmp_path / "m")
    shapes = []
    runtime.model.lm_head.register_forward_hook(lambda *call: shapes.append(call[-1].shape))
    assert runtime.start(list(range(40))).shape == (96,)
    assert shapes == [(1, 1, 96)]
    with pytest.raises(InputError, match="at least one token"):
        runtime.start([])


def test_room_behind_a_prompt() -> None:
    assert [
        count_remaining(5, 4, None),
        count_remaining(5, 4, 9),
        count_remaining(5, 4, 8),
        count_remaining(5, 4, 6),
    ] == [4, 4, 3, 1]
    with pytest.raises(InputError, match="has 5 tokens, but the context of the model is 5"):
        count_remaining(5, 4, 5)


@pytest.fixture(params=["hf", "gptq", "onnx"])
def opened(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Path, list[Counting]]]:
    """Return a folder whose model holds 8 tokens and counts, and what was opened of it."""
    make_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 8, "eos_token_id": 0}')
    write_manifest(tmp_path, request.param)
    made: list[Counting] = []

    def reopen(*_: object, **__: object) -> Counting:
        made.append(Counting(96))
        return made[-1]

    monkeypatch.setattr(type(registry.find_target(request.param)), "reopen", reopen)
    verbosity = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    yield tmp_path, made
    logging.set_verbosity(verbosity)
    if bars:
        logging.enable_progress_bar()


def command(folder: Path, *arguments: str) -> Any:
    return run("generate", str(folder), *arguments)


@pytest.mark.parametrize(
    ("asked", "made", "note"),
    [
        (("-n", "3"), "def", ""),
        (("-n", "5"), "defgh", ""),
        (
            (),
            "defgh",
            "note: generating at most 5 tokens instead of 64: the prompt takes 3 of the 8 ",
        ),
        (("-n", "6"), "defgh", "note: generating at most 5 tokens instead of 6: "),
    ],
)
def test_the_command_goes_on_up_to_the_last_position(
    opened: tuple[Path, list[Counting]], asked: tuple[str, ...], made: str, note: str
) -> None:
    result = command(opened[0], "abc", *asked)
    # The tokenizer writes a space between tokens.
    assert (result.exit_code, result.stdout.replace(" ", "")) == (0, f"abc{made}\n")
    assert result.stderr.startswith(note)
    assert result.stderr.count("\n") == bool(note)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("abcdefgh",), "the prompt has 8 tokens, but the context of the model is 8"),
        (("",), "the prompt has no tokens"),
        (("abc", "-n", "0"), "max_tokens is 0"),
        (("abc", "--top-p", "2"), "top_p is 2"),
        (("abc", "--chat"), "no chat template"),
    ],
)
def test_the_command_refuses_before_it_loads_the_model(
    opened: tuple[Path, list[Counting]], arguments: tuple[str, ...], message: str
) -> None:
    result = command(opened[0], *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert opened[1] == []


def test_settings_are_refused_before_anything_is_imported(tmp_path: Path) -> None:
    write_manifest(tmp_path, "hf")
    code = (
        "import sys; from moe2edge.cli.main import main\n"
        "try: main()\n"
        "finally: print({'torch', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "generate", str(tmp_path), "a", "-n", "0"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "set()\n")
    assert done.stderr == "error: max_tokens is 0; give 1 or more\n"


def test_logits_that_are_not_numbers_are_an_error() -> None:
    tokens = generate(Broken(), [1, 2], max_tokens=9)
    assert [next(tokens), next(tokens)] == [3, 4]
    with pytest.raises(Moe2EdgeError, match="after 4 tokens are not numbers"):
        next(tokens)


# ---- text -----------------------------------------------------------------------------------


def bytes_tokenizer() -> Any:
    """One token per byte, as in byte-level BPE without merges, and one special token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "a"), ("Ã", "¤")]  # " a" and "ä" are single tokens as well
    words = [*alphabet, *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE({word: n for n, word in enumerate(words)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def sentence_tokenizer() -> Any:
    """Words with bytes as a fall-back and a first space that is dropped, as in Llama's."""
    words = ["<unk>", *(f"<0x{n:02X}>" for n in range(256)), "▁a", "b", "▁", "▁▁", "ä", ",", "c▁"]
    tokenizer = Tokenizer(models.BPE({w: n for n, w in enumerate(words)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def word_tokenizer() -> Any:
    """Word pieces, as in BERT's: a space goes before every token that does not begin with ##."""
    words = {w: n for n, w in enumerate(["[UNK]", "a", "##b", "c", ".", ",", "'", "s", "n't"])}
    tokenizer = Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


TEXTS = ["", "plain", "Grüße, 你好! 🎉👩‍👩‍👧 ä a", "🎉", "a\ufffdb", "\ufffd", "  a  \n\n a\t"]


@pytest.mark.parametrize("text", TEXTS)
def test_text_streams_in_whole_characters(text: str) -> None:
    tokenizer = bytes_tokenizer()
    ids = tokenizer(text)["input_ids"]
    pieces = list(stream_text(tokenizer, ids))
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert len(pieces) >= len(text) - text.count("ä") - text.count(" a")
        assert not any("\ufffd" in piece for piece in pieces)


def test_text_comes_as_soon_as_a_character_is_whole() -> None:
    tokenizer = bytes_tokenizer()
    fed: list[int] = []

    def feed() -> Iterator[int]:
        for token in tokenizer("a€b")["input_ids"]:
            fed.append(token)
            yield token

    seen = [(piece, len(fed)) for piece in stream_text(tokenizer, feed())]
    assert seen == [("a", 1), ("€", 4), ("b", 5)]


def test_text_that_ends_within_a_character_is_flushed() -> None:
    tokenizer = bytes_tokenizer()
    ids = tokenizer("a🎉")["input_ids"][:-1]
    assert list(stream_text(tokenizer, ids)) == ["a", tokenizer.decode(ids)[1:]]


@pytest.mark.parametrize("make", [bytes_tokenizer, sentence_tokenizer, word_tokenizer])
def test_pieces_join_to_the_decoded_text_of_any_tokens(make: Callable[[], Any]) -> None:
    tokenizer = make()
    chooser = random.Random(0)
    common = list(range(len(tokenizer)))[-8:]
    for _ in range(300):
        pool = [chooser.randrange(len(tokenizer)) for _ in range(4)] + common
        ids = [chooser.choice(pool) for _ in range(chooser.randrange(24))]
        expected = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        assert "".join(stream_text(tokenizer, ids)) == expected, ids


# ---- prompts and end tokens -------------------------------------------------------------------

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def chatty() -> Any:
    """Return a tokenizer with a first token, which it adds itself, and a chat template."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = bytes_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def test_the_chat_template_is_used_where_there_is_one(chatty: Any) -> None:
    for chat in (None, True):
        ids = encode_prompt(chatty, "hi", chat)
        assert chatty.decode(ids) == "<bos><user>hi<assistant>"
        assert ids.count(chatty.bos_token_id) == 1
    assert chatty.decode(encode_prompt(chatty, "hi", chat=False)) == "<bos>hi"


def test_the_first_token_comes_once_also_when_the_user_writes_it(chatty: Any) -> None:
    assert chatty.decode(encode_prompt(chatty, "<bos>hi", chat=False)) == "<bos>hi"


def test_no_chat_template() -> None:
    tokenizer = bytes_tokenizer()
    assert tokenizer.decode(encode_prompt(tokenizer, "hi")) == "hi"
    with pytest.raises(InputError, match="the model has no chat template"):
        encode_prompt(tokenizer, "hi", chat=True)


@pytest.mark.parametrize("template", ["{{ raise_exception('no users') }}", "{% if %}", "{{ 1/0 }}"])
def test_a_template_that_fails_is_one_line(chatty: Any, template: str) -> None:
    chatty.chat_template = template
    with pytest.raises(InputError, match="chat template cannot be filled in") as caught:
        encode_prompt(chatty, "hi")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        (None, {}, set()),
        (None, {"eos_token_id": 3}, {3}),
        (None, {"eos_token_id": [3, 4]}, {3, 4}),
        ({"eos_token_id": [7, 8]}, {"eos_token_id": 3}, {7, 8}),
        ({"eos_token_id": 0}, {"eos_token_id": 3}, {0}),
        ({"eos_token_id": None}, {"eos_token_id": 3}, {3}),
        ({}, {"eos_token_id": 3}, {3}),
        ({}, {"eos_token_id": None}, set()),
    ],
)
def test_end_tokens(tmp_path: Path, generation: Any, config: Any, expected: set[int]) -> None:
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation), "utf-8")
    assert read_stop_ids(tmp_path, config) == expected
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    assert read_stop_ids(tmp_path) == expected


@pytest.mark.parametrize("value", ["</s>", [1, "2"], -1, True, {}])
def test_invalid_end_tokens(tmp_path: Path, value: Any) -> None:
    with pytest.raises(InputError, match="not a token or a list of tokens"):
        read_stop_ids(tmp_path, {"eos_token_id": value})


def test_end_tokens_of_a_damaged_file(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text("{", "utf-8")
    with pytest.raises(InputError, match="is damaged"):
        read_stop_ids(tmp_path, {})


def test_context_length() -> None:
    assert read_context_length({"max_position_embeddings": 128}) == 128
    assert read_context_length({}) is None
