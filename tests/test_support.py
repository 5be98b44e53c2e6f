"""The table of passes, targets and families: one cell of each family, and what the page says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.support.cells import CELLS, WRONG, Cell, render_table, try_cell
from every_family import GENERIC, TABLED, make_folder
from helpers import run
from moe2edge.model.family import FIRST_CLASS
from moe2edge.testing import make_tokenizer

ROOT = Path(__file__).parents[1]
RESULTS = json.loads((ROOT / "benchmarks" / "support" / "results.json").read_text())
FAMILIES = [*TABLED, *FIRST_CLASS]
OTHERS = [family for family in GENERIC if family not in FAMILIES]
# Every pass with every family of the table and every first-class one. A fixed part of the pairs is
# tried each time, with all cells and families in it; all of them with --all-cells. Others of the
# families have a cell each.
TRIED = [
    pytest.param(family, cell, id=f"{family}-{cell.title}", marks=() if own else pytest.mark.rest)
    for n, family in enumerate([*FAMILIES, *OTHERS[::3]])
    for m, cell in enumerate(CELLS)
    for own in [(7 * n + m) % (20 if family in FAMILIES else len(CELLS)) == 0]
    if (own or family in FAMILIES) and not RESULTS[family][cell.title].startswith(WRONG)
]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "cell"), TRIED)
def test_a_cell_is_as_the_table_says(family: str, cell: Cell, tmp_path: Path) -> None:
    make_folder(tmp_path / "source", family)
    make_tokenizer(tmp_path / "source")
    (tmp_path / "work").mkdir()
    found = try_cell(cell, tmp_path / "source", tmp_path / "work", run)
    assert found == RESULTS[family][cell.title]


def test_all_cells_and_families_are_tried() -> None:
    usual = [one.values for one in TRIED if not one.marks]
    assert {cell for _, cell in usual} == set(CELLS)
    assert {family for family, _ in usual} >= set(FAMILIES)


def test_the_page_holds_the_table() -> None:
    assert RESULTS.keys() == {*TABLED, *GENERIC}
    assert all(cells.keys() == {cell.title for cell in CELLS} for cells in RESULTS.values())
    page = (ROOT / "docs" / "families.md").read_text()
    shown = page.partition("<!-- support -->")[2].partition("<!-- end of support -->")[0]
    assert shown.strip() == render_table(RESULTS)
