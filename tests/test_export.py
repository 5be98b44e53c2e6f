"""Whole exports on the command line: what they write, what they refuse, what they leave behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import Result
from safetensors.torch import load_file, save_file

from helpers import SMALL, each_family, list_steps, run, write_text
from moe2edge.errors import InputError
from moe2edge.numerics.grid import Quantized
from moe2edge.pipeline import recipe, registry
from moe2edge.runtime.memory import Estimate
from moe2edge.storage import durable
from moe2edge.testing import Make

# Small enough for the tiny models, whose vocabulary is one entry per character.
RECIPE = "passes: [{expert_drop: {keep: 0.75}}, {block_drop: {drop: 1}}, {gptq: {min_tokens: 20}}]"


def export(model: Path, out: Path, target: str, *more: str | Path) -> Result:
    text = out.parent / "text.txt"
    write_text(text)
    return run(
        "export", model, "-t", target, "-o", out, "--calib", text, "--eval", text, *SMALL, *more
    )


# Those whose runtimes are installed.
QUANTIZED = ["onnx", "gptq", "compressed-tensors"] + ["mlx"] * (find_spec("mlx_lm") is not None)


@pytest.fixture(scope="module")
def pair(tiny: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All quantized targets of one trimmed and solved model."""
    out = tmp_path_factory.mktemp("pair") / "out"
    (out.parent / "r.yaml").write_text(RECIPE)
    result = export(tiny("olmoe"), out, ",".join(QUANTIZED), "-r", out.parent / "r.yaml")
    assert result.exit_code == 0, result.output
    return out


def numbers(folder: Path, target: str) -> dict[str, Any]:
    return dict(registry.find_target(target).tensors(folder))


def test_all_targets_hold_the_same_integers(pair: Path) -> None:
    onnx = numbers(pair / "onnx", "onnx")
    for target in QUANTIZED[1:]:
        other = numbers(pair / target, target)
        assert set(onnx) == set(other)
        quantized = 0
        for name, a in onnx.items():
            b = other[name]
            if isinstance(a, Quantized):
                assert torch.equal(a.q, b.q), name
                assert torch.equal(a.scales, b.scales), name
                assert a.scheme == b.scheme
                quantized += 1
            else:
                assert torch.equal(a, b), name
        # 2 blocks of 5 experts with three matrices, and four of attention.
        assert quantized == 2 * (5 * 3 + 4)


@pytest.mark.parametrize("target", QUANTIZED[2:])
def test_all_targets_generate_the_same(pair: Path, target: str) -> None:
    text = json.loads(run("generate", pair / target, "def f", "-n", "2", "--json").stdout)
    gptq = json.loads(run("generate", pair / "gptq", "def f", "-n", "2", "--json").stdout)
    assert text["text"] == gptq["text"]


def test_files_beside_the_weights(pair: Path) -> None:
    for target in QUANTIZED:
        folder = pair / target
        resolved = recipe.parse((folder / "recipe.resolved.yaml").read_text())
        assert resolved.passes[0].model_dump()["keep"] == 0.75
        assert (folder / "tokenizer.json").exists()
        manifest = json.loads((folder / "manifest.json").read_text())
        assert manifest["model"]["expert_counts"] == [5, 5]
        card = (folder / "README.md").read_text().split("---")
        # Stock transformers does not read a GPTQ folder.
        library = {"onnx": "onnxruntime", "compressed-tensors": "transformers", "mlx": "mlx"}
        assert yaml.safe_load(card[1]).get("library_name") == library.get(target)
        assert "base_model" not in yaml.safe_load(card[1])  # a folder has no name on the hub
        report = json.loads((folder / "report.json").read_text())
        forms = [row["form"] for row in (report["before"], report["after"], *report["results"])]
        assert forms[0] == "source"
        assert forms[2:] == [f"{name}, in its runtime" for name in QUANTIZED]
        assert report["results"][0]["parity"]["exact"] < 1e-4
        assert [step["name"] for step in report["steps"]] == ["expert_drop", "block_drop", "gptq"]
    assert not list(pair.parent.glob("*.partial"))


def test_verify_passes_and_prints(pair: Path) -> None:
    for target in QUANTIZED:
        result = run("verify", pair / target)
        assert result.exit_code == 0, result.output
        assert result.stdout.endswith("verified\n")


def test_verify_against_the_source(tiny: Make, pair: Path) -> None:
    result = run("verify", pair / "onnx", "--reference", tiny("olmoe"), "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["kl_to_source"] > 0


def test_generate_streams_what_json_returns(pair: Path) -> None:
    plain = run("generate", pair / "onnx", "def f", "-n", "12")
    as_json = run("generate", pair / "onnx", "def f", "-n", "12", "--json")
    assert plain.exit_code == as_json.exit_code == 0, plain.output
    assert plain.stdout == "def f" + json.loads(as_json.stdout)["text"] + "\n"
    # The same numbers in PyTorch choose the same tokens.
    other = run("generate", pair / "gptq", "def f", "-n", "1", "--json")
    assert json.loads(other.stdout)["tokens"] == json.loads(as_json.stdout)["tokens"][:1]


def test_evaluate_repeats_the_figures_of_the_report(tiny: Make, pair: Path) -> None:
    result = run(
        "evaluate", pair / "onnx", "--reference", tiny("olmoe"), "--json",
        "--text", pair.parent / "text.txt", "--samples", "3", "--length", "64",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    report = json.loads((pair / "onnx" / "report.json").read_text())
    expected = report["results"][0]["quality"]
    found = json.loads(result.stdout)
    assert found["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-6)
    assert found["kl"] == pytest.approx(expected["kl"], rel=1e-6)


def test_inspect_knows_models_and_outputs(tiny: Make, pair: Path) -> None:
    assert "6 experts of width 32" in run("inspect", tiny("olmoe")).stdout
    assert "[5, 5]" in run("inspect", pair / "onnx").stdout
    assert json.loads(run("inspect", pair / "onnx", "--json").stdout)["ok"]


@pytest.mark.slow
def test_profile_measures_an_output(pair: Path) -> None:
    result = run(
        "profile", pair / "onnx", "--preset", "quick", "--text", pair.parent / "text.txt",
        "--prompt-tokens", "16", "--gen-tokens", "8", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["metrics"]["ms_per_token"]["p50"] > 0


@pytest.mark.parametrize("family", each_family("qwen2_moe"))
@pytest.mark.slow
def test_two_runs_write_the_same_bytes(tiny: Make, tmp_path: Path, family: str) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE)
    files: list[dict[str, Path]] = []
    for n in range(2):
        out = tmp_path / f"out{n}"
        result = export(tiny(family), out, "onnx,gptq", "-r", tmp_path / "r.yaml")
        assert result.exit_code == 0, result.output
        files.append(
            {str(path.relative_to(out)): path for path in out.rglob("*") if path.is_file()}
        )
    first, second = files
    assert set(first) == set(second)
    different = {name for name in first if first[name].read_bytes() != second[name].read_bytes()}
    of_the_run = {f"{target}/report.json" for target in ("onnx", "gptq")}
    assert different == of_the_run | {f"{target}/manifest.json" for target in ("onnx", "gptq")}
    for name in sorted(different - of_the_run):
        one, other = (json.loads(paths[name].read_text()) for paths in files)
        del one["files"]["report.json"], other["files"]["report.json"]
        assert one == other


def test_plain_trimming_for_stock_transformers(tiny: Make, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(
        "passes: [{expert_drop: {keep: 4, criterion: frequency}}, {block_drop: {drop: 1}}]"
    )
    out = tmp_path / "out"
    result = export(tiny("qwen3_moe"), out, "hf", "-r", tmp_path / "r.yaml")
    assert result.exit_code == 0, result.output
    assert run("verify", out).exit_code == 0


# ---- what is refused -------------------------------------------------------------------------

REFUSED: list[tuple[str, list[str], int, str]] = [
    ("target", ["-t", "onx"], 2, "did you mean 'onnx'"),
    ("target twice", ["-t", "onnx:accuracy_level=0,onnx"], 2, "expected one or more of"),
    ("no target", ["-t", ","], 2, "expected one or more of"),
    ("target option", ["-t", "onnx:acuracy_level=0"], 2, "did you mean 'accuracy_level'"),
    ("its value", ["-t", "onnx:accuracy_level=3"], 2, "is 0 (float32 activations) or 4"),
    ("its kind", ["-t", "onnx:accuracy_level=high"], 2, "is 'high', expected: a valid integer"),
    ("its truth", ["-t", "onnx:accuracy_level=true"], 2, "is True, expected: a valid integer"),
    ("no value", ["-t", "onnx:accuracy_level"], 2, "expected NAME:option=value"),
    ("empty value", ["-t", "onnx:accuracy_level="], 2, "expected NAME:option=value"),
    ("option twice", ["-t", "onnx:accuracy_level=0:accuracy_level=4"], 2, "each option once"),
    ("weight", ["--calib", "builtin:0"], 2, "the weight of builtin is '0'"),
    ("part", ["--calib", "builtin:1,none.txt:1"], 2, "calibration text none.txt does not exist"),
    ("template", ["--set", "calibration.template='{a'"], 2, "expected: a text with plain fields"),
    ("recipe", ["-r", "w5"], 2, "unknown recipe"),
    ("hf has no default recipe", ["-t", "hf"], 2, "needs a recipe that prunes"),
    ("option", ["--set", "gptq.bit=4"], 2, "did you mean 'bits'"),
    ("hf of quantized numbers", ["-t", "hf", "-r", "w4"], 6, "unquantized weights only"),
    ("gptq of unquantized numbers", ["-t", "gptq", "-r", "trim"], 6, "is not quantized"),
    ("group size", ["--set", "gptq.group_size=128"], 2, "group_size 128 does not divide"),
    ("keep below top-k", ["-r", "trim-w4", "--set", "expert_drop.keep=1"], 2, "keep at least 2"),
    ("keep 0", ["-r", "trim-w4", "--set", "expert_drop.keep=0"], 2, "keep is 0"),
    ("keep 1.5", ["-r", "trim-w4", "--set", "expert_drop.keep=1.5"], 2, "keep is 1.5"),
    ("keep too many", ["-r", "trim-w4", "--set", "expert_drop.keep=9"], 2,
     "keep is 9, but block 0 has 6"),
    ("keep all", ["-r", "trim-w4", "--set", "expert_drop.keep=6"], 2, "keeps every expert"),
    ("drop all", ["-r", "trim-w4", "--set", "block_drop.drop=3"], 2, "drop is 3 of 3 blocks"),
    ("text", ["--calib", "none.txt"], 2, "does not exist"),
    ("short text", ["--set", "calibration.samples=9999"], 2, "too short"),
    ("long samples", ["--set", "calibration.length=999"], 2, "longer than the 128 positions"),
    ("flag", ["--presicion", "4"], 2, "No such option"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("args", "code", "message"), [c[1:] for c in REFUSED], ids=[c[0] for c in REFUSED]
)
def test_refusals(tiny: Make, tmp_path: Path, args: list[str], code: int, message: str) -> None:
    out = tmp_path / "out"
    target = [] if "-t" in args else ["-t", "onnx"]
    text = tmp_path / "text.txt"
    text.write_text("abc def " * 300)
    texts = ["--eval", str(text)] + ([] if "--calib" in args else ["--calib", str(text)])
    result = run("export", tiny("mixtral"), "-o", out, *target, *texts, *SMALL, *args)
    assert result.exit_code == code, result.output
    error = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    assert message in error[0]
    assert "Traceback" not in result.output
    assert [p.name for p in tmp_path.iterdir()] == ["text.txt"]


def test_keep_below_top_k_where_that_is_asked_for(tiny: Make, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(
        "passes: [{expert_drop: {keep: 1, clamp_top_k: true, criterion: random}}, rtn]"
    )
    result = export(tiny("mixtral"), tmp_path / "out", "onnx", "-r", tmp_path / "r.yaml")
    assert result.exit_code == 0, result.output


def test_errors_as_json(tmp_path: Path) -> None:
    code = subprocess.run(
        [sys.executable, "-m", "moe2edge", "inspect", str(tmp_path / "none"), "--json"],
        capture_output=True,
        text=True,
    )
    assert code.returncode == 2
    found = json.loads(code.stdout)
    assert found["ok"] is False
    assert found["error"]["code"] == 2


def test_existing_folders(tiny: Make, tmp_path: Path) -> None:
    foreign = tmp_path / "mine"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("x")
    for more in ([], ["--force"]):
        result = export(tiny("mixtral"), foreign, "onnx", "-r", "w4-rtn", *more)
        assert result.exit_code == 2
        assert "was not written by moe2edge" in result.stderr
    out = tmp_path / "out"
    assert export(tiny("mixtral"), out, "onnx", "-r", "w4-rtn").exit_code == 0
    again = export(tiny("mixtral"), out, "onnx", "-r", "w4-rtn")
    assert again.exit_code == 2
    assert "replace it with --force" in again.stderr
    before = (out / "model.onnx.data").read_bytes()
    assert export(tiny("mixtral"), out, "gptq", "-r", "w4-rtn", "--force").exit_code == 0
    assert not (out / "model.onnx.data").exists()
    assert before
    assert (foreign / "thesis.txt").read_text() == "x"
    assert not list(tmp_path.glob("*.partial"))


def test_leftovers_of_a_killed_export(tiny: Make, tmp_path: Path) -> None:
    stale = tmp_path / "out.partial"
    (stale / "work").mkdir(parents=True)
    result = export(tiny("mixtral"), tmp_path / "out", "onnx", "-r", "w4-rtn")
    assert result.exit_code == 2
    assert "exists and was not written by moe2edge; move it away" in result.stderr
    (stale / ".moe2edge-partial").write_text('{"pid": 999999999, "started": 1.0}')
    result = export(tiny("mixtral"), tmp_path / "out", "onnx", "-r", "w4-rtn")
    assert result.exit_code == 0, result.output
    assert not stale.exists()


def test_no_space(tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr("moe2edge.storage.output_checks.shutil.disk_usage", lambda _: usage)
    result = export(tiny("mixtral"), tmp_path / "out", "onnx")
    assert result.exit_code == 5
    assert "0.00 GB free" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted(tiny: Make, tmp_path: Path, number: signal.Signals) -> None:
    text = tmp_path / "text.txt"
    text.write_text("abcdefgh" * 9000)
    process = subprocess.Popen(
        [
            sys.executable, "-m", "moe2edge", "export", str(tiny("mixtral")), "-t", "onnx",
            "-o", str(tmp_path / "out"), "--calib", str(text), "--eval", str(text),
            "--set", "calibration.length=64", "--set", "calibration.samples=999",
            "--set", "evaluation.length=64",
        ],
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    partial = tmp_path / "out.partial" / ".moe2edge-partial"
    for _ in range(600):
        if partial.exists():
            break
        time.sleep(0.1)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"interrupted; nothing was left behind" in err
    assert [p.name for p in tmp_path.iterdir()] == ["text.txt"]


def test_help_is_quick() -> None:
    best = 9.0
    for _ in range(5):
        begun = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "moe2edge", "--help"], capture_output=True)
        best = min(best, time.perf_counter() - begun)
        assert done.returncode == 0
    assert best < 0.5


@pytest.mark.parametrize(
    "command", ["export", "decide", "inspect", "verify", "profile", "generate", "evaluate"]
)
def test_every_command_has_an_example(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"moe2edge {command} " in result.output.partition("Example")[2]


def test_threads_rule_torch_and_the_onnx_session(
    pair: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime

    seen = []
    session = onnxruntime.InferenceSession

    def watched(source: Any, options: Any, **more: Any) -> Any:
        seen.append((torch.get_num_threads(), options.intra_op_num_threads))
        return session(source, options, **more)

    monkeypatch.setattr(onnxruntime, "InferenceSession", watched)
    before = torch.get_num_threads()
    try:
        assert run("generate", pair / "onnx", "ab", "-n", "2", "--threads", "3").exit_code == 0
        assert run("generate", pair / "onnx", "ab", "-n", "2", "--threads", "0").exit_code == 2
    finally:
        torch.set_num_threads(before)
    assert seen == [(3, 3)]


def test_a_failing_rename_leaves_the_old_output(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert export(tiny("mixtral"), out, "onnx", "-r", "w4-rtn").exit_code == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    rename = durable.rename_exclusively

    def failing(source: Path, target: Path) -> bool:
        if source.name == "out" and source.parent.name == "out.partial":
            raise OSError(5, "Input/output error", str(target))
        return rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(durable, "rename_exclusively", failing)
        failed = export(tiny("mixtral"), out, "gptq", "-r", "w4-rtn", "--force")
    assert failed.exit_code == 1
    assert f"the finished output is kept as {tmp_path / 'out.partial' / 'out'}" in failed.stderr
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    # The same command only moves it there, and reports what the run that wrote it did.
    again = export(tiny("mixtral"), out, "gptq", "-r", "w4-rtn", "--force")
    assert again.exit_code == 0, again.output
    assert "had been finished by an earlier run" in again.stderr
    assert "solving" not in again.stderr
    assert "gptq, in its runtime" in again.stdout
    assert run("verify", out).exit_code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "text.txt"]


def test_what_is_read_is_not_replaced(tiny: Make, pair: Path, tmp_path: Path) -> None:
    """Decisions, texts and the model itself may not lie in what --force deletes."""
    out = tmp_path / "out"
    shutil.copytree(pair, out)
    text, steps = out / "gptq" / "config.json", tmp_path / "steps.json"
    decided = list_steps("apply_decisions", tiny("olmoe"), tmp_path)
    (tmp_path / "sets.json").replace(out / "gptq" / "sets.json")
    (tmp_path / "sets.json").symlink_to(out / "gptq" / "sets.json")
    steps.write_text(json.dumps({"passes": [*decided, "rtn"]}))
    model = tmp_path / "model"
    shutil.copytree(tiny("olmoe"), model)
    (model / "notes.txt").symlink_to(text)
    for source, more in (
        (model, ["-r", "w4-rtn", "--eval", "none"]),
        (tiny("olmoe"), ["-r", "w4", "--calib", text, "--eval", "none"]),
        (tiny("olmoe"), ["-r", "w4-rtn", "--eval", f"{text}:1,builtin:1"]),
        (tiny("olmoe"), ["-r", steps, "--eval", "none"]),
    ):
        result = run("export", source, "-t", "onnx", "-o", out, *SMALL, "--force", *more)
        assert result.exit_code == 2, result.output
        assert "is read and lies in" in result.stderr, result.stderr
    # A recipe is read once, at the start.
    (out / "gptq" / "sets.json").unlink()
    recipe = out / "gptq" / "recipe.resolved.yaml"
    result = run("export", tiny("olmoe"), "-t", "onnx", "-o", out, "-r", recipe, *SMALL, "--force",
                 "--calib", pair.parent / "text.txt", "--eval", "none")  # fmt: skip
    assert result.exit_code == 0, result.output


def test_force_spares_files_of_the_user(pair: Path, tiny: Make, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(pair, out)
    (out / "gptq" / "notes.txt").write_text("mine")
    result = export(tiny("olmoe"), out, "onnx", "-r", "w4-rtn", "--force")
    assert result.exit_code == 2
    assert "such as gptq/notes.txt" in result.stderr
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "nowhere")
    assert export(tiny("olmoe"), link, "onnx", "-r", "w4-rtn").exit_code == 2


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("recipe", ["w4-rtn", "w4"])
def test_numbers_that_are_not_finite_are_refused(
    tiny: Make, tmp_path: Path, bad: float, recipe: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny("olmoe"), folder)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    tensors[name][2, 3] = bad
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    result = export(folder, tmp_path / "out", "onnx", "-r", recipe)
    assert result.exit_code == 2, result.output
    assert f"{name} holds numbers that are not finite" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "text.txt"]


def test_the_group_size_is_that_of_the_whole_source(tiny: Make, tmp_path: Path) -> None:
    # The dense block, 96 wide, is the last one, and may be the one that is dropped.
    model = tiny(
        "qwen3_moe", hidden_size=128, head_dim=32, moe_intermediate_size=128,
        intermediate_size=96, mlp_only_layers=[2],
    )  # fmt: skip
    out = tmp_path / "out"
    recipe = tmp_path / "r.yaml"
    recipe.write_text("passes: [{block_drop: {drop: 1}}, rtn]")
    result = export(model, out, "gptq", "-r", recipe)
    assert result.exit_code == 0, result.output
    assert "rtn: w4a16, groups of 32: " in result.stderr
    config = json.loads((out / "quantize_config.json").read_text())
    assert config["group_size"] == 32
    resolved = yaml.safe_load((out / "recipe.resolved.yaml").read_text())
    assert resolved["passes"][1]["rtn"]["group_size"] == 32


def test_a_shipped_error_beyond_the_usual_is_a_warning(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moe2edge.evaluation import verify

    monkeypatch.setattr(verify, "SHIPPED_USUAL", 0.0)
    result = export(tiny("mixtral"), tmp_path / "out", "onnx", "-r", "w4-rtn")
    assert result.exit_code == 0
    assert "warning: logits of onnx, as shipped, differ from PyTorch by" in result.stderr
    monkeypatch.setattr(verify, "SHIPPED_TOLERANCE", 0.0)
    result = export(tiny("mixtral"), tmp_path / "other", "onnx", "-r", "w4-rtn")
    assert result.exit_code == 7
    assert "at most 0%" in result.stderr


def test_an_output_that_the_machine_cannot_run(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph needs its runtime to be verified; a checkpoint is read back block by block."""
    for name in ("gptq", "onnx"):
        kind = type(registry.find_target(name))
        monkeypatch.setattr(kind, "estimate", lambda *_: Estimate(1 << 60))
    result = export(tiny("olmoe"), tmp_path / "onnx", "onnx", "-r", "w4-rtn")
    assert result.exit_code == 5
    assert "verifying the output runs it, which needs" in result.stderr
    out = tmp_path / "gptq"
    result = export(tiny("olmoe"), out, "gptq", "-r", "w4-rtn")
    assert result.exit_code == 0, result.output
    assert "warning: gptq was not run, because that needs" in result.stderr
    row = json.loads((out / "report.json").read_text())["results"][0]
    assert row["form"] == "gptq, not run"
    assert row["parity"]["exact"] < 1e-4
    assert row["parity"]["shipped"] is None
    assert row["quality"] is None
    told = run("verify", out)
    assert told.exit_code == 0
    assert "runtime: not run, because this machine has too little memory" in told.stdout
    assert run("verify", out, "--reference", tiny("olmoe")).exit_code == 5


def test_transformers_cannot_load_a_graph(pair: Path) -> None:
    import moe2edge

    with pytest.raises(InputError, match="is an output of target onnx, which has no safetensors"):
        moe2edge.load(pair / "onnx")
    assert moe2edge.load(pair / "gptq").num_parameters() > 0


def test_an_unexpected_error_is_one_line_and_one_json_document(
    tiny: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moe2edge.storage import checkpoint

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("out of\nluck")

    monkeypatch.setattr(checkpoint, "open_checkpoint", broken)
    monkeypatch.setattr(sys, "argv", ["moe2edge", "inspect", "x", "--json"])
    result = run("inspect", tiny("olmoe"), "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["error"]["message"].startswith("RuntimeError: out of luck")
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.slow
def test_a_session_writes_nothing_into_the_home(pair: Path, tmp_path: Path) -> None:
    environment = {key: v for key, v in os.environ.items() if key != "ORT_DISABLE_TELEMETRY"}
    environment |= {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "moe2edge", "generate", str(pair / "onnx"), "ab", "-n", "2"]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    assert list(tmp_path.rglob("*onnxruntime*")) == []
