"""A profile as one HTML page that needs nothing else: no script, no file, no network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from moe2edge.evaluation.profile.views.charts import (
    draw_bars,
    draw_cells,
    draw_lines,
    format_value,
)
from moe2edge.evaluation.profile.views.parts import (
    Document,
    format_interval,
    format_quality,
    list_profiles,
)

# Headings of the sections that each folder has.
SECTIONS = (
    "Summary", "Where the time goes", "Each token", "Latency distribution", "Memory over time",
    "Experts", "Bound by memory", "Quality", "Environment",
)  # fmt: skip
_MIB = 2**20
_NO_BREAK = "\u00a0"
_STYLE = """
:root{color-scheme:light dark;--fg:#1b1f24;--bg:#fff;--line:#9aa4ae;--c0:#2563c9;--c1:#c2410c;
--c2:#15803d;--c3:#7e22ce;--soft:#eef2f6}
@media(prefers-color-scheme:dark){:root{--fg:#e6e9ec;--bg:#14181d;--line:#66707a;--c0:#7fb0ff;
--c1:#ffae7a;--c2:#7bdc9c;--c3:#d1a3ff;--soft:#20262d}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--fg);background:var(--bg);max-width:60rem;
margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem}h2{border-bottom:2px solid var(--line);margin-top:2.5rem}h3{margin-top:2rem}
table{border-collapse:collapse}td,th{padding:.15rem .7rem;text-align:right}
td:first-child,th:first-child{text-align:left}tr:nth-child(even){background:var(--soft)}
svg{width:100%;max-width:50rem;font:12px system-ui,sans-serif}svg text{fill:var(--fg)}
.end{text-anchor:end}.mid{text-anchor:middle}.axis{stroke:var(--line);fill:none}
.c0{fill:var(--c0)}.c1{fill:var(--c1)}.c2{fill:var(--c2)}.c3{fill:var(--c3)}
.l0,.l1,.l2,.l3{fill:none;stroke-width:1.5}.l0{stroke:var(--c0)}.l1{stroke:var(--c1)}
.l2{stroke:var(--c2)}.l3{stroke:var(--c3)}
.none,.warning{background:var(--soft);padding:.4rem .8rem;border-left:4px solid var(--line)}
.warning{border-color:var(--c1)}code{overflow-wrap:anywhere}
"""


def build_page(document: Document) -> str:
    """Build the page of a document of one folder or of several."""
    profiles = list_profiles(document)
    parts = [_build_comparison(document)] if "ratios" in document else []
    parts += [_build_folder(label, profile) for label, profile in profiles]
    parts.append(_build_definitions(profiles[0][1]["definitions"]))
    title = "moe2edge profile: " + ", ".join(label for label, _ in profiles)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>"
        f"<h1>{escape(title)}</h1><p>{escape(document['created'])}</p>{''.join(parts)}"
        "</body></html>\n"
    )


def _build_comparison(document: Document) -> str:
    """Build the table of ratios to the first folder."""
    labels = document["labels"]
    names = list(document["ratios"][labels[0]])
    rows = []
    for name in names:
        cells = [name]
        for label in labels:
            ratio = document["ratios"][label].get(name)
            cells.append("-" if ratio is None else _format_ratio(ratio))
        rows.append(cells)
    order = "; ".join(" ".join(one) for one in document["rounds"])
    return (
        "<h2>Ratios to the first folder</h2><p>Median over the rounds, in brackets the smallest "
        f"and the largest.</p>{_build_table(['', *labels], rows)}<p>Order: {escape(order)}</p>"
    )


def _format_ratio(ratio: Mapping[str, float]) -> str:
    return f"{ratio['median']:.2f} ({ratio['min']:.2f}-{ratio['max']:.2f})"


def _build_folder(label: str, profile: Document) -> str:
    builders = (
        _build_summary, _build_times, _build_tokens, _build_distribution, _build_memory,
        _build_experts, _build_bound, _build_quality, _build_environment,
    )  # fmt: skip
    target = profile["artifact"].get("target") or "source in transformers"
    parts = [f"<h2>{escape(f'{label} ({target})')}</h2>"]
    parts += [f'<p class="warning">{escape(text)}</p>' for text in profile["warnings"]]
    for heading, build in zip(SECTIONS, builders, strict=True):
        parts.append(f"<section><h3>{heading}</h3>{build(profile)}</section>")
    return "".join(parts)


def _build_summary(profile: Document) -> str:
    keys = ("p50", "p90", "p95", "p99", "min", "max")
    rows: list[list[str]] = []
    said: list[str] = []
    for name, metric in profile["metrics"].items():
        if metric["samples"]:
            values = [format_value(metric.get(key)) for key in keys]
            interval = format_interval(metric).replace(" ", _NO_BREAK)
            rows.append([name, *values, interval, str(metric["n"]), metric["unit"]])
        else:
            rows.append([name, *["-"] * 7, "0", metric["unit"]])
            said.append(_say(f"{name}: {metric['reason']}"))
    cold = profile["load"]["cold"]
    if cold["reason"] is None:
        rows.append([f"load, cold (cache: {cold['page_cache']})", format_value(cold["ms"]),
                     *["-"] * 6, "1", "ms"])  # fmt: skip
    work = profile["workload"]
    done = (
        f"{work['processes']} processes, {work['prompts']} prompts of {work['prompt_tokens']} "
        f"tokens, {work['gen_tokens']} generated"
    )
    sizes = [
        [name, f"{size / _MIB:,.2f}"] for name, size in profile["sizes"]["classes"].items() if size
    ]
    return (
        f"<p>{escape(done)}</p>{_build_table(['', *keys, '95 % of p50', 'n', 'unit'], rows)}"
        f"{''.join(said)}{_build_table(['on disk', 'MiB'], sizes)}"
    )


def _build_times(profile: Document) -> str:
    found = profile["breakdown"]
    if found["reason"] is not None:
        return _say(found["reason"])
    parts = []
    for phase in found["phases"]:
        kinds = {name: 100 * ms / phase["ms"] for name, ms in phase["by_kind"].items() if ms}
        parts.append(f"<h4>{phase['phase']}, {phase['tokens']} tokens</h4>")
        parts.append(draw_bars(kinds, "%"))
        slow = phase["by_operator"][:8]
        rows = [[one["op"], str(one["calls"]), f"{one['ms']:.2f}"] for one in slow]
        parts.append(_build_table(["operator", "calls", "ms"], rows))
    fell = found.get("fallback_nodes") or ()
    if fell:
        rows = [[one["node"], one["op"], one["wanted_ep"], one["got_ep"], f"{one['pct']:.1f}"]
                for one in fell]  # fmt: skip
        parts.append(_build_table(["ran elsewhere", "operator", "asked for", "ran on", "%"], rows))
    return "".join(parts)


def _build_tokens(profile: Document) -> str:
    """Draw the time of each token by its place behind the prompt, of all prompts."""
    samples = profile["metrics"]["ms_per_token"]["samples"]
    length = max(1, profile["workload"]["gen_tokens"] - 1)
    points = [(float(n % length + 2), value) for n, value in enumerate(samples)]
    return draw_lines({"one token": points}, ("token behind the prompt", "ms"), dots=True)


def _build_distribution(profile: Document) -> str:
    """Draw the part of the tokens that took at most so long."""
    ordered = sorted(profile["metrics"]["ms_per_token"]["samples"])
    points = [(value, 100 * (n + 1) / len(ordered)) for n, value in enumerate(ordered)]
    return draw_lines({"tokens": points}, ("ms", "% of tokens"), steps=True)


def _build_memory(profile: Document) -> str:
    rows = []
    for phase in profile["memory"]["phases"]:
        above = phase["above_floor"]
        sizes = [phase["peak_rss"], phase["rss_anon"], phase["rss_file"], above["peak_rss"],
                 phase.get("pss"), phase.get("private_dirty")]  # fmt: skip
        shown = ["-" if size is None else f"{size / _MIB:,.1f}" for size in sizes]
        faults = phase.get("major_faults")
        rows.append([phase["phase"], *shown, "-" if faults is None else str(faults)])
    heads = ["MiB", "peak", "anonymous", "mapped files", "peak above that without a model", "PSS",
             "private dirty", "major faults (count)"]  # fmt: skip
    timeline = profile["memory"]["timeline"]
    if timeline["reason"] is not None:
        return _build_table(heads, rows) + _say(timeline["reason"])
    names = {"rss": "resident", "rss_anon": "anonymous", "rss_file": "mapped files"}
    lines = {
        name: [(sample["t_s"], sample[key] / _MIB) for sample in timeline["samples"]]
        for key, name in names.items()
    }
    begins: dict[str, float] = {}
    for sample in timeline["samples"]:
        begins.setdefault(sample["phase"], sample["t_s"])
    said = ", ".join(f"{phase} from {begin:.2f} s" for phase, begin in begins.items())
    return _build_table(heads, rows) + draw_lines(lines, ("s", "MiB")) + f"<p>{escape(said)}</p>"


def _build_experts(profile: Document) -> str:
    found = profile["experts"]
    if found["reason"] is not None:
        return _say(found["reason"])
    rows = {f"block {layer['block']}": layer["counts"] for layer in found["layers"]}
    hits = [
        [f"block {layer['block']}", f"{layer['hit']} of {layer['experts']}",
         format_value(layer.get("hit_per_token")), format_value(layer.get("new_per_token")),
         format_value(layer.get("router_entropy")), format_value(layer.get("load_entropy"))]
        for layer in found["layers"]
    ]  # fmt: skip
    heads = ["", "experts hit", "of one token", "of them new", "entropy of the router, nats",
             "of the load"]  # fmt: skip
    said = (
        f"{found['tokens']} tokens; {found['coverage_pct']:.0f} % of the experts were chosen; "
        f"load imbalance {found['load_imbalance']:.2f} (standard deviation / mean)"
        if found["layers"]
        else "no layer has experts"
    )
    table = _build_table(heads, hits) if hits else ""
    return f"<p>{escape(said)}</p>{draw_cells(rows, 'expert')}{table}"


def _build_bound(profile: Document) -> str:
    found = profile["roofline"]
    read, rate = found["bytes_per_token"], found["bandwidth"]["median"]
    rows = [
        [
            "read for a token",
            format_value(None if read["total"] is None else read["total"] / _MIB),
            "MiB",
        ],
        ["memory bandwidth", format_value(None if rate is None else rate / 1e9), "GB/s"],
        ["ceiling", format_value(found["ceiling_tok_s"]), "token/s"],
        ["reached", format_value(found["reached_pct"]), "%"],
    ]
    kinds = {name: (size or 0) / _MIB for name, size in (read["kinds"] or {}).items() if size}
    said = _say(found["reason"]) if found["reason"] else ""
    return _build_table(["", "", ""], rows) + said + draw_bars(kinds, "MiB")


def _build_quality(profile: Document) -> str:
    found = profile["quality"]
    if found["reason"] is not None:
        return _say(found["reason"])
    rows = [[name, str(found[name])] for name in ("origin", "text", "sha256", "tokens")]
    rows += [[name, format_quality(found, name)] for name in ("perplexity", "kl", "top1")]
    said = [text for name in ("kl_reason", "error_reason") if (text := found.get(name))]
    return _build_table(["", ""], rows) + "".join(_say(text) for text in said)


def _build_environment(profile: Document) -> str:
    flat = {
        "folder": profile["artifact"],
        **{k: v for k, v in profile["env"].items() if isinstance(v, Mapping)},
        "machine": {k: v for k, v in profile["env"].items() if not isinstance(v, Mapping)},
    }
    rows = [
        [f"{part}: {name}", "-" if value is None else str(value)]
        for part, values in flat.items()
        for name, value in values.items()
        if not isinstance(value, Mapping)
    ]
    return _build_table(["", ""], rows)


def _build_definitions(definitions: Mapping[str, str]) -> str:
    rows = "".join(
        f"<dt><code>{escape(name)}</code></dt><dd>{escape(text)}</dd>"
        for name, text in definitions.items()
    )
    return f"<section><h2>Definitions</h2><dl>{rows}</dl></section>"


def _build_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _say(reason: str) -> str:
    return f'<p class="none">not known: {escape(reason)}</p>'
