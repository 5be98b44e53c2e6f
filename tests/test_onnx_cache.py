"""The cache in int8 of the onnx target: its scales, the folder, and who runs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from helpers import SMALL, export, run, write_text
from moe2edge.errors import InputError, VerificationFailed
from moe2edge.model.model import Model
from moe2edge.numerics.scheme import Scheme
from moe2edge.pipeline.registry import make_target
from moe2edge.runtime.waiting import ONNX_KEY, ONNX_MOMENT_US
from moe2edge.storage.checkpoint import open_checkpoint
from moe2edge.targets import _onnx_runtime
from moe2edge.targets._onnx_cache import measure_pairs
from moe2edge.targets._onnx_runtime import OnnxRuntime
from moe2edge.targets._onnx_storage import CACHE_SCALES
from moe2edge.targets.onnx import Onnx
from moe2edge.testing import Make, quantize

INT8 = Onnx(kv_cache="int8")
TEXTS = torch.randint(0, 96, (60, 40), generator=torch.Generator().manual_seed(3)).tolist()
IDS = torch.randint(0, 96, (1, 60), generator=torch.Generator().manual_seed(5))


def opened(tiny: Make, family: str, **changes: Any) -> Model:
    return open_checkpoint(str(tiny(family, initializer_range=0.05, **changes))).model


def written(model: Model, folder: Path) -> Path:
    INT8.write(model, folder)
    assert list(INT8.calibrate(folder, TEXTS)) == ["model.onnx"]
    return folder


FORMS: list[tuple[str, dict[str, Any]]] = [
    ("mixtral", {"sliding_window": 12}),
    ("qwen2_moe", {}),
    ("qwen3_moe", {"head_dim": 48}),
    ("olmoe", {"clip_qkv": 0.7}),
]


@pytest.mark.parametrize(("family", "changes"), FORMS, ids=lambda value: str(value))
def test_int8_keys_and_values_stay_near(
    family: str, changes: dict[str, Any], tiny: Make, tmp_path: Path, monkeypatch: Any
) -> None:
    """At once, in chunks and step by step, the same within the rounding of sums."""
    monkeypatch.setattr(_onnx_runtime, "CHUNK", 7)
    monkeypatch.setattr(_onnx_runtime, "SMALLEST_CACHE", 4)
    folder = written(opened(tiny, family, **changes), tmp_path)
    runtime, whole = INT8.reopen(folder), INT8.with_whole_cache(folder)
    assert isinstance(runtime, OnnxRuntime)
    assert whole is not None
    expected, found = whole.logits(IDS)[0], runtime.logits(IDS)[0]
    error = ((found - expected).norm(dim=-1) / expected.norm(dim=-1)).median()
    assert 1e-4 < error < 0.02
    steps = [runtime.start(IDS[0, :30].tolist())]
    steps += [runtime.step(token) for token in IDS[0, 30:].tolist()]
    assert {cache.dtype for cache in runtime.cached.values()} == {np.dtype(np.int8)}
    assert (torch.stack(steps) - found[29:]).abs().max() < 1e-4
    # The check with float32 activations is one without rounding: cached keys included.
    assert (INT8.reopen(folder, exact=True).logits(IDS)[0] - expected).abs().max() < 1e-4


def test_scales_are_those_of_the_longest_pairs_and_largest_values(
    tiny: Make, tmp_path: Path
) -> None:
    """Against keys and values that the graph with a float32 cache returns as its outputs."""
    model = quantize(opened(tiny, "qwen3_moe"), Scheme(group_size=32))
    Onnx().write(model, tmp_path)
    session = _onnx_runtime.open_session(tmp_path)
    moment = session.get_session_options().get_session_config_entry(ONNX_KEY)
    assert moment == ONNX_MOMENT_US  # threads that wait for each other soon sleep
    names = [output.name for output in session.get_outputs()]
    largest: dict[str, Any] = {}
    for text in TEXTS:
        feeds = {"input_ids": np.array([text]), "attention_mask": np.ones((1, len(text)), np.int64)}
        for value in session.get_inputs()[2:]:
            feeds[value.name] = np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
        for name, numbers in zip(names, session.run(None, feeds), strict=True):
            largest.setdefault(name, []).append(numbers)
    graph = onnx.load(written(model, tmp_path) / "model.onnx", load_external_data=False).graph
    scales = {proto.name: proto for proto in graph.initializer}
    for index in range(len(model.blocks)):
        for part in ("key", "value"):
            numbers = np.concatenate(largest[f"present.{index}.{part}"], axis=2)[0]
            heads, _, size = numbers.shape
            for head in range(heads):
                for channel in range(size):
                    column = numbers[head, :, channel]
                    if part == "key":
                        other = (channel + size // 2) % size
                        column = np.sqrt(column**2 + numbers[head, :, other] ** 2)
                    found = numpy_helper.to_array(
                        scales[CACHE_SCALES.format(index=index, part=part[0])]
                    )[0, head, 0, channel]
                    assert found == pytest.approx(np.abs(column).max() / 127, rel=1e-3)


def test_no_position_turns_keys_out_of_their_range() -> None:
    keys = np.random.default_rng(0).standard_normal((2, 20, 8)).astype(np.float32)
    pairs = measure_pairs(keys)
    for angle in np.linspace(0, 6, 40):
        first, second = np.split(keys, 2, axis=-1)
        turned = np.concatenate(
            [
                first * np.cos(angle) - second * np.sin(angle),
                second * np.cos(angle) + first * np.sin(angle),
            ],
            axis=-1,
        )
        assert (np.abs(turned).max(1) <= pairs * (1 + 1e-6)).all()


def test_a_graph_without_scales_or_with_another_cache_is_found(tiny: Make, tmp_path: Path) -> None:
    INT8.write(opened(tiny, "olmoe"), tmp_path)
    with pytest.raises(VerificationFailed, match=r"layers\.0\.attn\.k_scale .* were measured"):
        INT8.check_derived(tmp_path)
    INT8.calibrate(tmp_path, TEXTS)
    INT8.check_derived(tmp_path)
    with pytest.raises(VerificationFailed, match=r"'k_quant_type': 'PER_CHANNEL'.* asks for"):
        Onnx().check_derived(tmp_path)
    model = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    name = CACHE_SCALES.format(index=1, part="v")
    scales = next(proto for proto in model.graph.initializer if proto.name == name)
    numbers = numpy_helper.to_array(scales).copy()
    for value in (0.0, np.nan, -1.0):
        numbers[0, 0, 0, 3] = value
        scales.raw_data = numbers.tobytes()
        (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
        with pytest.raises(VerificationFailed, match=rf"{name}.*export it again"):
            INT8.check_derived(tmp_path)


def test_unknown_caches_are_refused() -> None:
    with pytest.raises(InputError, match="onnx:kv_cache is 'int4', expected: 'float32' or 'int8'"):
        make_target("onnx", {"kv_cache": "int4"})


@pytest.fixture(scope="module")
def exported(tiny: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export with a pass that needs no calibration text, so that the target alone reads it."""
    out = tmp_path_factory.mktemp("cache") / "out"
    text = out.parent / "text.txt"
    write_text(text)
    model = tiny("qwen2_moe", initializer_range=0.05)
    code, said, _ = export(
        model, out, [{"rtn": {"group_size": 32}}], "onnx:kv_cache=int8", "--calib", text, "--eval",
        text, *SMALL,
    )  # fmt: skip
    assert code == 0, said
    return out


def test_an_export_says_what_the_cache_costs_and_verifies(exported: Path) -> None:
    report = json.loads((exported / "report.json").read_text())
    assert report["calibration"]["text"].endswith("text.txt")
    parity = report["results"][0]["parity"]
    assert 0 < parity["whole_cache"] < 0.05
    programs = {each["program"]: each["verdict"] for each in report["loaders"]["onnx"]}
    assert (programs["onnxruntime"], programs["onnxruntime-genai"]) == ("yes", "yes")
    card = (exported / "README.md").read_text()
    assert f"{parity['whole_cache']:.2%} without rounding them" in card
    assert "kv_cache int8" in card
    done = run("verify", exported)
    assert done.exit_code == 0, done.output
    assert "relative error without rounding keys and values" in done.output


def test_other_commands_run_such_a_folder(exported: Path) -> None:
    text = ("--text", exported.parent / "text.txt", "--samples", "2", "--length", "32")
    for command in (("generate", exported, "abc", "-n", "5"), ("evaluate", exported, *text)):
        done = run(*command)
        assert done.exit_code == 0, done.output
