"""`moe2edge plan` beside exports: bytes, refusals, recipes for a budget; and no weight is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import Result

from helpers import LESS, NO_CHECK, run
from moe2edge.evaluation import machine_rates
from moe2edge.evaluation.machine_rates import DEFAULT_RATES, MachineRates
from moe2edge.model.token_reads import count_token_reads
from moe2edge.storage.hollow import open_without_numbers, plan_checkpoint
from moe2edge.storage.safetensors_files import write_hollow_safetensors
from moe2edge.testing import Make

BUILTIN = "builtin:tiny-moe"
# Every target but mlx, whose runtime is not installed everywhere.
TARGETS = "onnx,gptq,gguf,compressed-tensors,hf:dequantize=true"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep rates out of the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def plan(*arguments: str) -> dict[str, Any]:
    """Run a plan, and return what it says of the only recipe."""
    done = invoke("plan", *arguments, "--json")
    (found,) = json.loads(done.stdout)["plans"]
    return dict(found)


def invoke(*arguments: object, code: int = 0) -> Result:
    """Run a command, whose exit code has to be ``code``."""
    done = run(*arguments)
    assert done.exit_code == code, done.output
    return done


@pytest.mark.slow
def test_bytes_are_those_of_an_export(tmp_path: Path) -> None:
    options = ["-t", TARGETS, "-r", "w4-rtn"]
    invoke("export", BUILTIN, *options, "-o", str(tmp_path / "out"), *LESS, NO_CHECK)
    settings = [word for word in LESS if not word.startswith("-") or word == "--set"]
    found = plan(BUILTIN, *options, *settings)
    names = [target.partition(":")[0] for target in TARGETS.split(",")]
    assert [one["target"] for one in found["targets"]] == names
    assert not found["refusals"]
    for one in found["targets"]:
        folder = tmp_path / "out" / one["target"]
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        # Only times, versions and digests are not known before.
        assert one["disk"] == pytest.approx(size, rel=2e-3), one["target"]


def test_no_number_is_read(tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights are a hole of 200 MB; a map of them is refused, and what is read is counted."""
    config = json.loads((tiny("olmoe") / "config.json").read_text())
    config |= {"hidden_size": 1024, "intermediate_size": 1024, "num_experts": 16}
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_hollow_safetensors(tmp_path / "model.safetensors", plan_checkpoint(config))
    size = (tmp_path / "model.safetensors").stat().st_size
    arguments = (str(tmp_path), "-t", "onnx,gptq", "-r", "w4")

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("numbers are read")

    monkeypatch.setattr("numpy.memmap", refuse)
    assert invoke("plan", *arguments, code=2).stderr.count("tokenizer") >= 1
    before = count_read()
    invoke("plan", *arguments, code=2)
    assert count_read() - before < 2e6 < size / 100


def count_read() -> int:
    """Return the bytes that this process has read by calls."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("rchar")))


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (["-t", "hf"], 2),
        (["-t", "hf", "-r", "w4"], 6),
        (["-t", "gptq", "-r", "trim"], 6),
        (["-t", "onnx", "-r", "w4", "--set", "gptq.group_size=48"], 2),
        (["-t", "onnx", "-r", "trim", "--set", "expert_drop.keep=17"], 2),
        (["-t", "onnx", "-r", "w4", "--set", "calibration.text=no-such.txt"], 2),
    ],
)
def test_refuses_with_the_line_of_export(tmp_path: Path, options: list[str], code: int) -> None:
    refused = invoke("export", BUILTIN, "-o", str(tmp_path / "out"), *options, "-q", code=code)
    planned = invoke("plan", BUILTIN, *options, code=code)
    assert planned.stderr.splitlines()[-1] == refused.stderr.splitlines()[-1]


def test_all_that_would_refuse_is_told(tmp_path: Path) -> None:
    """Each pass and each target is looked at, not only the first that refuses."""
    recipe = tmp_path / "recipe.yaml"
    passes: list[Any] = [{"expert_drop": {"keep": 99}}, {"block_drop": {"drop": 50}}, "gptq"]
    recipe.write_text(json.dumps({"passes": passes}))
    done = invoke("plan", BUILTIN, "-r", str(recipe), "-t", "hf,gptq", code=2)
    told = [line for line in done.stdout.splitlines() if line.startswith("refused")]
    assert len(told) == 3
    assert all(words in line for words, line in zip(("99", "50", "hf"), told, strict=True))
    assert done.stderr.splitlines()[-1] == f"error: {told[0].partition('): ')[2]}"


def test_recipes_for_a_budget_fit_and_can_be_exported() -> None:
    every = invoke("plan", BUILTIN, "-t", "onnx,gptq", "--budget", "2GB", "--json")
    found = json.loads(every.stdout)["recipes"]
    assert [yaml.safe_load(one["recipe"])["passes"] for one in found[:2]] == [
        [{"gptq": {"bits": 8}}],
        ["gptq"],
    ]
    done = invoke("plan", BUILTIN, "-t", "onnx", "--disk", "8.5MB", "--context", "100")
    passes = yaml.safe_load(done.stdout)["passes"]
    # Its head is in 8 bits in any case, as this is the only target.
    assert passes[-1] == "gptq"
    texts = ("--disk", "9MB", "--set", "calibration.samples=8")
    done = invoke("plan", BUILTIN, "-t", "onnx", "-r", "w4-rtn", *texts)
    assert yaml.safe_load(done.stdout)["calibration"]["samples"] == 8
    refused = invoke("plan", BUILTIN, "-t", "onnx,gptq", "--budget", "100MB", code=5)
    assert "nothing fits --budget 0.10 GB" in refused.stderr
    assert "onnx takes" in refused.stderr


def test_a_token_reads_what_a_profile_counts() -> None:
    found = plan(BUILTIN, "-t", "hf:dequantize=true", "-r", "as-is", "--context", "1")
    with open_without_numbers(BUILTIN) as (checkpoint, _):
        reads = count_token_reads(checkpoint.model)
    (one,) = found["targets"]
    assert one["read"] - one["cache"] == sum(reads.values())


def test_rates_are_kept_for_this_machine(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine_rates.find_rates() == DEFAULT_RATES
    mine = MachineRates(1e12, 1e10, 1e9, 5e10)
    monkeypatch.setattr("moe2edge.commands.plan.measure_rates", lambda: mine)
    invoke("plan", "--measure")
    assert (cache / "moe2edge" / "machine-rates.json").is_file()
    assert machine_rates.find_rates() == mine
    monkeypatch.setattr(machine_rates, "fingerprint_host", lambda: "another machine")
    assert machine_rates.find_rates() == DEFAULT_RATES


def test_a_working_folder_that_takes_no_file_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> MachineRates:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("moe2edge.commands.plan.measure_rates", refuse)
    refused = invoke("plan", "--measure", code=2)
    assert f"nothing can be written to {Path.cwd()} (Permission denied)" in refused.stderr
