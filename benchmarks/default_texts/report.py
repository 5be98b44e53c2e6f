"""The report of the study: tables of perplexity by text, domain and seed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean

from benchmarks._study import Row, Study, make_table

TEXTS = {
    "own": "own: equal parts of the domains' own calibration text",
    "general": "general: the mix of this project, the default",
    "builtin-old": "builtin-old: excerpts of Python's library, the default up to commit 007197c",
    "builtin": "builtin: code of this project",
    "self": "self: written by the model, temperature 1.2, the most even quarter",
    "self-plain": "self-plain: the same, one candidate for each",
    "self-1.0": "self-1.0: written at temperature 1.0, one candidate for each",
    "self+general": "self+general: half of either",
}
METHODS = {
    "mone": "expert_drop, criterion mone (the default)",
    "reap": "expert_drop, criterion reap (the default up to commit 007197c)",
    "search": "expert_search",
}
# What a text may cost in any domain, against text of the domains.
GOAL = 1.10
Found = dict[str, dict[int, Mapping[str, float]]]


def name_sets(kept: Sequence[Sequence[int]]) -> str:
    """Return the name of a choice of experts: those of each layer."""
    return "sets " + " ".join("".join(f"{one:x}" for one in experts) for experts in kept)


def write(folder: Path) -> None:
    """Write the report: what was written by hand, and the tables of all rows behind it."""
    text = (folder / "findings.md").read_text("utf-8")
    for file in sorted(folder.glob("*.jsonl")):
        rows = Study(file).read()
        if any(row["key"] == "source" for row in rows):
            text += f"\n# {file.stem}\n\n" + "\n".join(build_tables(rows)) + "\n"
    (folder / "report.md").write_text(text, "utf-8")


def build_tables(rows: Sequence[Row]) -> Iterator[str]:
    """Yield lines: for each method and number of bits the means by domain, then every seed."""
    by_key = {row["key"]: row for row in rows}
    source = by_key["source"]["perplexity"]
    domains = list(source)
    yield "## The source\n"
    yield make_table([[f"{source[domain]:.2f}" for domain in domains]], domains)
    for method, title in METHODS.items():
        for bits in (16, 4):
            found = collect(by_key, method, bits)
            if found:
                yield f"\n## {title}, {bits} bits\n"
                yield summarize(found, domains)
                yield f"\nSeed by seed:\n\n{list_seeds(found, domains)}"
    yield "\n## Sets of experts that differ over the seeds\n"
    yield count_sets(rows)
    yield "\n## Seconds to make the text\n"
    yield list_costs(rows)


def collect(by_key: Mapping[str, Row], method: str, bits: int) -> Found:
    """Return perplexity by text, seed and domain."""
    found: Found = {}
    for row in by_key.values():
        if method not in row.get("kept", {}):
            continue
        text, seed = row["text"], row["seed"]
        key = name_sets(row["kept"][method]) if bits == 16 else f"bits {text} {seed} {method}"
        if key in by_key:
            found.setdefault(text, {})[seed] = by_key[key]["perplexity"]
    return {text: found[text] for text in TEXTS if text in found}


def summarize(found: Found, domains: Sequence[str]) -> str:
    """Return a table of means and ranges by text and domain, and of ratios to the own text."""
    own, lines = found.get("own"), []
    for text, seeds in found.items():
        cells = [TEXTS[text], str(len(seeds))]
        for domain in domains:
            values = [one[domain] for one in seeds.values()]
            cell = f"{mean(values):.1f} ({min(values):.1f} to {max(values):.1f})"
            if own and text != "own":
                ratio = mean(values) / mean(one[domain] for one in own.values())
                cell += f", x {ratio:.3f}" if ratio <= GOAL else f", **x {ratio:.3f}**"
            cells.append(cell)
        lines.append(cells)
    return make_table(lines, ["text", "seeds", *domains])


def list_seeds(found: Found, domains: Sequence[str]) -> str:
    """Return a table of text, seed and domain."""
    lines = [
        [text, str(seed), *(f"{one[domain]:.2f}" for domain in domains)]
        for text, seeds in found.items()
        for seed, one in sorted(seeds.items())
    ]
    return make_table(lines, ["text", "seed", *domains])


def count_sets(rows: Sequence[Row]) -> str:
    """Return a table: of each text, how many different choices a method made, and of how many."""
    chosen = [row for row in rows if "kept" in row and row["text"] in TEXTS]
    methods = list(chosen[0]["kept"]) if chosen else []
    lines = []
    for text in TEXTS:
        own = [row for row in chosen if row["text"] == text]
        if own:
            counts = [
                str(len({name_sets(r["kept"][m]) for r in own if m in r["kept"]})) for m in methods
            ]
            lines.append([text, str(len(own)), *counts])
    return make_table(lines, ["text", "seeds", *methods])


def list_costs(rows: Sequence[Row]) -> str:
    """Return a table of the time that it took to make each text, on one busy core."""
    lines = []
    for text in TEXTS:
        own = [r["seconds_of_the_text"] for r in rows if "kept" in r and r["text"] == text]
        if own:
            lines.append([text, f"{min(own):.1f} to {max(own):.1f}"])
    return make_table(lines, ["text", "seconds"])
