"""Tables and plots of ``results.jsonl``.

    python -m benchmarks.replacing.report [RESULTS.jsonl]

Writes results.md, results.png and sizes.png beside it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks._study import Row, Study, import_pyplot

STAGES = ("before", "after", "quantized")


def write_report(rows: Sequence[Row], folder: Path) -> None:
    """Write ``results.md``, ``results.png`` and ``sizes.png``."""
    (folder / "results.md").write_text("\n".join(build_tables(rows)) + "\n")
    draw_plots(rows, folder)


def compute_mean(figures: Mapping[str, float], *, log: bool = False) -> float:
    """Return the mean over domains; with ``log`` the geometric mean, for perplexities."""
    values = [math.log(v) if log else v for v in figures.values()]
    found = sum(values) / len(values)
    return math.exp(found) if log else found


# ---- tables --------------------------------------------------------------------------------------


def build_tables(rows: Sequence[Row]) -> Iterator[str]:
    """Yield lines: tables for each model and size, and one of all domains at the end."""
    yield "`python -m benchmarks.replacing.run --models DIR --data DIR` (two cores of a shared AMD"
    yield "EPYC machine, a thread each for two cells at a time, which seconds are of).\n"
    yield "Perplexity is the geometric mean over domains, KL to the source in nats per token;"
    yield "before training, after it, and after training and GPTQ with 4 bits, where factors and"
    yield "linear maps have 8. MB of all tensors. One seed of training; what different draws do to"
    yield "it is to be seen from `drop, random`."
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        tokens = {row["training"]["tokens"] for row in own if "training" in row}
        shown = ", ".join(f"{count:,}" for count in sorted(tokens))
        yield f"\n# {model}: {shown or 'no'} tokens of training in each cell"
        for size in sorted({row["size"] for row in own}, reverse=True):
            what = "all expert bytes" if size == 1 else f"{size:.0%} of the expert bytes"
            yield f"\n## {model}, {what}\n"
            yield "| | MB | experts | before | KL | trained | KL | 4 bits, MB | perplexity | KL |"
            yield "|---|---|---|---|---|---|---|---|---|---|"
            yield from (_line(row, own) for row in own if row["size"] == size)
            yield from (line for row in own if row["size"] == size for line in _fewer(row))
            yield from _annealing([row for row in own if row["size"] == size])
        yield f"\n## {model}, perplexity by domain, before and after training\n"
        domains = list(own[0]["before"]["perplexity"])
        yield f"| | {' | '.join(domains)} | seconds: method, training |"
        yield "|---" * (len(domains) + 2) + "|"
        yield from (_by_domain(row, domains) for row in own if "before" in row)


def _line(row: Row, rows: Sequence[Row]) -> str:
    if "refused" in row:
        return f"| {row['name']} | {row['refused']} |" + " |" * 8
    before = row["before"]
    # Cells may be run one by one, the source later.
    whole = (r["before"]["expert_bytes"] for r in rows if r["name"] == "source")
    share = next((f"{before['expert_bytes'] / source:.1%}" for source in whole), "")
    cells = [row["name"], f"{before['bytes'] / 1e6:.2f}", share]
    for stage in STAGES:
        if stage not in row:
            cells += [""] * (2 if stage != "quantized" else 3)
            continue
        found = row[stage]
        if stage == "quantized":
            cells.append(f"{found['bytes'] / 1e6:.2f}")
        cells += [
            f"{compute_mean(found['perplexity'], log=True):.2f}",
            f"{compute_mean(found['kl']):.4f}",
        ]
    return f"| {' | '.join(cells)} |"


def _fewer(row: Row) -> Iterator[str]:
    """Yield lines of a trained model in fewer bits than 4."""
    for bits, found in row.get("fewer", {}).items():
        figures = (
            f"{compute_mean(found['perplexity'], log=True):.2f} | {compute_mean(found['kl']):.4f}"
        )
        size = f"{found['bytes'] / 1e6:.2f}"
        yield f"| {row['name']}, trained, in {bits} bits |" + " |" * 6 + f" {size} | {figures} |"


def _annealing(rows: Sequence[Row]) -> Iterator[str]:
    """Yield comparisons of annealing with training the replaced model from the start."""
    after = {
        row["name"]: compute_mean(row["after"]["perplexity"], log=True)
        for row in rows
        if "after" in row
    }
    for name in after:
        plain = name.removesuffix(", annealed")
        other = next((n for n in (plain, f"{plain}, not annealed") if n in after), name)
        if other != name:
            yield (
                f"\nAnnealing {plain}: {after[name]:.2f} in place of {after[other]:.2f} "
                f"({after[name] / after[other] - 1:+.1%})."
            )


def _by_domain(row: Row, domains: Sequence[str]) -> str:
    cells = [f"{row['size']:.0%} {row['name']}"]
    for domain in domains:
        both = [f"{row[s]['perplexity'][domain]:.2f}" for s in STAGES[:2] if s in row]
        cells.append(", ".join(both))
    seconds = [row["seconds"], *([row["training"]["seconds"]] if "training" in row else [])]
    return f"| {' | '.join(cells)} | {', '.join(f'{s:.0f}' for s in seconds)} |"


# ---- plots ---------------------------------------------------------------------------------------


def draw_plots(rows: Sequence[Row], folder: Path) -> None:
    """Draw ``results.png`` and ``sizes.png``."""
    panels = list(dict.fromkeys((r["model"], r["size"]) for r in rows if r["size"] < 1))
    if panels:
        _plot(folder / "results.png", panels, lambda axis, panel: _curves(axis, rows, *panel))
        models = list(dict.fromkeys(model for model, _ in panels))
        _plot(folder / "sizes.png", models, lambda axis, model: _sizes(axis, rows, model))


def _plot(path: Path, panels: Sequence[Any], draw: Callable[[Any, Any], None]) -> None:
    plt = import_pyplot()
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    figure, axes = plt.subplots(1, len(panels), figsize=(6.5 * len(panels), 5.5), squeeze=False)
    for axis, panel in zip(axes[0], panels, strict=True):
        draw(axis, panel)
        for one in (axis.xaxis, axis.yaxis):
            one.set_major_formatter(ScalarFormatter())
            one.set_minor_formatter(NullFormatter())
        axis.legend(fontsize="x-small")
        axis.grid(alpha=0.3, which="both")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _curves(axis: Any, rows: Sequence[Row], model: str, size: float) -> None:
    """Draw held-out perplexity during training."""
    shown = [r for r in rows if r["model"] == model and r["size"] in (size, 1)]
    for n, row in enumerate(r for r in shown if "history" in r):
        tokens = row["training"]["tokens"] / row["history"][-1]["step"]
        x = [line["step"] * tokens / 1e6 for line in row["history"]]
        y = [line["perplexity"] for line in row["history"]]
        style = ("-", "--", ":")[n // 10]
        axis.plot(x, y, style, label=row["name"], color=f"C{n % 10}")
    low = min(line["perplexity"] for r in shown for line in r.get("history", ()))
    axis.set(
        title=f"{model}, {size:.0%} of the expert bytes",
        xlabel="million tokens of training",
        ylabel="held-out perplexity",
        yscale="log",
    )
    # Most end near the lowest; where some begin is in the table.
    axis.set_ylim(0.98 * low, 2 * low)
    axis.set_yticks([round(low * factor) for factor in (1, 1.05, 1.1, 1.2, 1.35, 1.5, 1.75, 2)])


def _sizes(axis: Any, rows: Sequence[Row], model: str) -> None:
    """Draw perplexity against bytes: of bits alone, and of trained methods in 16 and 4 bits."""
    own = [r for r in rows if r["model"] == model]
    bits = [r["before"] for r in own if r["size"] == 1]
    bits.sort(key=lambda found: found["bytes"])
    line = [(b["bytes"] / 1e6, compute_mean(b["perplexity"], log=True)) for b in bits]
    if not line:
        return  # the source has no result yet
    axis.plot(*zip(*line, strict=True), "k.--", label="16, 8, 4, 3, 2 bits, not trained")
    names = list(dict.fromkeys(r["name"] for r in own if "quantized" in r))
    for n, name in enumerate(names):
        for row in (r for r in own if r["name"] == name and "quantized" in r):
            found = [row["after"], row["quantized"], *row.get("fewer", {}).values()]
            x, y = zip(
                *((f["bytes"] / 1e6, compute_mean(f["perplexity"], log=True)) for f in found),
                strict=True,
            )
            label = name if row["size"] == next(r for r in own if r["name"] == name)["size"] else ""
            marker = "o^sDvP*X"[n // 10 % 8]
            axis.plot(x, y, f"{marker}-", color=f"C{n % 10}", label=label, lw=0.5, ms=4)
    least = min(y for _, y in line)
    axis.set(
        title=f"{model}: trained on equal tokens, 16 and 4 bits",
        xlabel="MB of all tensors",
        ylabel="perplexity, geometric mean over domains",
        xscale="log",
    )
    axis.set_ylim(0.88 * least, 1.25 * least)
    axis.set_xticks(
        [size for size in (3, 4, 5, 6, 8, 10, 12, 16, 20, 24) if size > 0.9 * line[0][0]]
    )


def main() -> None:
    """Write all files."""
    default = Path(__file__).parent / "results.jsonl"
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else default
    write_report(Study(path).read(), path.parent)


if __name__ == "__main__":
    main()
