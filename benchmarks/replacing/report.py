"""Tables and plots of ``results.jsonl``."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]
STAGES = ("before", "after", "quantized")


def read(path: Path) -> list[Row]:
    """All lines."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(rows: Sequence[Row], folder: Path) -> None:
    """``results.md`` and ``results.png``."""
    (folder / "results.md").write_text("\n".join(tables(rows)) + "\n")
    plot(rows, folder / "results.png")


def mean(figures: Mapping[str, float], *, log: bool = False) -> float:
    """Over domains; of perplexities the geometric mean."""
    values = [math.log(v) if log else v for v in figures.values()]
    found = sum(values) / len(values)
    return math.exp(found) if log else found


# ---- tables --------------------------------------------------------------------------------------


def tables(rows: Sequence[Row]) -> Iterator[str]:
    """For each model and size, and all domains at the end."""
    yield "Perplexity is the geometric mean over four domains, KL to the source in nats per token;"
    yield "before training, after it, and after training and GPTQ with 4 bits. MB of all tensors."
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        for size in sorted({row["size"] for row in own}, reverse=True):
            what = "all expert bytes" if size == 1 else f"{size:.0%} of the expert bytes"
            yield f"\n## {model}, {what}\n"
            yield "| | MB | experts | before | KL | trained | KL | 4 bits, MB | perplexity | KL |"
            yield "|---|---|---|---|---|---|---|---|---|---|"
            yield from (_line(row, own) for row in own if row["size"] == size)
        yield f"\n## {model}, perplexity by domain, before and after training\n"
        domains = list(own[0]["before"]["perplexity"])
        yield f"| | {' | '.join(domains)} | seconds: method, training |"
        yield "|---" * (len(domains) + 2) + "|"
        yield from (_by_domain(row, domains) for row in own if "before" in row)


def _line(row: Row, rows: Sequence[Row]) -> str:
    if "refused" in row:
        return f"| {row['name']} | {row['refused']} |" + " |" * 8
    whole = next(r["before"]["expert_bytes"] for r in rows if r["name"] == "source")
    before = row["before"]
    cells = [row["name"], f"{before['bytes'] / 1e6:.2f}", f"{before['expert_bytes'] / whole:.1%}"]
    for stage in STAGES:
        if stage not in row:
            cells += [""] * (2 if stage != "quantized" else 3)
            continue
        found = row[stage]
        if stage == "quantized":
            cells.append(f"{found['bytes'] / 1e6:.2f}")
        cells += [f"{mean(found['perplexity'], log=True):.2f}", f"{mean(found['kl']):.4f}"]
    return f"| {' | '.join(cells)} |"


def _by_domain(row: Row, domains: Sequence[str]) -> str:
    cells = [f"{row['size']:.0%} {row['name']}"]
    for domain in domains:
        both = [f"{row[s]['perplexity'][domain]:.2f}" for s in STAGES[:2] if s in row]
        cells.append(", ".join(both))
    seconds = [row["seconds"], *([row["training"]["seconds"]] if "training" in row else [])]
    return f"| {' | '.join(cells)} | {', '.join(f'{s:.0f}' for s in seconds)} |"


# ---- plot ----------------------------------------------------------------------------------------


def plot(rows: Sequence[Row], path: Path) -> None:
    """Held-out perplexity while training, one panel for each model and size."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    panels = list(dict.fromkeys((r["model"], r["size"]) for r in rows if r["size"] < 1))
    if not panels:
        return
    figure, axes = plt.subplots(1, len(panels), figsize=(6.5 * len(panels), 5), squeeze=False)
    for axis, (model, size) in zip(axes[0], panels, strict=True):
        shown = [r for r in rows if r["model"] == model and r["size"] in (size, 1)]
        for n, row in enumerate(r for r in shown if "history" in r):
            tokens = row["training"]["tokens"] / row["history"][-1]["step"]
            x = [line["step"] * tokens / 1e6 for line in row["history"]]
            y = [line["perplexity"] for line in row["history"]]
            style = ("-", "--", ":")[n // 10]
            axis.plot(x, y, style, label=row["name"], color=f"C{n % 10}")
        axis.set(
            title=f"{model}, {size:.0%} of the expert bytes",
            xlabel="million tokens of training",
            ylabel="held-out perplexity",
            yscale="log",
        )
        axis.legend(fontsize="x-small")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
