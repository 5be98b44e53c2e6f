"""Kill an export at each of its file operations, or let one fail, and run the same command again.

    python -m benchmarks.attack.kills [--fates before,middle,after,full,broken] [--step 1]
        [--target gptq,onnx] [--chains 50]

Plain: after a kill the same command ends with 0 and the same bytes; or, where OUT was whole and
cleaned up, with 2 and "exists". Nothing is left beside OUT. With --force over an old output:
likewise, and OUT is at any time the old one, the new one, or absent with the old one kept. Chains:
three kills at random operations, one after another. A failing operation (full, broken): no half
OUT, exit 5 or 1, then the same command ends with 0 and the same bytes.
"""

from __future__ import annotations

import argparse
import collections
import random
import sys
import tempfile
from pathlib import Path

from benchmarks.attack.children import (
    copy_of,
    digest,
    export,
    find_leftovers,
    run_child,
    start_base,
)
from benchmarks.attack.operations import ERRORS, Fate


class Attack:
    """Kills and failures of one command.

    Attributes:
        base: folder with the inputs, and with an old output for --force.
        command: the export.
        whole: digests of the output of an export that nothing happened to.
        old: digests of the output that is replaced; empty: there is none.
    """

    def __init__(self, base: Path, command: list[str]) -> None:
        self.base, self.command = base, command
        self.old = digest(base / "out") if (base / "out").exists() else {}
        with copy_of(base) as place:
            ended = run_child(place, command, count=True)
            assert ended.code == 0, ended.said
            self.names, self.whole = ended.names, digest(place / "out")
            assert not find_leftovers(place), find_leftovers(place)

    def kill(self, points: list[tuple[int, Fate]]) -> str:
        """Run the command with these kills, one after another, and again; return what is wrong."""
        with copy_of(self.base) as place:
            for at, fate in points:
                run_child(place, self.command, at, fate)
                if wrong := self._judge_between(place):
                    return wrong
            was_whole = (place / "out").exists() and digest(place / "out") == self.whole
            clean = not find_leftovers(place)
            again = run_child(place, self.command)
            if left := find_leftovers(place):
                return f"left {left[0]} (exit {again.code}: {again.said[:120]})"
            expected = (0, 2) if was_whole and clean and not self.old else (0,)
            if was_whole and not self.old:
                expected = (0, 2)
            if again.code not in expected or (again.code == 2 and "exists" not in again.said):
                return f"exit {again.code}: {again.said[:150]}"
            return "" if digest(place / "out") == self.whole else "other bytes"

    def fail(self, at: int, fate: Fate) -> str:
        """Run the command with a failing operation, and again; return what is wrong."""
        with copy_of(self.base) as place:
            first = run_child(place, self.command, at, fate)
            if wrong := self._judge_between(place):
                return wrong
            code = 5 if fate == "full" else 1
            if first.code not in (0, code):
                return f"exit {first.code}: {first.said[:150]}"
            if first.code == 0:
                return "" if digest(place / "out") == self.whole else "other bytes, exit 0"
            again = run_child(place, self.command)
            taken = again.code == 2 and "exists" in again.said and not self.old
            if again.code != 0 and not taken:
                return f"again: exit {again.code}: {again.said[:150]}"
            if left := find_leftovers(place):
                return f"left {left[0]}"
            return "" if digest(place / "out") == self.whole else "other bytes"

    def _judge_between(self, place: Path) -> str:
        """Return what is wrong with OUT behind a kill."""
        if not (place / "out").exists():
            kept = not self.old or (place / "out.partial/old").exists()
            return "" if kept else "neither the old output nor the new one is there"
        if digest(place / "out") not in (self.whole, self.old):
            return "OUT is neither the old output nor the new one"
        return ""


def main() -> None:
    """Print a table of the attacks, and each fault; exit 1 if there is one."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--fates", default="before,middle,after,full,broken")
    parser.add_argument("--step", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="the first operation that is tried")
    parser.add_argument("--target", default="gptq")
    parser.add_argument("--chains", type=int, default=50)
    given = parser.parse_args()
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        base = start_base(Path(folder))
        plain = Attack(base, export(target=given.target))
        wrong += attack(plain, "plain", given)
        old = run_child(base, export(target=given.target, recipe="w4-rtn"))
        assert old.code == 0, old.said
        forced = Attack(base, export("--force", target=given.target))
        wrong += attack(forced, "--force", given)
    sys.exit(bool(wrong))


def attack(target: Attack, name: str, given: argparse.Namespace) -> int:
    """Run all attacks on one command; return the number of faults."""
    total = 0
    numbers = range(given.first, len(target.names), given.step)
    print(f"{name}: {len(target.names)} file operations", flush=True)
    for fate in given.fates.split(","):
        faults: dict[str, list[int]] = collections.defaultdict(list)
        chosen = [n for n in numbers if fate != "middle" or target.names[n].startswith("write")]
        for n in chosen:
            run = target.fail(n, fate) if fate in ERRORS else target.kill([(n, fate)])
            if run:
                faults[run].append(n)
        total += _report(f"{name}, {fate}", len(chosen), faults, target.names)
    draw, faults = random.Random(0), collections.defaultdict(list)
    for chain in range(given.chains):
        points: list[tuple[int, Fate]] = [
            (draw.randrange(len(target.names)), draw.choice(("before", "middle", "after")))
            for _ in range(3)
        ]
        if run := target.kill(points):
            faults[run].append(chain)
    return total + _report(f"{name}, chains of three kills", given.chains, faults, [])


def _report(what: str, count: int, faults: dict[str, list[int]], names: list[str]) -> int:
    wrong = sum(map(len, faults.values()))
    print(f"  {what}: {count - wrong} of {count} right", flush=True)
    for fault, numbers in faults.items():
        first = names[numbers[0]] if names else ""
        print(f"    {fault}: {len(numbers)}, such as {numbers[:5]} ({first})", flush=True)
    return wrong


if __name__ == "__main__":
    main()
