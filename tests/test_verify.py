"""`verify` finds damage also when the manifest was written anew."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file

from helpers import run, slow_except, write_text
from moe2edge.errors import VerificationFailed
from moe2edge.evaluation import verify
from moe2edge.evaluation.folder_record import REFERENCE
from moe2edge.evaluation.reference import Reference
from moe2edge.evaluation.tensor_digests import compute_digest
from moe2edge.numerics import metrics
from moe2edge.pipeline import registry
from moe2edge.runtime.load import load
from moe2edge.storage.manifest import open_artifact, write_manifest
from moe2edge.testing import Make


@pytest.fixture(scope="module")
def folders(tiny: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("verify") / "out"
    text = out.parent / "text.txt"
    text.write_text("".join(chr(33 + n * n % 90) for n in range(3000)))
    result = run(
        "export", str(tiny("olmoe")), "-t", "onnx,gptq", "-o", str(out), "-r", "w4-rtn",
        "--eval", str(text), "--set", "evaluation.samples=3", "--set", "evaluation.length=64",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    return out


def check(folder: Path) -> Result:
    return run("verify", str(folder))


def renew_manifest(folder: Path) -> None:
    old = dict(open_artifact(folder).manifest)
    kept = {k: v for k, v in old.items() if k not in ("schema_version", "tool", "target", "files")}
    write_manifest(folder, str(old["target"]), **kept)


def flip(path: Path, at: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(len(data) * at)] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("at", slow_except([0.1, 0.5, 0.9], 0.5))
@pytest.mark.parametrize("target", ["onnx", "gptq"])
@pytest.mark.parametrize("renew", [False, True])
@pytest.mark.slow
def test_one_flipped_bit(
    folders: Path, tmp_path: Path, target: str, at: float, renew: bool
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(folders / target, folder)
    assert check(folder).exit_code == 0
    flip(folder / {"onnx": "model.onnx.data", "gptq": "model.safetensors"}[target], at)
    if renew:
        renew_manifest(folder)
    assert check(folder).exit_code == 7


EXPERTS = "model.layers.1.mlp.experts."


def gptq_scale(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{EXPERTS}2.up_proj.scales"][0, 3] *= 2


def gptq_swap(tensors: dict[str, torch.Tensor]) -> None:
    for part in ("gate_proj", "up_proj", "down_proj"):
        for kind in ("qweight", "scales"):
            a, b = (f"{EXPERTS}{n}.{part}.{kind}" for n in (0, 4))
            tensors[a], tensors[b] = tensors[b], tensors[a]


# Random weights, and trained ones, on which faults change less.
both = pytest.mark.parametrize("made", slow_except(["folders", "builtin_out"], "folders"))


@both
@pytest.mark.parametrize("damage", [gptq_scale, gptq_swap])
def test_gptq_damage_under_a_new_manifest(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    made: str,
    damage: Callable[[dict[str, torch.Tensor]], None],
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(request.getfixturevalue(made) / "gptq", folder)
    tensors = load_file(folder / "model.safetensors")
    damage(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    renew_manifest(folder)
    result = check(folder)
    assert result.exit_code == 7
    assert EXPERTS in result.stderr


def change_onnx(folder: Path, name: str, change: Callable[[Any], None]) -> None:
    """Change an initializer in the data file, or in the graph, which holds small ones itself."""
    graph = onnx.load(folder / "model.onnx", load_external_data=False)
    proto = next(p for p in graph.graph.initializer if p.name == name)
    dtype = {1: np.float32, 2: np.uint8, 10: np.float16}[proto.data_type]
    if where := {e.key: e.value for e in proto.external_data}:
        path, shape = folder / "model.onnx.data", tuple(proto.dims)
        change(np.memmap(path, dtype, "r+", int(where["offset"]), shape))
        return
    array = np.frombuffer(proto.raw_data, dtype).reshape(proto.dims).copy()
    change(array)
    proto.raw_data = array.tobytes()
    (folder / "model.onnx").write_bytes(graph.SerializeToString())


def onnx_scale(folder: Path) -> None:
    def double(array: Any) -> None:
        array[2, 5, 0] *= 2

    change_onnx(folder, "model.layers.1.moe.experts.gate_up_proj.scales", double)


def onnx_swap(folder: Path) -> None:
    def swap(array: Any) -> None:
        array[[0, 4]] = array[[4, 0]]

    for part in ("gate_up_proj", "down_proj"):
        for kind in ("qweight", "scales"):
            change_onnx(folder, f"model.layers.1.moe.experts.{part}.{kind}", swap)


@both
@pytest.mark.parametrize("damage", [onnx_scale, onnx_swap])
def test_onnx_damage_under_a_new_manifest(
    request: pytest.FixtureRequest, tmp_path: Path, made: str, damage: Callable[[Path], None]
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(request.getfixturevalue(made) / "onnx", folder)
    damage(folder)
    renew_manifest(folder)
    result = check(folder)
    assert result.exit_code == 7
    assert EXPERTS in result.stderr


@both
def test_logits_alone_find_swapped_experts(
    request: pytest.FixtureRequest, tmp_path: Path, made: str
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(request.getfixturevalue(made) / "onnx", folder)
    onnx_swap(folder)
    target, recorded = registry.find_target("onnx"), Reference.read(folder)
    with pytest.raises(VerificationFailed, match="logits of the output differ"):
        verify.measure_exact(recorded, target, folder)


def test_a_missing_or_damaged_reference(folders: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(folders / "onnx", folder)
    (folder / REFERENCE).write_bytes(b"nothing")
    renew_manifest(folder)
    assert check(folder).exit_code == 7
    # One that an earlier version wrote, with other notes.
    old = {"ids": torch.zeros(1, 2), "logits": torch.zeros(1, 2, 2)}
    save_file(old, folder / REFERENCE, {"reference": '{"prefill": 1, "probes": {}}'})
    renew_manifest(folder)
    assert check(folder).exit_code == 7
    (folder / REFERENCE).unlink()
    renew_manifest(folder)
    result = check(folder)
    assert result.exit_code == 7
    assert "cannot be verified" in result.stderr


def test_tensors_that_come_or_go(folders: Path) -> None:
    recorded = Reference.read(folders / "onnx")
    pairs = [(name, torch.ones(2)) for name in ("a", "b")]
    small = replace(recorded, digests={name: compute_digest(value) for name, value in pairs})
    assert verify.check_tensors(small, pairs) == 2
    with pytest.raises(VerificationFailed, match="1 tensors are missing, such as b"):
        verify.check_tensors(small, pairs[:1])
    with pytest.raises(VerificationFailed, match="was not exported"):
        verify.check_tensors(small, [*pairs, ("c", torch.ones(2))])
    with pytest.raises(VerificationFailed, match="b does not hold the values"):
        verify.check_tensors(small, [pairs[0], ("b", torch.tensor([1.0, 1.0001]))])


def test_another_model_as_reference_is_refused(tiny: Make, folders: Path) -> None:
    for vocabulary in (52, 200):
        other = tiny("olmoe", vocab_size=vocabulary)
        result = run("verify", str(folders / "gptq"), "--reference", str(other))
        assert result.exit_code == 2, result.output
        assert f"{vocabulary} entries in its vocabulary, the folder has 96" in result.stderr


def test_a_folder_of_links_is_verified_as_the_hub_keeps_it(folders: Path, tmp_path: Path) -> None:
    blobs, folder = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    folder.mkdir()
    for n, path in enumerate(sorted((folders / "onnx").iterdir())):
        shutil.copyfile(path, blobs / f"{n:040x}")
        (folder / path.name).symlink_to(blobs / f"{n:040x}")
    result = check(folder)
    assert result.exit_code == 0, result.output


@pytest.mark.slow
@pytest.mark.parametrize("renew", [False, True])
@pytest.mark.parametrize("target", ["onnx", "gptq"])
def test_the_built_in_model_whole_and_with_one_flipped_bit(
    builtin_out: Path, tmp_path: Path, target: str, renew: bool
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(builtin_out / target, folder)
    if renew:
        assert check(folder).exit_code == 0
    flip(folder / {"onnx": "model.onnx.data", "gptq": "model.safetensors"}[target], 0.6)
    if renew:
        renew_manifest(folder)
    result = check(folder)
    assert result.exit_code == 7
    assert ("does not hold the values" if renew else "has changed: sha256") in result.stderr


# ---- the whole folder ----------------------------------------------------------------------------


def load_attack() -> Any:
    """Import the benchmark that changes every file of an output."""
    path = Path(__file__).parents[1] / "benchmarks" / "attack" / "flip_output.py"
    spec = importlib.util.spec_from_file_location("flip_output", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


attack = load_attack()


@pytest.fixture
def copied(folders: Path, tmp_path: Path) -> Callable[[str], Path]:
    def copy(target: str) -> Path:
        return Path(shutil.copytree(folders / target, tmp_path / target))

    return copy


@pytest.mark.parametrize("target", ["onnx", "gptq"])
def test_one_change_of_each_file_is_found_and_named(folders: Path, target: str) -> None:
    folder, tried = folders / target, set()
    for change in attack.list_changes(folder, 1):
        kind = change.file, change.place.rpartition(" ")[2] in ("changed", "out")
        if attack.is_free(change) or kind in tried:
            continue
        tried.add(kind)
        result = attack.try_change(folder, change)
        assert (result.found, result.named) == (True, True), (change.place, result.message)
    assert {file for file, _ in tried} == set(attack.list_files(folder)) - {
        "README.md", "report.json",
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("target", ["onnx", "gptq"])
def test_every_change_is_found(folders: Path, target: str) -> None:
    changes = list(attack.list_changes(folders / target, 4))
    assert len(changes) > 200
    for change in changes[::3]:
        if not attack.is_free(change):
            result = attack.try_change(folders / target, change)
            assert result.found, (change.file, change.place, result.message)


def test_tables_behind_the_recorded_text(copied: Callable[[str], Path]) -> None:
    folder = copied("onnx")
    change_onnx(folder, "model.rotary_emb.sin", lambda table: table[64:100].fill(0))
    renew_manifest(folder)
    result = check(folder)
    assert result.exit_code == 7
    assert "model.rotary_emb.sin" in result.stderr
    assert "at 36 positions, from 64 to 99" in result.stderr
    # By the runtime alone, which sees the last positions.
    whole = Reference.read(folder)
    verify.measure_exact(whole, registry.find_target("onnx"), folder)
    change_onnx(folder, "model.rotary_emb.sin", lambda table: np.negative(table[112:], table[112:]))
    with pytest.raises(VerificationFailed, match=r"from the reference by .* at position 127"):
        verify.measure_exact(whole, registry.find_target("onnx"), folder)


def test_the_far_end_is_run_where_it_was_recorded(folders: Path) -> None:
    whole, target = Reference.read(folders / "gptq"), registry.find_target("gptq")
    assert whole.far is not None
    assert whole.far.positions.tolist() == [*range(16), *range(112, 128)]
    found = verify.measure_exact(whole, target, folders / "gptq")
    assert found.far is not None
    assert found.far < verify.EXACT_TOLERANCE
    moved = replace(whole, far=replace(whole.far, positions=whole.far.positions - torch.tensor(
        [0] * 16 + [1] * 16)))  # fmt: skip
    for within in (None, 1):  # in its runtime, and block by block
        with pytest.raises(VerificationFailed, match="at position 126"):
            verify.measure_exact(moved, target, folders / "gptq", within)


def change_json(path: Path, *keys: str, to: object) -> None:
    settings = parent = json.loads(path.read_bytes())
    for key in keys[:-1]:
        parent = parent[key]
    parent[keys[-1]] = to
    path.write_text(json.dumps(settings))


@pytest.mark.parametrize(
    ("target", "file", "keys", "value"),
    [
        ("onnx", "genai_config.json", ("model", "context_length"), 99),
        ("onnx", "genai_config.json", ("model", "decoder", "num_hidden_layers"), 4),
        ("gptq", "quantize_config.json", ("bits",), 8),
    ],
)
def test_an_older_output_is_verified_for_what_it_holds(
    copied: Callable[[str], Path], target: str, file: str, keys: tuple[str, ...], value: int
) -> None:
    folder = copied(target)
    attack.forget_record(folder)
    result = run("verify", folder, "--json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)["not_checked"]
    assert any("tokenizer" in line for line in said)
    assert any("far end" in line for line in said)
    assert "not checked: configs, tokenizer" in check(folder).stdout
    change_json(folder / file, *keys, to=value)
    renew_manifest(folder)
    result = check(folder)
    assert result.exit_code == 7
    assert file in result.stderr


def test_sections_of_the_manifest(copied: Callable[[str], Path]) -> None:
    folder = copied("gptq")
    change_json(folder / "manifest.json", "source", "sha256", to="0" * 64)
    change_json(folder / "manifest.json", "target_options", "layout", to="uniform")
    result = check(folder)
    assert result.exit_code == 7
    assert "source in manifest.json is not what was exported" in result.stderr
    assert "target_options in manifest.json is not what was exported" in result.stderr
    (folder / "manifest.json").write_text("{")
    assert check(folder).exit_code == 7


def test_every_part_of_the_reference_is_sealed(copied: Callable[[str], Path]) -> None:
    folder = copied("gptq")
    data = (folder / REFERENCE).read_bytes()
    changes = list(attack.flip_tensors(REFERENCE, data))
    assert {change.part for change in changes} == {
        "ids", "logits", "far.ids", "far.positions", "far.logits",
    }  # fmt: skip
    for key in (b'\\"sha256\\"', b'\\"source_kl\\"', b'\\"record\\"'):
        assert key in data
        changes.append(attack.flip(REFERENCE, data, data.index(key) + 3, 0, "key"))
    for change in changes:
        (folder / REFERENCE).write_bytes(change.content)
        with pytest.raises(VerificationFailed, match=r"moe2edge\.reference"):
            Reference.read(folder)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("ids", "logits of the output differ"),
        ("logits", "logits of the output differ"),
        ("far", "differ from the reference by .* at position 127"),
        ("digests", "does not hold the values that were exported"),
        ("record", "config.json is not the file that was exported"),
    ],
)
def test_a_reference_that_was_written_anew(
    copied: Callable[[str], Path], part: str, message: str
) -> None:
    """Its own digest fits again, and so does the manifest, but not the model."""
    folder = copied("gptq")
    old = Reference.read(folder)
    assert old.far is not None
    assert old.record is not None
    name = min(old.digests)
    changes: dict[str, Any] = {
        "ids": old.ids.roll(1, 1),
        "logits": old.logits + 0.001,
        "far": replace(old.far, logits=old.far.logits + 0.001),
        "digests": {**old.digests, name: "0" * 64},
        "record": replace(old.record, files={**old.record.files, "config.json": "0" * 64}),
    }
    replace(old, **{part: changes[part]}).save(folder)
    renew_manifest(folder)
    with pytest.raises(VerificationFailed, match=message):
        verify.verify_output(folder)


def test_other_ids_of_the_tokenizer(folders: Path) -> None:
    record = Reference.read(folders / "gptq").record
    assert record is not None
    assert record.tokens is not None
    assert record.check_tokenizer(folders / "gptq")
    other = replace(record, tokens=(*record.tokens[:7], 1, *record.tokens[8:]))
    with pytest.raises(VerificationFailed, match=r"other ids .* from token 7 on"):
        other.check_tokenizer(folders / "gptq")
    with pytest.raises(VerificationFailed, match="has no tokenizer"):
        record.check_tokenizer(folders)
    assert not replace(record, tokens=None).check_tokenizer(folders)


def test_files_of_the_hub_and_an_edited_card_are_noted(copied: Callable[[str], Path]) -> None:
    folder = copied("onnx")
    (folder / ".gitattributes").write_text("*.onnx filter=lfs\n")
    (folder / ".cache" / "huggingface").mkdir(parents=True)
    (folder / ".cache" / "huggingface" / ".gitignore").write_text("*")
    (folder / "README.md").write_text("my model")
    result = run("verify", folder, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["notes"] == [
        "README.md was edited since the export",
        ".cache/huggingface/ is not part of the output",
        ".gitattributes is not part of the output",
    ]
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    result = check(folder)
    assert result.exit_code == 7
    assert "chat_template.jinja is not listed in the manifest" in result.stderr


@pytest.mark.parametrize("command", [["generate", "x"], ["evaluate"], ["profile"]])
def test_commands_look_at_sizes_first(copied: Callable[[str], Path], command: list[str]) -> None:
    folder = copied("gptq")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    result = run(command[0], folder, *command[1:])
    assert result.exit_code == 7
    assert "model.safetensors has changed:" in result.stderr


def test_load_looks_at_the_sizes_of_what_it_reads(copied: Callable[[str], Path]) -> None:
    folder = copied("gptq")
    for name in ("report.json", "moe2edge.reference", "tokenizer.json"):
        (folder / name).unlink()  # as in a snapshot of the hub
    load(folder)
    for name, short in (("config.json", b"{}"), ("model.safetensors", b"")):
        path = folder / name
        content = path.read_bytes()
        path.write_bytes(short)
        with pytest.raises(VerificationFailed, match=rf"{name} has changed: {len(short)} bytes"):
            load(folder)
        path.unlink()
        with pytest.raises(VerificationFailed, match=f"{name} is missing; export or download"):
            load(folder)
        path.write_bytes(content)


@pytest.mark.parametrize(
    "changed",
    ["text.txt", "model.safetensors", "touched", "touched text", "reference"],
)
def test_evaluate_compares_what_it_read_at_its_end(
    copied: Callable[[str], Path], tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    changed: str,
) -> None:  # fmt: skip
    folder, text = copied("gptq"), write_text(tmp_path / "text.txt")
    source = Path(shutil.copytree(tiny("olmoe"), tmp_path / "source"))
    path = {"text.txt": text, "touched text": text, "reference": source / "config.json"}.get(
        changed
    )
    path = path or folder / "model.safetensors"
    measure = metrics.measure

    def change(*given: Any) -> Any:
        found = measure(*given)
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(content if "touched" in changed else content[:-1] + b"?")
        return found

    monkeypatch.setattr(metrics, "measure", change)
    sizes = ["--text", text, "--samples", "2", "--length", "32"]
    result = run("evaluate", folder, "--reference", source, *sizes)
    if "touched" in changed:
        assert result.exit_code == 0, result.output
    else:
        assert result.exit_code == 2, result.output
        assert f"{path} has changed since this run began to use it" in result.stderr
        assert "perplexity" not in result.stdout
