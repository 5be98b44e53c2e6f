"""Profiles of several folders in turns, bytes that a token reads, and the bound of memory."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file

from helpers import run
from moe2edge.errors import InputError, Unsupported
from moe2edge.evaluation.profile import bandwidth, measure
from moe2edge.evaluation.profile.bandwidth import choose_array_bytes, measure_bandwidth
from moe2edge.evaluation.profile.definitions import DEFINITIONS
from moe2edge.evaluation.profile.interleave import Job, Round, run_in_turns
from moe2edge.evaluation.profile.measure import profile_folders
from moe2edge.evaluation.profile.roofline import make_roofline
from moe2edge.evaluation.profile.settings import ProfileSettings
from moe2edge.evaluation.profile.subject import open_subject
from moe2edge.model.experts import Constant
from moe2edge.model.layers import MoELayer
from moe2edge.model.token_reads import count_token_reads
from moe2edge.numerics.scheme import Scheme
from moe2edge.pipeline import registry
from moe2edge.storage.checkpoint import open_checkpoint
from moe2edge.storage.manifest import write_manifest
from moe2edge.testing import Make, make_checkpoint, quantize

PROMPTS = [[1 + (7 * n + i) % 90 for i in range(16)] for n in range(3)]


# ---- turns ------------------------------------------------------------------------------------


def test_jobs_run_in_turns_forwards_and_backwards() -> None:
    ran: list[str] = []

    def add(name: str) -> int:
        ran.append(name)
        return len(ran)

    jobs = [Job(name, lambda name=name: add(name)) for name in "ABC"]  # type: ignore[misc]
    rounds = run_in_turns(jobs, 3)
    assert "".join(ran) == "ABCCBAABC"
    assert [r.order for r in rounds] == [tuple("ABC"), tuple("CBA"), tuple("ABC")]
    assert dict(rounds[1].found) == {"A": 6, "B": 5, "C": 4}
    assert list(rounds[1].found) == list("ABC")


def test_a_condition_ends_the_turns_early_and_orders_can_be_given() -> None:
    seen: list[int] = []

    def stop(done: Sequence[Round[int]]) -> bool:
        seen.append(len(done))
        return len(done) == 2

    jobs = [Job("A", lambda: 1), Job("B", lambda: 2)]
    rounds = run_in_turns(jobs, 9, order=lambda count, n: [(n + i) % count for i in range(count)],
                        stop=stop)  # fmt: skip
    assert [r.order for r in rounds] == [("A", "B"), ("B", "A")]
    assert seen == [1, 2]


@pytest.mark.parametrize("labels", ["", "AA"])
def test_jobs_need_names_of_their_own(labels: str) -> None:
    with pytest.raises(InputError, match="each job once, with a name of its own"):
        run_in_turns([Job(label, int) for label in labels], 1)


def make_reply(step_s: float, peak: int) -> dict[str, Any]:
    """Make the reply of a process: two prompts, two steps each."""
    reading = {"peak_rss": peak, "rss": peak, "rss_anon": peak - 1, "rss_file": 1}
    return {
        "import_s": 1.0, "load_s": 2.0, "dtype": "float32", "threads": 1, "note": "",
        "runs": [{"ttft_s": 0.5, "gaps_s": [step_s] * 2, "tokens": [1, 2, 3]}] * 2,
        "memory": {"method": "told", "reason": None, "phases": {"decode": reading}},
        "cache_bytes": 1000,
        "bandwidth": {"bytes_per_s": 1e9, "samples": [1e9], "threads": 1, "array_bytes": 1},
    }  # fmt: skip


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return two checkpoints of different families."""
    root = tmp_path_factory.mktemp("pair")
    return make_checkpoint(root / "a", "olmoe"), make_checkpoint(root / "b", "mixtral")


def test_ratios_are_of_the_same_round(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The machine gets slower from round to round, which ratios of one round do not see.
    steps = {"a": iter((0.1, 0.2, 0.4)), "b": iter((0.15, 0.32, 0.6))}
    order: list[str] = []

    def reply(request: dict[str, Any], _: ProfileSettings) -> dict[str, Any]:
        order.append(Path(request["folder"]).name)
        return make_reply(next(steps[order[-1]]), 100 if order[-1] == "a" else 150)

    monkeypatch.setattr(measure, "run_child", reply)
    found = profile_folders(pair, prompts=PROMPTS, settings=ProfileSettings(gen_tokens=3))
    assert "".join(order) == "abbaab"
    ratios = found.compute_ratios(1)
    assert ratios["ms_per_token"].samples == pytest.approx((1.5, 1.6, 1.5))
    assert ratios["ms_per_token"].median == pytest.approx(1.5)
    assert ratios["decode_tok_s"].samples == pytest.approx((1 / 1.5, 1 / 1.6, 1 / 1.5))
    assert ratios["peak_rss_decode"].samples == (1.5,) * 3
    shown = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert shown["kind"] == "moe2edge.profiles"
    assert shown["labels"] == [str(folder) for folder in pair]
    assert shown["ratios"][str(pair[0])]["ttft_ms"]["median"] == 1
    assert [p["artifact"]["path"] for p in shown["profiles"]] == shown["labels"]


def test_one_folder_can_be_measured_against_itself(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "run_child", lambda *_: make_reply(0.1, 100))
    found = profile_folders(
        [pair[0]] * 2, prompts=PROMPTS, settings=ProfileSettings(gen_tokens=3, repeats=1)
    )
    assert found.labels == (str(pair[0]), f"{pair[0]} (2)")
    assert found.compute_ratios(1)["load_ms"].samples == (1,)


def test_the_command_compares_folders(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "cut_prompts", lambda *_: PROMPTS)
    tokenizer = Mock(return_value={"input_ids": [1]})
    monkeypatch.setattr(measure, "load_tokenizer", lambda _: tokenizer)

    def reply(request: dict[str, Any], _: ProfileSettings) -> dict[str, Any]:
        return make_reply(0.1 if request["folder"].endswith("a") else 0.125, 100 << 20)

    monkeypatch.setattr(measure, "run_child", reply)
    options = ("--prompt-tokens", 16, "--gen-tokens", 3, "--no-explain")
    result = run("profile", *pair, *options)
    assert result.exit_code == 0, result.output
    assert "125.0  x1.25" in result.stdout
    assert "rounds: A B, B A, A B" in result.stdout
    found = json.loads(run("profile", *pair, *options, "--json").stdout)
    first, second = map(str, pair)
    assert found["rounds"] == [[first, second], [second, first], [first, second]]
    assert found["profiles"][0]["kind"] == "moe2edge.profile"


# ---- bytes that a token reads -------------------------------------------------------------------


def test_bytes_of_a_token_are_those_of_the_files(tiny: Make) -> None:
    folder = tiny("qwen2_moe")
    sizes = {n: t.nbytes for n, t in load_file(folder / "model.safetensors").items()}
    config = json.loads((folder / "config.json").read_text())
    chosen = config["num_experts_per_tok"], config["num_experts"]

    def add(*parts: str) -> int:
        return sum(size for name, size in sizes.items() if any(part in name for part in parts))

    found = count_token_reads(open_checkpoint(folder).model)
    assert found["experts"] == add(".experts.") * chosen[0] // chosen[1]
    assert found["attention"] == add("self_attn")
    assert found["router"] == add("mlp.gate.")
    assert found["mlp"] == add("shared_expert")
    assert found["norm"] == add("norm")
    assert found["head"] == add("lm_head")
    assert found["embedding"] == add("embed_tokens") // config["vocab_size"]
    assert found["other"] == 0


def test_a_tied_head_is_read_whole_and_its_row_too(tiny: Make) -> None:
    found = count_token_reads(open_checkpoint(tiny("olmoe", tie_word_embeddings=True)).model)
    assert found["head"] == 96 * 64 * 4
    assert found["embedding"] == 64 * 4


def test_rows_without_an_expert_cost_what_they_hold(tiny: Make) -> None:
    model = open_checkpoint(tiny("olmoe")).model
    block = model.blocks[0]
    assert isinstance(block.mlp, MoELayer)
    constant = replace(block.mlp.router.weight, shape=(64,))
    rows = (*block.mlp.rows[:1], *(Constant(n, constant) for n in range(1, 6)))
    changed = model.replace_block(
        replace(block, mlp=replace(block.mlp, rows=rows, experts=block.mlp.experts[:1]))
    )
    expert = 3 * 32 * 64 * 4
    before, after = (count_token_reads(m)["experts"] for m in (model, changed))
    assert before - after == expert - 64 * 4


@pytest.mark.parametrize("name", ["gptq", "onnx", "compressed-tensors"])
def test_every_target_outlines_its_folders(name: str, tiny: Make, tmp_path: Path) -> None:
    model = quantize(open_checkpoint(tiny("olmoe", dtype="bfloat16")).model, Scheme(group_size=32))
    target = registry.find_target(name)
    target.write(model, tmp_path)
    write_manifest(tmp_path, name)
    outline = target.outline(tmp_path)
    files = open_subject(tmp_path).sizes["weights"]
    # Rotary tables, alignment, headers and indexes are no weights.
    assert 0.7 * files < outline.nbytes <= files
    reads, reason = open_subject(tmp_path).count_reads()
    assert reason is None
    assert reads is not None
    expert = 3 * 32 * 64
    assert reads["experts"] == 3 * 2 * (expert // 2 + expert // 32 * 2)
    # Scales of MatMulNBits are float32, those of the experts are not.
    attention = 2 * 64 * 64 + 2 * 32 * 64
    norms = (64 + 32) * 2
    scale = 4 if name == "onnx" else 2
    assert reads["attention"] == 3 * (attention // 2 + attention // 32 * scale + norms)


# ---- the bound ----------------------------------------------------------------------------------


def test_the_bound_by_hand() -> None:
    work = {"prompt_tokens": 10, "gen_tokens": 3}
    found = make_roofline(({"experts": 6000, "head": 3000}, None), [make_reply(0.1, 1)], 25.0, work)
    assert found.bytes_per_token == 10_000
    assert found.ceiling_tok_s == pytest.approx(1e9 / 10_000)
    assert found.reached == pytest.approx(0.025)
    shown = found.to_json()
    assert shown["achieved_bytes_s"] == 250_000
    assert shown["bytes_per_token"]["kinds"] == {"experts": 6000, "head": 3000, "kv_cache": 1000}
    assert shown["bytes_per_token"]["context"] == 12
    assert shown["reason"] is None


def test_what_is_not_known_is_null_with_a_reason() -> None:
    reply = make_reply(0.1, 1) | {"cache_bytes": None, "bandwidth": None}
    work = {"prompt_tokens": 10, "gen_tokens": 1}
    shown = make_roofline((None, "no such family"), [reply], None, work).to_json()
    assert shown["bytes_per_token"]["total"] is None
    assert (shown["ceiling_tok_s"], shown["reached_pct"]) == (None, None)
    for part in ("no such family", "cache", "bandwidth", "at least two"):
        assert part in shown["reason"]


def test_bandwidth_is_that_of_an_array_larger_than_the_caches(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "index0").mkdir()
    (tmp_path / "index0" / "size").write_text("64K\n")
    (tmp_path / "index3").mkdir()
    (tmp_path / "index3" / "size").write_text("2M\n")
    monkeypatch.setattr(bandwidth, "CACHES", tmp_path)
    assert bandwidth.find_cache_bytes() == 2 << 20
    monkeypatch.setattr(bandwidth, "_LEAST", 1 << 20)
    ticks = iter(range(1000))
    before = torch.get_num_threads()
    found = measure_bandwidth(1, clock=lambda: next(ticks) / 4)
    assert torch.get_num_threads() == before
    assert (found.threads, found.array_bytes) == (1, 8 << 20)
    assert found.bytes_per_s == (8 << 20) * 4
    assert choose_array_bytes(1 << 30, 64 << 30) == 1 << 30


# ---- runtimes that are missing ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "module", "remedy"),
    [
        ("onnx", "onnxruntime", r"pip install 'onnxruntime>=1\.31'"),
        ("gguf", "xllamacpp", r"pip install 'xllamacpp>="),
        ("mlx", "mlx.core", r"pip install .*mlx-lm"),
    ],
)
def test_a_missing_runtime_is_one_line_before_anything_is_measured(
    name: str, module: str, remedy: str, tmp_path: Path, pair: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from moe2edge.targets import _gguf_library, _gguf_runtime

    def missing() -> str:
        raise _gguf_library.LibraryError(f"not installed: {_gguf_library.INSTALL_LLAMA}")

    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(_gguf_runtime, "find_version", missing)
    (tmp_path / "weights.data").write_bytes(b"0")
    write_manifest(tmp_path, name)
    monkeypatch.setattr(measure, "run_child", lambda *_: pytest.fail("a process was started"))
    with pytest.raises(Unsupported, match=remedy) as caught:
        profile_folders([pair[0], tmp_path], prompts=PROMPTS)
    assert "\n" not in str(caught.value)
    result = run("evaluate", tmp_path, "--reference", pair[0])
    assert result.exit_code == 6
    assert "pip install" in result.stderr


def test_the_page_defines_every_name() -> None:
    page = (Path(__file__).parents[1] / "docs" / "profile.md").read_text("utf-8")
    for name, meaning in DEFINITIONS.items():
        assert f"| `{name}` | {meaning} |" in page


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_a_torch_cache_is_counted(family: str, tiny: Make) -> None:
    from moe2edge.runtime.torch_runtime import open_source

    runtime = open_source(tiny(family))
    runtime.start(list(range(1, 9)))
    runtime.step(3)
    size = 32 if family == "qwen3_moe" else 16
    assert runtime.cache_nbytes == 9 * 3 * 2 * 2 * size * 2
