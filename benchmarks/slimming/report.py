"""Tables and a picture from results.jsonl.

    python -m benchmarks.slimming.report [RESULTS.jsonl]

Writes results.md and results.png beside it.
"""

from __future__ import annotations

import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from benchmarks._study import Row, Study, import_pyplot, make_table

Cell = tuple[str, str, int, int]
HEADS = (
    "tool", "wall s", "less imports", "processor s", "peak MB", "less imports", "output MB",
    "perplexity", "KL", "top-1",
)  # fmt: skip


def compute_median(rows: Sequence[Row], value: Callable[[Row], float]) -> float:
    """Return the median over repeats."""
    return statistics.median(map(value, rows))


def group_by_cell(rows: Iterable[Row]) -> dict[Cell, dict[str, list[Row]]]:
    """Return the runs by model, scope, bits and threads, and by tool."""
    found: dict[Cell, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row["kind"] == "run":
            cell = (row["model"], row["scope"], row["bits"], row["threads"])
            found[cell][row["tool"]].append(row)
    return found


def group_imports(rows: Iterable[Row]) -> dict[tuple[str, int], Row]:
    """Return the rows of imports, by environment and threads."""
    return {(row["tool"], row["threads"]): row for row in rows if row["kind"] == "imports"}


def build_line(tool: str, rows: Sequence[Row], cost: Row) -> list[str]:
    """Return a tool's line of a table."""
    good = [row for row in rows if "failed" not in row]
    if not good:
        return [tool, f"failed: {rows[-1]['failed'][:120]}".replace("|", "/")]
    seconds = compute_median(good, lambda row: row["seconds"])
    peak = compute_median(good, lambda row: row["peak_bytes"])
    size = f"{good[0]['output_bytes'] / 1e6:.1f}"
    found = [
        tool,
        f"{seconds:.1f}",
        f"{seconds - cost['seconds']:.1f}",
        f"{compute_median(good, lambda row: row['cpu_seconds']):.1f}",
        f"{peak / 1e6:.0f}",
        f"{(peak - cost['peak_bytes']) / 1e6:.0f}",
        f"({size})" if good[0]["dequantized"] else size,
    ]
    if "quality" in good[0]:
        quality = good[0]["quality"]
        found += [f"{quality['perplexity']:.3f}", f"{quality['kl']:.5f}", f"{quality['top1']:.2%}"]
    return found


def build_title(cell: Cell, tools: dict[str, list[Row]]) -> str:
    """Return the heading of a cell, with size and quality of its source."""
    model, scope, bits, threads = cell
    rows = [row for of in tools.values() for row in of]
    what = "attention and experts" if scope == "all" else "experts only"
    plural = "s" if threads > 1 else ""
    found = f"## {model}, {bits} bits, {what}, {threads} thread{plural}\n\n"
    said = [f"source {rows[0]['source_bytes'] / 1e6:.0f} MB"]
    if quality := next((row["quality"] for row in rows if "quality" in row), None):
        said.append(f"perplexity {quality['source_perplexity']:.3f}")
    calibration = rows[0]["calibration"]
    said.append(f"calibration {calibration['samples']} samples of {calibration['length']} tokens")
    return found + ", ".join(said) + "\n"


def build_tables(rows: Sequence[Row]) -> str:
    """Return results.md."""
    costs = group_imports(rows)
    parts = [
        "# Results\n\nMade by `report.py`. Output sizes in brackets are of plain weights, which "
        "say nothing about the format.\n",
        "## Imports\n",
        make_table(
            (
                [
                    tool,
                    str(threads),
                    f"{row['seconds']:.1f}",
                    f"{row['peak_bytes'] / 1e6:.0f}",
                    ", ".join(f"{name} {version}" for name, version in row["versions"].items()),
                ]
                for (tool, threads), row in sorted(costs.items())
            ),
            ("environment", "threads", "wall s", "peak MB", "versions"),
        ),
        "",
    ]
    for cell, tools in group_by_cell(rows).items():
        lines = [build_line(t, of, costs[t.split("-")[0], cell[3]]) for t, of in tools.items()]
        parts += [build_title(cell, tools), make_table(lines, HEADS), ""]
    return "\n".join(parts)


def draw_picture(rows: Sequence[Row], path: Path) -> None:
    """Draw wall time and peak memory per tool; the part of the imports is paler."""
    costs = group_imports(rows)
    found = {cell: tools for cell, tools in group_by_cell(rows).items() if cell[2] == 4}
    if not found:
        return
    pyplot = import_pyplot()
    size = (11, 0.6 + 1.9 * len(found))
    figure, axes = pyplot.subplots(len(found), 2, figsize=size, squeeze=False)
    kinds = (("seconds", 1.0, "wall time, s"), ("peak_bytes", 1e6, "peak memory, MB"))
    for (cell, tools), line_of_axes in zip(found.items(), axes, strict=True):
        good = {t: [r for r in of if "failed" not in r] for t, of in tools.items()}
        names = [tool for tool, of in good.items() if of][::-1]
        for axis, (key, unit, label) in zip(line_of_axes, kinds, strict=True):
            values = [compute_median(good[t], lambda row, key=key: row[key]) / unit for t in names]
            base = [costs[t.split("-")[0], cell[3]][key] / unit for t in names]
            axis.barh(names, values, color="tab:blue")
            axis.barh(names, base, color="lightsteelblue")
            for n, value in enumerate(values):
                axis.text(value, n, f" {value:.0f}", va="center", fontsize=8)
            axis.set_xlim(0, 1.15 * max(values, default=1.0))
            model, scope, bits, threads = cell
            axis.set_title(f"{model}, {scope}, {bits} bits, {threads} threads: {label}", fontsize=9)
            axis.tick_params(labelsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Write both files."""
    default = Path(__file__).parent / "results.jsonl"
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else default
    rows = Study(path).read()
    path.with_suffix(".md").write_text(build_tables(rows))
    draw_picture(rows, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
