"""Files that the disk changes between writing and the manifest: found, and the disk is named."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import NO_CHECK, TEXT, export, run
from moe2edge.commands import decide as deciding
from moe2edge.commands import report
from moe2edge.commands.trial import try_targets
from moe2edge.errors import DiskFailed, InputError
from moe2edge.model.model import Model
from moe2edge.numerics.scheme import Scheme
from moe2edge.pipeline.registry import make_target
from moe2edge.storage import safetensors_files
from moe2edge.storage.checkpoint import open_checkpoint
from moe2edge.storage.companions import read_companions
from moe2edge.storage.manifest import build_manifest, list_files
from moe2edge.storage.safetensors_files import PlannedTensor, write_checkpoint
from moe2edge.storage.text_files import write_json
from moe2edge.storage.written_files import FileDigest, blame_disk
from moe2edge.targets.hf import Hf
from moe2edge.testing import Make, quantize

NOT_WRITTEN = "is not what was written to it; check the disk, and run the same command again"


def flip(path: Path, place: int = -1) -> None:
    """Change one bit of a file."""
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("seed", range(5))
def test_pieces_in_any_order_have_the_digest_of_the_file(seed: int) -> None:
    draw = random.Random(seed)
    content = bytearray(200_000)
    digest, end = FileDigest(), 0
    for _ in range(6):  # runs of pieces that come in any order, with zeros between them
        end += draw.choice([0, 7, 20_000])
        digest.settle(end)
        pieces = []
        for _ in range(draw.randrange(1, 5)):
            pieces.append((end, draw.randbytes(draw.randrange(1, 3000))))
            end += len(pieces[-1][1])
        for start, data in draw.sample(pieces, len(pieces)):
            content[start : start + len(data)] = data
            digest.add(start, memoryview(data))
    assert digest.finish(len(content)) == hashlib.sha256(content).hexdigest()


# Targets with their options, and the scheme of what they hold.
FORMS: tuple[tuple[str, dict[str, Any], Scheme | None], ...] = (
    ("hf", {}, None),
    ("onnx", {}, None),
    ("onnx", {}, Scheme(4, 32, True)),
    ("onnx", {}, Scheme(2, 16, False)),
    ("gptq", {}, Scheme(4, 32, True)),
)


@pytest.mark.parametrize(("name", "options", "scheme"), FORMS)
def test_targets_return_the_digest_of_each_file(
    tiny: Make, tmp_path: Path, name: str, options: dict[str, Any], scheme: Scheme | None
) -> None:
    checkpoint = open_checkpoint(str(tiny("qwen2_moe")))
    model: Model = checkpoint.model if scheme is None else quantize(checkpoint.model, scheme)
    digests = read_companions(checkpoint).write(tmp_path)
    digests |= make_target(name, options).write(model, tmp_path)
    read_back = build_manifest(tmp_path, name)["files"]
    assert {file: entry["sha256"] for file, entry in read_back.items()} == digests
    assert build_manifest(tmp_path, name, digests)["files"] == read_back
    for file, path in list_files(tmp_path).items():
        flip(path)
        with pytest.raises(DiskFailed, match=f"{file} {NOT_WRITTEN}") as caught:
            build_manifest(tmp_path, name, digests)
        assert caught.value.exit_code == 1
        flip(path)


def test_shards_and_their_index_have_digests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safetensors_files, "SHARD_BYTES", 100)
    plan = [PlannedTensor(f"t{n}", (20,), "F32", lambda: torch.ones(20)) for n in range(3)]
    digests = write_checkpoint(tmp_path, plan)
    assert len(digests) == 4
    read_back = build_manifest(tmp_path, "hf", digests)["files"]
    assert {file: entry["sha256"] for file, entry in read_back.items()} == digests


def test_a_file_that_is_gone_is_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        build_manifest(tmp_path, "hf", {"config.json": "0" * 64})


def test_the_disk_is_named_before_what_it_caused(tmp_path: Path) -> None:
    def check(fails: bool) -> None:
        with blame_disk(tmp_path, {"a": hashlib.sha256(b"meant").hexdigest()}):
            if fails:
                raise InputError("a is damaged")

    (tmp_path / "a").write_bytes(b"meant")
    with pytest.raises(InputError, match="a is damaged"):
        check(True)
    (tmp_path / "a").write_bytes(b"other")
    with pytest.raises(DiskFailed, match=NOT_WRITTEN):
        check(True)
    check(False)  # that is for the manifest


Hook = Callable[..., Any]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_an_export_that_the_disk_changes_has_no_output(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Right after writing, where a check may stumble over it, or behind all checks."""
    write: Hook = Hf.write
    build: Hook = build_manifest

    def write_badly(target: Hf, model: Model, folder: Path) -> Any:
        digests = write(target, model, folder)
        if folder.parent == at:
            flip(folder / name, 1)
        return digests

    def build_late(folder: Path, *given: Any, **sections: Any) -> Any:
        flip(folder / name)
        return build(folder, *given, **sections)

    model, out = tiny("olmoe"), tmp_path / "out"
    steps = [{"expert_drop": {"keep": 4, "criterion": "random"}}]
    at = out.with_name("out.partial")
    for place, hook, bad in ((Hf, "write", write_badly), (report, "build_manifest", build_late)):
        with monkeypatch.context() as patch:
            patch.setattr(place, hook, bad)
            code, stderr, _ = export(model, out, steps, "hf", "--eval", "none")
        assert code == 1, stderr
        assert f"{name} {NOT_WRITTEN}" in stderr
        assert not (tmp_path / "out").exists()
        assert not (tmp_path / "out.partial").exists()


def test_the_disk_of_temporary_files_is_named(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    write: Hook = Hf.write

    def write_badly(target: Hf, model: Model, folder: Path) -> Any:
        digests = write(target, model, folder)
        flip(folder / "model.safetensors", 1)
        return digests

    monkeypatch.setattr(Hf, "write", write_badly)
    with pytest.raises(DiskFailed, match=NOT_WRITTEN):
        try_targets([Hf()], open_checkpoint(str(tiny("olmoe", hidden_size=96))).model)


def test_decisions_that_the_disk_changes_are_not_kept(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write: Hook = write_json

    def write_badly(path: Path, data: object) -> Any:
        digest = write(path, data)
        flip(path)
        return digest

    monkeypatch.setattr(deciding, "write_json", write_badly)
    recipe = tmp_path / "r.yaml"
    recipe.write_text("passes: [{expert_drop: {keep: 4, criterion: random}}]")
    out = tmp_path / "d.json"
    result = run("decide", tiny("olmoe"), "-r", recipe, "-o", out, *TEXT, NO_CHECK)
    assert result.exit_code == 1
    assert NOT_WRITTEN in result.stderr
    assert not out.exists()
