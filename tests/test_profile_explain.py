"""What is measured apart from all that is timed, quality, and the published form of documents."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from helpers import run, write_text
from moe2edge.calibration.sources import TextSource
from moe2edge.errors import InputError
from moe2edge.evaluation.profile import energy, measure, quality, sensors, timeline
from moe2edge.evaluation.profile.document import (
    ProfileSetDocument,
    build_profile_schema,
    parse_profile,
)
from moe2edge.evaluation.profile.energy import EnergyMeter
from moe2edge.evaluation.profile.expert_use import describe_expert_use, list_expert_choices
from moe2edge.evaluation.profile.explain import NO_PROVIDERS, describe_fallbacks, explain_once
from moe2edge.evaluation.profile.page_cache import count_resident_bytes, evict_files, warm_files
from moe2edge.evaluation.profile.quality import (
    NO_ERRORS,
    ONE_SAMPLE,
    find_source,
    read_quality,
)
from moe2edge.evaluation.profile.sensors import compare_sensors, read_sensors
from moe2edge.evaluation.profile.timeline import Timeline
from moe2edge.numerics.metrics import Quality
from moe2edge.numerics.scheme import Scheme
from moe2edge.pipeline import registry
from moe2edge.progress import QUIET
from moe2edge.runtime.operator_times import KINDS, PhaseTimes, classify_place
from moe2edge.runtime.router_choices import RouterChoices
from moe2edge.storage.checkpoint import open_checkpoint
from moe2edge.storage.manifest import write_manifest
from moe2edge.targets._onnx_profiler import find_fallbacks
from moe2edge.testing import Make, make_tokenizer, quantize

IDS = [1 + (7 * i) % 90 for i in range(24)]


@pytest.fixture(scope="module")
def outputs(tiny: Make, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a folder of ONNX and of GPTQ with the same integers."""
    root = tmp_path_factory.mktemp("explained")
    model = quantize(open_checkpoint(tiny("olmoe", dtype="bfloat16")).model, Scheme(group_size=32))
    for name in ("onnx", "gptq"):
        (root / name).mkdir()
        registry.find_target(name).write(model, root / name)
        write_manifest(root / name, name)
    return {name: root / name for name in ("onnx", "gptq")}


def make_explain_request(folder: Path, target: str) -> dict[str, Any]:
    return {"folder": str(folder), "target": target, "prompts": [IDS], "gen_tokens": 5}


@pytest.fixture(scope="module")
def explained(outputs: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """Return what explains each of them."""
    return {
        name: explain_once(
            make_explain_request(folder, name),
            import_libraries=lambda: None,
            open_runtime=lambda name=name, folder=folder: registry.find_target(name).reopen(folder),  # type: ignore[misc]
        )
        for name, folder in outputs.items()
    }


def test_a_load_is_cold_and_memory_is_sampled_by_phase(
    explained: dict[str, dict[str, Any]],
) -> None:
    for found in explained.values():
        assert found["cold_load"]["seconds"] > 0
        assert found["cold_load"]["major_faults"] >= 0
        assert found["cold_load"]["state"] in ("evicted", "partly")
        samples = found["timeline"]["samples"]
        assert found["timeline"]["reason"] is None
        times = [sample["t_s"] for sample in samples]
        assert times == sorted(times)
        order = ["import", "load", "prefill", "decode", "after"]
        assert list(dict.fromkeys(sample["phase"] for sample in samples)) == order
        for sample in samples:
            assert sample["rss"] == sample["rss_anon"] + sample["rss_file"] > 50 << 20


def test_experts_are_those_that_the_routers_choose(
    explained: dict[str, dict[str, Any]], outputs: dict[str, Path]
) -> None:
    for found in explained.values():
        use = found["experts"]
        assert use["reason"] is None
        assert [layer["block"] for layer in use["layers"]] == [0, 1, 2]
        for layer in use["layers"]:
            assert sum(layer["counts"]) == 2 * use["tokens"] == 2 * (24 + 5 - 1)
    # The same router on the same text, once in the graph and once in PyTorch.
    graph, walked = (
        list_expert_choices(make_explain_request(folder, name), IDS)
        for name, folder in outputs.items()
    )
    pairs = [zip(graph[n].counts, walked[n].counts, strict=True) for n in graph]
    assert sum(abs(a - b) for pair in pairs for a, b in pair) <= 4
    module = open_source_router(outputs["gptq"])
    assert walked[0].counts == module[0]
    assert walked[0].entropies == pytest.approx(module[1], rel=1e-3)
    assert graph[0].entropies == pytest.approx(module[1], rel=0.05)
    for found in explained.values():
        use = found["experts"]
        assert 0 < use["load_entropy"] <= math.log(6)
        for layer in use["layers"]:
            assert layer["load_entropy"] == pytest.approx(entropy_of(layer["counts"]))
            assert 0 < layer["router_entropy"] <= math.log(6)


def entropy_of(weights: Sequence[float]) -> float:
    total = sum(weights)
    return sum(weight / total * math.log(total / weight) for weight in weights if weight)


def open_source_router(folder: Path) -> tuple[list[int], list[float]]:
    """Count the choices of the first router in another way: by hooks on the loaded model.

    The second are the entropies of its tokens.
    """
    import moe2edge

    model: Any = moe2edge.load(folder, dtype=torch.float32)
    seen: list[torch.Tensor] = []
    gate = model.model.layers[0].mlp.gate
    handle = gate.register_forward_hook(lambda module, given, _: seen.append(given[0]))
    with torch.inference_mode():
        model(torch.tensor([IDS]))
        scores = seen[0].reshape(-1, 64) @ gate.weight.T
    handle.remove()
    counts = torch.bincount(scores.topk(2).indices.flatten(), minlength=6).tolist()
    return counts, [entropy_of(row) for row in scores.softmax(-1).tolist()]


def test_use_of_experts_by_hand() -> None:
    choices = {0: RouterChoices(4, ((0, 1), (1, 0))), 3: RouterChoices(4, ((0, 1), (2, 3)))}
    found = describe_expert_use(choices)
    assert found["tokens"] == 2
    assert found["coverage_pct"] == 75
    assert found["load_imbalance"] == pytest.approx(0.5)
    first = found["layers"][0]
    assert (first["hit"], first["max_over_mean"], first["coefficient_of_variation"]) == (2, 2, 1)
    assert [layer["new_per_token"] for layer in found["layers"]] == [0, 2]
    assert found["layers"][1]["last_tokens"] == [[0, 1], [2, 3]]
    ids, logits = torch.tensor([[0, 1], [2, 4]]), torch.zeros(2, 4)
    skipped = describe_expert_use({0: RouterChoices.collect(4, ids, logits)})["layers"][0]
    assert (skipped["hit_per_token"], skipped["counts"]) == (1.5, [1, 1, 1, 0])
    assert skipped["last_tokens"] == [[0, 1], [2]]
    assert skipped["router_entropy"] == pytest.approx(math.log(4))  # it prefers none
    assert skipped["load_entropy"] == pytest.approx(math.log(3))
    sure = RouterChoices.collect(4, ids, torch.tensor([[0, -math.inf, -math.inf, -math.inf]] * 2))
    assert sure.entropies == (0, 0)
    # A mean over layers of which one is not known is not known.
    mixed = describe_expert_use({0: sure, 1: RouterChoices(4, ((0, 1),))})
    assert (mixed["router_entropy"], mixed["layers"][0]["router_entropy"]) == (None, 0)
    assert sure.join(sure).entropies == (0,) * 4


def test_operators_are_told_by_the_profiler_of_the_runtime(
    explained: dict[str, dict[str, Any]],
) -> None:
    for name, found in explained.items():
        assert found["breakdown"]["reason"] is None
        prefill, decode = found["breakdown"]["phases"]
        assert (prefill["phase"], prefill["tokens"]) == ("prefill", 24)
        assert (decode["phase"], decode["tokens"]) == ("decode", 4)
        for phase in (prefill, decode):
            assert set(phase["by_kind"]) == {*KINDS, "gap"}
            for kind in ("attention", "experts", "router", "norm", "head"):
                assert phase["by_kind"][kind] > 0, (name, phase["phase"], kind)
            assert sum(phase["by_kind"].values()) == pytest.approx(phase["ms"], rel=1e-6)
            assert [layer["layer"] for layer in phase["by_layer"]] == [0, 1, 2]
        expected = {"onnx": ("QMoE", 3 * 4), "gptq": ("aten::mm", None)}[name]
        calls = {one["op"]: one["calls"] for one in decode["by_operator"]}
        assert expected[0] in calls
        assert expected[1] in (None, calls[expected[0]])
        nodes, reason = (found["breakdown"][f"fallback_{part}"] for part in ("nodes", "reason"))
        assert (nodes, reason) == (([], None) if name == "onnx" else (None, NO_PROVIDERS))


def test_nodes_that_fall_back_to_another_provider_are_named() -> None:
    def run(node: str, provider: str, us: int) -> dict[str, Any]:
        about = {"op_name": "Mul", "provider": provider}
        return {"name": f"{node}_kernel_time", "dur": us, "args": about}

    events = [run("/a", "Fast", 50), run("/b", "Slow", 10), run("/c", "Slow", 15)]
    found = find_fallbacks([*events, events[1]], "Fast")
    phases = [PhaseTimes("decode", 1, seconds, (), (), found) for seconds in (1e-4, 3e-4)]
    one = {"op": "Mul", "wanted_ep": "Fast", "got_ep": "Slow"}
    described = describe_fallbacks(phases)
    assert described["fallback_nodes"] == [
        {"node": "/b", **one, "pct": pytest.approx(10)},
        {"node": "/c", **one, "pct": pytest.approx(7.5)},
    ]


def test_a_runtime_without_a_profiler_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from moe2edge.evaluation.profile import explain

    found = explain._explain(
        lambda: explain._break_down({"folder": "x", "target": "gguf", "gen_tokens": 4}, IDS)
    )
    assert found == {"reason": explain.NO_PROFILER.format("gguf")}


@pytest.mark.parametrize(
    ("place", "kind"),
    [
        ("/model/layers.0/attn/GroupQueryAttention", "attention"),
        ("/model/layers.0/attn/q_norm/RMSNormalization", "norm"),
        ("/model/layers.0/moe/router/FusedMatMul", "router"),
        ("/model/layers.0/moe/QMoE", "experts"),
        ("/lm_head/FusedMatMul", "head"),
        ("model.layers.1.mlp.shared_expert.up_proj", "mlp"),
        ("model.layers.1.mlp.down_proj", "mlp"),
        ("model.layers.1.block_sparse_moe.experts", "experts"),
        ("model.embed_tokens", "other"),
    ],
)
def test_places_of_operators(place: str, kind: str) -> None:
    assert classify_place(place, place.rpartition("/")[2] if "/" in place else "") == kind


def test_files_leave_the_cache_and_come_back(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"1" * (4 << 20))
    assert count_resident_bytes(path) == 4 << 20
    assert evict_files([path]).state == "evicted"
    assert count_resident_bytes(path) == 0
    warm_files([path])
    assert count_resident_bytes(path) == 4 << 20


def test_without_smaps_a_timeline_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(timeline, "PROC", tmp_path)
    with Timeline() as found:
        found.begin("load")
    shown = found.to_json()
    assert shown["samples"] == []
    assert "no smaps_rollup" in shown["reason"]


@pytest.fixture
def fake_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for module, name in ((sensors, "CPUS"), (sensors, "THERMAL"), (energy, "POWERCAP")):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(module, name, tmp_path / name)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    return tmp_path


def write_number(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{number}\n")


def test_sensors_where_there_are_some(fake_system: Path) -> None:
    write_number(fake_system / "CPUS/cpu0/cpufreq/scaling_cur_freq", 2_000_000)
    write_number(fake_system / "CPUS/cpu1/cpufreq/scaling_cur_freq", 3_000_000)
    write_number(fake_system / "THERMAL/thermal_zone0/temp", 65_000)
    write_number(fake_system / "CPUS/cpu0/thermal_throttle/core_throttle_count", 7)
    first = read_sensors()
    assert first == {"mhz": 2500, "celsius": 65, "throttled": 7}
    write_number(fake_system / "CPUS/cpu0/thermal_throttle/core_throttle_count", 9)
    assert compare_sensors([first, read_sensors()])["throttled"] == 2
    package = fake_system / "POWERCAP/intel-rapl:0"
    write_number(package / "energy_uj", 900)
    write_number(package / "max_energy_range_uj", 1000)
    write_number(fake_system / "POWERCAP/intel-rapl:0:0/energy_uj", 5)
    meter = EnergyMeter()
    meter.start()
    write_number(package / "energy_uj", 950)
    assert meter.read() == pytest.approx(50e-6)
    write_number(package / "energy_uj", 100)  # it began anew
    assert meter.read() == pytest.approx(200e-6)


def test_sensors_where_there_are_none(fake_system: Path) -> None:
    found = compare_sensors([read_sensors(), read_sensors()])
    assert found["mhz"] == [None, None]
    assert found["throttled"] is None
    assert "virtual machine" in found["mhz_reason"]
    assert "virtual machine" in found["celsius_reason"]
    meter = EnergyMeter()
    meter.start()
    assert meter.read() is None
    assert "RAPL" in (meter.reason or "")
    assert "pip install 'nvidia-ml-py" in (meter.reason or "")


class Nvml:
    """Two GPUs, of which a process uses the second, in place of the library."""

    NVMLError = RuntimeError

    def __init__(self, user: int) -> None:
        self.user, self.taken = user, [5_000, 7_000]

    def nvmlInit(self) -> None:
        if self.user < 0:
            raise self.NVMLError("Driver Not Loaded")

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, number: int) -> int:
        return number

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> int:
        return self.taken[handle]

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> list[SimpleNamespace]:
        return [SimpleNamespace(pid=self.user)] if handle else []


@pytest.mark.usefixtures("fake_system")
def test_energy_of_the_gpu_that_the_process_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Nvml(os.getpid())
    monkeypatch.setitem(sys.modules, "pynvml", library)
    meter = EnergyMeter()
    assert meter.reason is not None
    meter.look_for_gpus()
    meter.start()
    library.taken = [9_000, 9_500]
    assert (meter.read(), meter.names) == (2.5, ["GPU 1 (NVML)"])
    assert meter.reason is None


@pytest.mark.usefixtures("fake_system")
def test_without_a_gpu_in_use_there_is_no_energy(monkeypatch: pytest.MonkeyPatch) -> None:
    for user, said in ((1, "no GPU was used"), (-1, "NVML tells no energy of a GPU (Driver")):
        monkeypatch.setitem(sys.modules, "pynvml", Nvml(user))
        meter = EnergyMeter()
        meter.look_for_gpus()
        meter.start()
        assert meter.read() is None
        assert said in (meter.reason or "")


# ---- quality ------------------------------------------------------------------------------------


def test_quality_is_taken_over_from_the_report(tmp_path: Path) -> None:
    numbers = {"tokens": 5, "perplexity": 3.5, "kl": 0.1, "top1": 0.9}
    results: list[dict[str, Any]] = [
        {"form": "gptq, in its runtime", "quality": {**numbers, "kl": 9.0}},
        {"form": "onnx, in its runtime", "quality": numbers},
    ]
    report: dict[str, Any] = {"results": results, "evaluation": {"text": "t", "sha256": "abc"}}
    (tmp_path / "report.json").write_text(json.dumps(report))
    none = {"perplexity_error": None, "kl_error": None, "top1_error": None}
    about = {"reason": None, "origin": "report", "text": "t", "sha256": "abc", "kl_reason": None}
    expected = {**about, **numbers}
    assert read_quality(tmp_path, "onnx") == {**expected, **none, "error_reason": NO_ERRORS}
    results[1]["quality"] = {**numbers, **none}
    (tmp_path / "report.json").write_text(json.dumps(report))
    assert read_quality(tmp_path, "onnx") == {**expected, **none, "error_reason": ONE_SAMPLE}
    errors = {"perplexity_error": 0.5, "kl_error": 0.01, "top1_error": 0.02}
    results[1]["quality"] = {**numbers, **errors}
    (tmp_path / "report.json").write_text(json.dumps(report))
    assert read_quality(tmp_path, "onnx") == {**expected, **errors, "error_reason": None}
    results[1]["quality"] = None
    (tmp_path / "report.json").write_text(json.dumps({**report, "evaluation": None}))
    assert "--eval none" in read_quality(tmp_path, "onnx")["reason"]
    assert "no report.json" in read_quality(tmp_path / "none", "onnx")["reason"]
    assert "checkpoint" in read_quality(tmp_path, None)["reason"]


def test_the_source_is_found_where_the_manifest_says(tiny: Make, tmp_path: Path) -> None:
    source = tiny("olmoe", dtype="bfloat16")
    digest = open_checkpoint(source).sha256
    (tmp_path / "config.json").write_text("{}")
    for name, told, said in (
        (str(source), digest, None),
        (str(source), "0" * 64, "is another model than the source of this output"),
        ("org/model", digest, "org/model is no folder of this machine; moe2edge evaluate"),
        (str(tmp_path), digest, "cannot be read"),
        ("", digest, "names no source"),
    ):
        write_manifest(tmp_path, "onnx", source={"model": name, "sha256": told})
        found, reason = find_source(tmp_path)
        assert (found is None) == (said is not None)
        assert (said or "") in (reason or "")


def test_measured_quality_has_errors_and_its_reasons(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[Any] = []
    answers = [Quality(9, 3.0, 0.1, 0.9, 0.2, 0.01, 0.02), Quality(9, 3.0)]

    def evaluate(folder: Path, text: Any, reference: Any, reporter: Any) -> tuple[Quality, str]:
        asked.append(reference)
        return answers.pop(0), "abc"

    monkeypatch.setattr(quality, "evaluate_on_text", evaluate)
    monkeypatch.setattr(quality, "find_source", lambda _: ("the source", None))
    found = quality.measure_quality(tmp_path, TextSource(text="t"), QUIET)
    assert asked == ["the source"]
    assert (found["kl"], found["kl_error"], found["top1_error"]) == (0.1, 0.01, 0.02)
    assert (found["origin"], found["kl_reason"], found["error_reason"]) == ("measured", None, None)
    monkeypatch.setattr(quality, "find_source", lambda _: (None, "no source"))
    found = quality.measure_quality(tmp_path, TextSource(text="t"), QUIET)
    assert (found["kl"], found["kl_reason"]) == (None, "no source")
    assert found["error_reason"] == ONE_SAMPLE


def test_a_text_for_quality_is_looked_at_before_anything_is_measured(
    outputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def measure_nothing(*_: Any, **__: Any) -> Any:
        raise InputError("it would be measured now")

    monkeypatch.setattr(measure, "run_in_turns", measure_nothing)
    make_tokenizer(outputs["onnx"])
    text = write_text(tmp_path / "short.txt")
    given = [*("profile", outputs["onnx"], "--preset", "quick", "--text", text)]
    for more, expected in (
        (["--quality", tmp_path / "none.txt", "--length", 64], "none.txt does not exist"),
        (["--quality", text], "positions of the model; give --length=128"),
        (["--quality", text, "--length", 128, "--samples", 32], "fewer samples (--samples=31)"),
        (["--length", 128], "are those of --quality TEXT; give it too"),
        # The remedies work.
        (["--quality", text, "--length", 128, "--samples", 31], "it would be measured now"),
    ):
        done = run(*given, *more)
        assert (done.exit_code, expected in done.stderr) == (2, True), done.stderr


# ---- the published form -------------------------------------------------------------------------


def test_the_schema_is_published() -> None:
    path = Path(__file__).parents[1] / "docs" / "profile.schema.json"
    assert json.loads(path.read_text("utf-8")) == build_profile_schema(), (
        "run: moe2edge profile --schema > docs/profile.schema.json"
    )
    result = run("profile", "--schema")
    assert json.loads(result.stdout) == build_profile_schema()


@pytest.mark.slow
def test_a_real_document_fits_the_schema(outputs: dict[str, Path], tmp_path: Path) -> None:
    from moe2edge.evaluation.profile.measure import profile_folders
    from moe2edge.evaluation.profile.settings import ProfileSettings

    found = profile_folders(
        [outputs["onnx"]],
        prompts=[IDS, IDS],
        settings=ProfileSettings(gen_tokens=4, repeats=1, threads=1, explain=True),
    )
    text = json.dumps(found.to_json(), allow_nan=False)
    document = ProfileSetDocument.model_validate_json(text)
    one = json.loads(text)["profiles"][0]
    parsed = parse_profile(one, "a.json")
    assert parsed == document.profiles[0]
    assert parsed.memory.phases[-1].pss
    assert parsed.breakdown.fallback_nodes == []
    # Those that were written before there was any of it are read as they were.
    old = Path(__file__).parents[1] / ".ci" / "profile.json"
    assert parse_profile(json.loads(old.read_text("utf-8")), "old").sizes.total
    assert parsed.load.cold.page_cache in ("evicted", "partly")
    assert parsed.roofline.reached_pct is not None
    assert parsed.roofline.bytes_per_token.kinds is not None
    # Keys and values of 27 tokens, 3 layers, 2 heads of 16, in float32.
    assert parsed.roofline.bytes_per_token.kinds["kv_cache"] == 27 * 3 * 2 * 2 * 16 * 4
    for wrong, said in (
        ({**one, "schema_version": 1}, "has schema_version 1, this moe2edge reads 2; measure it"),
        ({**one, "kind": "moe2edge.routing"}, "is not the profile of one folder"),
        ({**one, "load": {}}, "a.json is damaged: load.cold: Field required"),
    ):
        with pytest.raises(InputError, match=said):
            parse_profile(wrong, "a.json")
