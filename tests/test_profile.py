"""Profiles: what is timed, how it is summed up, and that a fresh process does the measuring."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor
from transformers.utils import logging

from helpers import ignore, run, slow_except
from moe2edge.errors import InputError, Moe2EdgeError, Unsupported
from moe2edge.evaluation.profile import environment, measure, memory, process
from moe2edge.evaluation.profile.child import Phases, measure_once
from moe2edge.evaluation.profile.definitions import DEFINITIONS
from moe2edge.evaluation.profile.environment import (
    compute_host_fingerprint,
    describe_environment,
    describe_limits,
)
from moe2edge.evaluation.profile.measure import cut_prompts, profile_folder, time_tokenizer
from moe2edge.evaluation.profile.memory import MemoryReading, Meter
from moe2edge.evaluation.profile.metrics import Metric, Phase, collect_metrics, collect_phases
from moe2edge.evaluation.profile.settings import PRESETS, ProfileSettings, fit_context
from moe2edge.evaluation.profile.subject import measure_sizes
from moe2edge.evaluation.profile.table import build_profile_table
from moe2edge.numerics.scheme import Scheme
from moe2edge.pipeline import registry
from moe2edge.progress import Reporter
from moe2edge.storage.checkpoint import BUILTIN, open_checkpoint
from moe2edge.storage.manifest import write_manifest
from moe2edge.testing import make_checkpoint, make_tokenizer, quantize

PROMPTS = [[1 + (7 * n + i) % 90 for i in range(16)] for n in range(3)]
SMALL = ProfileSettings(gen_tokens=5, repeats=1, threads=1, timeout_s=120)


# The reply of the process that explains.
EXPLAINED: dict[str, Any] = {
    "cold_load": {"seconds": 0.25, "state": "evicted", "resident": 0.0},
    "timeline": {"reason": None, "method": "told", "interval_s": 1.0, "samples": []},
    "experts": {"reason": "told"},
    "breakdown": {"reason": "told"},
}


class Clocked:
    """A runtime on a clock of its own: a start takes 2 s and 1 s per token, a step 0.5 s."""

    dtype = "float16"
    threads = 1

    def __init__(self) -> None:
        self.now = 0.0

    def clock(self) -> float:
        return self.now

    def work(self, seconds: float) -> None:
        self.now += seconds

    def logits(self, ids: Tensor) -> Tensor:
        raise AssertionError("a profile measures start and step")

    def start(self, ids: Sequence[int]) -> Tensor:
        self.work(2 + len(ids))
        return torch.eye(9)[ids[-1]]

    def step(self, token: int) -> Tensor:
        self.work(0.5)
        return torch.eye(9)[(token + 1) % 9]


class Gauge(Meter):
    """A meter that reads what it is told to, and takes a long time to do so."""

    def __init__(self, runtime: Clocked, peaks: Sequence[int]) -> None:
        self.method, self.reason, self.shares_reason = "told", None, None
        self._runtime, self._peaks = runtime, iter(peaks)

    def start(self) -> None:
        self._runtime.work(100)

    def read(self) -> MemoryReading:
        self._runtime.work(100)
        peak = next(self._peaks)
        return MemoryReading(peak, peak - 1, peak - 2, 1, major_faults=3)

    def add_shares(self, reading: MemoryReading) -> MemoryReading:
        self._runtime.work(100)
        return replace(reading, pss=reading.peak_rss, private_dirty=5)


def clocked_answer(gen_tokens: int, peaks: Sequence[int]) -> dict[str, Any]:
    runtime = Clocked()

    def open_runtime() -> Clocked:
        runtime.work(7)
        return runtime

    return measure_once(
        {"prompts": [[1, 2, 3], [4, 5, 6], [2, 4]], "gen_tokens": gen_tokens},
        import_libraries=lambda: runtime.work(3),
        open_runtime=open_runtime,
        phases=Phases(Gauge(runtime, peaks)),
        clock=runtime.clock,
    )


def test_each_time_is_that_of_its_own_work_only() -> None:
    found = clocked_answer(4, range(10, 18))
    assert (found["import_s"], found["load_s"]) == (3, 7)
    assert (found["dtype"], found["threads"]) == ("float16", 1)
    assert found["runs"] == [  # without the warm-up
        {"ttft_s": 5, "gaps_s": [0.5] * 3, "tokens": [6, 7, 8, 0], "joules": None},
        {"ttft_s": 4, "gaps_s": [0.5] * 3, "tokens": [4, 5, 6, 7], "joules": None},
    ]


def test_memory_of_a_phase_is_the_largest_of_all_runs_also_of_the_warm_up() -> None:
    found = clocked_answer(2, [1, 2, 30, 50, 31, 41, 29, 42])["memory"]
    assert list(found["phases"]) == ["import", "load", "prefill", "decode"]
    assert {name: m["peak_rss"] for name, m in found["phases"].items()} == {
        "import": 1,
        "load": 2,
        "prefill": 31,
        "decode": 50,
    }
    assert found["phases"]["prefill"] == {
        "peak_rss": 31, "rss": 30, "rss_anon": 29, "rss_file": 1,
        "pss": 30, "private_dirty": 5, "major_faults": 3,
    }  # fmt: skip
    # Read once, where nothing that is timed follows: behind the last token of all.
    assert found["phases"]["decode"]["pss"] == 42


def test_metrics() -> None:
    found = collect_metrics([clocked_answer(4, range(10, 18))] * 2, prompt_tokens=3)
    assert set(found) <= set(DEFINITIONS)
    assert found["import_ms"].samples == (3000, 3000)
    assert found["load_ms"].samples == (7000, 7000)
    assert found["ttft_ms"].samples == (5000, 4000, 5000, 4000)
    assert found["prefill_tok_s"].samples == pytest.approx((3 / 5, 3 / 4) * 2)
    assert found["ms_per_token"].samples == (500,) * 12
    assert found["decode_tok_s"].samples == (2.0,) * 4
    assert found["e2e_ms"].samples == (6500, 5500) * 2
    assert found["first_token_ms"].samples == (5000, 5000)  # of the warm-up
    shown = found["ttft_ms"].to_json()
    assert (shown["mean"], shown["mad"]) == (4500, 500)
    assert shown["sd"] == pytest.approx(math.sqrt(1e6 / 3))


def test_one_generated_token_has_no_time_per_token() -> None:
    found = collect_metrics([clocked_answer(1, range(10, 18))], prompt_tokens=3)
    for name in ("ms_per_token", "decode_tok_s"):
        values = found[name].to_json()
        assert values["n"] == 0
        assert "at least two" in values["reason"]
        for key in ("median", "p50", "p90", "min", "max"):
            assert values[key] is None
    assert found["ttft_ms"].to_json()["reason"] is None


def test_energy_is_that_of_the_tokens_behind_the_first() -> None:
    reply = clocked_answer(4, range(10, 18))
    for joules, run_ in zip((6.0, 9.0), reply["runs"], strict=True):
        run_["joules"] = joules
    assert collect_metrics([reply], 3)["joules_per_token"].samples == (2, 3)
    reply["runs"][0]["joules"] = None
    found = collect_metrics([reply | {"energy_reason": "none here"}], 3)["joules_per_token"]
    assert (found.samples, found.reason) == ((), "none here")


def test_memory_above_that_without_a_model_is_of_the_same_process() -> None:
    answers = [clocked_answer(2, [n, n + 2, 30, 50, 31, 41, 29, 42]) for n in (1, 7)]
    phases = {phase.name: phase.to_json()["above_floor"] for phase in collect_phases(answers)}
    # The floor is the resident set, one less than the peak.
    assert phases["load"] == {"peak_rss": 3, "rss_anon": 2, "rss_file": 0}
    assert phases["decode"]["peak_rss"] == 50


def test_the_interval_of_a_median_is_that_of_other_processes() -> None:
    drawn = np.random.default_rng(0)
    hits = 0
    for _ in range(40):
        shifts = drawn.normal(size=(12, 1)).repeat(9, axis=1)
        samples = (10 + shifts + drawn.normal(size=(12, 9)) / 10).flatten()
        found = Metric("ms", "lower", tuple(samples.tolist()), processes=12).compute_interval()
        assert found is not None
        hits += found[0] <= 10 <= found[1]
    # Samples drawn without regard to processes give intervals that hit in 24 or so.
    assert 34 <= hits < 40
    shown = Metric("ms", "lower", (1.0, 2.0, 3.0, 4.0), processes=2).to_json()
    assert (shown["ci95"], shown["ci95_reason"], shown["processes"]) == ([1.0, 4.0], None, 2)
    alone = Metric("ms", "lower", (1.0, 2.0)).to_json()
    assert alone["ci95"] is None
    assert "--repeats" in alone["ci95_reason"]
    assert Metric("ms", "lower", (), "none here", 2).to_json()["ci95_reason"] == "none here"


def test_percentiles_are_those_of_numpy() -> None:
    samples = tuple(np.random.default_rng(0).lognormal(size=37).tolist())
    found = Metric("ms", "lower", samples).to_json()
    for p in (50, 90, 95):
        assert found[f"p{p}"] == pytest.approx(np.percentile(samples, p), rel=1e-12)
    assert found["median"] == sorted(samples)[18]
    assert (found["min"], found["max"], found["n"]) == (min(samples), max(samples), 37)
    assert found["samples"] == list(samples)


def test_p90_by_hand() -> None:
    assert Metric("ms", "lower", tuple(map(float, range(11)))).percentile(90) == 9
    assert Metric("ms", "lower", (1.0, 2.0)).percentile(90) == pytest.approx(1.9)


# ---- memory ---------------------------------------------------------------------------------


def test_the_peak_of_a_phase_is_its_own() -> None:
    meter = Meter()
    assert meter.reason is None, "these tests run on Linux"
    meter.start()
    before = meter.read()
    block = np.ones(64 << 20, dtype=np.uint8)
    during = meter.read()
    del block
    still = meter.read()
    meter.start()
    after = meter.read()
    assert None not in (before.peak_rss, during.peak_rss, still.peak_rss, after.peak_rss)
    grown = 60 << 20
    assert (during.peak_rss or 0) > (before.peak_rss or 0) + grown
    assert (during.rss_anon or 0) > (before.rss_anon or 0) + grown
    # The kernel gathers its counters from the cores now and then: a little may be missing.
    assert (still.peak_rss or 0) > (before.peak_rss or 0) + grown
    assert (still.rss or 0) < (during.rss or 0) - grown
    assert (after.peak_rss or 0) < (during.peak_rss or 0) - grown
    assert (after.rss_file or 0) > 0
    whole = meter.add_shares(after)
    assert (after.rss or 0) * 1.1 > (whole.pss or 0) > (whole.private_dirty or 0) > 1 << 20
    assert after.major_faults is not None
    assert after.major_faults >= 0


def test_major_faults_are_counted_from_the_begin_of_a_phase(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def write(own: int, started: int) -> None:
        for number, faults in ((1, own), (2, started)):
            place = tmp_path / str(number)
            (place / "task/1").mkdir(parents=True, exist_ok=True)
            (place / "clear_refs").touch()
            (place / "task/1/children").write_text("2" if number == 1 else "")
            (place / "stat").write_text(f"{number} (a ) b) S 1 1 1 0 -1 0 77 0 {faults} 0 8 9\n")
            status = "".join(f"{name}:\t1 kB\n" for name in memory._FIELDS)
            (place / "status").write_text(status)

    write(own=5, started=7)
    monkeypatch.setattr(memory, "PROC", tmp_path / "1")
    meter = Meter()
    meter.start()
    write(own=6, started=10)
    found = meter.read()
    assert (found.major_faults, found.rss) == (4, 2048)
    # These have no smaps_rollup.
    assert meter.add_shares(found) == found
    assert "no smaps_rollup" in (meter.shares_reason or "")


def test_without_linux_unknown_values_are_null_with_a_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(memory, "PROC", tmp_path / "none")
    meter = Meter()
    meter.start()
    found = meter.read()
    assert meter.method == "psutil resident set size at the end of the phase"
    assert meter.reason is not None
    assert "cannot reset the peak memory" in meter.reason
    assert (found.rss or 0) > 1 << 20
    assert (found.peak_rss, found.rss_anon, found.rss_file) == (None, None, None)
    phase = Phase("load", (found, found)).to_json()
    assert phase["peak_rss"] is None
    assert phase["rss"] == found.rss


def test_a_value_unknown_once_is_unknown_for_the_phase() -> None:
    assert MemoryReading(1, 2, None, 4).merge(MemoryReading(3, None, 2, 1)) == MemoryReading(
        3, None, None, 4
    )


# ---- in a real process ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a random checkpoint, with a tokenizer."""
    folder = make_checkpoint(tmp_path_factory.mktemp("profile") / "m", "olmoe")
    make_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def measured(checkpoint: Path) -> Any:
    """Return a profile of two processes, and what was said on the way."""
    said: list[tuple[str, int, int]] = []
    result = profile_folder(
        checkpoint,
        text="def f(x): return x * 2  # twice\n" * 4,
        settings=ProfileSettings(16, gen_tokens=5, prompts=2, repeats=2, threads=1, timeout_s=120),
        reporter=Reporter(ignore, lambda *step: said.append(step)),
    )
    return result, said


@pytest.mark.slow
def test_a_source_checkpoint_is_measured(measured: Any, checkpoint: Path) -> None:
    result, said = measured
    assert said == [("measure", 1, 2), ("measure", 2, 2)]
    assert result.artifact["runtime"] == "transformers"
    assert result.artifact["dtype"] == "bfloat16"
    assert {name: metric.n for name, metric in result.metrics.items()} == {
        "import_ms": 2,
        "load_ms": 2,
        "first_token_ms": 2,
        "e2e_ms": 4,
        "ttft_ms": 4,
        "prefill_tok_s": 4,
        "ms_per_token": 16,
        "decode_tok_s": 4,
        "joules_per_token": result.metrics["joules_per_token"].n,
        "tokenise_ms": 2,
    }
    assert all(s > 0 for metric in result.metrics.values() for s in metric.samples)
    for phase in result.phases:
        assert len(phase.samples) == 2
        for m in phase.samples:
            assert m.peak_rss >= m.rss > 50 << 20
            assert m.rss_anon > 0
            assert m.rss_file > 0
            assert m.rss_anon + m.rss_file <= m.peak_rss
            assert 0 < m.private_dirty <= m.pss <= 1.1 * m.peak_rss
            assert m.major_faults >= 0
    assert result.env["threads"] == {"asked": 1, "runtime": 1}
    assert result.sizes["weights"] == (checkpoint / "model.safetensors").stat().st_size
    assert not any("different tokens" in warning for warning in result.warnings)


@pytest.mark.slow
def test_json_has_the_promised_form(measured: Any) -> None:
    result, _ = measured
    found = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert (found["schema_version"], found["kind"]) == (2, "moe2edge.profile")
    assert list(found) == [
        "schema_version", "kind", "id", "created", "verdict", "warnings", "artifact", "workload",
        "env", "metrics", "memory", "load", "sizes", "roofline", "experts", "breakdown", "quality",
        "sensors", "definitions",
    ]  # fmt: skip
    assert found["workload"]["prompt_tokens"] == 16
    assert found["workload"]["gen_tokens"] == 5
    assert (found["workload"]["prompts"], found["workload"]["processes"]) == (2, 2)
    for name, metric in found["metrics"].items():
        if name == "joules_per_token" and metric["reason"]:
            continue
        assert metric["min"] <= metric["p50"] <= metric["p90"] <= metric["p95"] <= metric["max"]
        if name != "tokenise_ms":  # it is measured in one process
            assert metric["min"] <= metric["ci95"][0] <= metric["p50"] <= metric["ci95"][1]
        assert metric["better"] in ("lower", "higher")
    assert found["memory"]["method"] == "VmHWM after writing 5 to /proc/self/clear_refs"
    assert [p["phase"] for p in found["memory"]["phases"]] == [
        "import", "load", "prefill", "decode",
    ]  # fmt: skip
    assert found["sizes"]["total"] == sum(found["sizes"]["classes"].values())
    assert found["env"]["versions"]["torch"] == torch.__version__
    assert found["env"]["cpu"]["logical"] >= 1
    assert found["env"]["host_fingerprint"] == compute_host_fingerprint()


@pytest.mark.slow
def test_the_table_shows_every_metric_phase_and_size(measured: Any) -> None:
    result, _ = measured
    console = Console(width=120)
    with console.capture() as captured:
        console.print(build_profile_table(result))
    text = captured.get()
    for label in (
        "time to first token", "each further token", "prefill", "peak memory, load",
        "peak memory, decode", "weights on disk", "2 processes x 2 prompts of 16 tokens",
    ):  # fmt: skip
        assert label in text
    ttft = result.metrics["ttft_ms"].percentile(50)
    assert f"{ttft:.1f}" in text or f"{ttft:.2f}" in text


# ---- one real profile of each target ----------------------------------------------------------


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a folder of each target, and the source of them, by name; float16 throughout."""
    root = tmp_path_factory.mktemp("outputs")
    source = make_checkpoint(root / "source", "olmoe", dtype="float16")
    whole = open_checkpoint(str(source)).model

    small = quantize(whole, Scheme(group_size=32))
    for name, model in {"hf": whole, "gptq": small, "onnx": small}.items():
        (root / name).mkdir()
        registry.find_target(name).write(model, root / name)
        write_manifest(root / name, name)
    return {path.name: path for path in root.iterdir()}


@pytest.mark.parametrize(
    ("name", "dtype"),
    slow_except(
        [("hf", "float16"), ("gptq", "bfloat16"), ("onnx", "float32"), ("source", "bfloat16")],
        ("onnx", "float32"),
    ),
)
def test_a_profile_reports_dtype_and_threads_of_the_runtime(
    name: str, dtype: str, outputs: dict[str, Path]
) -> None:
    result = profile_folder(outputs[name], prompts=PROMPTS, settings=replace(SMALL, threads=3))
    assert result.artifact["target"] == (None if name == "source" else name)
    assert result.artifact["dtype"] == dtype
    assert result.env["threads"] == {"asked": 3, "runtime": 3}
    assert [result.metrics[m].n for m in ("import_ms", "ttft_ms", "ms_per_token")] == [1, 2, 8]
    assert [phase.name for phase in result.phases] == ["import", "load", "prefill", "decode"]


# Only numbers of modules and threads: all that is timed is in the child itself.
SPLIT = """
import json, os, sys
from moe2edge.evaluation.profile import child

def count():
    return set(sys.modules), len(os.listdir("/proc/self/task"))

import_libraries, open_runtime = child._make_loaders(json.load(sys.stdin))
import_libraries()
modules, threads = count()
runtime = open_runtime()
late, more = count()
heavy = ("torch", "transformers", "onnxruntime", "onnx", "numpy", "safetensors")
late = sorted(m for m in late - modules if m.split(".")[0] in heavy)
print(json.dumps({"late": late, "new_threads": more - threads, "threads": runtime.threads}))
"""


@pytest.mark.parametrize("name", ["hf", "gptq", "onnx", "source"])
@pytest.mark.slow
def test_libraries_are_imported_before_the_folder_is_loaded(
    name: str, outputs: dict[str, Path]
) -> None:
    request = {
        "folder": str(outputs[name]),
        "target": None if name == "source" else name,
        "dtype": "bfloat16",
        "threads": 3,
    }
    done = subprocess.run(
        [sys.executable, "-P", "-c", SPLIT],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    found = json.loads(done.stdout)
    assert found["late"] == []
    assert found["threads"] == 3
    if name == "onnx":  # the session works in the calling thread and in two of its own
        assert found["new_threads"] == 2


@pytest.mark.slow
def test_a_library_that_is_missing_is_reported_with_a_remedy(
    outputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('none here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(Unsupported, match=r"pip install 'onnxruntime>="):
        profile_folder(outputs["onnx"], prompts=PROMPTS, settings=SMALL)


class Spelling:
    """One token per character."""

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(map(chr, ids))

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in text]}


def test_prompts_come_from_evenly_spaced_places() -> None:
    settings = ProfileSettings(prompt_tokens=2, prompts=2)
    found = cut_prompts(Spelling(), "abcdefghij", settings)
    assert [[chr(i) for i in prompt] for prompt in found] == [["a", "b"], ["d", "e"], ["g", "h"]]
    assert len(cut_prompts(Spelling(), "abcdef", settings)) == 3
    with pytest.raises(InputError, match="the text has 5 tokens; 3 prompts of 2 tokens need 6"):
        cut_prompts(Spelling(), "abcde", settings)


def test_the_tokenizer_is_timed_on_the_text_of_each_prompt() -> None:
    said: list[str] = []
    spelling = Spelling()

    class Slow(Spelling):
        def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
            said.append(text)
            return spelling(text, **options)

    found = time_tokenizer(Slow(), [[97], [98, 99]], clock=lambda: 2.0 ** len(said))
    assert said == ["a", "bc"]
    assert found.samples == (2000,)  # without the warm-up
    assert found.median_by_process() == []  # no ratio between folders, round by round


def test_limits_of_the_container_and_the_governor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(path: str, text: str) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(f"{text}\n")

    assert describe_limits(tmp_path) == {"cpu_quota": None, "mem_limit": None}
    write("proc/self/cgroup", "4:cpu,cpuacct:/x\n0::/a/b")
    write("sys/fs/cgroup/a/b/cpu.max", "max 100000")
    write("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712")
    write("sys/fs/cgroup/cpu/x/cpu.cfs_quota_us", "-1")
    write("sys/fs/cgroup/cpu/x/cpu.cfs_period_us", "100000")
    assert describe_limits(tmp_path) == {"cpu_quota": None, "mem_limit": None}
    write("sys/fs/cgroup/cpu/x/cpu.cfs_quota_us", "300000")
    assert describe_limits(tmp_path)["cpu_quota"] == 3
    write("sys/fs/cgroup/a/cpu.max", "150000 100000")
    write("sys/fs/cgroup/a/memory.max", "4096")
    assert describe_limits(tmp_path) == {"cpu_quota": 1.5, "mem_limit": 4096}
    for number, name in enumerate(("performance", "powersave", "performance")):
        write(f"cpu{number}/cpufreq/scaling_governor", name)
    monkeypatch.setattr(environment, "CPUS", tmp_path)
    assert describe_environment()["cpu"]["governor"] == "performance, powersave"
    for battery, source in ((None, None), (True, "mains"), (False, "battery")):
        told = None if battery is None else SimpleNamespace(power_plugged=battery)
        monkeypatch.setattr("psutil.sensors_battery", lambda told=told: told)
        assert describe_environment()["power_source"] == source


# ---- failures -------------------------------------------------------------------------------


def test_an_unknown_target_is_the_users_error(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "weights.data").write_bytes(b"0")
    write_manifest(out, "onyx")
    with pytest.raises(InputError, match="unknown target 'onyx'"):
        profile_folder(out, prompts=PROMPTS, settings=SMALL)


@pytest.fixture
def fake_child(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Run some lines of Python in place of the child."""
    real = subprocess.run

    def use(code: str) -> None:
        def run(command: list[str], **options: Any) -> Any:
            assert command[-1] == "moe2edge.evaluation.profile.child"
            return real([sys.executable, "-c", code], **options)

        monkeypatch.setattr(subprocess, "run", run)

    return use


def test_a_child_that_crashes_is_reported_with_its_last_line(
    tmp_path: Path, fake_child: Callable[[str], None]
) -> None:
    make_checkpoint(tmp_path / "m", "olmoe")
    fake_child("raise IndexError('out of range')")
    with pytest.raises(Moe2EdgeError, match="the measuring process failed: IndexError") as caught:
        profile_folder(tmp_path / "m", prompts=[[1, 2], [1, 2]], settings=SMALL)
    assert type(caught.value) is Moe2EdgeError
    assert "\n" not in str(caught.value)


def test_a_thread_that_ends_meanwhile_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for thread in ("1", "2"):
        (tmp_path / "self" / "task" / thread).mkdir(parents=True)
    (tmp_path / "self" / "task" / "1" / "children").write_text("12 13")
    # It is listed and cannot be read, as that of a thread that has ended.
    (tmp_path / "self" / "task" / "2" / "children").mkdir()
    monkeypatch.setattr(memory, "PROC", tmp_path / "self")
    assert memory.list_started() == [tmp_path / "12", tmp_path / "13"]


def test_ids_beyond_the_vocabulary_are_an_error_of_the_input(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "m", "olmoe")
    with pytest.raises(InputError, match="token ids run from 95 to 96"):
        profile_folder(tmp_path / "m", prompts=[[95, 96], [95, 96]], settings=SMALL)


REQUEST = {"folder": "out"}


@pytest.mark.parametrize(
    ("code", "kind", "message"),
    [
        ("import sys; sys.exit('one\\ntwo')", Moe2EdgeError, "process failed: two"),
        ("import sys; sys.exit(1)", Moe2EdgeError, "process failed: it wrote no message"),
        ("import sys; print('no', file=sys.stderr); sys.exit(6)", Unsupported, "^no$"),
        (
            "import os; os.kill(os.getpid(), 9)",
            Moe2EdgeError,
            "killed by SIGKILL; this machine may have too little",
        ),
        ("import os; os.kill(os.getpid(), 15)", Moe2EdgeError, "SIGTERM$"),
    ],
)
def test_failures_of_the_child(
    fake_child: Callable[[str], None], code: str, kind: type[Moe2EdgeError], message: str
) -> None:
    fake_child(code)
    with pytest.raises(kind, match=message) as caught:
        process.run_child(REQUEST, SMALL)
    assert type(caught.value) is kind


def test_a_child_that_takes_too_long_is_stopped(
    fake_child: Callable[[str], None], tmp_path: Path
) -> None:
    fake_child(
        "import os, time; open('pid', 'w').write(str(os.getpid())); time.sleep(60)".replace(
            "'pid'", repr(str(tmp_path / "pid"))
        )
    )
    with pytest.raises(Moe2EdgeError, match="took longer than 1 s and was stopped"):
        process.run_child(REQUEST, ProfileSettings(timeout_s=1))
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGCONT)


def test_threads_are_passed_on(fake_child: Callable[[str], None]) -> None:
    fake_child("import os; print('{\"threads\": \"' + os.environ['OMP_NUM_THREADS'] + '\"}')")
    assert process.run_child(REQUEST, ProfileSettings(threads=3)) == {"threads": "3"}


def test_output_of_libraries_stays_out_of_the_result() -> None:
    code = (
        "import os, sys; from moe2edge.evaluation.profile import child;"
        "child._serve = lambda request: (print('noise'), os.system('echo more'), {'got': request})"
        "[-1]; sys.exit(child.serve_request())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input='{"a": 1}', capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == {"got": {"a": 1}}
    assert sorted(done.stderr.split()) == ["more", "noise"]


def test_different_tokens_are_a_warning(monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> None:
    answers: Iterator[dict[str, Any]] = iter(clocked_answer(n, range(10, 18)) for n in (2, 3))
    monkeypatch.setattr(measure, "run_child", lambda *_: next(answers))
    idle = {"cpu": {"usable": 2, "logical": 2}, "load_avg": 0.1}
    monkeypatch.setattr(measure, "describe_environment", lambda: idle)
    result = profile_folder(checkpoint, prompts=PROMPTS, settings=ProfileSettings(repeats=2))
    assert result.warnings == ("greedy decoding gave different tokens in different processes",)
    assert result.verdict == "invalid"


def test_a_busy_machine_is_a_warning(monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> None:
    monkeypatch.setattr(measure, "run_child", lambda *_: clocked_answer(2, range(10, 18)))
    busy = {"cpu": {"usable": None, "logical": 2}, "load_avg": 1.6}
    monkeypatch.setattr(measure, "describe_environment", lambda: busy)
    result = profile_folder(checkpoint, prompts=PROMPTS)
    (warning,) = result.warnings
    assert result.verdict == "noisy"
    assert "load 1.6 on 2 cores" in warning


@pytest.mark.parametrize("name", ["prompt_tokens", "gen_tokens", "prompts", "repeats", "threads"])
def test_settings_out_of_range(checkpoint: Path, name: str) -> None:
    wrong: dict[str, Any] = {name: 0}
    with pytest.raises(InputError, match=f"{name} is 0; give 1 or more"):
        profile_folder(checkpoint, text="", settings=ProfileSettings(**wrong))


def test_input_that_is_refused_before_a_process_starts(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no folder"):
        profile_folder(tmp_path / "none", text="")
    with pytest.raises(InputError, match="neither an output folder"):
        profile_folder(tmp_path, text="")
    too_much = ProfileSettings(prompt_tokens=100, gen_tokens=29)
    with pytest.raises(InputError, match="do not fit the context of 128 tokens of the model"):
        profile_folder(checkpoint, text="", settings=too_much)
    with pytest.raises(InputError, match="128 prompt tokens and 1 generated ones do not fit"):
        profile_folder(checkpoint, prompts=[[1] * 128] * 2, settings=too_much, fixed=("threads",))
    with pytest.raises(InputError, match="the text has 0 tokens"):
        profile_folder(checkpoint, settings=ProfileSettings(prompt_tokens=8, gen_tokens=8))
    with pytest.raises(InputError, match=r"2 prompts of lengths \[1, 2\]"):
        profile_folder(checkpoint, prompts=[[1], [1, 2]])
    with pytest.raises(InputError, match=r"1 prompts of lengths \[1\]; give at least two"):
        profile_folder(checkpoint, prompts=[[1]])


@pytest.mark.parametrize(
    ("fixed", "context", "expected"),
    [
        ((), None, (512, 128)),
        ((), 640, (512, 128)),
        ((), 512, (410, 102)),
        ((), 2, (1, 1)),
        (("threads",), 128, (103, 25)),
        (("prompt_tokens",), 512, None),
        (("prompt_tokens",), 600, (512, 88)),
        (("gen_tokens",), 512, (384, 128)),
        (("gen_tokens",), 128, None),
        (("prompt_tokens", "gen_tokens"), 639, None),
        (("prompt_tokens", "gen_tokens"), 640, (512, 128)),
    ],
)
def test_a_preset_shrinks_to_the_context_and_the_users_own_sizes_do_not(
    fixed: tuple[str, ...], context: int | None, expected: tuple[int, int] | None
) -> None:
    full = PRESETS["full"]
    if expected is None:
        with pytest.raises(InputError, match=f"do not fit the context of {context} tokens"):
            fit_context(full, context, fixed)
        return
    found, warnings = fit_context(full, context, fixed)
    assert (found.prompt_tokens, found.gen_tokens) == expected
    assert replace(found, prompt_tokens=512, gen_tokens=128) == full
    if expected == (512, 128):
        assert warnings == ()
    else:
        start = f"the context of the model is {context} tokens: measured with {expected[0]} prompt "
        assert len(warnings) == 1
        assert warnings[0].startswith(f"{start}tokens and {expected[1]} ")
        assert warnings[0].endswith("not 512 and 128")


# ---- the command ------------------------------------------------------------------------------


@pytest.fixture
def commanded(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Run the command with a clock in place of fresh processes."""

    def answer(request: dict[str, Any], _: ProfileSettings) -> dict[str, Any]:
        return EXPLAINED if request.get("explain") else clocked_answer(2, range(10, 18))

    monkeypatch.setattr(measure, "run_child", answer)
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    yield lambda *arguments: run("profile", *map(str, arguments))
    logging.set_verbosity(verbosity)
    if bars:
        logging.enable_progress_bar()


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_fits_the_built_in_model(commanded: Any, preset: str) -> None:
    result = commanded(BUILTIN, "--preset", preset, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    work = found["workload"]
    assert work["prompt_tokens"] + work["gen_tokens"] <= 512
    shrunk = [
        w for w in found["warnings"] if w.startswith("the context of the model is 512 tokens")
    ]
    assert len(shrunk) == (preset == "full")


def test_a_size_that_the_user_gave_is_not_shrunk(commanded: Any, checkpoint: Path) -> None:
    result = commanded(checkpoint, "--prompt-tokens", 128)
    assert result.exit_code == 2
    assert "128 prompt tokens and 1 generated ones do not fit the context of 128" in result.stderr
    found = json.loads(commanded(checkpoint, "--gen-tokens", 100, "--json").stdout)
    assert (found["workload"]["prompt_tokens"], found["workload"]["gen_tokens"]) == (28, 100)


def test_a_model_of_the_hub(
    commanded: Any, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[tuple[object, ...]] = []

    def download(name: str, **options: Any) -> str:
        asked.append((name, options["revision"], options["cache_dir"]))
        return str(checkpoint)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    result = commanded("org/name", "--revision", "v2", "--cache-dir", tmp_path, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["artifact"]["path"] == str(checkpoint)
    # What the commit has of further chat templates is asked for separately.
    assert asked == [("org/name", "v2", tmp_path), ("org/name", checkpoint.name, tmp_path)]
    for name in ("no-such-folder", checkpoint / "config.json"):
        result = commanded(name)
        assert result.exit_code == 2
        assert "there is no folder" in result.stderr


def test_presets_are_sound() -> None:
    assert set(PRESETS) == {"quick", "ci", "full"}
    for settings in PRESETS.values():
        settings.check()


def test_sizes_by_class(tmp_path: Path) -> None:
    sizes = {
        "model.onnx": 1, "model.onnx.data": 2, "part/a.safetensors": 4, "tokenizer.json": 8,
        "chat_template.jinja": 16, "merges.txt": 32, "config.json": 64, "recipe.yaml": 128,
        "README.md": 256,
    }  # fmt: skip
    (tmp_path / "part").mkdir()
    for name, size in sizes.items():
        (tmp_path / name).write_bytes(b"0" * size)
    expected = {"weights": 6, "graph": 1, "tokenizer": 56, "config": 192, "other": 256}
    assert measure_sizes(tmp_path) == expected
    # Without data beside it, the graph holds the weights itself.
    (tmp_path / "model.onnx.data").unlink()
    assert measure_sizes(tmp_path) == {**expected, "weights": 5, "graph": 0}
    (tmp_path / "model.onnx_data_1").write_bytes(b"00")
    assert measure_sizes(tmp_path) == expected
    (tmp_path / "model.onnx_data_1").unlink()
    (tmp_path / ".git" / "lfs").mkdir(parents=True)
    (tmp_path / ".git" / "lfs" / "x.safetensors").write_bytes(b"again")
    assert measure_sizes(tmp_path) == {**expected, "weights": 5, "graph": 0}
