"""Compare output folders and JSON documents of two versions: bytes, structure, numbers, words."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

OLD, NEW = "old", "new"

# Fields whose values differ between two runs of one program, and why. A star stands for one step
# of the way, two for any number. They have to be there in both, with values of one type.
DIFFERING = {
    "seconds": "time of the export",
    "steps.*.seconds": "time of a pass",
    "peak_bytes": "peak memory of the process",
    "results.*.skip_times.prefill": "a time",
    "results.*.skip_times.prefill_without": "a time",
    "results.*.skip_times.decode": "a time",
    "results.*.skip_times.decode_without": "a time",
    "versions.moe2edge": "the version itself",
    "decisions.versions.moe2edge": "the version itself",
    "files.README.md.sha256": "the card tells time and memory of the export",
    "files.README.md.bytes": "likewise",
    "files.report.json.sha256": "the report holds times",
    "files.report.json.bytes": "likewise",
}
# Measured values of a profile, which differ besides.
MEASURED = {
    "created": "a time",
    "warnings": "other work on the machine is warned of",
    "env.**": "load and free memory of the machine",
    "metrics.*.median": "a time",
    "metrics.*.p50": "a time",
    "metrics.*.p90": "a time",
    "metrics.*.min": "a time",
    "metrics.*.max": "a time",
    "metrics.*.samples.*": "a time",
    "memory.phases.*.peak_rss": "memory of a process",
    "memory.phases.*.rss": "memory of a process",
    "memory.phases.*.rss_anon": "memory of a process",
    "memory.phases.*.rss_file": "memory of a process",
    "memory.phases.*.peak_rss_samples.*": "memory of a process",
}
# Words for people: numbers in them are compared, wording is counted.
WORDS = (
    "steps.*.notes.*",
    "materialized",
    "error.message",
    "recipes.*",
    "targets.*",
    "**.title",
    "definitions.*",
    "artifact.note",
    "memory.reason",
    "metrics.*.reason",
    "warnings.*",
)
# Words for people that hold no measured number: what is known of programs, and what options mean.
PROSE = ("loaders.*.*.note", "**.description")

NUMBER = re.compile(r"(?<![\w.])\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?")


class Comparison:
    """Everything compared so far: what differs, and how often the wording does."""

    def __init__(self) -> None:
        self.differences: list[str] = []
        self.files = self.nbytes = self.wordings = 0

    def fail(self, place: str, what: str) -> None:
        """Note a difference."""
        self.differences.append(f"{place}: {what}")

    def compare_folders(self, place: str, old: Path, new: Path) -> None:
        """Compare two output folders, file by file."""
        names = [{str(p.relative_to(f)) for p in f.rglob("*") if p.is_file()} for f in (old, new)]
        for name in sorted(names[0] ^ names[1]):
            self.fail(f"{place}/{name}", f"only {OLD if name in names[0] else NEW} wrote it")
        for name in sorted(names[0] & names[1]):
            self.files += 1
            self.nbytes += (old / name).stat().st_size
            self._compare_files(f"{place}/{name}", old / name, new / name)

    def _compare_files(self, place: str, old: Path, new: Path) -> None:
        if old.name in ("report.json", "manifest.json"):
            self.compare_values(
                place, json.loads(old.read_text()), json.loads(new.read_text()), DIFFERING
            )
        elif old.name == "README.md":
            self._compare_cards(place, old, new)
        elif not are_equal(old, new):
            self.fail(place, f"bytes differ ({old.stat().st_size} and {new.stat().st_size})")

    def compare_values(
        self, place: str, old: object, new: object, differing: Mapping[str, str], at: str = ""
    ) -> None:
        """Compare JSON values: structure, keys and numbers exactly, but for what has to differ."""
        here = f"{place}: {at or 'the document'}"
        if type(old) is not type(new):
            self.fail(here, f"{old!r:.60} and {new!r:.60}")
        elif any(match_pattern(pattern, at) for pattern in differing) and not isinstance(old, dict):
            return
        elif isinstance(old, dict) and isinstance(new, dict):
            keys = [[key for key in value if key != "description"] for value in (old, new)]
            if keys[0] != keys[1]:
                self.fail(here, f"keys {keys[0]} and {keys[1]}")
            self.wordings += len(old) != len(new)
            self._compare_parts(place, old, new, differing, at)
        elif isinstance(old, list) and isinstance(new, list):
            if len(old) != len(new):
                self.fail(here, f"{len(old)} and {len(new)} entries")
            parts = [dict(enumerate(entries)) for entries in (old, new)]
            self._compare_parts(place, *parts, differing, at)
        elif isinstance(old, str) and any(match_pattern(pattern, at) for pattern in PROSE):
            self.wordings += old != new
        elif isinstance(old, str) and any(match_pattern(pattern, at) for pattern in WORDS):
            self._compare_words(here, old, str(new))
        elif old != new:
            self.fail(here, f"{old!r:.60} and {new!r:.60}")

    def _compare_parts(
        self,
        place: str,
        old: Mapping[Any, object],
        new: Mapping[Any, object],
        differing: Mapping[str, str],
        at: str,
    ) -> None:
        for key in old:
            if key in new:
                way = f"{at}.{key}".lstrip(".")
                self.compare_values(place, old[key], new[key], differing, way)

    def _compare_words(
        self, place: str, old: str, new: str, less: Sequence[Sequence[str]] = ((), ())
    ) -> None:
        """Compare the numbers in words for people, without those in ``less``; count wordings."""
        found = [Counter(NUMBER.findall(text)) for text in (old, new)]
        counts = [own - Counter(out) for own, out in zip(found, less, strict=True)]
        if counts[0] != counts[1]:
            differ = sorted((counts[0] - counts[1]) + (counts[1] - counts[0]))
            self.fail(place, f"numbers in words differ: {', '.join(differ)[:100]}")
        self.wordings += re.sub(NUMBER, "0", old) != re.sub(NUMBER, "0", new)

    def _compare_cards(self, place: str, old: Path, new: Path) -> None:
        """Compare model cards: front matter and recipe to the byte, numbers of the rest.

        Lines on programs that load the folder are prose.
        """
        parts = [split_card(path.read_text()) for path in (old, new)]
        for name in ("front matter", "recipe"):
            if parts[0][name] != parts[1][name]:
                self.fail(f"{place}: {name}", "differs")
        less, texts = [], []
        for path, part in zip((old, new), parts, strict=True):
            said = json.loads((path.parent / "report.json").read_text())
            less.append([f"{said['seconds']:.1f}", f"{said['peak_bytes'] / 1e6:.0f}"])
            notes = [one["note"] for found in said["loaders"].values() for one in found]
            lines = part["text"].splitlines()
            texts.append("\n".join(row for row in lines if not any(n in row for n in notes)))
        self._compare_words(place, texts[0], texts[1], less)


def resolve(schema: Any, definitions: Mapping[str, Any] | None = None) -> Any:
    """Return a JSON Schema with definitions in the place of references, whose names are its own."""
    if isinstance(schema, list):
        return [resolve(part, definitions) for part in schema]
    if not isinstance(schema, dict):
        return schema
    known = schema.get("$defs", {}) if definitions is None else definitions
    if "$ref" in schema:
        rest = {key: part for key, part in schema.items() if key != "$ref"}
        return resolve(known[schema["$ref"].rpartition("/")[2]] | rest, known)
    return {key: resolve(part, known) for key, part in schema.items() if key != "$defs"}


def match_pattern(pattern: str, at: str) -> bool:
    """Tell whether a way such as ``steps.0.seconds`` is meant by a pattern."""
    steps = re.escape(pattern).replace(r"\*\*\.", r"(.+\.)?").replace(r"\*\*", ".+")
    return re.fullmatch(steps.replace(r"\*", r"[^.]+"), at) is not None


def split_card(text: str) -> dict[str, str]:
    """Return front matter, recipe and text of a model card."""
    _, front, rest = text.split("---\n", 2)
    words, _, recipe = rest.rpartition("```yaml\n")
    return {"front matter": front, "recipe": recipe, "text": words}


def are_equal(old: Path, new: Path) -> bool:
    """Tell whether two files are the same."""
    if old.stat().st_size != new.stat().st_size:
        return False
    with old.open("rb") as one, new.open("rb") as other:
        while True:
            a, b = one.read(1 << 20), other.read(1 << 20)
            if a != b:
                return False
            if not a:
                return True
