"""Charts as SVG text, without scripts; colors are classes of the page that they stand in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from itertools import chain, pairwise

CHART_WIDTH, CHART_HEIGHT = 640, 220
# Space for the numbers of the axes.
_LEFT, _BOTTOM, _TOP, _RIGHT = 64, 28, 10, 12
_BAR, _NAME = 22, 130
_MOST_POINTS = 2000
_MOST_CELLS = 20_000

Points = Sequence[tuple[float, float]]


def draw_bars(values: Mapping[str, float], unit: str) -> str:
    """Draw horizontal bars, the largest first."""
    items = sorted(values.items(), key=lambda item: -item[1])
    largest = max((value for _, value in items), default=0) or 1
    room = CHART_WIDTH - _NAME - 110
    parts = []
    for n, (name, value) in enumerate(items):
        y, length = n * _BAR, room * value / largest
        parts.append(
            f'<text x="{_NAME - 8}" y="{y + 15}" class="end">{escape(name)}</text>'
            f'<rect x="{_NAME}" y="{y + 3}" width="{length:.1f}" height="{_BAR - 6}" class="c0"/>'
            f'<text x="{_NAME + length + 6:.1f}" y="{y + 15}">{format_value(value)} {unit}</text>'
        )
    return _frame("".join(parts), max(1, len(items)) * _BAR)


def draw_lines(
    lines: Mapping[str, Points], labels: tuple[str, str], *, dots: bool = False, steps: bool = False
) -> str:
    """Draw lines, or dots, over common axes.

    Args:
        lines: points of each line by its name.
        labels: of the two axes.
        dots: draw points only.
        steps: go from point to point along the axes.
    """
    lines = {name: _thin(points) for name, points in lines.items() if points}
    everything = [point for points in lines.values() for point in points]
    if not everything:
        return '<p class="none">no samples</p>'
    high = max(x for x, _ in everything) or 1, max(y for _, y in everything) or 1
    low = min(x for x, _ in everything)

    def place(point: tuple[float, float]) -> tuple[float, float]:
        across = (point[0] - low) / ((high[0] - low) or 1)
        return (
            _LEFT + across * (CHART_WIDTH - _LEFT - _RIGHT),
            CHART_HEIGHT - _BOTTOM - point[1] / high[1] * (CHART_HEIGHT - _BOTTOM - _TOP),
        )

    parts = [_draw_axes((low, high[0]), high[1], labels)]
    for n, (name, points) in enumerate(lines.items()):
        placed = [place(point) for point in points]
        if dots:
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2" class="c{n % 4}"/>'
                      for x, y in placed]  # fmt: skip
        else:
            if steps:
                corners = ((a, (b[0], a[1])) for a, b in pairwise(placed))
                placed = [*chain.from_iterable(corners), placed[-1]]
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
            parts.append(f'<polyline points="{path}" class="l{n % 4}"/>')
        x = _LEFT + 8 + 150 * n
        parts.append(
            f'<rect x="{x}" y="{_TOP}" width="10" height="10" class="c{n % 4}"/>'
            f'<text x="{x + 14}" y="{_TOP + 9}">{escape(name)}</text>'
        )
    return _frame("".join(parts), CHART_HEIGHT)


def draw_cells(rows: Mapping[str, Sequence[float]], across: str) -> str:
    """Draw rows of cells, the darker the larger their part of their row's largest.

    Args:
        rows: values of the cells of each row, by its name.
        across: name of what cells stand for.
    """
    columns = max((len(values) for values in rows.values()), default=0)
    if not columns or len(rows) * columns > _MOST_CELLS:
        return f'<p class="none">{len(rows)} x {columns} cells are not drawn</p>'
    width, height = (CHART_WIDTH - _LEFT - _RIGHT) / columns, 16
    parts = []
    for n, (name, values) in enumerate(rows.items()):
        y, largest = n * height, max(values, default=0) or 1
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 12}" class="end">{escape(name)}</text>')
        for column, value in enumerate(values):
            x = _LEFT + column * width
            title = f"{name}, {across} {column}: {format_value(value)}"
            parts.append(
                f'<rect x="{x:.2f}" y="{y}" width="{width:.2f}" height="{height - 1}" class="c0" '
                f'fill-opacity="{value / largest:.3f}"><title>{escape(title)}</title></rect>'
            )
    bottom = len(rows) * height
    parts.append(f'<text x="{_LEFT}" y="{bottom + 16}">{escape(across)} 0 to {columns - 1}</text>')
    return _frame("".join(parts), bottom + 24)


def format_value(value: float | None) -> str:
    """Format a number with at least three digits, or a dash for an unknown value.

    >>> format_value(1234.5), format_value(0.5), format_value(None)
    ('1,234', '0.50', '-')
    """
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.{1 if value >= 10 else 2}f}"


def _draw_axes(across: tuple[float, float], high: float, labels: tuple[str, str]) -> str:
    base, top, right = CHART_HEIGHT - _BOTTOM, _TOP, CHART_WIDTH - _RIGHT
    return (
        f'<path d="M{_LEFT} {top}V{base}H{right}" class="axis"/>'
        f'<text x="{_LEFT - 6}" y="{top + 10}" class="end">{format_value(high)}</text>'
        f'<text x="{_LEFT - 6}" y="{base}" class="end">0</text>'
        f'<text x="{_LEFT}" y="{CHART_HEIGHT - 8}">{format_value(across[0])}</text>'
        f'<text x="{right}" y="{CHART_HEIGHT - 8}" class="end">{format_value(across[1])}</text>'
        f'<text x="{(_LEFT + right) // 2}" y="{CHART_HEIGHT - 8}" class="mid">'
        f"{escape(labels[0])}</text>"
        f'<text x="12" y="{(top + base) // 2}" class="mid" '
        f'transform="rotate(-90 12 {(top + base) // 2})">{escape(labels[1])}</text>'
    )


def _thin(points: Points) -> Points:
    step = -(-len(points) // _MOST_POINTS)
    return points[::step]


def _frame(content: str, height: int) -> str:
    return f'<svg viewBox="0 0 {CHART_WIDTH} {height}" role="img">{content}</svg>'
