"""Show a routing report as a table, a heat map in characters, or heat maps in a picture."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe2edge.errors import InputError, Unsupported
from moe2edge.evaluation.cache_simulation import CacheSimulation
from moe2edge.evaluation.routing_report import ExpertUse, LayerUse, RoutingReport
from moe2edge.storage.durable import check_writable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.table import Table

FORMATS = (".png", ".svg", ".pdf")
LAYER_HEADINGS = (
    "block", "experts", "top-k", "entropy (bits)", "variation", "max / min", "unused",
    "most used", "least used",
)  # fmt: skip
CACHE_HEADINGS = (
    "experts held per layer", "MB held", "LRU hits", "MB read per token", "fixed set hits",
    "MB read per token",
)  # fmt: skip
CACHE_CAPTION = (
    "decoding token by token, with a cache in each layer; LRU: experts used last; fixed set: "
    "experts most used in one half of the text, tried on the other"
)
# Levels of a heat map in characters, their replacement in ASCII, and an expert without a token.
BLOCKS, PLAIN, EMPTY = "▁▂▃▄▅▆▇█", "12345678", "."
# Up to this many experts and layers, a number inside each cell of a picture is legible.
NUMBERED_EXPERTS, NUMBERED_LAYERS = 16, 40
DOTS_PER_INCH = 150


# ---- on the terminal ---------------------------------------------------------------------------


def build_layer_table(report: RoutingReport, criterion: str) -> Table:
    """Build a table of key figures with one row per MoE layer.

    Args:
        report: the report to show.
        criterion: criterion of the last column, the expert with the lowest score.
    """
    from rich.table import Table
    from rich.text import Text

    title = f"{report.model}: {report.tokens:,} tokens of {report.text['text']}"
    table = Table(
        title=Text(title),
        title_justify="left",
        caption=Text(_make_caption(criterion)),
        caption_justify="left",
    )
    for heading in (*LAYER_HEADINGS, f"lowest {criterion}"):
        table.add_column(heading, justify="right")
    for layer in report.layers:
        table.add_row(*_make_cells(layer, criterion))
    return table


def build_cache_table(found: CacheSimulation) -> Table:
    """Build a table of caches of experts with one row per size."""
    from rich.table import Table
    from rich.text import Text

    size, used = found.nbytes / 1e6, found.bytes_per_token / 1e6
    table = Table(
        title=Text(f"cache of experts: {size:,.2f} MB in all, a token uses {used:,.2f} MB"),
        title_justify="left",
        caption=Text(CACHE_CAPTION),
        caption_justify="left",
    )
    for heading in CACHE_HEADINGS:
        table.add_column(heading, justify="right")
    for cache in found.caches:
        fewest, most = min(cache.experts), max(cache.experts)
        table.add_row(
            str(most) if fewest == most else f"{fewest} to {most}",
            f"{cache.held / 1e6:,.2f}",
            f"{cache.recent:.1%}",
            f"{cache.recent_bytes / 1e6:,.2f}",
            f"{cache.fixed:.1%}",
            f"{cache.fixed_bytes / 1e6:,.2f}",
        )
    return table


def _make_caption(criterion: str) -> str:
    return (
        "entropy: of the load, and its maximum, an even load; variation: standard deviation / mean "
        "of the loads; most and least used: expert and its share of the routed tokens; "
        f"lowest {criterion}: the expert that expert_drop would remove first"
    )


def _make_cells(layer: LayerUse, criterion: str) -> tuple[str, ...]:
    most = max(layer.experts, key=lambda e: e.tokens)
    least = min(layer.experts, key=lambda e: e.tokens)
    # If several experts have the lowest score, expert_drop removes the last of them.
    lowest = min(layer.experts, key=lambda e: (e.saliency[criterion], -e.expert))
    was = "" if layer.origin == layer.block else f" (was {layer.origin})"
    return (
        f"{layer.block}{was}",
        str(len(layer.experts)),
        str(layer.top_k),
        f"{layer.entropy:.3f} of {layer.entropy_limit:.3f}",
        f"{layer.variation:.2f}",
        "-" if layer.ratio is None else f"{layer.ratio:.2f}",
        str(len(layer.unused)),
        f"{most.expert}: {most.share:.1%}",
        f"{least.expert}: {least.share:.1%}",
        f"{lowest.expert}: {lowest.saliency[criterion]:.4g}",
    )


def draw_heat_map(report: RoutingReport, width: int, encoding: str) -> list[str]:
    """Draw the load of every expert as a character: a legend, then one line per MoE layer.

    Loads are relative to an even share of the layer, so that layers of unequal size compare.

    Args:
        report: the report to show.
        width: columns of the terminal; longer lines are wrapped.
        encoding: encoding of the terminal; without block elements, digits show the levels.
    """
    levels = BLOCKS if _can_encode(encoding, BLOCKS) else PLAIN
    loads = [[e.share * len(layer.experts) for e in layer.experts] for layer in report.layers]
    largest = max(max(row) for row in loads)
    # Up to 32 experts are easier to count with spaces between them; more need the columns.
    gap = "" if max(map(len, loads)) > 32 else " "
    label = len(f"block {max(layer.block for layer in report.layers)}  ")
    per_line = max(8, (width - label) // (1 + len(gap)))
    lines = [
        f"load of every expert: {levels[0]} to {levels[-1]} up to {largest:.2f} times an even "
        f"share, {EMPTY} no token"
    ]
    for layer, row in zip(report.layers, loads, strict=True):
        for at in range(0, len(row), per_line):
            head = "" if at else f"block {layer.block}"
            cells = (_choose_level(load / largest, levels) for load in row[at : at + per_line])
            lines.append(f"{head:<{label}}{gap.join(cells)}")
    return lines


def _can_encode(encoding: str, characters: str) -> bool:
    try:
        characters.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _choose_level(part: float, levels: str) -> str:
    """Choose the character for a fraction of the largest load.

    >>> [_choose_level(part, BLOCKS) for part in (0, 0.01, 0.5, 1)]
    ['.', '▁', '▄', '█']
    """
    return levels[math.ceil(part * len(levels)) - 1] if part else EMPTY


# ---- as a picture ------------------------------------------------------------------------------


def check_picture(path: Path) -> None:
    """Check before any work that a picture can be drawn and written.

    Raises:
        InputError: the format is not known, or no file can be written there.
        DoesNotFit: the disk is full.
        Unsupported: matplotlib is not installed.
    """
    if path.suffix.lower() not in FORMATS:
        raise InputError(f"-o {path}: the name of a picture ends in {', '.join(FORMATS)}")
    check_writable(path)
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise Unsupported(
            "a picture needs matplotlib, which is not installed: pip install 'matplotlib>=3.9'"
        ) from error


def draw_picture(report: RoutingReport, criterion: str, suffix: str) -> bytes:
    """Draw three heat maps, layers by experts: token share, gate mass and scores of a criterion.

    Cells beyond the last expert of a smaller layer stay blank. The same report and the same
    version of matplotlib give the same bytes.

    Args:
        report: the report to show.
        criterion: criterion whose scores the third map shows.
        suffix: format, one of `FORMATS`.

    Returns:
        The content of the picture file.
    """
    import matplotlib

    # Metadata that would make the bytes depend on the time or on the version.
    undated: dict[str, dict[str, str | None]] = {
        ".png": {"Software": None},
        ".svg": {"Date": None},
        ".pdf": {"CreationDate": None},
    }
    file = io.BytesIO()
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()  # the user's own settings would change the picture
        matplotlib.rcParams.update({"svg.hashsalt": "moe2edge", "text.parse_math": False})
        # Characters that the font lacks are drawn as boxes, without a warning for each.
        warnings.filterwarnings("ignore", message="Glyph")
        figure = _draw_figure(report, criterion)
        figure.savefig(
            file, format=suffix.lower()[1:], dpi=DOTS_PER_INCH, metadata=undated[suffix.lower()]
        )
    return file.getvalue()


def _draw_figure(report: RoutingReport, criterion: str) -> Any:
    """Draw the figure, without pyplot, whose figures are global state."""
    from matplotlib.figure import Figure

    layers, experts = len(report.layers), max(len(layer.experts) for layer in report.layers)
    numbered = experts <= NUMBERED_EXPERTS and layers <= NUMBERED_LAYERS
    # Inches: a cell, then a map with its labels and color bar.
    cell_width, cell_height = (0.42, 0.3) if numbered else (0.13, 0.15)
    width = min(max(experts * cell_width, 2.4), 14) + 1.4
    height = min(max(layers * cell_height, 1.2), 10) + 0.9
    rows, columns = (1, 3) if experts <= 10 else (3, 1)
    figure = Figure(figsize=(width * columns, height * rows + 0.7), layout="constrained")
    tokens, text = report.tokens, str(report.text["text"])
    note = "  (×: no token)" if any(layer.unused for layer in report.layers) else ""
    between = ", " if columns > 1 else "\n"
    heading = f"{_shorten(report.model)}{between}{tokens:,} tokens of {_shorten(text)}{note}"
    figure.suptitle(heading, fontsize=11)
    relative = all(e.saliency[criterion] >= 0 for layer in report.layers for e in layer.experts)
    maps: tuple[tuple[str, str, Callable[[LayerUse, ExpertUse], float]], ...] = (
        ("Token share", "% of the layer's routed tokens", lambda _, e: 100 * e.share),
        ("Gate mass", "mean gate weight of all tokens, %", lambda _, e: 100 * e.gate_mass / tokens),
        _choose_score_map(criterion, relative=relative),
    )
    for axes, (title, unit, value) in zip(figure.subplots(rows, columns), maps, strict=True):
        image = _draw_map(axes, report.layers, value, numbered=numbered)
        axes.set_title(title, fontsize=10)
        bar = figure.colorbar(image, ax=axes, pad=0.02)
        bar.set_label(unit, fontsize=8)
        bar.ax.tick_params(labelsize=7)
    return figure


def _choose_score_map(
    criterion: str, *, relative: bool
) -> tuple[str, str, Callable[[LayerUse, ExpertUse], float]]:
    """Return title, unit and values of the map of scores.

    Scores of different layers differ by orders of magnitude, and experts compete only within
    their layer. So scores are shown relative to the largest of the layer, unless some are
    negative.
    """

    def compute_percentage(layer: LayerUse, expert: ExpertUse) -> float:
        largest = max(e.saliency[criterion] for e in layer.experts)
        return 100 * expert.saliency[criterion] / largest if largest else 0.0

    if relative:
        return f"Saliency: {criterion}", "% of the layer's largest", compute_percentage
    return f"Saliency: {criterion}", "score", lambda _, e: e.saliency[criterion]


def _draw_map(
    axes: Axes,
    layers: Sequence[LayerUse],
    value: Callable[[LayerUse, ExpertUse], float],
    *,
    numbered: bool,
) -> Any:
    """Draw one heat map, with a number in each cell if ``numbered``; returns the image."""
    import numpy as np

    experts = max(len(layer.experts) for layer in layers)
    values = np.full((len(layers), experts), np.nan)
    for row, layer in enumerate(layers):
        values[row, : len(layer.experts)] = [value(layer, e) for e in layer.experts]
    low = min(float(np.nanmin(values)), 0.0) if np.nanmax(values) > 0 else None
    image: Any = axes.imshow(
        values, aspect="auto", cmap="viridis", vmin=low, interpolation="nearest"
    )
    axes.set_xlabel("expert", fontsize=8)
    axes.set_ylabel("block", fontsize=8)
    axes.set_xticks(range(0, experts, math.ceil(experts / 32)))
    every = math.ceil(len(layers) / 32)
    axes.set_yticks(range(0, len(layers), every), [str(layer.block) for layer in layers[::every]])
    axes.tick_params(labelsize=7)
    for row, layer in enumerate(layers):
        for expert in layer.experts:
            at = float(values[row, expert.expert])
            color = "black" if image.norm(at) > 0.6 else "white"
            unused = not expert.tokens and not at
            if numbered or unused:
                text = "×" if unused else _format_number(at)
                axes.text(
                    expert.expert, row, text, ha="center", va="center", fontsize=7, color=color
                )
    return image


def _format_number(value: float) -> str:
    """Format the number in a cell.

    >>> [_format_number(value) for value in (0.04, 3.14159, 9.97, 40.8, -0.71234)]
    ['<0.1', '3.1', '10', '41', '-0.712']
    """
    if value < 0:
        return f"{value:.3f}"
    if value < 0.1:
        return "<0.1" if value else "0"
    return f"{value:.1f}" if value < 9.95 else f"{value:.0f}"


def _shorten(name: str) -> str:
    """Shorten a name to fit a title; keep its end, the more telling part."""
    return name if len(name) <= 48 else f"…{name[-47:]}"
