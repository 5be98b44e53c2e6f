"""Compare what two checkouts of moe2edge write: the same bytes, and each other's folders read.

    python benchmarks/same_bytes.py OLD NEW [--model DIR] > benchmarks/same_bytes.txt

Makes an environment of each checkout, exports every bundled recipe and at least one recipe for each
pass to every target with one thread, and compares weights, graphs and configs byte for byte, JSON
documents but for times and versions (`DIFFERING` lists each field with its reason). Words for
people (`WORDS`) may be put differently; the numbers in them are compared, but for prose (`PROSE`).
A refusal has to be a refusal in both, with the same exit code. Then NEW reads, verifies, runs and
applies what OLD wrote.

Prints a table; exits with 1 if anything differs, and names the first difference. Samples are few
and short, because the same arithmetic gives the same bytes with any number of them.

With ``--python-old`` and ``--python-new`` environments that are there already are used (they have
to hold the very sources of the checkouts, and the compiled loops). With ``--keep DIR`` all folders
stay, and a second run exports nothing again with a checkout whose sources are the same.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _same_bytes_cases import CALIBRATION, EVALUATION, Case, Passes, make_cases
from _same_bytes_compare import DIFFERING, MEASURED, NEW, OLD, PROSE, WORDS, Comparison, resolve
from _same_bytes_sides import Side, make_environment

BUILTIN = "builtin:tiny-moe"
REFUSED = (2, 5, 6)


@dataclass(frozen=True)
class Line:
    """A line of the table."""

    model: str
    what: str
    where: str
    codes: str
    files: str
    size: str
    result: str

    def __str__(self) -> str:
        return (
            f"{self.model:12} {self.what:28} {self.where:33} {self.codes:>5} {self.files:>5} "
            f"{self.size:>7}  {self.result}"
        )


HEADING = Line("model", "recipe or command", "targets", "exit", "files", "MB", "result")
# Exports of OLD that both read, and the commands that do.
VERBS = ("verify", "inspect", "inspect --routing", "generate", "evaluate", "profile")
READ: dict[str, tuple[str, ...]] = {
    "w4": VERBS,
    "trim": VERBS,
    "expert_skip, rtn": ("verify", "generate", "evaluate"),
    "replace base, rtn": ("verify", "generate", "evaluate"),
    "uneven, rtn": ("verify", "inspect", "generate", "evaluate"),
}


class Study:
    """Exports and commands of both sides, one after another."""

    def __init__(self, old: Side, new: Side, models: Sequence[str], together: bool) -> None:
        self.old, self.new, self.models = old, new, models
        self.found = Comparison()
        self._together = together
        self._begun, self._done, self._total = time.perf_counter(), 0, 0

    def run(self, only: str) -> None:
        """Compare the command line, and the cases whose name holds ``only``."""
        print(HEADING, flush=True)
        self._compare_commands()
        bundled = list(self._pair(["recipe", "list", "--json"], "recipe list")["recipes"])
        for command in (["recipe", "schema"], ["targets", "--json"]):
            self._pair(command, " ".join(command))
        for name in bundled:
            self._pair(["recipe", "show", name], f"recipe show {name}")
        work: list[tuple[str, Callable[..., object], tuple[Any, ...]]] = []
        for model in self.models:
            work.append((f"{short(model)} decisions", self._decide, (model,)))
            chosen = [case for case in make_cases(bundled) if only in case.name]
            for case in chosen:
                for targets in (case.held, *((target,) for target in case.alone)):
                    name = f"{short(model)} {case.name} {','.join(targets)}"
                    work.append((name, self._export, (model, case, targets)))
            for case in chosen:
                name = f"{short(model)} {case.name}, read"
                work += [(name, self._read, (model, case.name))] if case.name in READ else []
        self._total, self._begun = len(work), time.perf_counter()
        for name, step, given in work:
            step(*given)
            self._done += 1
            self._tell(name)

    def _tell(self, what: str) -> None:
        """Report progress on stderr."""
        left = (time.perf_counter() - self._begun) / self._done * (self._total - self._done)
        print(
            f"[{self._done}/{self._total}] {what}; {len(self.found.differences)} differences; "
            f"about {left / 60:.1f} min left",
            file=sys.stderr,
            flush=True,
        )

    def _both(self, work: Callable[[Side], Any]) -> tuple[Any, Any]:
        """Do the same on both sides."""
        if not self._together:
            return work(self.old), work(self.new)
        with ThreadPoolExecutor(2) as pool:
            old, new = pool.map(work, (self.old, self.new))
        return old, new

    @contextmanager
    def _line(self, model: str, what: str, where: str = "") -> Iterator[list[int]]:
        """Print a line about what is compared inside; exit codes go into the list."""
        found, codes = self.found, list[int]()
        differences, files, nbytes = len(found.differences), found.files, found.nbytes
        yield codes
        new = found.differences[differences:]
        files, nbytes = found.files - files, found.nbytes - nbytes
        same = "same refusal" if codes and codes[0] in REFUSED else "same"
        line = Line(
            short(model),
            what,
            where,
            "/".join(map(str, dict.fromkeys(codes))),
            str(files or "-"),
            f"{nbytes / 1e6:.1f}" if nbytes else "-",
            f"DIFFERS: {new[0]}" if new else same,
        )
        print(line, flush=True)

    def _compare_commands(self) -> None:
        """Compare commands, options, their types and defaults."""
        with self._line("", "command line", "every command and option"):
            self.found.compare_values("command line", *self._both(Side.list_commands), {})

    def _pair(self, argv: Sequence[str], what: str, model: str = "") -> Any:
        """Run a command on both sides, compare what it prints, and return that of OLD."""
        with self._line(model, what) as codes:
            old, new = self._both(lambda side: side.run(argv))
            codes += [old["code"], new["code"]]
            self._compare_outputs(what, old, new, DIFFERING)
        return json.loads(old["stdout"]) if "--json" in argv else None

    def _decide(self, model: str) -> None:
        """Compare decisions; then give NEW those of OLD, for `apply_decisions`."""
        files = ("sets.json", "others.json")
        for file, keep in zip(files, (0.75, 0.5), strict=True):
            recipe = self._write([{"expert_drop": {"keep": keep, "criterion": "reap"}}])
            argv = ["decide", model, "-r", recipe, "-o", file, "--force", "-q", "--json"]
            argv += ["--threads", "1", *give(CALIBRATION)]
            self._pair(argv, f"decide {file}", model)
        for file in files:
            shutil.copyfile(self.old.folder / file, self.new.folder / file)
        for command in (["show", files[0]], ["compare", *files]):
            argv = ["decisions", *command, "--json"]
            self._pair(argv, f"decisions {command[0]}, of old's", model)

    def _write(self, passes: Passes) -> str:
        """Write a recipe for both sides, and return its file name."""
        text = json.dumps({"passes": passes})
        name = f"recipe-{hashlib.sha256(text.encode()).hexdigest()[:12]}.yaml"
        for side in (self.old, self.new):
            (side.folder / name).write_text(text)
        return name

    def _export(self, model: str, case: Case, targets: Sequence[str]) -> None:
        """Export a case on both sides, and compare; one target each where OLD refuses several."""
        out = f"{short(model)}/{case.name}/{'+'.join(targets)}"
        out = re.sub(r"[^\w./+-]+", "-", out)
        recipe = case.name if case.passes is None else self._write(case.passes)
        argv = ["export", model, "-t", ",".join(targets), "-o", out, "-r", recipe, "--json", "-q"]
        argv += ["--threads", "1", *case.flags]
        argv += give((*CALIBRATION, *EVALUATION, *case.settings))
        old, new = self._both(lambda side: side.export(argv, out))
        if old["code"] == new["code"] and old["code"] in REFUSED and len(targets) > 1:
            for target in targets:
                self._export(model, case, (target,))
            return
        with self._line(model, case.name, ",".join(targets)) as codes:
            codes += [old["code"], new["code"]]
            self._compare_outputs(out, old, new, DIFFERING)
            if not old["code"] and not new["code"]:
                self.found.compare_folders(out, self.old.folder / out, self.new.folder / out)

    def _compare_outputs(
        self,
        place: str,
        old: Mapping[str, Any],
        new: Mapping[str, Any],
        differing: Mapping[str, str],
    ) -> None:
        """Compare exit codes, and what was printed on stdout."""
        if old["code"] != new["code"] or old["code"] not in (0, *REFUSED):
            said = " and ".join(" ".join(side["stderr"].split())[-200:] for side in (old, new))
            self.found.fail(place, f"exit codes {old['code']} and {new['code']}: {said}")
        try:
            documents = [resolve(json.loads(side["stdout"])) for side in (old, new)]
        except json.JSONDecodeError:
            if old["stdout"] != new["stdout"]:
                self.found.fail(place, "what is printed differs")
            return
        self.found.compare_values(f"{place} --json", *documents, differing)

    def _read(self, model: str, case: str) -> None:
        """Let both sides read the folders of a case that OLD wrote, and compare what they say."""
        parent = self.old.folder / short(model) / re.sub(r"[^\w./+-]+", "-", case)
        folders = sorted(path.parent for path in parent.rglob("manifest.json"))
        if not folders:
            self.found.fail(case, "old wrote no folder that could be read")
        for folder in folders:
            target = json.loads((folder / "manifest.json").read_text())["target"]
            for verb in READ[case]:
                if (verb, target) != ("inspect --routing", "onnx"):
                    self._use(model, case, target, verb, folder)

    def _use(self, model: str, case: str, target: str, verb: str, folder: Path) -> None:
        """Run a command on a folder of OLD."""
        few = ["--samples", "2", "--length", "64"]
        argv = {
            "verify": ["verify", str(folder), "--reference", model],
            "inspect": ["inspect", str(folder)],
            "inspect --routing": ["inspect", str(folder), "--routing", "-q", *few],
            "generate": ["generate", str(folder), "def read_json(path):", "-n", "12"],
            "evaluate": ["evaluate", str(folder), "--reference", model, *few],
            "profile": ["profile", str(folder), "--preset", "quick"],
        }[verb]
        threads = [] if verb == "inspect" else ["--threads", "1"]
        differing = DIFFERING | MEASURED if verb == "profile" else DIFFERING
        with self._line(model, f"{case}: {verb}", f"{target}, written by old") as codes:
            old, new = self._both(lambda side: side.run([*argv, *threads, "--json"]))
            codes += [old["code"], new["code"]]
            place = f"{verb} {case}, {target}"
            self._compare_outputs(place, old, new, differing)
            if new["code"]:
                self.found.fail(place, f"exit code {new['code']}: {new['stderr'][-200:]}")


def short(model: str) -> str:
    """Return the name of a model."""
    return model.rpartition(":")[2].rstrip("/").rpartition("/")[2]


def give(settings: Sequence[str]) -> list[str]:
    """Return settings of a recipe as options of a command."""
    return [part for setting in settings for part in ("--set", setting)]


def print_head(old: Side, new: Side) -> None:
    """Print what is compared, and where."""
    versions = old.about["versions"]
    print(f"old: {old.commit}; new: {new.commit}")
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    if others := {k: v for k, v in new.about["versions"].items() if versions[k] != v}:
        print(f"versions differ in new: {others}")
    print(f"{platform.machine()}, one thread, compiled loops in both\n")


def print_end(found: Comparison) -> None:
    """Print what was compared, and which fields were not."""
    print(
        f"\n{found.files} files, {found.nbytes / 1e6:.0f} MB; "
        f"{len(found.differences)} differences; {found.wordings} texts for people with other words "
        "and the same numbers"
    )
    print("\nFields that may differ, in a report and a manifest:")
    for name, reason in DIFFERING.items():
        print(f"  {name}: {reason}")
    print("and in a profile, whose keys are compared:")
    for name, reason in MEASURED.items():
        print(f"  {name}: {reason}")
    print("Names of definitions in the JSON Schema may differ, too: references are resolved.")
    print("Words for people, whose numbers are compared:")
    print("  model cards, " + ", ".join(WORDS))
    print("  and wholly: " + ", ".join(PROSE))
    for difference in found.differences[:20]:
        print(f"DIFFERS: {difference}")


def main() -> None:
    """Compare two checkouts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("old", type=Path, help="checkout of moe2edge")
    parser.add_argument("new", type=Path, help="another one")
    parser.add_argument("--python-old", type=Path, help="interpreter of a ready environment")
    parser.add_argument("--python-new", type=Path, help="likewise")
    parser.add_argument("--model", type=Path, action="append", default=[], help="a further model")
    parser.add_argument("--keep", type=Path, help="folder for environments and outputs")
    parser.add_argument("--only", default="", help="recipes whose name holds this")
    parser.add_argument("--together", action="store_true", help="both sides at once, on two cores")
    given = parser.parse_args()
    models = [BUILTIN, *(str(model.resolve()) for model in given.model)]
    with tempfile.TemporaryDirectory() as temporary:
        work = given.keep.resolve() if given.keep else Path(temporary)
        sides = []
        cores = sorted(os.sched_getaffinity(0))
        for n, name in enumerate((OLD, NEW)):
            checkout: Path = getattr(given, name).resolve()
            (work / name).mkdir(parents=True, exist_ok=True)
            python = getattr(given, f"python_{name}")
            python = (
                python.absolute() if python else make_environment(checkout, work / f"{name}-env")
            )
            sides.append(Side(name, checkout, python, work / name, cores[n % len(cores)]))
        for side in sides:
            side.start()
        print_head(*sides)
        study = Study(*sides, models, given.together)
        study.run(given.only)
        for side in sides:
            side.stop()
    print_end(study.found)
    if study.found.differences:
        sys.exit(f"first difference: {study.found.differences[0]}")


if __name__ == "__main__":
    main()
