"""Change every file of an output, rewrite the manifest to fit, and see if `verify` finds it.

Changes are: one bit at several places of each file; one bit in each tensor; each value of each
JSON file, once another value and once left out; each attribute, input and constant of the graph.
``manifest.json`` is rewritten after each change, so that it lists the changed file as it is.
Changes that people may make (of the card) are counted as free.
With ``--older`` the reference is made one of an earlier version first, which recorded no digests of
files: what is found then is found by values.

    python benchmarks/attack/flip_output.py            # three targets, a tiny model
    python benchmarks/attack/flip_output.py --model builtin:tiny-moe --targets onnx
    python benchmarks/attack/flip_output.py --older
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import shutil
import struct
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from moe2edge.commands.api import export
from moe2edge.errors import VerificationFailed
from moe2edge.evaluation.folder_record import REFERENCE, UNRECORDED
from moe2edge.evaluation.reference import Reference
from moe2edge.evaluation.verify import verify_output
from moe2edge.storage.manifest import CARD, FILES, MANIFEST, describe_file, list_files
from moe2edge.testing import make_checkpoint, make_tokenizer

TARGETS = ("onnx", "gptq", "hf")
RECIPES = {
    "onnx": {"passes": [{"rtn": {"group_size": 32}}]},
    "gptq": {"passes": [{"rtn": {"group_size": 32}}]},
    "hf": {"passes": [{"expert_drop": {"keep": 4, "criterion": "random"}}]},
}
FLIPS = 8


@dataclass(frozen=True)
class Change:
    """Another content of one file.

    Attributes:
        file: its name.
        place: what was changed, in words.
        part: tensor, key or table that a message may name in place of the file.
        content: the changed bytes.
    """

    file: str
    place: str
    part: str
    content: bytes


# ---- changes -------------------------------------------------------------------------------------


def list_changes(folder: Path, flips: int = FLIPS) -> Iterator[Change]:
    """Yield every change of every file of an output."""
    for name, path in list_files(folder).items():
        data = path.read_bytes()
        for n in range(flips):
            at = round((len(data) - 1) * n / max(1, flips - 1))
            yield flip(name, data, at, n % 8, f"byte {at}")
        if name.endswith(".safetensors") or name == REFERENCE:
            yield from flip_tensors(name, data)
        if name.endswith(".json"):
            yield from change_json(name, data)
        if name.endswith(".onnx"):
            yield from change_graph(folder, name)


def flip(name: str, data: bytes, at: int, bit: int, place: str, part: str = "") -> Change:
    """Flip one bit."""
    changed = bytearray(data)
    changed[at] ^= 1 << bit
    return Change(name, f"{place}, bit {bit}", part, bytes(changed))


def flip_tensors(name: str, data: bytes) -> Iterator[Change]:
    """Flip one bit in the middle of each tensor of a safetensors file."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    for n, (tensor, entry) in enumerate(header.items()):
        if tensor == "__metadata__":
            continue
        start, end = entry["data_offsets"]
        yield flip(name, data, 8 + length + (start + end) // 2, n % 8, f"tensor {tensor}", tensor)


def change_json(name: str, data: bytes) -> Iterator[Change]:
    """Change each value once, and leave each out once."""
    settings = json.loads(data)
    for path, _ in walk_values(settings):
        for action in ("changed", "left out"):
            other = copy.deepcopy(settings)
            parent = other
            for key in path[:-1]:
                parent = parent[key]
            if action == "changed":
                parent[path[-1]] = change_value(parent[path[-1]])
            else:
                del parent[path[-1]]
            place = ".".join(map(str, path))
            yield Change(name, f"{place} {action}", place, json.dumps(other, indent=2).encode())


def walk_values(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yield each value that holds no others, with its path; long lists only at both ends."""
    if isinstance(value, dict) and value:
        for key in list(value) if len(value) < 200 else [*list(value)[:3], *list(value)[-3:]]:
            yield from walk_values(value[key], (*path, key))
    elif isinstance(value, list) and value:
        for n in range(len(value)) if len(value) < 20 else (0, 1, len(value) - 1):
            yield from walk_values(value[n], (*path, n))
    elif path:
        yield path, value


def change_value(value: Any) -> Any:
    """Return another value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, str):
        return value[:-1] + chr(ord(value[-1]) ^ 1) if value else "x"
    return 1 if value is None else [1]


def change_graph(folder: Path, name: str) -> Iterator[Change]:
    """Change each operator, input and attribute of a graph, and one bit of each weight."""
    import onnx

    data = (folder / name).read_bytes()
    model = onnx.load_from_string(data)
    for node in model.graph.node:
        for place, edit in list_node_edits(node):
            before = node.SerializeToString()
            edit()
            content = model.SerializeToString(deterministic=True)
            assert content != data, f"{place} of {node.name} was not changed"
            node.ParseFromString(before)
            yield Change(name, f"{place} of {node.name}", node.name, content)
    for n, tensor in enumerate(model.graph.initializer):
        where = {entry.key: entry.value for entry in tensor.external_data}
        if where:
            content = (folder / where["location"]).read_bytes()
            at = int(where["offset"]) + int(where["length"]) // 2
            yield flip(where["location"], content, at, n % 8, f"tensor {tensor.name}", tensor.name)
            continue
        before = tensor.raw_data
        tensor.raw_data = flip(name, before, len(before) // 2, 0, "").content
        content = model.SerializeToString(deterministic=True)
        tensor.raw_data = before
        yield Change(name, f"constant {tensor.name}", tensor.name, content)


def list_node_edits(node: Any) -> Iterator[tuple[str, Callable[[], None]]]:
    """Yield edits of a node in place, with what they change."""

    def change_input() -> None:
        node.input[0] += "x"

    def change_operator() -> None:
        node.op_type += "x"

    yield "input", change_input
    yield "operator", change_operator
    for n, name in enumerate([attribute.name for attribute in node.attribute]):
        yield name, partial(change_attribute, node, n)


def change_attribute(node: Any, n: int) -> None:
    """Change the value of an attribute, or the name of one that holds no simple value."""
    attribute = node.attribute[n]  # now, because restoring a node makes new ones
    if attribute.HasField("i"):
        attribute.i += 1
    elif attribute.HasField("f"):
        attribute.f = attribute.f * 1.5 + 1
    elif attribute.HasField("s"):
        attribute.s += b"x"
    else:
        attribute.name += "x"


def is_free(change: Change) -> bool:
    """Return whether people may make a change: of the card, its line in the manifest, the report.

    The report holds times, and no program reads it.
    """
    card = change.file == MANIFEST and change.place.startswith(f"{FILES}.{CARD}")
    return card or change.file in UNRECORDED - {MANIFEST, REFERENCE}


# ---- the verdict ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """What `verify` made of one change.

    Attributes:
        change: the change.
        found: whether it failed as it has to.
        named: whether its message names the file or the part of it.
        message: its message, or the error that it should not have raised.
    """

    change: Change
    found: bool
    named: bool
    message: str


def try_change(folder: Path, change: Change) -> Result:
    """Verify a folder of links to ``folder``, in which one file has been changed."""
    with tempfile.TemporaryDirectory() as place:
        copied = Path(place) / folder.name
        shutil.copytree(folder, copied, copy_function=os.link if same_disk(folder) else shutil.copy)
        path = copied / change.file
        path.unlink()
        path.write_bytes(change.content)
        if change.file != MANIFEST:
            fit_manifest(copied, change.file)
        try:
            verify_output(copied)
        except VerificationFailed as error:
            names = {change.file, change.part} - {""}
            return Result(change, True, any(name in str(error) for name in names), str(error))
        except Exception as error:
            return Result(change, False, False, f"{type(error).__name__}: {error}")
        return Result(change, False, False, "verified")


def same_disk(folder: Path) -> bool:
    """Return whether temporary files are on the disk of ``folder``, so that links work."""
    return folder.stat().st_dev == Path(tempfile.gettempdir()).stat().st_dev


def fit_manifest(folder: Path, name: str) -> None:
    """Let the manifest list a file as it is now."""
    path = folder / MANIFEST
    manifest = json.loads(path.read_bytes())
    manifest[FILES][name] = describe_file(folder / name)
    path.unlink()
    path.write_text(json.dumps(manifest, indent=2))


def forget_record(folder: Path) -> None:
    """Make the reference one of an earlier version, which recorded no files and no far end."""
    old = replace(Reference.read(folder), record=None, far=None)
    (folder / REFERENCE).unlink()
    old.save(folder)
    fit_manifest(folder, REFERENCE)


def describe(results: Sequence[Result], file: str) -> str:
    """Return the line of the table for a file."""
    mine = [r for r in results if r.change.file == file]
    free = [r for r in mine if is_free(r.change)]
    mine = [r for r in mine if not is_free(r.change)]
    counts = Counter((r.found, r.named) for r in mine)
    missed = [r for r in mine if not r.found]
    said = "; ".join(f"{r.change.place}: {r.message[:60]}" for r in missed[:6])
    more = f"; and {len(missed) - 6} more" if len(missed) > 6 else ""
    found = counts[True, True] + counts[True, False]
    return f"| {file} | {len(mine)} | {found} | {counts[True, True]} | {said}{more} | {len(free)} |"


def main() -> None:
    """Export, change, verify, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="MODEL [default: a tiny random one]")
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--flips", type=int, default=FLIPS, help="flipped bits of each file")
    parser.add_argument("--older", action="store_true", help="without the record of the files")
    given = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as place:
        model = given.model
        if model is None:
            model = str(make_checkpoint(Path(place) / "model", "qwen3_moe"))
            make_tokenizer(Path(model))
        for target in given.targets.split(","):
            out = Path(place) / target
            text = {"samples": 4, "length": 64}
            recipe = {**RECIPES[target], "calibration": text, "evaluation": text}
            export(model, recipe, target, out)
            if given.older:
                forget_record(out)
            verify_output(out)
            results = []
            for n, change in enumerate(list_changes(out, given.flips)):
                results.append(try_change(out, change))
                if n % 100 == 0:
                    print(f"{target}: {n} changes", file=sys.stderr)
            print(f"\n{target}: {len(results)} changes\n")
            print(
                "| file | changes | found | named | not found | free |\n|---|---|---|---|---|---|"
            )
            for file in list_files(out):
                print(describe(results, file))


if __name__ == "__main__":
    main()
