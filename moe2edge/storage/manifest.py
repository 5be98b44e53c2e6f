"""Manifest of an output folder, and the check that no file of the folder has changed.

The manifest marks a folder as written by moe2edge.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from moe2edge.errors import InputError, VerificationFailed
from moe2edge.storage.text_files import hash_file, read_json, write_json
from moe2edge.storage.written_files import hash_written

MANIFEST = "manifest.json"
MANIFEST_VERSION = 1
TOOL = "moe2edge"
# The model card; whoever publishes an output may edit it.
CARD = "README.md"
# Files and folders that the hub, its clients and operating systems add to a folder.
SYSTEM_FILES = (
    ".gitattributes", ".cache/huggingface/*", ".DS_Store", "._*", "Thumbs.db", "desktop.ini",
)  # fmt: skip
# Folders of which only the first is named where their files are listed.
SYSTEM_FOLDERS = (".git/", ".cache/huggingface/")
# Names that programs look for in the folder of a model: weights and their indexes, graphs,
# adapters, configs, tokenizers, chat templates and code.
RUNTIME_FILES = (
    "*.safetensors", "*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt", "*.h5", "*.msgpack", "*.ot",
    "*.npz", "*.npy", "*.gguf", "*.ggml", "*.onnx", "*.onnx.*", "*.onnx_data*", "*.data", "*.ort",
    "*.json", "*.jinja", "*.jinja2", "*.model", "*.tiktoken", "*.bpe", "*.spm", "tokenizer*",
    "tekken*", "vocab*", "merges*", "adapter*", "*.py", "*.pyc", "*.so", "*.dll", "*.pyd",
    "*.dylib", "*.reference",
)  # fmt: skip

# Key of the list of files.
FILES = "files"
_RESERVED_KEYS = frozenset({"schema_version", "tool", "target", FILES})


@dataclass(frozen=True)
class Artifact:
    """Folder that moe2edge wrote.

    Attributes:
        folder: its path.
        target: name of the target that wrote it and can reopen it.
        manifest: content of ``manifest.json``.
    """

    folder: Path
    target: str
    manifest: Mapping[str, Any]

    @property
    def options(self) -> Mapping[str, Any]:
        """Options of the target that the folder was written with; older outputs have none."""
        options: Mapping[str, Any] = self.manifest.get("target_options", {})
        return options

    @property
    def source(self) -> str:
        """The model that it was made of, as the user named it; empty if it does not say."""
        source = self.manifest.get("source")
        name = source.get("model") if isinstance(source, dict) else None
        return name if isinstance(name, str) else ""

    @property
    def files(self) -> Mapping[str, Mapping[str, Any]]:
        """``sha256`` and ``bytes`` of each file, by its name relative to the folder."""
        files: Mapping[str, Mapping[str, Any]] = self.manifest["files"]
        return files


def open_artifact(folder: Path) -> Artifact:
    """Open a folder that moe2edge wrote.

    This reads only the manifest; `check_manifest_files` reads the rest.

    Raises:
        InputError: there is no such folder, or its manifest is missing, damaged, of another
            version, or names files outside of the folder.
    """
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}; name a folder that moe2edge export wrote")
    if not (folder / MANIFEST).is_file():
        raise InputError(f"{folder} has no {MANIFEST}: {_suggest_folder(folder)}")
    manifest = read_json(folder / MANIFEST)
    version = manifest.get("schema_version")
    if manifest.get("tool") != TOOL or type(version) is not int:
        raise InputError(f"{folder / MANIFEST} was not written by moe2edge; name another folder")
    if version != MANIFEST_VERSION:
        raise InputError(
            f"{folder / MANIFEST} has schema_version {version}, this moe2edge reads "
            f"{MANIFEST_VERSION}: use the moe2edge that wrote it, or export again"
        )
    target = manifest.get("target")
    if not isinstance(target, str):
        raise _make_damage_error(folder / MANIFEST, f"target is {target!r}, not a name")
    if not isinstance(manifest.get("target_options", {}), dict):
        raise _make_damage_error(folder / MANIFEST, "target_options is not a mapping")
    files = manifest.get("files")
    if not isinstance(files, dict):
        raise _make_damage_error(folder / MANIFEST, "it has no list of files")
    for name, entry in files.items():
        _check_entry(folder / MANIFEST, name, entry)
    return Artifact(folder, target, manifest)


def is_artifact(folder: Path) -> bool:
    """Return whether moe2edge (of any version) wrote this folder, so that it may be replaced."""
    try:
        return read_json(folder / MANIFEST).get("tool") == TOOL
    except InputError:
        return False


def write_manifest(folder: Path, target: str, **sections: object) -> None:
    """Hash every file of ``folder`` and write ``manifest.json``; see `build_manifest`."""
    write_json(folder / MANIFEST, build_manifest(folder, target, **sections))


def build_manifest(
    folder: Path, target: str, written: Mapping[str, str] | None = None, /, **sections: object
) -> dict[str, Any]:
    """Hash every file of ``folder`` and build the content of ``manifest.json``.

    Names are sorted, and there are no time stamps.

    Args:
        folder: a finished output folder; an old manifest in it does not count.
        target: name of the target that wrote it.
        written: digests of what was to be written, by the names of files, as far as known.
        sections: further top-level keys (``model``, ``source``, ``versions``), JSON values.

    Raises:
        DiskFailed: the disk gives back something else than was written.
        ValueError: a section has the name of a key that the manifest always has.
    """
    if reserved := _RESERVED_KEYS & set(sections):
        raise ValueError(f"a section cannot be called {min(reserved)}: every manifest has that key")
    written = written or {}
    names = sorted((list_files(folder).keys() | written.keys()) - {MANIFEST})
    files = {name: describe_file(folder / name, written.get(name)) for name in names}
    manifest = {"schema_version": MANIFEST_VERSION, "tool": TOOL, "target": target}
    return {**manifest, **sections, FILES: files}


def describe_file(path: Path, sha256: str | None = None) -> dict[str, Any]:
    """Return the entry of a file in the list of files; see `hash_written`."""
    return {"sha256": hash_written(path, sha256), "bytes": path.stat().st_size}


def check_manifest_files(artifact: Artifact) -> list[str]:
    """Compare the files with the manifest; return the differences in words.

    An edited card is none, nor is a file that the manifest does not list and no program reads; see
    `list_harmless_changes`.
    """
    differences = []
    paths = list_files(artifact.folder)
    for name, entry in sorted(artifact.files.items()):
        if name == CARD:
            continue
        path = paths.get(name)
        if path is None:
            differences.append(f"{name} is missing")
        elif difference := _compare_size(name, path, entry):
            differences.append(difference)
        elif (digest := hash_file(path)) != entry["sha256"]:
            differences.append(
                f"{name} has changed: sha256 {digest[:12]}..., "
                f"the manifest says {entry['sha256'][:12]}..."
            )
    unlisted = sorted(set(paths) - set(artifact.files) - {MANIFEST})
    return differences + [
        f"{name} is not listed in the manifest, and programs that load this folder may read it; "
        "move it away"
        for name in unlisted
        if is_read_by_runtimes(name)
    ]


def list_harmless_changes(artifact: Artifact) -> list[str]:
    """List, in words, the changes of a folder that do not change the model."""
    notes = []
    paths = list_files(artifact.folder)
    if CARD in artifact.files:
        if CARD not in paths:
            notes.append(f"{CARD} was removed since the export")
        elif hash_file(paths[CARD]) != artifact.files[CARD]["sha256"]:
            notes.append(f"{CARD} was edited since the export")
    unlisted = {
        next((folder for folder in SYSTEM_FOLDERS if name.startswith(folder)), name)
        for name in set(paths) - set(artifact.files) - {MANIFEST}
        if not is_read_by_runtimes(name)
    }
    return notes + [f"{name} is not part of the output" for name in sorted(unlisted)]


def check_sizes(artifact: Artifact, only: Collection[str] = ("*",)) -> None:
    """Compare the sizes of the files that programs read with the manifest; nothing is read.

    Args:
        artifact: the folder.
        only: patterns of the files to look at.

    Raises:
        VerificationFailed: a file is missing or has another size.
    """
    for name, entry in sorted(artifact.files.items()):
        wanted = any(fnmatchcase(name, pattern) for pattern in only)
        if not (wanted and is_read_by_runtimes(name)):
            continue
        path = artifact.folder / name
        difference = f"{name} is missing"
        if path.is_file():
            difference = _compare_size(name, path, entry)
        if difference:
            raise VerificationFailed(
                f"{artifact.folder}: {difference}; export or download it again"
            )


def is_read_by_runtimes(name: str) -> bool:
    """Test if programs that load the folder of a model may read a file of this relative name."""
    inside_system_folder = name.startswith(SYSTEM_FOLDERS)
    return not (inside_system_folder or is_added_by_systems(name)) and any(
        fnmatchcase(PurePosixPath(name).name.lower(), pattern) for pattern in RUNTIME_FILES
    )


def is_added_by_systems(name: str) -> bool:
    """Test if the hub or an operating system adds a file of this relative name to folders."""
    return any(
        fnmatchcase(name if "/" in pattern else PurePosixPath(name).name, pattern)
        for pattern in SYSTEM_FILES
    )


def _compare_size(name: str, path: Path, entry: Mapping[str, Any]) -> str:
    """Compare the size of a file with its entry; return the difference in words, else nothing."""
    if (size := path.stat().st_size) == entry["bytes"]:
        return ""
    return f"{name} has changed: {size} bytes, the manifest says {entry['bytes']}"


def list_files(folder: Path) -> dict[str, Path]:
    """List every file below ``folder`` by its relative name with forward slashes, sorted."""
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*")}
    return {name: paths[name] for name in sorted(paths) if paths[name].is_file()}


def _make_damage_error(path: Path, why: str) -> InputError:
    return InputError(f"{path} is damaged ({why}); export or download it again")


def _check_entry(manifest: Path, name: str, entry: object) -> None:
    """Refuse a name that leaves the folder, on any system, or an entry that is incomplete."""
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    leaves = (
        not posix.parts
        or ".." in windows.parts
        or posix.is_absolute()
        or bool(windows.drive or windows.root)
        or "\0" in name
    )
    if leaves:
        raise InputError(
            f"{manifest} names {name!r}, which is not a file inside the folder; "
            "do not trust this folder, export again"
        )
    if not isinstance(entry, dict) or not isinstance(entry.get("sha256"), str):
        raise _make_damage_error(manifest, f"the entry of {name} has no sha256")
    if type(entry.get("bytes")) is not int:
        raise _make_damage_error(manifest, f"the entry of {name} has no bytes")


def _suggest_folder(folder: Path) -> str:
    """Say what to do with a folder that is not an output folder."""
    outputs = [child.name for child in sorted(folder.iterdir()) if is_artifact(child)]
    if outputs:
        return f"it holds the outputs {', '.join(outputs)}; name one of them"
    return "it is not a folder that moe2edge export wrote; name one that is"
