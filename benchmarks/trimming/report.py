"""Tables and a picture from results.jsonl.

    python -m benchmarks.trimming.report [RESULTS.jsonl]

Writes results.md and results.png beside it.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks._study import Row, Study, import_pyplot, make_table

# Quantile 0.975 of Student's t with 9 degrees of freedom, for ten draws.
T_TEN = 2.262


def compute_excess(row: Row, source: Row) -> float:
    """Return the mean over domains of the loss above the source's, nats per token."""
    losses = [
        math.log(row["perplexity"][d]) - math.log(source["perplexity"][d])
        for d in source["perplexity"]
    ]
    return statistics.mean(losses)


def compute_kl(row: Row) -> float:
    """Return the mean over domains of the KL to the source, nats per token."""
    return statistics.mean(row["kl"].values())


def group_by_method(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """Return the rows by method and setting, in order."""
    found: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        found[row["method"], row["setting"]].append(row)
    return found


def build_table(
    rows: Sequence[Row], source: Row, extra: Sequence[tuple[str, Callable[..., str]]]
) -> str:
    """Return a table with one line per method and setting; several seeds as mean and range."""
    domains = list(source["perplexity"])
    heads = ["method", "dropped", "excess loss", "KL", *domains, *(name for name, _ in extra)]
    lines = [" | ".join(heads), " | ".join("---" for _ in heads)]
    sources = " | ".join(f"{source['perplexity'][d]:.2f}" for d in domains)
    blank = "".join(" | " for _ in extra)
    lines.append(f"source | | 0 | 0 | {sources}{blank}")
    order = sorted(
        group_by_method(rows).items(),
        key=lambda e: (e[0][1], statistics.mean(compute_excess(r, source) for r in e[1])),
    )
    for (method, setting), of in order:
        losses = [compute_excess(row, source) for row in of]
        ppl = [statistics.mean(row["perplexity"][d] for row in of) for d in domains]
        cells = [
            method,
            setting,
            format_spread(losses),
            f"{statistics.mean(map(compute_kl, of)):.4f}",
            *(f"{value:.2f}" for value in ppl),
            *(make(of) for _, make in extra),
        ]
        lines.append(" | ".join(cells))
    return "\n".join(f"| {line} |" for line in lines)


def format_spread(values: Sequence[float]) -> str:
    """Return the mean, and the range if there are several values."""
    mean = f"{statistics.mean(values):.4f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.4f} to {max(values):.4f})"


def make_verdict(rows: Sequence[Row], source: Row, setting: str) -> Callable[[list[Row]], str]:
    """Return a function that compares a method's mean with the draws of the same setting."""
    draws = [
        compute_excess(r, source)
        for r in rows
        if r["method"] == "random" and r["setting"] == setting
    ]

    def verdict(of: list[Row]) -> str:
        mean = statistics.mean(compute_excess(row, source) for row in of)
        if of[0]["method"] == "random":
            half = T_TEN * statistics.stdev(draws) / math.sqrt(len(draws))
            return f"mean within ± {half:.4f} (95 %)"
        better = sum(mean < draw for draw in draws)
        return f"better than {better} of {len(draws)} draws"

    return verdict


def build_rank_table(rows: Sequence[Row], found: Row) -> str:
    """Return a table that ranks each method's set among all sets of one layer, by true loss."""
    losses = {tuple(map(int, key.split())): value for key, value in found["losses"].items()}
    ranked = sorted(losses, key=losses.__getitem__)
    best = losses[ranked[0]]
    middle = statistics.median(losses.values())
    lines = ["| method | rank of its set | loss above the best set |", "| --- | --- | --- |"]
    lines.append(f"| best set {list(ranked[0])} | 1 of {len(ranked)} | 0 |")
    lines.append(f"| median of all sets | | {middle - best:.4f} |")
    lines.append(f"| worst set | {len(ranked)} | {losses[ranked[-1]] - best:.4f} |")
    scored = []
    for (method, setting), of in group_by_method(rows).items():
        sets = [tuple(row["kept"][str(found["block"])]) for row in of]
        # A set of another size belongs to an uneven budget.
        if setting != "50 %" or method == "random" or any(kept not in losses for kept in sets):
            continue
        ranks = statistics.mean(ranked.index(kept) + 1 for kept in sets)
        scored.append((statistics.mean(losses[kept] - best for kept in sets), ranks, method))
    for above, rank, method in sorted(scored):
        lines.append(f"| {method} | {rank:.1f} | {above:.4f} |")
    return "\n".join(lines)


def build_overlap_table(rows: Sequence[Row], method: str) -> str:
    """Return a table of the kept experts per layer that the sets of two domains share."""
    of = {row["domains"][0]: row["kept"] for row in rows if row["method"] == method}
    lines = []
    for a in of:
        shared = []
        for b in of:
            both = [len({*of[a][n]} & {*of[b][n]}) for n in of[a]]
            shared.append(f"{sum(both) / len(both):.2f}")
        lines.append([a, *shared])
    return make_table(lines, [method, *of])


def build_section(name: str, rows: Sequence[Row]) -> str:
    """Return all tables of a model."""
    source = next(row for row in rows if row["key"] == "source")
    of: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        of[row.get("group", "")].append(row)
    parts = [f"## {name}\n"]
    for setting in ("25 %", "50 %"):
        compared = [r for r in of["experts"] + of["budgets"] if r["setting"] == setting]
        if compared:
            verdict = make_verdict(compared, source, setting)
            parts.append(f"### {setting} of the experts dropped\n")
            parts.append(build_table(compared, source, [("against random", verdict)]) + "\n")
    for row in rows:
        if row["key"] == "oracle":
            parts.append(f"### All sets of half of the experts of block {row['block']}\n")
            parts.append(build_rank_table(of["experts"], row) + "\n")
    if of["depth"]:
        parts.append(
            "### Layer Drop and Block Drop\n\n" + build_table(of["depth"], source, []) + "\n"
        )
    if of["skipping"]:
        rate = ("skip rate", lambda rows: f"{statistics.mean(r['skip_rate'] for r in rows):.1%}")
        parts.append(
            "### Dynamic skipping\n\n" + build_table(of["skipping"], source, [rate]) + "\n"
        )
    if of["tasks"]:
        parts.append(_build_task_tables(of["tasks"], of["experts"], source))
    return "\n".join(parts)


def _build_task_tables(rows: list[Row], general: list[Row], source: Row) -> str:
    """Return tables of perplexity when calibrated on one domain or all, and of shared experts."""
    domains = list(source["perplexity"])
    lines = []
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
            lines.append([method, on, *(f"{row['perplexity'][d]:.2f}" for d in domains)])
    tables = [build_overlap_table(rows, m) for m in dict.fromkeys(row["method"] for row in rows)]
    return (
        "### Calibrated on a task, 50 % of the experts dropped\n\n"
        + make_table(lines, ["method", "calibrated on", *domains])
        + "\n\nExperts per layer that two domains' sets share, of those kept:\n\n"
        + "\n\n".join(tables)
        + "\n"
    )


def write_report(rows: Sequence[Row], folder: Path) -> None:
    """Write ``results.md`` and ``results.png``."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    text = "\n".join(build_section(m, [r for r in rows if r["model"] == m]) for m in models)
    (folder / "results.md").write_text(f"# Results\n\n{text}")
    draw_picture(rows, models, folder / "results.png")


def draw_picture(rows: Sequence[Row], models: Sequence[str], path: Path) -> None:
    """Draw the excess loss of every method against the band of the random draws."""
    pyplot = import_pyplot()
    from matplotlib import ticker

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
            methods = {
                m: [compute_excess(r, source) for r in g]
                for (m, _), g in group_by_method(shown).items()
            }
            draws = methods.pop("random", [])
            order = sorted(methods, key=lambda m: -statistics.mean(methods[m]))
            if draws:
                label = f"{len(draws)} random draws"
                axis.axvspan(min(draws), max(draws), color="0.9", label=label)
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


def main() -> None:
    """Write both files."""
    default = Path(__file__).parent / "results.jsonl"
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else default
    write_report(Study(path).read(), path.parent)


if __name__ == "__main__":
    main()
