"""Output folders: what the manifest holds, what it refuses, and which changes it finds."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from moe2edge.errors import InputError, VerificationFailed
from moe2edge.storage.manifest import (
    check_manifest_files,
    check_sizes,
    is_added_by_systems,
    is_artifact,
    is_read_by_runtimes,
    list_files,
    list_harmless_changes,
    open_artifact,
    write_manifest,
)
from moe2edge.storage.tokenizer import load_tokenizer
from moe2edge.testing import make_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return an output folder with two files, one of them in a folder of its own."""
    out = tmp_path / "out"
    (out / "part").mkdir(parents=True)
    (out / "model.bin").write_bytes(b"weights")
    (out / "part" / "b.txt").write_text("text", "utf-8")
    write_manifest(out, "onnx", model={"experts": 8}, versions={"tool": "1"})
    return out


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")


def test_manifest_holds_every_file_and_section(folder: Path) -> None:
    artifact = open_artifact(folder)
    assert artifact.target == "onnx"
    assert artifact.manifest["model"] == {"experts": 8}
    assert list(artifact.manifest) == [
        "schema_version", "tool", "target", "model", "versions", "files",
    ]  # fmt: skip
    assert artifact.files == {
        "model.bin": {"sha256": hashlib.sha256(b"weights").hexdigest(), "bytes": 7},
        "part/b.txt": {"sha256": hashlib.sha256(b"text").hexdigest(), "bytes": 4},
    }
    assert check_manifest_files(artifact) == []


def test_manifest_is_the_same_when_written_again(folder: Path) -> None:
    before = (folder / "manifest.json").read_bytes()
    write_manifest(folder, "onnx", model={"experts": 8}, versions={"tool": "1"})
    assert (folder / "manifest.json").read_bytes() == before


def test_a_section_cannot_take_the_place_of_the_files(folder: Path) -> None:
    with pytest.raises(ValueError, match="cannot be called files"):
        write_manifest(folder, "onnx", files={})


@pytest.mark.parametrize("position", range(7))
def test_one_changed_byte_is_found(folder: Path, position: int) -> None:
    data = bytearray(b"weights")
    data[position] ^= 1
    (folder / "model.bin").write_bytes(data)
    (found,) = check_manifest_files(open_artifact(folder))
    assert found.startswith("model.bin has changed: sha256")


def test_differences_are_named(folder: Path) -> None:
    (folder / "part" / "b.txt").unlink()
    (folder / "model.bin").write_bytes(b"weight")
    (folder / "adapter_config.json").touch()
    assert check_manifest_files(open_artifact(folder)) == [
        "model.bin has changed: 6 bytes, the manifest says 7",
        "part/b.txt is missing",
        "adapter_config.json is not listed in the manifest, and programs that load this folder "
        "may read it; move it away",
    ]


# Files that make programs load something else than was exported.
READ = (
    "model.safetensors.index.json", "model-00002-of-00002.safetensors", "pytorch_model.bin",
    "consolidated.safetensors", "adapter_model.safetensors", "adapter_config.json",
    "chat_template.jinja", "additional_chat_templates/tool.jinja", "modeling_x.py",
    "custom_generate/generate.py", "genai_config.json", "MODEL.ONNX", "model.onnx.data", "x.gguf",
    "tokenizer.model.v3", "tekken.json", "vocab.txt", "sub/config.json",
)  # fmt: skip
HARMLESS = (
    ".gitattributes", ".gitignore", ".DS_Store", "._model.safetensors", "._config.json",
    "sub/.DS_Store", "Thumbs.db", "desktop.ini", "LICENSE", "NOTICE.txt", "plot.png", "notes.md",
    ".cache/huggingface/.gitignore", ".cache/huggingface/download/config.json.metadata",
)  # fmt: skip


@pytest.mark.parametrize("name", [*READ, *HARMLESS])
def test_an_added_file_matters_if_programs_read_it(folder: Path, name: str) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    artifact = open_artifact(folder)
    found, notes = check_manifest_files(artifact), list_harmless_changes(artifact)
    shown = ".cache/huggingface/" if name.startswith(".cache") else name
    if name in READ:
        assert [line.partition(" ")[0] for line in found] == [name]
        assert notes == []
    else:
        assert found == []
        assert notes == [f"{shown} is not part of the output"]
    assert is_read_by_runtimes(name) == (name in READ)


def test_files_of_the_hub_and_of_systems() -> None:
    added = [name for name in HARMLESS if is_added_by_systems(name)]
    assert added == [
        ".gitattributes", ".DS_Store", "._model.safetensors", "._config.json", "sub/.DS_Store",
        "Thumbs.db", "desktop.ini", ".cache/huggingface/.gitignore",
        ".cache/huggingface/download/config.json.metadata",
    ]  # fmt: skip
    assert not any(is_added_by_systems(name) for name in (*READ, ".git/config", ".cache/x"))


def test_a_clone_and_an_edited_card_are_notes(folder: Path) -> None:
    (folder / "README.md").write_text("card")
    write_manifest(folder, "onnx")
    for name in (".git/HEAD", ".git/refs/config.json"):
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).touch()
    (folder / "README.md").write_text("my words")
    artifact = open_artifact(folder)
    assert check_manifest_files(artifact) == []
    assert list_harmless_changes(artifact) == [
        "README.md was edited since the export",
        ".git/ is not part of the output",
    ]
    (folder / "README.md").unlink()
    assert check_manifest_files(artifact) == []
    assert list_harmless_changes(artifact)[0] == "README.md was removed since the export"


def test_sizes_are_compared_without_reading(folder: Path) -> None:
    check_sizes(open_artifact(folder))
    (folder / "part" / "b.txt").write_text("longer, but no program reads it")
    check_sizes(open_artifact(folder))
    (folder / "model.bin").write_bytes(b"weight")
    with pytest.raises(VerificationFailed, match=r"model\.bin has changed: 6 bytes, the manifest"):
        check_sizes(open_artifact(folder))
    (folder / "model.bin").unlink()
    with pytest.raises(VerificationFailed, match=r"model\.bin is missing; export or download"):
        check_sizes(open_artifact(folder))


def test_a_symbolic_link_to_the_same_bytes_is_the_same_file(folder: Path) -> None:
    (folder / "model.bin").rename(folder.parent / "blob")
    (folder / "model.bin").symlink_to(folder.parent / "blob")
    assert check_manifest_files(open_artifact(folder)) == []
    assert list(list_files(folder)) == ["manifest.json", "model.bin", "part/b.txt"]


NAMES = ("../x", "a/../../x", "/etc/passwd", "C:\\x", "\\x", "..\\x", "C:x", "", ".", "a\0b")


@pytest.mark.parametrize("name", NAMES)
def test_names_that_leave_the_folder_are_refused(folder: Path, name: str) -> None:
    edit(folder, files={name: {"sha256": "0", "bytes": 1}})
    with pytest.raises(InputError, match="not a file inside the folder"):
        open_artifact(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": 2}, "has schema_version 2, this moe2edge reads 1"),
        ({"schema_version": "1"}, "was not written by moe2edge"),
        ({"schema_version": True}, "was not written by moe2edge"),
        ({"tool": "other"}, "was not written by moe2edge"),
        ({"target": None}, "target is None, not a name"),
        ({"files": []}, "has no list of files"),
        ({"files": {"a": {"bytes": 1}}}, "the entry of a has no sha256"),
        ({"files": {"a": {"sha256": "0"}}}, "the entry of a has no bytes"),
        ({"files": {"a": "0"}}, "the entry of a has no sha256"),
    ],
)
def test_bad_manifests(folder: Path, changes: dict[str, Any], message: str) -> None:
    edit(folder, **changes)
    with pytest.raises(InputError, match=message) as caught:
        open_artifact(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[]", b"[" * 100_000, b""])
def test_damaged_json(folder: Path, content: bytes) -> None:
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(InputError, match=r"manifest\.json is damaged"):
        open_artifact(folder)
    assert not is_artifact(folder)


def test_folders_that_are_not_outputs(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no folder"):
        open_artifact(tmp_path / "none")
    with pytest.raises(InputError, match=r"has no manifest\.json: it is not a folder that"):
        open_artifact(tmp_path)
    assert not is_artifact(tmp_path)
    assert not is_artifact(tmp_path / "none")


def test_a_folder_of_outputs_names_them(folder: Path) -> None:
    with pytest.raises(InputError, match=r"it holds the outputs out; name one"):
        open_artifact(folder.parent)


def test_a_folder_of_a_later_version_is_recognized(folder: Path) -> None:
    edit(folder, schema_version=99)
    assert is_artifact(folder)


def test_tokenizer(tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "olmoe"}', "utf-8")
    expected = [ord(character) - 31 for character in "a b"]
    assert load_tokenizer(tmp_path)("a b")["input_ids"] == expected
    # transformers alone would now take the family's usual class, which drops the space.
    (tmp_path / "tokenizer_config.json").unlink()
    assert load_tokenizer(tmp_path)("a b")["input_ids"] == expected


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "has no tokenizer"),
        ({"tokenizer_config.json": '{"tokenizer_class": "LlamaTokenizer"}'}, "has no tokenizer"),
        ({"tokenizer.json": "{"}, r"tokenizer\.json is damaged"),
        ({"tokenizer.json": "{}"}, "cannot be read"),
    ],
)
def test_no_tokenizer(tmp_path: Path, files: dict[str, str], message: str) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "olmoe"}', "utf-8")
    for name, content in files.items():
        (tmp_path / name).write_text(content, "utf-8")
    with pytest.raises(InputError, match=message) as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_code_that_comes_with_a_tokenizer_is_not_run(tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')\nclass Evil: pass\n", "utf-8")
    settings = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": [None, "evil.Evil"]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
    with pytest.raises(InputError, match="cannot be read"):
        load_tokenizer(tmp_path)
