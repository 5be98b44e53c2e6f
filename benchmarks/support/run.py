"""Export every family through every cell, and write what works.

    python -m benchmarks.support.run [--only FAMILY ...] [--passes PASS] [--without PASS]

Tiny random models (`tests/every_family.py`) go through the command line: exported, reopened in
their runtime, verified. Results are written to `results.json`, and into the page of families.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PAGE = ROOT / "docs" / "families.md"
BEGIN, END = "<!-- support -->", "<!-- end of support -->"


def main() -> None:
    """Run all cells that are asked for."""
    sys.path.insert(0, str(ROOT / "tests"))
    from transformers.utils import logging

    from benchmarks.support.cells import CELLS, WRONG, render_table, try_cell
    from every_family import GENERIC, TABLED, make_folder
    from helpers import run
    from moe2edge.testing import make_tokenizer

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--only", nargs="*", help="families")
    parser.add_argument("--passes", help="only cells whose title has this")
    parser.add_argument("--without", help="no cells whose title has this")
    given = parser.parse_args()
    place = HERE / "results.json"
    results = json.loads(place.read_text()) if place.exists() else {}
    begun = time.time()
    for family in given.only or [*TABLED, *GENERIC]:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "source")
            make_folder(source, family)
            make_tokenizer(source)
            found = results.setdefault(family, {})
            for n, cell in enumerate(CELLS):
                if (given.passes or "") not in cell.title or (given.without or "-") in cell.title:
                    continue
                work = Path(folder, str(n))
                work.mkdir()
                try:
                    found[cell.title] = try_cell(cell, source, work, run)
                except AssertionError as error:
                    last = str(error).strip().splitlines()[-1]
                    found[cell.title] = (
                        f"{WRONG}: {last.removeprefix('error: ').partition('; ')[0]}"
                    )
                print(f"{family}: {cell.title}: {found[cell.title]}", flush=True)
        place.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    page = PAGE.read_text()
    head, _, rest = page.partition(BEGIN)
    _, _, tail = rest.partition(END)
    PAGE.write_text(f"{head}{BEGIN}\n{render_table(results)}\n{END}{tail}")
    print(f"{time.time() - begun:.0f} s")


if __name__ == "__main__":
    main()
