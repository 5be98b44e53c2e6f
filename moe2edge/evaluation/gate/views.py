"""Comparisons as a table, as Markdown and as JUnit XML."""

from __future__ import annotations

from xml.etree import ElementTree

from rich.markup import escape
from rich.table import Table

from moe2edge.evaluation.gate.comparison import GateResult, MetricResult

_MIB = 2**20
_BYTES = ("folder", "weights", "bytes_per_token", "peak_rss", "rss_anon", "above_floor")
COLUMNS = (
    "metric",
    "base",
    "head",
    "change",
    "interval (95 %)",
    "tolerance",
    "seen from",
    "found",
    "gate",
)


def list_cells(row: MetricResult) -> tuple[str, ...]:
    """Return the cells of a metric, one for each of `COLUMNS`."""
    spread = f"{row.spread[0]:+.1%} to {row.spread[1]:+.1%}" if row.spread else "-"
    found = row.judgement or "not compared"
    return (
        row.name,
        _format_value(row.name, row.base),
        _format_value(row.name, row.head),
        "-" if row.change is None else f"{row.change:+.2%}",
        spread,
        f"{row.tolerance:.2%}",
        "-" if row.smallest_effect is None else f"{row.smallest_effect:.2%}",
        f"{found} ({row.note})" if row.note else found,
        "fail" if row.fails else "advice",
    )


def build_comparison_table(found: GateResult) -> Table:
    """Build a table of all metrics."""
    table = Table(title=escape(f"{found.head} against {found.base}"), caption=_describe(found))
    for name in COLUMNS:
        table.add_column(name, justify="left" if name in ("metric", "found", "gate") else "right")
    for row in found.rows:
        table.add_row(*map(escape, list_cells(row)))
    return table


def build_comparison_markdown(found: GateResult) -> str:
    """Build Markdown for a comment on a pull request."""
    lines = [
        "<!-- moe2edge compare -->",
        f"**{found.judgement}**: `{found.head}` against `{found.base}`",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|---" * len(COLUMNS) + "|",
    ]
    lines += ["| " + " | ".join(list_cells(row)).replace("\n", " ") + " |" for row in found.rows]
    return "\n".join([*lines, "", _describe(found), ""])


def build_comparison_junit(found: GateResult) -> str:
    """Build JUnit XML with a test case for each metric."""
    failed, unknown = found.list_names("regressed"), found.list_names("inconclusive")
    suite = ElementTree.Element(
        "testsuite",
        name="moe2edge compare",
        tests=str(len(found.rows)),
        failures=str(len(failed) + len(unknown)),
        errors="0",
        skipped=str(sum(row.judgement is None for row in found.rows)),
    )
    for row in found.rows:
        case = ElementTree.SubElement(suite, "testcase", classname="moe2edge", name=row.name)
        said = ", ".join(f"{k}: {v}" for k, v in zip(COLUMNS, list_cells(row), strict=True))
        if row.judgement is None:
            ElementTree.SubElement(case, "skipped", message=row.note)
        elif row.name in (*failed, *unknown):
            ElementTree.SubElement(case, "failure", type=row.judgement, message=said)
        else:
            ElementTree.SubElement(case, "system-out").text = said
    ElementTree.indent(suite)
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def _describe(found: GateResult) -> str:
    if not found.rounds:
        return "Two profiles, measured at two times: timings are advice alone."
    rounds = "one round" if found.rounds == 1 else f"{found.rounds} rounds"
    return (
        f"Run in turns in fresh processes, {found.pairs} pairs in {rounds}. Of timings, changes "
        'from "seen from" on are found in four of five cases.'
    )


def _format_value(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    if name.startswith(_BYTES):
        return f"{value / _MIB:.2f} MiB"
    return f"{value:.2f} ms" if name.endswith(("_ms", "ms_per_token")) else f"{value:.4g}"
