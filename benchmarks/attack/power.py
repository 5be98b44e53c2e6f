"""Simulate losses of power during and after an export, from the record of its file operations.

    python -m benchmarks.attack.power [--points 200] [--target gptq,onnx] [--force]

The state of the disk after a loss is: everything that was synced before it, and any subset of what
came later. A file holds what it held when it was synced last, or a part of what was written since
(nothing, half, zeros, all). A name is durable once its folder was synced behind the operation.

Under way OUT is absent, the old output or the new one, whole, and the same command then ends with
0 and the same bytes. After exit 0 OUT is the new output, whole.
"""

from __future__ import annotations

import argparse
import collections
import random
import shutil
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.attack.children import copy_of, digest, export, run_child, start_base

Event = tuple[str, tuple[str, ...], bytes | None]


@dataclass
class Node:
    """A file with its content at the last sync and since, or a folder with its entries."""

    entries: dict[str, Node] | None = None
    synced: bytes = b""
    latest: bytes | None = None


@dataclass
class Step:
    """An operation on names, or on the content of a file.

    Attributes:
        kind: of the operation.
        at: number of the event.
        folders: folders whose entries it changes.
        act: applies it to a tree; does nothing where what it needs is not there.
        durable: number of the event behind which it cannot be lost; None: it always can.
    """

    kind: str
    at: int
    folders: tuple[str, ...]
    paths: tuple[str, ...]
    data: bytes | None = None
    durable: int | None = None


@dataclass
class Disk:
    """A tree of files, built from steps."""

    root: str
    top: Node = field(default_factory=lambda: Node({}))

    def find(self, path: str) -> tuple[Node | None, str]:
        """Return the folder of a path in the tree, None where there is none, and the last name."""
        parts = Path(path).relative_to(self.root).parts
        node: Node | None = self.top
        for part in parts[:-1]:
            node = node.entries.get(part) if node is not None and node.entries is not None else None
        return (node if node is not None and node.entries is not None else None), parts[-1]

    def apply(self, step: Step) -> None:
        """Apply an operation on names."""
        holder, name = self.find(step.paths[0])
        if holder is None or holder.entries is None:
            return
        if step.kind == "create":
            holder.entries.setdefault(name, Node())
        elif step.kind == "mkdir":
            holder.entries.setdefault(name, Node({}))
        elif step.kind in ("unlink", "remove", "rmdir"):
            holder.entries.pop(name, None)
        elif step.kind in ("rename", "replace"):
            target, new = self.find(step.paths[1])
            if target is not None and target.entries is not None and name in holder.entries:
                target.entries[new] = holder.entries.pop(name)

    def write(self, folder: Path, draw: random.Random) -> None:
        """Write the tree into an empty folder, files as a loss of power may leave them."""
        _write(self.top, folder, draw)


def _write(node: Node, path: Path, draw: random.Random) -> None:
    if node.entries is not None:
        path.mkdir(exist_ok=True)
        for name, entry in node.entries.items():
            _write(entry, path / name, draw)
        return
    choices = [node.synced]
    if node.latest is not None and node.latest != node.synced:
        new = node.latest
        choices += [new, new[: len(new) // 2], bytes(len(new)), b""]
    path.write_bytes(draw.choice(choices))


def read_steps(log: list[Event]) -> list[Step]:
    """Turn a record into steps, each with the event behind which it is durable."""
    steps: list[Step] = []
    waiting: list[Step] = []
    for at, (kind, paths, data) in enumerate(log):
        if kind == "sync" and data is None:  # a folder
            for step in waiting:
                if step.durable is None and set(step.folders) <= {paths[0]}:
                    step.durable = at
                elif paths[0] in step.folders:  # a rename between folders needs both
                    step.folders = tuple(f for f in step.folders if f != paths[0])
            waiting = [step for step in waiting if step.durable is None]
        elif kind in ("sync", "close"):
            steps.append(Step(kind, at, (), paths, data))
        elif kind in ("create", "mkdir", "rename", "replace", "unlink", "remove", "rmdir"):
            folders = tuple({str(Path(path).parent) for path in paths})
            steps.append(Step(kind, at, folders, paths))
            waiting.append(steps[-1])
    return steps


def build_disk(before: Path, steps: list[Step], at: int, draw: random.Random) -> Disk:
    """Return a state of the disk after a loss of power behind event ``at``."""
    disk = Disk(str(before))
    _read(disk.top, before)
    for step in steps:
        if step.at > at:
            break
        if step.kind in ("sync", "close"):
            holder, name = disk.find(step.paths[0])
            node = holder.entries.get(name) if holder is not None and holder.entries else None
            if node is not None and step.data is not None:
                node.latest = step.data
                node.synced = step.data if step.kind == "sync" else node.synced
        else:
            kept = step.durable is not None and step.durable <= at
            # A name that is made again must not bring back an older file.
            if kept or draw.random() < 0.5:
                disk.apply(step)
    return disk


def _read(node: Node, folder: Path) -> None:
    assert node.entries is not None
    for path in folder.iterdir():
        entry = Node({}) if path.is_dir() else Node(None, path.read_bytes())
        node.entries[path.name] = entry
        if path.is_dir():
            _read(entry, path)


def main() -> None:
    """Print how many points are right, and each fault; exit 1 if there is one."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--points", type=int, default=200)
    parser.add_argument("--target", default="gptq")
    parser.add_argument("--force", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        base = start_base(Path(folder))
        if given.force:
            old = run_child(base, export(target=given.target, recipe="w4-rtn"))
            assert old.code == 0, old.said
        sys.exit(bool(attack(base, given)))


def attack(base: Path, given: argparse.Namespace) -> int:
    """Lose power at many points; return the number of faults."""
    command = export(*(["--force"] if given.force else []), target=given.target)
    old = digest(base / "out") if given.force else {}
    with copy_of(base) as place:
        ended = run_child(place, command, record=True)
        assert ended.code == 0, ended.said
        whole, log = digest(place / "out"), ended.log
    # Paths of the record are those of the case; each loss is written to the same place.
    place = base.parent / "case"
    steps = read_steps(log)
    draw = random.Random(given.seed)
    faults: dict[str, list[int]] = collections.defaultdict(list)
    points = [draw.randrange(len(log)) for _ in range(given.points * 3 // 4)]
    points += [len(log) - 1] * (given.points - len(points))
    for at in points:
        with copy_of(base):
            disk = build_disk(place, steps, at, draw)
        shutil.rmtree(place, ignore_errors=True)
        disk.write(place, draw)
        if wrong := judge(place, command, old, whole, finished=at == len(log) - 1):
            faults[wrong].append(at)
        shutil.rmtree(place, ignore_errors=True)
    wrong_count = sum(map(len, faults.values()))
    name = "--force" if given.force else "plain"
    print(f"{name}: {len(log)} events, {len(points) - wrong_count} of {len(points)} losses right")
    for fault, numbers in faults.items():
        print(f"  {fault}: {len(numbers)}, such as {numbers[:5]} {log[numbers[0]][:2]}")
    return wrong_count


def judge(
    place: Path, command: list[str], old: dict[str, str], whole: dict[str, str], *, finished: bool
) -> str:
    """Return what is wrong with a state of the disk, and with what the command makes of it."""
    there: Any = digest(place / "out") if (place / "out").exists() else None
    if finished and there != whole:
        return "after exit 0: OUT is not the new output"
    if there not in (None, old, whole):
        return "OUT is neither absent, old nor new"
    if there is None and old and not (place / "out.partial/old").exists():
        return "the old output is gone and the new one is not there"
    again = run_child(place, command)
    taken = again.code == 2 and "exists" in again.said and there == whole and not old
    if again.code != 0 and not taken:
        return f"again: exit {again.code}: {again.said[:150]}"
    return "" if digest(place / "out") == whole else "again: other bytes"


if __name__ == "__main__":
    main()
