"""Show a profile as a table on the terminal."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from moe2edge.evaluation.profile.result import Metric, Profile

_NAMES = {
    "import_ms": "import",
    "load_ms": "load",
    "ttft_ms": "time to first token",
    "prefill_tok_s": "prefill",
    "ms_per_token": "each further token",
    "decode_tok_s": "decode",
}
_MIB = 2**20


def build_profile_table(result: Profile) -> Table:
    """Build a table of times, memory and sizes, each with its unit."""
    work, subject = result.workload, result.artifact
    table = Table(
        title=escape(f"{subject['path']} ({subject['target'] or 'source in transformers'})"),
        caption=(
            f"{work['processes']} processes x {work['prompts']} prompts of "
            f"{work['prompt_tokens']} tokens, {work['gen_tokens']} generated, greedy"
        ),
    )
    for heading in ("", "p50", "p90", "min", "max", "n"):
        table.add_column(heading, justify="right" if heading else "left")
    table.add_column("unit")
    for name, metric in result.metrics.items():
        _add_row(table, _NAMES.get(name, name), metric)
    table.add_section()
    for phase in result.phases:
        _add_row(
            table,
            f"peak memory, {phase.name}",
            _make_mib_metric([m.peak_rss for m in phase.samples]),
        )
    last = result.phases[-1]
    anonymous = [m.rss_anon for m in last.samples]
    mapped = [m.rss_file for m in last.samples]
    _add_row(table, f"after {last.name}, anonymous", _make_mib_metric(anonymous))
    _add_row(table, f"after {last.name}, mapped files", _make_mib_metric(mapped))
    table.add_section()
    sizes = {"total": sum(result.sizes.values()), **result.sizes}
    for name, size in sizes.items():
        if size:
            _add_row(table, f"{name} on disk", _make_mib_metric([size]))
    return table


def _make_mib_metric(sizes: list[int | None]) -> Metric:
    known = tuple(size / _MIB for size in sizes if size is not None)
    return Metric("MiB", "lower", known if len(known) == len(sizes) else ())


def _add_row(table: Table, name: str, metric: Metric) -> None:
    values = (
        metric.percentile(50),
        metric.percentile(90),
        min(metric.samples, default=None),
        max(metric.samples, default=None),
    )
    table.add_row(name, *map(_format_number, values), str(metric.n), metric.unit)


def _format_number(value: float | None) -> str:
    """Format a number with at least three digits, or a dash for an unknown value."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.{1 if value >= 10 else 2}f}"
