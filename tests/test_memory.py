"""Memory limits: shares of a budget, streams on the disk, refusals."""

from __future__ import annotations

import json
import os
import platform
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from every_family import make_folder
from helpers import run, write_text
from moe2edge.calibration import tokens
from moe2edge.cli.common import parse_bytes
from moe2edge.errors import DoesNotFit
from moe2edge.runtime import memory
from moe2edge.runtime.memory import IMPORTED, SOLVED_TOGETHER_BYTES, Estimate, Memory
from moe2edge.testing import Make, make_tokenizer


def test_hidden_states_beyond_their_share_go_to_an_unnamed_file(tmp_path: Path) -> None:
    small = Memory(hidden_bytes=400, folder=tmp_path)
    inside, outside = small.empty((10, 10)), small.empty((10, 11))
    assert inside.dtype == outside.dtype == torch.float32
    numbers = torch.rand(10, 11)
    outside.copy_(numbers)
    outside += 1
    assert torch.equal(outside, numbers + 1)
    mapped = Path("/proc/self/maps").read_text()
    assert sum(str(tmp_path) in line for line in mapped.splitlines()) == 1
    assert not list(tmp_path.iterdir())
    del outside
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_shares_of_a_limit(tmp_path: Path) -> None:
    assert Memory.from_limit(IMPORTED + 1600, tmp_path) == Memory(0, 100, tmp_path, IMPORTED + 1600)
    assert Memory.from_limit(64 << 30, tmp_path).group_bytes == SOLVED_TOGETHER_BYTES
    Estimate(100).check(IMPORTED + 100)
    with pytest.raises(DoesNotFit, match=r"this, which needs 2.63 GB of memory; .* 1.00 GB"):
        Estimate(2 * 10**9, purpose="this").check(10**9)


def test_the_limit_is_the_least_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = memory.find_limit()
    assert memory.find_limit(10**6) == 10**6
    assert memory.find_limit(1 << 60) == machine
    none = resource.RLIM_INFINITY
    limits = {resource.RLIMIT_DATA: (5000, none), resource.RLIMIT_AS: (none, none)}
    monkeypatch.setattr(resource, "getrlimit", limits.__getitem__)
    assert memory.find_limit() == 5000


HOLE = """
import sys, torch
from pathlib import Path
from moe2edge.runtime.memory import avoid_fragmentation

def data():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmData"))

avoid_fragmentation(int(sys.argv[1]) or None)
torch.empty(30 << 20, dtype=torch.uint8)  # freed: from here on glibc would keep such blocks
before = data()
blocks = [torch.empty(8 << 20, dtype=torch.uint8) for _ in range(8)]
stays = [bytearray(1000) for _ in range(1000)], torch.ones(1000)
del blocks
print(data() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about the heap of glibc")
def test_large_matrices_leave_no_holes_where_memory_is_limited() -> None:
    left = [
        int(subprocess.run([sys.executable, "-c", HOLE, most], capture_output=True).stdout)
        for most in ("0", "1000000000")
    ]
    assert left[0] > 30 << 20
    assert left[1] < 4 << 20


@pytest.mark.parametrize(
    ("text", "bytes_"),
    [("8GB", 8 * 10**9), ("512MiB", 512 << 20), ("2e9", 2 * 10**9), ("1.5 gb", 15 * 10**8)],
)
def test_sizes(text: str, bytes_: int) -> None:
    from typing import Any, cast

    assert parse_bytes(cast(Any, None), cast(Any, None), text) == bytes_


@pytest.mark.slow
def test_limits_on_the_command_line(tiny: Make, tmp_path: Path) -> None:
    def export(size: str, *more: str) -> tuple[int, str]:
        result = run(
            "export", str(tiny("olmoe")), "-t", "gptq", "-o", str(tmp_path / "out"), "--eval",
            "none", "--max-memory", size, "--set", "calibration.samples=4", "--set",
            "calibration.length=64", "--calib", str(text), *more,
        )  # fmt: skip
        return result.exit_code, result.stderr

    text = tmp_path / "text.txt"
    write_text(text)
    code, said = export("much")
    assert code == 2
    assert "expected one such as 8GB" in said
    code, said = export("10MB")
    assert code == 5
    assert "running the model block by block holds one block in float32, which needs" in said
    code, said = export("2GB")
    assert code == 0, said


def export_peak(model: Path, out: Path, text: Path, limit: str, *more: str) -> int:
    """Export to gptq in a process of its own, and return its peak memory."""
    command = [sys.executable, "-m", "moe2edge", "export", str(model), "-t", "gptq"]
    command += ["-o", str(out), "--max-memory", limit, "--eval", "none"]
    command += ["--calib", str(text), "--threads", "1"]
    command += ["--set", "calibration.samples=4", "--set", "calibration.length=64", *more]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(json.loads((out / "report.json").read_text())["peak_bytes"])


@pytest.mark.slow
def test_memory_does_not_grow_with_blocks(tiny: Make, tmp_path: Path) -> None:
    """Less than a quarter of what six more blocks take on the disk."""
    text = tmp_path / "text.txt"
    write_text(text)
    peaks, sizes = [], []
    for blocks in (2, 8):
        model = tiny(
            "mixtral",
            hidden_size=512,
            intermediate_size=1024,
            num_local_experts=8,
            num_hidden_layers=blocks,
            dtype="bfloat16",
            initializer_range=0.02,
        )
        sizes.append(sum(path.stat().st_size for path in model.glob("*.safetensors")))
        peaks.append(export_peak(model, tmp_path / f"out-{blocks}", text, "1.2GB"))
    assert sizes[1] - sizes[0] > 150e6
    assert peaks[1] - peaks[0] < (sizes[1] - sizes[0]) / 4


@pytest.mark.slow
def test_memory_does_not_grow_where_one_tensor_holds_all_experts(tmp_path: Path) -> None:
    """Less than a tenth from 8 to 16 blocks, where the result is too large to be run whole."""
    text, recipe = tmp_path / "text.txt", tmp_path / "recipe.yaml"
    write_text(text)
    recipe.write_text("passes:\n  - gptq: {bits: 4, group_size: -1}\n")
    peaks = []
    for blocks in (8, 16):
        model = tmp_path / f"source-{blocks}"
        sizes = {"hidden_size": 512, "moe_intermediate_size": 512, "num_experts": 16}
        sizes |= {"num_attention_heads": 8, "head_dim": 64, "num_hidden_layers": blocks}
        kinds = ["linear_attention", "full_attention"] * (blocks // 2)
        make_folder(model, "qwen3_5_moe_text", **sizes, layer_types=kinds, initializer_range=0.02)
        make_tokenizer(model)
        more = ("-r", str(recipe))
        peaks.append(export_peak(model, tmp_path / f"out-{blocks}", text, "0.7GB", *more))
        shutil.rmtree(model)
    assert peaks[1] < 1.1 * peaks[0]


RUN = """
import sys, torch
from pathlib import Path
import moe2edge

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key))

torch.ones(64, 64) @ torch.ones(64, 64)
before = status("VmRSS")
model = moe2edge.load(sys.argv[1])
ids = torch.arange(1, 33)[None]
with torch.no_grad():
    model(ids)
print(status("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("step", ["base", "linear"])
def test_replaced_experts_save_memory_at_run_time(tiny: Make, tmp_path: Path, step: str) -> None:
    """Peak memory of running a folder, against that of its source, falls as its file does."""
    model = tiny(
        "mixtral",
        hidden_size=512,
        intermediate_size=1024,
        num_local_experts=12,
        num_hidden_layers=4,
        dtype="bfloat16",
        initializer_range=0.02,
    )
    text, out, recipe = tmp_path / "text.txt", tmp_path / "out", tmp_path / "recipe.json"
    write_text(text)
    options = {"with": step, "budget": 0.5, **({"factors": "zero"} if step == "base" else {})}
    recipe.write_text(json.dumps({"passes": [{"expert_replace": options}]}))
    command = ["export", str(model), "-t", "hf:layout=natural", "-o", str(out), "-r", str(recipe)]
    more = ["--calib", str(text), "--eval", "none", "--set", "calibration.length=64"]
    done = run(*command, *more, "--set", "calibration.samples=4")
    assert done.exit_code == 0, done.output
    sizes = [sum(p.stat().st_size for p in f.glob("*.safetensors")) for f in (model, out)]
    saved = sizes[0] - sizes[1]
    assert saved > 70e6
    peaks = []
    # oneDNN compiles code for each shape of a product, how much of it depends on the processor.
    env = {**os.environ, "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "1"}
    for folder in (model, out):
        command = [sys.executable, "-c", RUN, str(folder)]
        ran = subprocess.run(command, capture_output=True, text=True, env=env)
        assert ran.returncode == 0, ran.stderr
        peaks.append(int(ran.stdout))
    assert peaks[0] - peaks[1] > 0.9 * saved


# ---- before any work -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({"expert_budget": {"keep": 4}}, "expert_budget compares allocations"),
        ({"expert_search": {"keep": 4}}, "expert_search keeps products"),
        ({"routing": {}}, "routing keeps products"),
    ],
    ids=["expert_budget", "expert_search", "routing"],
)
def test_searches_are_judged_before_any_text_is_read(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: Any, message: str
) -> None:
    """The limit holds a block and the first pass, which needs less."""
    monkeypatch.setattr(tokens, "load_tokens", lambda *_, **__: pytest.fail("a text was read"))
    recipe = tmp_path / "r.json"
    recipe.write_text(json.dumps({"passes": [{"expert_drop": {"keep": 5}}, step]}))
    size = ["--set", "calibration.samples=512", "--set", "calibration.length=128"]
    small = psutil.virtual_memory()._replace(total=IMPORTED + (8 << 20))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: small)
    commands = [["export", "-t", "hf:layout=natural", "-o", tmp_path / "out"]]
    commands += [["decide", "-o", tmp_path / "sets.json"]] if "routing" not in step else []
    for name, *more in commands:
        done = run(name, tiny("olmoe"), *more, "-r", recipe, *size)
        assert done.exit_code == 5, done.output
        assert message in done.stderr
        assert "which needs" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


def test_inspecting_routing_is_judged_before_any_text_is_read(
    tiny: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "load_tokens", lambda *_, **__: pytest.fail("a text was read"))
    small = psutil.virtual_memory()._replace(total=IMPORTED + (8 << 20))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: small)
    size = ("--samples", "512", "--length", "128")
    done = run("inspect", tiny("olmoe"), "--routing", *size)
    assert done.exit_code == 5, done.output
    assert "--routing holds one block in float32 and the hidden states" in done.stderr
    assert "give fewer --samples" in done.stderr
