"""A routing report to look at: heat map in characters, table, picture."""

from __future__ import annotations

import io
import re

import pytest

from moe2edge.evaluation import routing_view
from moe2edge.evaluation.cache_simulation import CacheSimulation
from moe2edge.evaluation.routing_report import REPORTED_CRITERIA, ExpertUse, LayerUse, RoutingReport

NO_CACHE = CacheSimulation(0, 0.0, ())


def report(*loads: list[int], top_k: int = 2) -> RoutingReport:
    """Return a report of layers with the given loads; every score is the load."""
    layers = []
    for block, tokens in enumerate(loads):
        experts = tuple(
            ExpertUse(
                n,
                t,
                t / sum(tokens),
                t / 2,
                0.1,
                1.0,
                {name: float(t) for name in REPORTED_CRITERIA},
            )
            for n, t in enumerate(tokens)
        )
        layers.append(LayerUse(block, block, top_k, sum(tokens) // top_k, experts))
    return RoutingReport(
        "some/model", "Family", None, {"text": "some.txt"}, tuple(layers), NO_CACHE
    )


def test_heat_map_compares_with_an_even_share() -> None:
    made = report([40, 40, 40, 40], [80, 0, 79, 1], [120, 40])
    legend, *lines = routing_view.draw_heat_map(made, 80, "utf-8")
    assert "2.00 times an even share" in legend
    assert lines == ["block 0  ▄ ▄ ▄ ▄", "block 1  █ . █ ▁", "block 2  ▆ ▂"]
    legend, *lines = routing_view.draw_heat_map(made, 80, "ascii")
    assert lines == ["block 0  4 4 4 4", "block 1  8 . 8 1", "block 2  6 2"]
    wide = report([1] * 100)
    _, *lines = routing_view.draw_heat_map(wide, 59, "utf-8")
    assert lines == ["block 0  " + "█" * 50, " " * 9 + "█" * 50]


def test_table_names_the_extremes() -> None:
    made = report([40, 50, 30, 40], [80, 0, 80, 0])
    table = routing_view.build_layer_table(made, "reap")
    rows = list(zip(*(list(column.cells) for column in table.columns), strict=True))
    assert rows == [
        ("0", "4", "2", "1.977 of 2.000", "0.18", "1.67", "0", "1: 31.2%", "2: 18.8%", "2: 30"),
        # Of equal scores expert_drop removes the last first.
        ("1", "4", "2", "1.000 of 2.000", "1.00", "-", "2", "0: 50.0%", "1: 0.0%", "3: 0"),
    ]
    assert made.warnings == (
        "block 1: no token was routed to 2 experts: 1, 3; criteria that use expert outputs "
        "cannot score them",
    )


# ---- the picture -------------------------------------------------------------------------------


def test_picture_shows_layers_by_experts() -> None:
    from PIL import Image

    made = report([40, 50, 30, 40], [80, 0, 80], [10, 10])
    figure = routing_view._draw_figure(made, "mone")
    maps, bars = figure.axes[:3], figure.axes[3:]
    assert [axes.get_title() for axes in maps] == ["Token share", "Gate mass", "Saliency: mone"]
    assert len(bars) == 3
    assert all(bar.get_ylabel() for bar in bars)
    assert "some/model" in figure.get_suptitle()
    for axes in maps:
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("expert", "block")
        assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "1", "2"]
        blank = axes.images[0].get_array().mask.tolist()
        assert blank == [[False] * 4, [False, False, False, True], [False, False, True, True]]
    shares, mass, scores = (axes.images[0].get_array() for axes in maps)
    assert shares[0].tolist() == pytest.approx([25, 31.25, 18.75, 25])
    assert mass[0].tolist() == pytest.approx([25, 31.25, 18.75, 25])
    assert scores[0].tolist() == pytest.approx([80, 100, 60, 80])
    assert "×" in {said.get_text() for said in maps[0].texts}
    image = Image.open(io.BytesIO(routing_view.draw_picture(made, "mone", ".png")))
    image.load()
    assert image.format == "PNG"
    width, height = figure.get_size_inches() * routing_view.DOTS_PER_INCH
    assert image.size == (round(width), round(height))
    assert width > height  # side by side


def test_picture_of_many_experts_and_of_negative_scores() -> None:
    figure = routing_view._draw_figure(report(*[list(range(64))] * 50), "mone")
    width, height = figure.get_size_inches()
    assert height > width  # one below the other
    assert not [said for said in figure.axes[0].texts if said.get_text() != "×"]
    assert len(figure.axes[0].get_yticklabels()) <= 32
    below = report([1, 2, 3])
    for expert in below.layers[0].experts:
        expert.saliency["aimer"] = -0.1 * expert.tokens  # type: ignore[index]
    scores = routing_view._draw_figure(below, "aimer").axes[2].images[0].get_array()
    assert scores[0].tolist() == pytest.approx([-0.1, -0.2, -0.3])


@pytest.mark.parametrize(
    ("suffix", "magic"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")]
)
@pytest.mark.slow
def test_pictures_have_no_date_and_no_chance(suffix: str, magic: bytes) -> None:
    import matplotlib

    made = report([40, 50, 30, 40], [80, 0, 80])
    first = routing_view.draw_picture(made, "mone", suffix)
    with matplotlib.rc_context({"image.cmap": "gray", "figure.dpi": 50, "font.size": 20}):
        assert routing_view.draw_picture(made, "mone", suffix) == first
        assert matplotlib.rcParams["font.size"] == 20
    assert first.startswith(magic)
    assert not re.search(rb"CreationDate|<dc:date>", first)


def test_names_are_drawn_as_they_are() -> None:
    made = RoutingReport(
        "a/$x_1$^\u6f22", "F", None, {"text": "b$" * 40}, report([3, 1]).layers, NO_CACHE
    )
    assert routing_view.draw_picture(made, "mone", ".png").startswith(b"\x89PNG")
