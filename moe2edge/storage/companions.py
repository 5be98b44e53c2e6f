"""Files of a checkpoint other than its weights: read and judged once, before any work.

Outputs are written from what was read here. Whatever is wrong with one of the files is an error, or
a note where outputs can do without.
"""

from __future__ import annotations

import codecs
import errno
import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from moe2edge.errors import InputError, get_first_line
from moe2edge.storage import tokenizer as tokenizers
from moe2edge.storage.checkpoint import Checkpoint
from moe2edge.storage.generation_config import (
    GENERATION_CONFIG,
    list_foreign_ids,
    read_generation_config,
)
from moe2edge.storage.hub import COMPANIONS, LICENSES, TEMPLATES
from moe2edge.storage.manifest import CARD
from moe2edge.storage.text_files import (
    find_read_remedy,
    read_bytes,
    read_json,
    read_yaml,
    write_bytes,
)

CHAT_TEMPLATE = "chat_template.jinja"
# Processors read it; tokenizers do not.
OLD_TEMPLATE = "chat_template.json"
# Two names of one class; transformers 5 writes the first, and release 4 does not know it.
NEW_CLASS, OLD_CLASS = "TokenizersBackend", "PreTrainedTokenizerFast"
# What the class asks for in release 5. Release 4 adds token_type_ids, which models of text refuse.
INPUT_NAMES = b'"model_input_names": ["input_ids", "attention_mask"]'
_NEW_CLASS = re.compile(rb'("tokenizer_class"\s*:\s*)"%s"' % NEW_CLASS.encode())
# Other files than vocabularies, in bytes.
LARGEST_TEXT = 16 << 20
MOST_FILES = 100 + len(COMPANIONS)
# Content of small files is kept in memory; of the others the digest.
KEPT = 1 << 20
# Front matter of a card; it is read by a slow parser.
LARGEST_FRONT_MATTER = 64 << 10
LICENSE_KEYS = ("license", "license_name", "license_link")
_FRONT_MATTER = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt")


@dataclass(frozen=True)
class Companion:
    """One file for the outputs.

    Attributes:
        name: name in the folder, with forward slashes.
        path: the file of the source.
        sha256: digest of its content when it was judged.
        content: what to write; None: what the file holds, which is larger.
    """

    name: str
    path: Path
    sha256: str
    content: bytes | None


@dataclass(frozen=True)
class Companions:
    """The files of a model beside config and weights, as outputs get them.

    Attributes:
        files: the files that outputs get.
        license: license keys of the source's card.
        notes: what a user should know about them, one line each.
    """

    files: tuple[Companion, ...] = ()
    license: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def write(self, folder: Path) -> dict[str, str]:
        """Write all files into an output folder; return the SHA-256 of each, by name.

        Raises:
            InputError: a file of the source is gone, or is another than was judged.
        """
        written = {}
        for file in self.files:
            target = folder / file.name
            target.parent.mkdir(exist_ok=True)
            content = file.content
            if content is None:
                content = read_bytes(file.path, tokenizers.LARGEST_VOCABULARY)
                if _hash(content) != file.sha256:
                    raise InputError(
                        f"{file.path} changed while the export ran; run the same command again"
                    )
            written[file.name] = write_bytes(target, content)
        return written

    @property
    def sha256(self) -> str:
        """Digest over all that outputs get of them."""
        parts = [
            f"{file.name} {file.sha256 if file.content is None else _hash(file.content)}"
            for file in self.files
        ]
        return _hash(json.dumps([*parts, self.license, self.notes]).encode())

    def get(self, name: str) -> Companion | None:
        """Return a file by its name, if there is one."""
        return next((file for file in self.files if file.name == name), None)


def read_companions(checkpoint: Checkpoint) -> Companions:
    """Read and judge the files of a checkpoint beside config and weights.

    Raises:
        InputError: one that outputs need is damaged, too large, no regular file, or a link that
            leads out of the checkpoint.
    """
    folder = checkpoint.folder
    model = checkpoint.model
    vocabulary = model.family.geometry(model.config).vocab
    notes = []
    if checkpoint.lacking:
        notes.append(f"the local cache lacks {', '.join(checkpoint.lacking)}; outputs do without")
    files, left_out = _collect(folder)
    found = Companions(files, notes=(*notes, *left_out))
    notes = _judge_ids(checkpoint.config, "config.json", vocabulary)
    notes += _judge_ids(read_generation_config(folder), GENERATION_CONFIG, vocabulary)
    if tokenizers.has_tokenizer(folder):
        loaded = tokenizers.load_tokenizer(folder)
        notes += _judge_tokenizer(loaded, folder, vocabulary)
        found = _settle_class(_settle_templates(found, loaded))
    licenses, reason = _read_license(folder)
    notes += [reason] if reason else []
    return replace(found, license=licenses, notes=(*found.notes, *notes))


# ---- reading -----------------------------------------------------------------------------------


def list_companions(folder: Path) -> list[Path]:
    """List the files of a checkpoint that outputs get, those that are not read left out."""
    return [
        folder / name
        for name in _list_names(folder)
        if not find_fault(folder, folder / name)
        and (folder / name).stat().st_size <= _find_limit(name)
    ]


def _list_names(folder: Path) -> list[str]:
    """List what there is by the name of a companion, whether or not it can be read."""
    names = [name for name in COMPANIONS if os.path.lexists(folder / name)]
    templates = sorted(path.name for path in (folder / TEMPLATES).glob("*.jinja"))
    return names + [f"{TEMPLATES}/{name}" for name in templates]


def _collect(folder: Path) -> tuple[tuple[Companion, ...], list[str]]:
    """Read the files; return them, and what is left out in words.

    Raises:
        InputError: one that outputs need cannot be read.
    """
    place = folder / TEMPLATES
    if os.path.lexists(place) and (reason := find_fault(folder, place, folder_wanted=True)):
        raise InputError(f"{TEMPLATES} in {folder} {reason}")
    names = _list_names(folder)
    if len(names) > MOST_FILES:
        raise InputError(
            f"{place} has more than {MOST_FILES - len(COMPANIONS)} templates; remove some"
        )
    files, left_out = [], []
    for name in names:
        if reason := find_fault(folder, folder / name):
            if name not in LICENSES:
                shown = name if name.isprintable() else repr(name)
                raise InputError(f"{shown} in {folder} {reason}")
            left_out.append(f"{name} {reason.partition(';')[0]}; outputs do without")
            continue
        try:
            files.append(_read(folder, name))
        except InputError as error:
            if name not in LICENSES:
                raise
            left_out.append(f"{str(error).partition(';')[0]}; outputs do without")
    return tuple(files), left_out


def find_fault(folder: Path, path: Path, *, folder_wanted: bool = False) -> str:
    """Say why a file of a checkpoint is not read, and what to do; empty if it is.

    A link may lead to another place in the folder, or to the blobs of the hub's cache if that is
    where the folder lies; elsewhere may be anything that a user can read.
    """
    try:
        inside, real = folder.resolve(), path.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        if not isinstance(error, OSError) or error.errno in (errno.ENOENT, errno.ENOTDIR):
            return "is a link that leads nowhere; download it again"
        return f"cannot be read: {error.strerror or error}; {find_read_remedy(error)}"
    blobs = inside.parents[1] / "blobs" if inside.parent.name == "snapshots" else inside
    if not (real.is_relative_to(inside) or real.is_relative_to(blobs)):
        return "is a link that leads out of the folder; put the file itself in its place"
    if folder_wanted:
        return "" if real.is_dir() else "is not a folder; remove it"
    return "" if real.is_file() else "is not a regular file; put a file in its place"


def _find_limit(name: str) -> int:
    """Return the bytes that a file may have."""
    return tokenizers.LARGEST_VOCABULARY if name in VOCABULARY_FILES else LARGEST_TEXT


def _read(folder: Path, name: str) -> Companion:
    """Read one file, and parse what should be JSON or text.

    Raises:
        InputError: it is damaged.
    """
    path = folder / name
    data = read_bytes(path, _find_limit(name))
    if name.endswith(".json"):
        read_json(path)
    elif name.endswith(".jinja"):
        try:
            data.decode()
        except UnicodeDecodeError as error:
            raise InputError(
                f"{path} is damaged ({error}); it has to be UTF-8: download it again"
            ) from error
    return Companion(name, path, _hash(data), data if len(data) <= KEPT else None)


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# ---- tokens and tokenizer ------------------------------------------------------------------------


def _judge_ids(settings: Mapping[str, Any], place: str, vocabulary: int) -> list[str]:
    """Name special tokens of a config that the model does not have."""
    said = []
    for key, ids in list_foreign_ids(settings, vocabulary).items():
        shown = ", ".join(map(str, ids[:5]))
        effect = {
            "pad_token_id": "padding changes no logits"
            + (", and outputs have no such key" if place == "config.json" else ""),
            "eos_token_id": "the model never gives it, so it ends no text",
        }
        said.append(
            f"{key} in {place} is {shown}, but the vocabulary of the model has {vocabulary} "
            f"entries: {effect.get(key, 'a prompt cannot use it')}"
        )
    return said


def _judge_tokenizer(loaded: Any, folder: Path, vocabulary: int) -> list[str]:
    """Say where a tokenizer does not fit its model or its own files."""
    said = []
    settings = _read_settings(folder)
    if code := settings.get("auto_map"):
        names = code.values() if isinstance(code, dict) else code if isinstance(code, list) else ()
        shown = next((repr(str(name)[:80]) for name in _flatten(names)), "auto_map")
        said.append(
            f"{tokenizers.CONFIG} names code of its own ({shown}), which is never executed; ids "
            f"are those of {type(loaded).__name__}"
        )
    if foreign := tokenizers.find_foreign_tokens(loaded, vocabulary):
        shown = ", ".join(repr(token[:40]) for token in foreign[:5])
        shown += f" and {len(foreign) - 5} more" if len(foreign) > 5 else ""
        said.append(
            f"the tokenizer has {len(foreign)} tokens that the model has not ({vocabulary} "
            f"entries): {shown}; a text or prompt with one of them is refused"
        )
    return said + tokenizers.compare_readers(loaded, folder)


def _flatten(names: Any) -> list[Any]:
    flat: list[Any] = []
    for name in names:
        flat += [one for one in name if one] if isinstance(name, list) else [name]
    return flat


def _read_settings(folder: Path) -> Mapping[str, Any]:
    path = folder / tokenizers.CONFIG
    return read_json(path) if path.exists() else {}


# ---- chat templates ------------------------------------------------------------------------------


def _settle_templates(found: Companions, loaded: Any) -> Companions:
    """Keep the chat templates that transformers uses, in one place, and say what is left out.

    Files of their own count before ``tokenizer_config.json`` for transformers.
    """
    used = _name_templates(loaded.chat_template)
    notes = [
        f"the chat template{'' if name == 'default' else f' {name[:40]!r}'} has a fault: {reason}; "
        "prompts have to be given without it (--no-chat)"
        for name, template in used.items()
        if (reason := _find_template_fault(template))
    ]
    files = list(found.files)
    in_files = any(file.name.endswith(".jinja") for file in files)
    config, old = found.get(tokenizers.CONFIG), found.get(OLD_TEMPLATE)
    if in_files and config is not None:
        settings = dict(read_json(config.path))
        other = settings.pop("chat_template", None)
        if other is not None and _name_templates(other) != used:
            text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
            files[files.index(config)] = replace(config, content=text.encode())
            notes.append(
                f"the chat template in {tokenizers.CONFIG} is another than the one of "
                f"{CHAT_TEMPLATE if found.get(CHAT_TEMPLATE) else TEMPLATES}, which transformers "
                "uses; outputs have only the latter"
            )
    if used and old is not None:
        other = read_json(old.path).get("chat_template")
        if other is None or _name_templates(other) != used:
            files.remove(old)
            notes.append(
                f"{OLD_TEMPLATE} holds another chat template than the one that transformers uses; "
                "outputs have only the latter"
            )
    return replace(found, files=tuple(files), notes=(*found.notes, *notes))


def _settle_class(found: Companions) -> Companions:
    """Name a tokenizer's class as releases 4 and 5 of transformers both know it."""
    config = found.get(tokenizers.CONFIG)
    if config is None:
        return found
    content = config.path.read_bytes() if config.content is None else config.content
    settings = json.loads(content)
    if settings.get("tokenizer_class") != NEW_CLASS:
        return found
    names = b"" if "model_input_names" in settings else b",\n  " + INPUT_NAMES
    changed = _NEW_CLASS.sub(rb'\1"%s"%s' % (OLD_CLASS.encode(), names), content)
    files = [replace(f, content=changed) if f is config else f for f in found.files]
    return replace(found, files=tuple(files))


def _name_templates(given: Any) -> dict[str, str]:
    """Return chat templates by name, from any of the forms in which files hold them."""
    if given is None:
        return {}
    if isinstance(given, list):
        pairs = [(one.get("name"), one.get("template")) for one in given if isinstance(one, dict)]
        given = dict(pairs)
    named = given if isinstance(given, dict) else {"default": given}
    return {
        str(name): str(template).replace("\r\n", "\n").removesuffix("\n")
        for name, template in named.items()
    }


def _find_template_fault(template: str) -> str:
    """Return why a chat template cannot be parsed; empty if it can.

    It is not compiled: the compiler computes constants, which can take any time and memory.
    """
    from jinja2 import Environment, TemplateError, nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser

    class _Generation(Extension):
        """The tag of transformers for what the model wrote."""

        tags = {"generation"}  # noqa: RUF012  (as jinja2 declares it)

        def parse(self, parser: Parser) -> list[nodes.Node]:
            """Parse the body of the tag."""
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    try:
        parsed = environment.parse(template)
        filters = {node.name for node in parsed.find_all(nodes.Filter)} - set(environment.filters)
        tests = {node.name for node in parsed.find_all(nodes.Test)} - set(environment.tests)
    except (TemplateError, RecursionError, MemoryError, ValueError) as error:
        return get_first_line(error, 200) or type(error).__name__
    if unknown := filters | tests:
        return f"there is no filter or test {min(unknown)[:40]!r}"
    return ""


# ---- card ----------------------------------------------------------------------------------------


def _read_license(folder: Path) -> tuple[dict[str, Any], str]:
    """Read the license keys of the source's card; return them, or why there are none."""
    path = folder / CARD
    if not os.path.lexists(path):
        return {}, ""
    if reason := find_fault(folder, path):
        return {}, f"{CARD} {reason.partition(';')[0]}; the cards of outputs name no license"
    try:
        front = _cut_front_matter(path)
        if front is None:
            return {}, ""
        data = read_yaml(front, "its front matter")
        if not isinstance(data, dict):
            raise InputError("its front matter is no mapping of keys")
        return _choose_license(data), ""
    except InputError as error:
        reason = str(error).replace(str(path), "it")[:200]
        return {}, f"{CARD} is no card that can be read ({reason}); outputs' cards name no license"


def _cut_front_matter(path: Path) -> str | None:
    """Return the front matter of a card; None if it has none.

    Raises:
        InputError: the file cannot be read, or the front matter is too large.
    """
    try:
        with path.open("rb") as file:
            head = file.read(LARGEST_FRONT_MATTER)
    except OSError as error:
        raise InputError(f"it cannot be read: {error.strerror or error}") from error
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise InputError("it is UTF-16; a card has to be UTF-8")
    # Keys are ASCII; a character that is not UTF-8 stays visible as such.
    text = head.decode("utf-8-sig", "replace")
    found = _FRONT_MATTER.match(text)
    if found is None and len(head) == LARGEST_FRONT_MATTER and text.lstrip().startswith("---"):
        raise InputError(f"its front matter has no end in the first {len(head):,} bytes")
    return found[1] if found else None


def _choose_license(data: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the license keys that a card can hold.

    Raises:
        InputError: the license is no name and no list of names.
    """
    chosen: dict[str, Any] = {}
    for key in LICENSE_KEYS:
        value = data.get(key)
        if value is None:
            continue
        names = value if isinstance(value, list) else [value]
        if not names or not all(_is_name(name) for name in names):
            raise InputError(f"its {key} is {repr(value)[:60]}, not a name")
        chosen[key] = value
    return chosen if "license" in chosen else {}


def _is_name(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 300 and value.isprintable()
