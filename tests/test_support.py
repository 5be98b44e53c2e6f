"""The table of passes, targets and families: one cell of each family, and what the page says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.support.cells import CELLS, WRONG, Cell, render_table, try_cell
from every_family import GENERIC, TABLED, make_folder
from helpers import run
from moe2edge.testing import make_tokenizer

ROOT = Path(__file__).parents[1]
RESULTS = json.loads((ROOT / "benchmarks" / "support" / "results.json").read_text())
# Each cell is tried with some families; all of them by the command of the page.
ROTATED = [
    (family, CELLS[n % len(CELLS)])
    for n, family in enumerate([*TABLED, *GENERIC][::2])
    if not RESULTS[family][CELLS[n % len(CELLS)].title].startswith(WRONG)
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "cell"), ROTATED, ids=[f"{family}-{cell.title}" for family, cell in ROTATED]
)
def test_a_cell_is_as_the_table_says(family: str, cell: Cell, tmp_path: Path) -> None:
    make_folder(tmp_path / "source", family)
    make_tokenizer(tmp_path / "source")
    (tmp_path / "work").mkdir()
    found = try_cell(cell, tmp_path / "source", tmp_path / "work", run)
    assert found == RESULTS[family][cell.title]


def test_the_page_holds_the_table() -> None:
    assert RESULTS.keys() == {*TABLED, *GENERIC}
    assert all(cells.keys() == {cell.title for cell in CELLS} for cells in RESULTS.values())
    page = (ROOT / "docs" / "families.md").read_text()
    shown = page.partition("<!-- support -->")[2].partition("<!-- end of support -->")[0]
    assert shown.strip() == render_table(RESULTS)
