"""Record of an output folder beside its tensors: files, sections of the manifest, tokens.

The manifest lists the digest of each file, so whoever changes a file can change the manifest, too.
The reference therefore repeats the digests, and adds those of the manifest's own sections, and the
ids that the tokenizer gives to a text. The manifest in turn lists the digest of the reference.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe2edge.errors import InputError, VerificationFailed, get_first_line
from moe2edge.storage.manifest import CARD, FILES, MANIFEST, Artifact
from moe2edge.storage.tokenizer import load_tokenizer

# Not named *.safetensors, because loaders of checkpoints read every such file of a folder.
REFERENCE = "moe2edge.reference"
# Files that the reference says nothing about: those that name its digest, the card, which people
# edit, and the report, which holds times and no program reads.
UNRECORDED = frozenset({MANIFEST, REFERENCE, CARD, "report.json"})
# Words, numbers, code, blanks, accents, other scripts, combined characters and control characters.
SAMPLE_TEXT = (
    "The quick brown fox doesn't jump over 1,234.56 lazy dogs; it re-thinks!\n\n"
    "def add(a, b):\n\treturn a + b  # sum\n    if x >= 10**3: y[0] = '\\n'\r\n"
    "Größe, naïve café, ½ €, Ελλάδα, Привет мир, שלום, مرحبا, नमस्ते, 你好，世界。こんにちは 한국어 "
    'e\u0301 \u00a0\u200b👩\u200d🔬🇪🇺   <|endoftext|><s></s>[INST]{"key": null}\u0007'
)


@dataclass(frozen=True)
class FolderRecord:
    """Digests of an output folder, and what its tokenizer does.

    Attributes:
        files: SHA-256 of each file by its relative name, but those in `UNRECORDED`.
        sections: SHA-256 of each value of the manifest but the list of files, by its key.
        text: a text for the tokenizer.
        tokens: its ids; None if the folder has no tokenizer, or it cannot encode the text.
    """

    files: Mapping[str, str]
    sections: Mapping[str, str]
    text: str
    tokens: tuple[int, ...] | None

    @classmethod
    def make(cls, folder: Path, manifest: Mapping[str, Any]) -> FolderRecord:
        """Record a finished folder.

        Args:
            folder: the folder, complete but for manifest and reference.
            manifest: its manifest, which lists its files.
        """
        files = {
            name: entry["sha256"]
            for name, entry in manifest[FILES].items()
            if name not in UNRECORDED
        }
        try:
            tokens = encode_sample(folder, SAMPLE_TEXT)
        except InputError:  # there is no tokenizer, or it knows only a few words
            tokens = None
        return cls(files, _hash_sections(manifest), SAMPLE_TEXT, tokens)

    def list_differences(self, artifact: Artifact) -> dict[str, str]:
        """Return what the manifest says otherwise, in words, by the file or section it is about.

        No file is read: the manifest itself has been compared with them.
        """
        found: dict[str, str] = {}
        for name in sorted((self.files.keys() | artifact.files.keys()) - UNRECORDED):
            if name not in artifact.files:
                found[name] = f"{name} was exported, but the manifest does not list it"
            elif name not in self.files:
                found[name] = f"{name} is in the manifest, but was not exported"
            elif artifact.files[name]["sha256"] != self.files[name]:
                found[name] = f"{name} is not the file that was exported"
        sections = _hash_sections(artifact.manifest)
        for key in sorted(self.sections.keys() | sections.keys()):
            if sections.get(key) != self.sections.get(key):
                found[f"{MANIFEST}: {key}"] = f"{key} in {MANIFEST} is not what was exported"
        return found

    def check_tokenizer(self, folder: Path) -> bool:
        """Encode the recorded text; return False if none was recorded.

        Raises:
            VerificationFailed: the tokenizer cannot be read, or gives other ids than at export.
        """
        if self.tokens is None:
            return False
        try:
            tokens = encode_sample(folder, self.text)
        except InputError as error:
            raise VerificationFailed(str(error)) from error
        if tokens != self.tokens:
            pairs = enumerate(zip(tokens, self.tokens, strict=False))
            place = min(len(tokens), len(self.tokens))
            place = next((n for n, (new, old) in pairs if new != old), place)
            raise VerificationFailed(
                f"the tokenizer gives other ids to the recorded text than at export, from token "
                f"{place} on; use the version of transformers that the manifest names, or export "
                "again"
            )
        return True

    def to_json(self) -> dict[str, Any]:
        """Return the record as plain data."""
        tokens = None if self.tokens is None else list(self.tokens)
        return {
            "files": dict(self.files),
            "sections": dict(self.sections),
            "text": self.text,
            "tokens": tokens,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> FolderRecord:
        """Read what `to_json` returned.

        Raises:
            KeyError, TypeError: it is something else.
        """
        tokens = data["tokens"]
        return cls(
            dict(data["files"]),
            dict(data["sections"]),
            data["text"],
            None if tokens is None else tuple(tokens),
        )


def encode_sample(folder: Path, text: str) -> tuple[int, ...]:
    """Encode a text with the tokenizer of a folder.

    Raises:
        InputError: it has none, it cannot be read, or it has no token for a part of the text.
    """
    tokenizer = load_tokenizer(folder)
    try:
        return tuple(tokenizer(text)["input_ids"])
    # The library raises this type itself, where a vocabulary without a token for the unknown
    # meets something unknown.
    except Exception as error:
        raise InputError(
            f"the tokenizer in {folder} cannot encode the recorded text: {get_first_line(error)}"
        ) from error


def _hash_sections(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Compute the SHA-256 of each value of a manifest but the list of files."""
    return {
        key: hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
        for key, value in manifest.items()
        if key != FILES
    }
