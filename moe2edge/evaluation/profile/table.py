"""A profile as a table for the terminal."""

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
    """Times, memory and sizes, each with its unit."""
    work, subject = result.workload, result.artifact
    shown = Table(
        title=escape(f"{subject['path']} ({subject['target'] or 'source in transformers'})"),
        caption=(
            f"{work['processes']} processes x {work['prompts']} prompts of "
            f"{work['prompt_tokens']} tokens, {work['gen_tokens']} generated, greedy"
        ),
    )
    for heading in ("", "p50", "p90", "min", "max", "n"):
        shown.add_column(heading, justify="right" if heading else "left")
    shown.add_column("unit")
    for name, metric in result.metrics.items():
        _add(shown, _NAMES.get(name, name), metric)
    shown.add_section()
    for phase in result.phases:
        _add(shown, f"peak memory, {phase.name}", _mib([m.peak_rss for m in phase.samples]))
    last = result.phases[-1]
    _add(shown, f"after {last.name}, its own", _mib([m.rss_anon for m in last.samples]))
    _add(shown, f"after {last.name}, mapped files", _mib([m.rss_file for m in last.samples]))
    shown.add_section()
    sizes = {"total": sum(result.sizes.values()), **result.sizes}
    for name, size in sizes.items():
        if size:
            _add(shown, f"{name} on disk", _mib([size]))
    return shown


def _mib(sizes: list[int | None]) -> Metric:
    known = tuple(size / _MIB for size in sizes if size is not None)
    return Metric("MiB", "lower", known if len(known) == len(sizes) else ())


def _add(shown: Table, name: str, metric: Metric) -> None:
    values = (
        metric.percentile(50),
        metric.percentile(90),
        min(metric.samples, default=None),
        max(metric.samples, default=None),
    )
    shown.add_row(name, *map(_number, values), str(metric.n), metric.unit)


def _number(value: float | None) -> str:
    """Three digits or more; a dash for what is not known."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.{1 if value >= 10 else 2}f}"
