"""`moe2edge plan` beside exports: bytes, refusals, recipes for a budget; and no weight is read."""

from __future__ import annotations

import itertools
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import Result

from helpers import LESS, NO_CHECK, run
from moe2edge.commands.plan_document import build_plan_schema, parse_plan
from moe2edge.evaluation import machine_rates
from moe2edge.evaluation.machine_rates import DEFAULT_RATES, MachineRates
from moe2edge.evaluation.stock_memory import choose_stock_group, estimate_source_check
from moe2edge.model.block import Block
from moe2edge.model.edits import change_weights
from moe2edge.model.kinds import look_at_blocks
from moe2edge.model.token_reads import count_token_reads
from moe2edge.storage.checkpoint import BUILTIN_FOLDER
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
    document = json.loads(invoke("plan", *arguments, "--json").stdout)
    check_document(document)
    (found,) = document["plans"]
    return dict(found)


def check_document(document: dict[str, Any]) -> None:
    """Check that a document has the published form, and nothing beside it."""
    form = parse_plan(json.dumps(document))
    assert {"error": None, **document} == {"error": None, **form.model_dump(mode="json")}


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


def test_all_that_would_refuse_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each pass and each target is looked at, not only the first that refuses."""
    recipe = tmp_path / "recipe.yaml"
    passes: list[Any] = [{"expert_drop": {"keep": 99}}, {"block_drop": {"drop": 50}}, "gptq"]
    recipe.write_text(json.dumps({"passes": passes}))
    done = invoke("plan", BUILTIN, "-r", str(recipe), "-t", "hf,gptq", code=2)
    told = [line for line in done.stdout.splitlines() if line.startswith("refused")]
    assert len(told) == 3
    assert all(words in line for words, line in zip(("99", "50", "hf"), told, strict=True))
    assert done.stderr.splitlines()[-1] == f"error: {told[0].partition('): ')[2]}"
    monkeypatch.setattr("sys.argv", ["moe2edge", "--json"])
    done = invoke("plan", BUILTIN, "-r", str(recipe), "-t", "hf,gptq", "--json", code=2)
    document = json.loads(done.stdout)
    check_document(document)
    refusals = document["plans"][0]["refusals"]
    assert [one["message"] for one in refusals] == [line.partition("): ")[2] for line in told]
    assert document["error"] == {"code": 2, "message": refusals[0]["message"]}


def test_recipes_for_a_budget_fit_and_can_be_exported() -> None:
    every = invoke("plan", BUILTIN, "-t", "onnx,gptq", "--budget", "2GB", "--json")
    check_document(json.loads(every.stdout))
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
    assert "nothing fits --budget 100 MB" in refused.stderr
    assert "onnx takes" in refused.stderr
    refused = invoke("plan", BUILTIN, "-t", "onnx,gptq", "--disk", "5MB", code=5)
    # A shorter context makes no folder smaller.
    pattern = (
        r"fits --disk 5\.00 MB: .* onnx takes 5\.\d\d MB .*; raise the limit or take a smaller "
    )
    assert re.search(pattern, refused.stderr)


def test_a_token_reads_what_a_profile_counts() -> None:
    found = plan(BUILTIN, "-t", "hf:dequantize=true", "-r", "as-is", "--context", "1")
    with open_without_numbers(BUILTIN) as (checkpoint, _):
        reads = count_token_reads(checkpoint.model)
    (one,) = found["targets"]
    assert one["read"] - one["cache"] == sum(reads.values())


def test_rates_are_kept_for_this_machine(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine_rates.find_rates() == DEFAULT_RATES
    mine = MachineRates(1e12, 2e12, 1e10, 1e9, 5e10)
    monkeypatch.setattr("moe2edge.commands.plan.measure_rates", lambda: mine)
    check_document(json.loads(invoke("plan", "--measure", "--json").stdout))
    assert (cache / "moe2edge" / "machine-rates.json").is_file()
    assert machine_rates.find_rates() == mine
    monkeypatch.setattr(machine_rates, "fingerprint_host", lambda: "another machine")
    assert machine_rates.find_rates() == DEFAULT_RATES


def test_rates_take_under_half_a_minute_on_a_slow_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each look at the clock is half a second later: whatever is timed is as slow."""
    monkeypatch.chdir(tmp_path)
    for name in ("PRODUCT", "SOLVED", "SOLVED_ROWS"):
        monkeypatch.setattr(machine_rates, name, 128)
    monkeypatch.setattr("moe2edge.evaluation.profile.bandwidth._MOST", 1 << 20)
    looks = itertools.count()
    rates = machine_rates.measure_rates(lambda: next(looks) / 2)
    assert next(looks) / 2 < 30
    assert rates.disk < machine_rates.DISK_BYTES / machine_rates.DISK_SECONDS
    assert rates.narrow == rates.products == 2 * 128**3 / 0.5


def test_recipes_of_a_tied_model_are_told_once(tiny: Make) -> None:
    """One tensor is head and embedding: 8 bits for one are 8 bits for the other."""
    folder = str(tiny("qwen3_moe", tie_word_embeddings=True))
    done = invoke("plan", folder, "-t", "onnx", "--budget", "2GB", "--json")
    every = [one["forecast"]["recipe"] for one in json.loads(done.stdout)["recipes"]]
    assert len(set(every)) == len(every) == 5


def test_the_form_of_documents_is_published() -> None:
    path = Path(__file__).parents[1] / "docs" / "plan.schema.json"
    assert json.loads(path.read_text("utf-8")) == build_plan_schema(), (
        "run: moe2edge plan --schema > docs/plan.schema.json"
    )
    assert json.loads(invoke("plan", "--schema").stdout) == build_plan_schema()


def test_blocks_of_one_kind_are_looked_at_once() -> None:
    with open_without_numbers(BUILTIN) as (checkpoint, _):
        blocks = checkpoint.model.blocks
    seen: list[int] = []

    def look(block: Block) -> int:
        seen.append(block.index)
        return block.parameters

    found = list(look_at_blocks((*blocks, blocks[0].keep_experts(range(4))), look))
    assert seen == [0, 0]
    assert found[:-1] == [blocks[0].parameters] * len(blocks) > [found[-1]]


@pytest.mark.parametrize("mixed", [False, True])
def test_memory_of_the_source_check_grows_with_blocks_at_once(mixed: bool) -> None:
    """Files in 16 bits are loaded so, in groups that take 1.5 GiB at most in float32."""
    config = json.loads((BUILTIN_FOLDER / "config.json").read_text())
    config |= {"hidden_size": 2048, "intermediate_size": 1024, "torch_dtype": "bfloat16"}
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "config.json").write_text(json.dumps(config))
        with open_without_numbers(place) as (checkpoint, _):
            model = checkpoint.model
    if mixed:
        model = change_weights(
            model, lambda role, weight: weight.change(dtype="F32") if "router" in role else None
        )
    size, whole = choose_stock_group(model, 24 << 30)
    assert size * model.block_nbytes <= 3 << 29
    assert not whole
    assert choose_stock_group(model, 1 << 40) == (size, whole)
    held = estimate_source_check(model, 24 << 30) / (size * model.block_nbytes)
    assert (2.3 < held < 2.6) if mixed else (1.05 < held < 1.4)


def test_a_working_folder_that_takes_no_file_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> MachineRates:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("moe2edge.commands.plan.measure_rates", refuse)
    refused = invoke("plan", "--measure", code=2)
    assert f"nothing can be written to {Path.cwd()} (Permission denied)" in refused.stderr
