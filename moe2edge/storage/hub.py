"""Models of the Hugging Face Hub: files to download, and what the local cache has of them."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from moe2edge.errors import InputError, get_first_line
from moe2edge.storage.manifest import CARD
from moe2edge.storage.safetensors_files import (
    PlannedTensor,
    refuse_numbers,
    write_hollow_safetensors,
)
from moe2edge.storage.text_files import read_json

# Files of a checkpoint other than its weights, copied into every output.
LICENSES = ("LICENSE", "LICENSE.txt", "LICENSE.md")
COMPANIONS = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja",
    "chat_template.json", "generation_config.json", *LICENSES,
)  # fmt: skip
# Folder of further chat templates, which are copied, too.
TEMPLATES = "additional_chat_templates"

CONFIGS = ("config.json",)
INDEXES = "*.safetensors.index.json"
WEIGHT_FILES = ("*.safetensors", INDEXES)
# Weights in the layout of another program.
OTHER_WEIGHTS = "consolidated"
# Nothing that transformers reads if there is a tokenizer.json.
_VOCABULARIES = frozenset({"tokenizer.model", "vocab.json", "vocab.txt", "merges.txt"})
# Read by transformers only where tokenizer_config.json does not list added tokens.
_ADDED_TOKENS = frozenset({"special_tokens_map.json", "added_tokens.json"})
# Outputs are complete without these.
_SPARE = frozenset({*LICENSES, CARD, "chat_template.json"})


def download(
    name: str, revision: str | None, cache_dir: Path | None, *, offline: bool = False
) -> tuple[Path, str, tuple[str, ...]]:
    """Download what is missing of a hub model to the local cache.

    Args:
        name: ``org/name``.
        revision: branch, tag or commit; None: the main branch.
        cache_dir: the cache; None: that of huggingface_hub.
        offline: look into the cache alone.

    Returns:
        The folder, its commit, and files that the cache lacks while the hub cannot be reached, none
        of which is needed.

    Raises:
        InputError: there is no such model, or the hub cannot be reached and the cache lacks a file
            that is needed.
    """
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder, lacking = _fetch(name, revision, cache_dir, offline=offline)
    except LocalEntryNotFoundError as error:
        raise InputError(
            f"{name} is not in the local cache and the hub cannot be reached; download it first, "
            "or give a local folder"
        ) from error
    except (HfHubHTTPError, HFValidationError) as error:
        raise InputError(
            f"{name} cannot be downloaded from the hub: {get_first_line(error)}"
        ) from error
    return folder, folder.name, lacking


def fetch_headers(
    name: str, revision: str | None, cache_dir: Path | None, place: Path
) -> tuple[Path, str]:
    """Make a checkpoint without numbers of a hub model, of whose weights only headers are fetched.

    Config, tokenizer and card go to the local cache, as `download` leaves them there. A model that
    the hub cannot be asked for is looked for in the cache.

    Args:
        name: ``org/name``.
        revision: branch, tag or commit; None: the main branch.
        cache_dir: the cache; None: that of huggingface_hub.
        place: empty folder for the checkpoint.

    Returns:
        The folder of the checkpoint, ``place`` or one of the cache, and its commit.

    Raises:
        InputError: there is no such model, it has no safetensors, or the hub cannot be reached and
            the cache lacks a file that is needed.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        NotASafetensorsRepoError,
        OfflineModeIsEnabled,
        SafetensorsParsingError,
    )

    # Every error of the library's HTTP client, whichever that is in its version.
    client_errors: Any = HfHubHTTPError.__bases__
    try:
        commit = str(HfApi().model_info(name, revision=revision).sha)
        snapshot = snapshot_download(
            name,
            revision=commit,
            cache_dir=cache_dir,
            allow_patterns=[*CONFIGS, *COMPANIONS, CARD, INDEXES],
            ignore_patterns=["*/*", f"{OTHER_WEIGHTS}*"],
        )
        _download_templates(name, Path(snapshot), cache_dir)
        headers = HfApi().get_safetensors_metadata(name, revision=commit).files_metadata
    except (NotASafetensorsRepoError, SafetensorsParsingError) as error:
        raise InputError(f"{name} has no weights to look at: {get_first_line(error)}") from error
    except (HfHubHTTPError, HFValidationError) as error:
        raise InputError(
            f"{name} cannot be looked at on the hub: {get_first_line(error)}"
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, *client_errors):
        return download(name, revision, cache_dir, offline=True)[:2]
    shutil.copytree(snapshot, place, dirs_exist_ok=True)
    for file, header in headers.items():
        tensors = sorted(header.tensors.items(), key=lambda item: item[1].data_offsets)
        planned = [
            PlannedTensor(each, tuple(info.shape), info.dtype, refuse_numbers)
            for each, info in tensors
        ]
        write_hollow_safetensors(place / Path(file).name, planned)
    return place, commit


def _fetch(
    name: str, revision: str | None, cache_dir: Path | None, *, offline: bool
) -> tuple[Path, tuple[str, ...]]:
    """Download a snapshot, or find it in the cache; return its folder and what it lacks."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = snapshot_download(
            name,
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=offline,
            allow_patterns=[*CONFIGS, *WEIGHT_FILES, *COMPANIONS, CARD],
            # A star matches slashes, too; weights in other layouts would be downloaded in vain.
            ignore_patterns=["*/*", f"{OTHER_WEIGHTS}*"],
        )
        if not offline:
            _download_templates(name, Path(folder), cache_dir)
        return Path(folder), ()
    except LocalEntryNotFoundError as error:
        # Only newer versions know what a snapshot lacks, and then where it is.
        place = getattr(error, "snapshot_path", None)
        if place is None:
            raise
        return Path(place), _list_lacking(name, Path(place), cache_dir)


def get_hub_id(folder: Path) -> str | None:
    """Return the id of the model in a folder of the hub's cache; None for any other folder."""
    place = folder.resolve()
    kind, *names = place.parent.parent.name.split("--")
    if place.parent.name != "snapshots" or kind != "models" or len(names) != 2:
        return None
    return "/".join(names)


def _download_templates(name: str, folder: Path, cache_dir: Path | None) -> None:
    """Download further chat templates, which patterns cannot choose together with the rest."""
    from huggingface_hub import snapshot_download

    tree = _list_tree(name, folder, cache_dir)
    if tree is None or any(path.startswith(f"{TEMPLATES}/") for path in tree):
        snapshot_download(
            name,
            revision=folder.name,
            cache_dir=cache_dir,
            allow_patterns=[f"{TEMPLATES}/*.jinja"],
        )


def _list_tree(name: str, folder: Path, cache_dir: Path | None) -> set[str] | None:
    """List the files of a commit, as they were when the hub was reached; None if not known."""
    try:
        from huggingface_hub import get_cached_repo_tree
        from huggingface_hub.errors import CachedRepoTreeNotFoundError
    except ImportError:  # older versions do not keep it
        return None
    try:
        tree = get_cached_repo_tree(name, revision=folder.name, cache_dir=cache_dir)
    except CachedRepoTreeNotFoundError:
        return None
    return {file.path for file in tree}


def _list_lacking(name: str, folder: Path, cache_dir: Path | None) -> tuple[str, ...]:
    """List the files that a snapshot lacks, if it can be used without them.

    Raises:
        InputError: it cannot; all that are needed are named.
    """
    tree = _list_tree(name, folder, cache_dir) or set()
    missing = sorted(path for path in tree if _is_wanted(path) and not (folder / path).exists())
    if needed := [path for path in missing if _is_needed(path, folder, tree)]:
        shown = ", ".join(needed[:5]) + (f" and {len(needed) - 5} more" if needed[5:] else "")
        raise InputError(
            f"{name} is in the local cache without {shown}, and the hub cannot be reached; "
            f"complete it where there is a connection: hf download {name}"
        )
    return tuple(missing)


def _is_wanted(path: str) -> bool:
    if "/" in path:
        return path.startswith(f"{TEMPLATES}/") and path.endswith(".jinja")
    if path in (*CONFIGS, *COMPANIONS, CARD):
        return True
    return _is_of_weights(path) and not path.startswith(OTHER_WEIGHTS)


def _is_of_weights(path: str) -> bool:
    return any(fnmatchcase(path, pattern) for pattern in WEIGHT_FILES)


def _is_needed(path: str, folder: Path, tree: Collection[str]) -> bool:
    """Return whether a model cannot be used as it is meant without a file of it."""
    if path in _SPARE:
        return False
    if path in _VOCABULARIES:
        return "tokenizer.json" not in tree
    if path in _ADDED_TOKENS:
        config = folder / "tokenizer_config.json"
        return not config.exists() or "added_tokens_decoder" not in read_json(config)
    if _is_of_weights(path):
        return not (folder / "model.safetensors").exists()
    return True
