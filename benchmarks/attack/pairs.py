"""Start several exports to one OUT at once, in one or in several PID namespaces.

    python -m benchmarks.attack.pairs [--rounds 100] [--together 2] [--namespaces]

Exactly one ends with 0 and the right bytes, all others with 2; nothing is left beside OUT. PID
namespaces, as containers have them, need root.
"""

from __future__ import annotations

import argparse
import collections
import ctypes
import os
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.attack.children import (
    copy_of,
    digest,
    end_child,
    export,
    find_leftovers,
    run_child,
    start_base,
)

NEW_PID_NAMESPACE = 0x20000000  # CLONE_NEWPID of <linux/sched.h>


def main() -> None:
    """Print how many rounds are right, and each fault; exit 1 if there is one."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--together", type=int, default=2)
    parser.add_argument("--namespaces", action="store_true")
    parser.add_argument("--recipe", default="w4-rtn")
    given = parser.parse_args()
    faults: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        base = start_base(Path(folder))
        command = export(recipe=given.recipe)
        with copy_of(base) as place:
            assert run_child(place, command).code == 0
            whole = digest(place / "out")
        for _ in range(given.rounds):
            with copy_of(base) as place:
                if wrong := run_round(place, command, whole, given):
                    faults[wrong] += 1
    wrong_count = sum(faults.values())
    print(
        f"{given.together} at once{', PID namespaces' * given.namespaces}: "
        f"{given.rounds - wrong_count} of {given.rounds} rounds right"
    )
    for fault, count in faults.items():
        print(f"  {fault}: {count}")
    sys.exit(bool(faults))


def run_round(
    place: Path, command: list[str], whole: dict[str, str], given: argparse.Namespace
) -> str:
    """Start the commands at one moment; return what is wrong."""
    begin = time.time() + 0.05
    children = [start(place, command, begin, n, given) for n in range(given.together)]
    codes = sorted(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children)
    if codes != [0] + [2] * (given.together - 1):
        return f"exit codes {codes}"
    if left := find_leftovers(place):
        return f"left {left[0]}"
    return "" if digest(place / "out") == whole else "other bytes"


def start(
    place: Path, command: list[str], begin: float, number: int, given: argparse.Namespace
) -> int:
    """Start one command at a moment, in a PID namespace of its own if that is asked."""
    aside = place.parent / f"{place.name}.{number}"
    aside.mkdir(exist_ok=True)
    pid = os.fork()
    if pid:
        return pid
    if given.namespaces:
        library = ctypes.CDLL(None, use_errno=True)
        if library.unshare(NEW_PID_NAMESPACE):
            os._exit(77)
        inner = os.fork()
        if inner:
            os._exit(os.waitstatus_to_exitcode(os.waitpid(inner, 0)[1]) & 0xFF)
    time.sleep(max(0.0, begin - time.time()))
    end_child(place, command, aside, None, "before", count=False, record=False)
    return 0


if __name__ == "__main__":
    main()
