"""Damage each file of the work folder of a killed export, and run the same command again.

    python -m benchmarks.attack.work_files [--flips 3] [--target gptq]

Each file is cut, emptied, deleted, and has one bit flipped at several places. The command ends with
0 and the same bytes as if nothing had happened, or with an error; never with 0 and other bytes.
"""

from __future__ import annotations

import argparse
import collections
import random
import sys
import tempfile
from pathlib import Path

from benchmarks.attack.children import copy_of, digest, export, run_child, start_base


def main() -> None:
    """Print how many damages are right, and each fault; exit 1 if there is one."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--flips", type=int, default=3)
    parser.add_argument("--target", default="gptq")
    parser.add_argument("--points", default="0.5,0.7,0.8", help="kill after these shares")
    given = parser.parse_args()
    draw, wrong = random.Random(0), 0
    with tempfile.TemporaryDirectory() as folder:
        base = start_base(Path(folder))
        command = export(target=given.target)
        with copy_of(base) as place:
            ended = run_child(place, command, count=True)
            assert ended.code == 0, ended.said
            names, whole = ended.names, digest(place / "out")
        for share in map(float, given.points.split(",")):
            killed = base.parent / "killed"
            with copy_of(base, "killed"):
                run_child(killed, command, int(share * len(names)))
                wrong += attack(killed, command, whole, given.flips, draw)
    sys.exit(bool(wrong))


def attack(
    killed: Path, command: list[str], whole: dict[str, str], flips: int, draw: random.Random
) -> int:
    """Damage each file of a killed export; return the number of faults."""
    faults: dict[str, list[str]] = collections.defaultdict(list)
    codes: collections.Counter[int] = collections.Counter()
    files = [path for path in sorted((killed / "out.partial").rglob("*")) if path.is_file()]
    for path in files:
        for how in ("cut", "empty", "delete", *("flip",) * flips):
            with copy_of(killed) as place:
                damage(place / path.relative_to(killed), how, draw)
                again = run_child(place, command)
                codes[again.code] += 1
                out = place / "out"
                if again.code == 0 and digest(out) != whole:
                    faults[f"{how}: exit 0, other bytes"].append(path.name)
                elif again.code not in (0, 2) or "bug" in again.said:
                    faults[f"{how}: exit {again.code}: {again.said[:120]}"].append(path.name)
    wrong = sum(map(len, faults.values()))
    total = sum(codes.values())
    print(f"{len(files)} files, {total} damages, {total - wrong} right; exit codes {dict(codes)}")
    for fault, names in faults.items():
        print(f"  {fault}: {len(names)}, such as {names[:5]}", flush=True)
    return wrong


def damage(path: Path, how: str, draw: random.Random) -> None:
    """Cut, empty or delete a file, or flip one of its bits."""
    data = path.read_bytes()
    if how == "delete":
        path.unlink()
    elif how == "flip" and data:
        changed = bytearray(data)
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
    else:
        path.write_bytes(data[: len(data) // 2] if how == "cut" else b"")


if __name__ == "__main__":
    main()
