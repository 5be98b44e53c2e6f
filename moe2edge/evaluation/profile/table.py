"""Show profiles as tables on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.markup import escape
from rich.table import Table

from moe2edge.evaluation.profile.metrics import Metric
from moe2edge.evaluation.profile.result import Profile, ProfileSet, Ratio
from moe2edge.evaluation.profile.roofline import Roofline
from moe2edge.evaluation.profile.views.charts import format_value

_NAMES = {
    "import_ms": "import",
    "load_ms": "load",
    "first_token_ms": "first token behind the load",
    "tokenise_ms": "tokenizer on a prompt",
    "e2e_ms": "a prompt and its tokens",
    "ttft_ms": "time to first token",
    "prefill_tok_s": "prefill",
    "ms_per_token": "each further token",
    "decode_tok_s": "decode",
    "joules_per_token": "energy of a token",
}
_MIB = 2**20


def build_profile_table(result: Profile) -> Table:
    """Build a table of times, memory and sizes, each with its unit."""
    subject = result.artifact
    table = Table(
        title=escape(f"{subject['path']} ({subject['target'] or 'source in transformers'})"),
        caption=_describe_work(result),
    )
    for heading in ("", "p50", "p90", "p95", "p99", "min", "max", "n"):
        table.add_column(heading, justify="right" if heading else "left")
    table.add_column("unit")
    cold = result.explanation["cold_load"].get("ms")
    for name, metric in result.metrics.items():
        if name == "joules_per_token" and not metric.samples:
            continue  # few systems tell it
        _add_row(table, _NAMES.get(name, name), metric)
        if name == "load_ms" and cold is not None:
            _add_row(table, "load, cold", Metric("ms", "lower", (cold,)))
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
    above = last.subtract_floor("peak_rss")
    _add_row(table, "peak above that without a model", _make_mib_metric([above]))
    table.add_section()
    for name, share in list_shares(result).items():
        _add_row(table, f"decode, {name}", Metric("%", "lower", (share,)))
    table.add_section()
    for name, (value, unit) in _list_roofline(result.roofline).items():
        _add_row(table, name, Metric(unit, "higher", () if value is None else (value,)))
    table.add_section()
    sizes = {"total": sum(result.sizes.values()), **result.sizes}
    for name, size in sizes.items():
        if size:
            _add_row(table, f"{name} on disk", _make_mib_metric([size]))
    return table


def build_set_table(found: ProfileSet) -> Table:
    """Build a table of several folders: medians, and ratios to the first with their spread."""
    table = Table(
        title="ratios to the first, in brackets the smallest and the largest of a round",
        caption=f"{_describe_work(found.profiles[0])}; rounds: {_describe_order(found)}",
    )
    table.add_column("")
    for label, profile in zip(found.labels, found.profiles, strict=True):
        target = profile.artifact["target"] or "source in transformers"
        table.add_column(escape(f"{label} ({target})"), justify="right")
    table.add_column("unit")
    ratios = [found.compute_ratios(n) for n in range(len(found.profiles))]
    first = found.profiles[0]
    for name, metric in first.metrics.items():
        values = [profile.metrics[name].median for profile in found.profiles]
        if name == "joules_per_token" and not any(values):
            continue
        _add_compared(table, _NAMES.get(name, name), values, ratios, (name, metric.unit))
    table.add_section()
    for place, phase in enumerate(first.phases):
        peaks = [profile.phases[place].largest.peak_rss for profile in found.profiles]
        key = f"peak_rss_{phase.name}", "MiB"
        _add_compared(table, f"peak memory, {phase.name}", _to_mib(peaks), ratios, key)
    weights = [profile.sizes.get("weights", 0) for profile in found.profiles]
    _add_compared(table, "weights on disk", _to_mib(weights), ratios, ("weights", "MiB"))
    table.add_section()
    rows = [_list_roofline(profile.roofline) for profile in found.profiles]
    for name, (_, unit) in rows[0].items():
        key = ("bytes_per_token" if name == "read for a token" else "", unit)
        _add_compared(table, name, [row[name][0] for row in rows], ratios, key)
    return table


def _add_compared(
    table: Table,
    name: str,
    values: Sequence[float | None],
    ratios: Sequence[Mapping[str, Ratio]],
    key: tuple[str, str],
) -> None:
    """Add a row with the value of each folder, and its ratio under the name in ``key``."""
    cells = [format_value(values[0])]
    for value, own in zip(values[1:], ratios[1:], strict=True):
        ratio = own.get(key[0])
        cells.append(format_value(value) + ("" if ratio is None else f"  {_format_ratio(ratio)}"))
    table.add_row(name, *cells, key[1])


def _format_ratio(ratio: Ratio) -> str:
    low, high = (f"{end:.2f}" for end in (min(ratio.samples), max(ratio.samples)))
    return f"x{ratio.median:.2f}" + ("" if low == high else f" ({low}-{high})")


def _describe_work(result: Profile) -> str:
    work = result.workload
    return (
        f"{work['processes']} processes x {work['prompts']} prompts of "
        f"{work['prompt_tokens']} tokens, {work['gen_tokens']} generated, greedy"
    )


def _describe_order(found: ProfileSet) -> str:
    """Return the order of the rounds, with letters for the folders."""
    letters = {label: chr(ord("A") + n % 26) for n, label in enumerate(found.labels)}
    return ", ".join(" ".join(letters[label] for label in order) for order in found.rounds)


def list_shares(result: Profile) -> dict[str, float]:
    """Return the percentage of decoding that each kind of operator takes; nothing: not known."""
    phases = result.explanation["breakdown"].get("phases") or ()
    for phase in phases:
        if phase["phase"] == "decode" and phase["ms"]:
            return {k: 100 * ms / phase["ms"] for k, ms in phase["by_kind"].items() if ms}
    return {}


def _list_roofline(roofline: Roofline) -> dict[str, tuple[float | None, str]]:
    """Return the rows about memory bandwidth: value and unit."""
    read, rate = roofline.bytes_per_token, roofline.bandwidth
    return {
        "read for a token": (None if read is None else read / _MIB, "MiB"),
        "memory bandwidth": (None if rate is None else rate / 1e9, "GB/s"),
        "ceiling by bandwidth": (roofline.ceiling_tok_s, "token/s"),
        "of that ceiling": (roofline.reached, "%"),
    }


def _to_mib(sizes: Sequence[int | None]) -> list[float | None]:
    return [None if size is None else size / _MIB for size in sizes]


def _make_mib_metric(sizes: Sequence[int | None]) -> Metric:
    known = tuple(size / _MIB for size in sizes if size is not None)
    return Metric("MiB", "lower", known if len(known) == len(sizes) else ())


def _add_row(table: Table, name: str, metric: Metric) -> None:
    values = (
        metric.percentile(50),
        metric.percentile(90),
        metric.percentile(95),
        metric.percentile(99),
        min(metric.samples, default=None),
        max(metric.samples, default=None),
    )
    table.add_row(name, *map(format_value, values), str(metric.n), metric.unit)
