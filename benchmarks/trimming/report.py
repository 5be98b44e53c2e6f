"""Tables and a picture from results.jsonl."""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
# Quantile 0.975 of Student's t with 9 degrees of freedom, for ten draws.
T_TEN = 2.262


def read(path: Path) -> list[Row]:
    """All rows so far."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def excess(row: Row, source: Row) -> float:
    """Mean over domains of the loss above the source's, nats per token."""
    losses = [
        math.log(row["perplexity"][d]) - math.log(source["perplexity"][d])
        for d in source["perplexity"]
    ]
    return statistics.mean(losses)


def kl(row: Row) -> float:
    """Mean over domains of the KL to the source."""
    return statistics.mean(row["kl"].values())


def grouped(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """Rows by method and setting, in order."""
    found: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        found[row["method"], row["setting"]].append(row)
    return found


def table(rows: Sequence[Row], source: Row, extra: Sequence[tuple[str, Callable[..., str]]]) -> str:
    """One line per method and setting; several seeds as mean and range."""
    domains = list(source["perplexity"])
    heads = ["method", "dropped", "excess loss", "KL", *domains, *(name for name, _ in extra)]
    lines = [" | ".join(heads), " | ".join("---" for _ in heads)]
    sources = " | ".join(f"{source['perplexity'][d]:.2f}" for d in domains)
    blank = "".join(" | " for _ in extra)
    lines.append(f"source | | 0 | 0 | {sources}{blank}")
    order = sorted(
        grouped(rows).items(),
        key=lambda e: (e[0][1], statistics.mean(excess(r, source) for r in e[1])),
    )
    for (method, setting), of in order:
        losses = [excess(row, source) for row in of]
        ppl = [statistics.mean(row["perplexity"][d] for row in of) for d in domains]
        cells = [
            method,
            setting,
            spread(losses),
            f"{statistics.mean(map(kl, of)):.4f}",
            *(f"{value:.2f}" for value in ppl),
            *(make(of) for _, make in extra),
        ]
        lines.append(" | ".join(cells))
    return "\n".join(f"| {line} |" for line in lines)


def spread(values: Sequence[float]) -> str:
    """Mean, and the range if there are several."""
    mean = f"{statistics.mean(values):.4f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.4f} to {max(values):.4f})"


def against_random(rows: Sequence[Row], source: Row, setting: str) -> Callable[[list[Row]], str]:
    """How a method's mean stands to the draws of the same setting."""
    draws = [excess(r, source) for r in rows if r["method"] == "random" and r["setting"] == setting]

    def verdict(of: list[Row]) -> str:
        mean = statistics.mean(excess(row, source) for row in of)
        if of[0]["method"] == "random":
            half = T_TEN * statistics.stdev(draws) / math.sqrt(len(draws))
            return f"mean within ± {half:.4f} (95 %)"
        better = sum(mean < draw for draw in draws)
        return f"better than {better} of {len(draws)} draws"

    return verdict


def oracle_table(rows: Sequence[Row], found: Row) -> str:
    """Where each method's set stands among all sets of one layer, by true loss."""
    losses = {tuple(map(int, key.split())): value for key, value in found["losses"].items()}
    ranked = sorted(losses, key=losses.__getitem__)
    best = losses[ranked[0]]
    middle = statistics.median(losses.values())
    lines = ["| method | rank of its set | loss above the best set |", "| --- | --- | --- |"]
    lines.append(f"| best set {list(ranked[0])} | 1 of {len(ranked)} | 0 |")
    lines.append(f"| median of all sets | | {middle - best:.4f} |")
    lines.append(f"| worst set | {len(ranked)} | {losses[ranked[-1]] - best:.4f} |")
    scored = []
    for (method, setting), of in grouped(rows).items():
        sets = [tuple(row["kept"][str(found["block"])]) for row in of]
        # A set of another size belongs to an uneven budget.
        if setting != "50 %" or method == "random" or any(kept not in losses for kept in sets):
            continue
        ranks = statistics.mean(ranked.index(kept) + 1 for kept in sets)
        scored.append((statistics.mean(losses[kept] - best for kept in sets), ranks, method))
    for above, rank, method in sorted(scored):
        lines.append(f"| {method} | {rank:.1f} | {above:.4f} |")
    return "\n".join(lines)


def overlap_table(rows: Sequence[Row], method: str) -> str:
    """How many experts per layer the sets of two domains share, of those kept."""
    of = {row["domains"][0]: row["kept"] for row in rows if row["method"] == method}
    lines = [f"| {method} | {' | '.join(of)} |", "| --- " * (len(of) + 1) + "|"]
    for a in of:
        shared = []
        for b in of:
            both = [len({*of[a][n]} & {*of[b][n]}) for n in of[a]]
            shared.append(f"{sum(both) / len(both):.2f}")
        lines.append(f"| {a} | {' | '.join(shared)} |")
    return "\n".join(lines)


def section(name: str, rows: Sequence[Row]) -> str:
    """All tables of a model."""
    source = next(row for row in rows if row["key"] == "source")
    of: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        of[row.get("group", "")].append(row)
    parts = [f"## {name}\n"]
    for setting in ("25 %", "50 %"):
        compared = [r for r in of["experts"] + of["budgets"] if r["setting"] == setting]
        if compared:
            verdict = against_random(compared, source, setting)
            parts.append(f"### {setting} of the experts dropped\n")
            parts.append(table(compared, source, [("against random", verdict)]) + "\n")
    for row in rows:
        if row["key"] == "oracle":
            parts.append(f"### All sets of half of the experts of block {row['block']}\n")
            parts.append(oracle_table(of["experts"], row) + "\n")
    if of["depth"]:
        parts.append("### Layer Drop and Block Drop\n\n" + table(of["depth"], source, []) + "\n")
    if of["skipping"]:
        rate = ("skip rate", lambda rows: f"{statistics.mean(r['skip_rate'] for r in rows):.1%}")
        parts.append("### Dynamic skipping\n\n" + table(of["skipping"], source, [rate]) + "\n")
    if of["tasks"]:
        parts.append(_tasks(of["tasks"], of["experts"], source))
    return "\n".join(parts)


def _tasks(rows: list[Row], general: list[Row], source: Row) -> str:
    """Perplexity by domain, calibrated on one domain and on all; and which experts they share."""
    domains = list(source["perplexity"])
    lines = [f"| method | calibrated on | {' | '.join(domains)} |", "| --- " * (len(domains) + 2)]
    lines[1] += "|"
    names = {"search": "search, exhaustive"}
    for method in dict.fromkeys(row["method"] for row in rows):
        everything = [
            r
            for r in general
            if r["method"] in (method, names.get(method))
            and r["setting"] == "50 %"
            and r["seed"] == 0
        ]
        for row in [r for r in rows if r["method"] == method] + everything:
            on = "+".join(row["domains"]) or "equal parts of all"
            ppl = " | ".join(f"{row['perplexity'][d]:.2f}" for d in domains)
            lines.append(f"| {method} | {on} | {ppl} |")
    tables = [overlap_table(rows, m) for m in dict.fromkeys(row["method"] for row in rows)]
    return (
        "### Calibrated on a task, 50 % of the experts dropped\n\n"
        + "\n".join(lines)
        + "\n\nExperts per layer that two domains' sets share, of those kept:\n\n"
        + "\n\n".join(tables)
        + "\n"
    )


def write(rows: Sequence[Row], folder: Path) -> None:
    """``results.md`` and ``results.png``."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    text = "\n".join(section(m, [r for r in rows if r["model"] == m]) for m in models)
    (folder / "results.md").write_text(f"# Results\n\n{text}")
    picture(rows, models, folder / "results.png")


def picture(rows: Sequence[Row], models: Sequence[str], path: Path) -> None:
    """Excess loss of every method against the band of the random draws."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    settings = ("25 %", "50 %")
    figure, axes = pyplot.subplots(
        len(models), 2, figsize=(13, 6 * len(models)), squeeze=False, layout="constrained"
    )
    for line, model in zip(axes, models, strict=True):
        of = [row for row in rows if row["model"] == model]
        source = next(row for row in of if row["key"] == "source")
        for axis, setting in zip(line, settings, strict=True):
            shown = [
                r
                for r in of
                if r.get("group") in ("experts", "budgets") and r["setting"] == setting
            ]
            methods = {m: [excess(r, source) for r in g] for (m, _), g in grouped(shown).items()}
            draws = methods.pop("random")
            order = sorted(methods, key=lambda m: -statistics.mean(methods[m]))
            axis.axvspan(min(draws), max(draws), color="0.9", label=f"{len(draws)} random draws")
            axis.axvline(statistics.mean(draws), color="0.6", label="their mean")
            for n, method in enumerate(order):
                values = methods[method]
                axis.plot([min(values), max(values)], [n, n], color="C0", linewidth=1)
                axis.plot(statistics.mean(values), n, "o", color="C0", markersize=5)
            axis.set_yticks(range(len(order)), order)
            axis.set_xscale("log")
            axis.xaxis.set_minor_formatter(ticker.NullFormatter())
            axis.set_xlabel("loss above the source's, nats per token (log scale)")
            axis.set_title(f"{model}: {setting} of the experts dropped")
            axis.legend(loc="lower left")
    figure.savefig(path, dpi=110, metadata={"Software": None})
